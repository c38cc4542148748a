"""A benchmark and its contender, the GPU suite and its check end together, however they are ended: what is left behind would keep the machine busy."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cdiff.benchmarks.gpu_suite import in_a_process
from tests.benchmarks.tiny import CPU
from tests.conftest import REPOSITORY


def test_ending_the_suite_ends_its_check(tmp_path: Path) -> None:
    """As by `timeout`: a check left behind would keep the GPU that the next ones are measured on."""
    check, begun = tmp_path / "check", tmp_path / "pid"
    check.write_text(f"#!/bin/sh\necho $$ > {begun}.part; mv {begun}.part {begun}; exec sleep 600\n")
    check.chmod(0o755)
    program = (
        f"import sys, runpy; sys.argv[1:] = ['--device', 'cpu', '--small', '--out', {str(tmp_path / 'out')!r}, '--checks', 'machine']\n"
        f"sys.executable = {str(check)!r}\n"
        "runpy.run_module('cdiff.benchmarks.gpu_suite', run_name='__main__')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as suite:
        while not begun.exists():
            assert suite.poll() is None
            time.sleep(0.1)
        suite.terminate()
        _, said = suite.communicate()
    pid = int(begun.read_text())
    try:
        assert suite.returncode == 130, said
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise to end a process with its parent is Linux's")
def test_a_suite_that_is_killed_takes_its_check_along(tmp_path: Path) -> None:
    """As by a caller's limit, which leaves no time to end anything: the check has a session of its own, and nobody else ends it."""
    check, code, begun = tmp_path / "check", tmp_path / "check.py", tmp_path / "pid"
    check.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{code}' \"$@\"\n")  # no interpreter's line may hold a space
    code.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom cdiff.benchmarks import gpu_checks\n"
        f"def begin(*_):\n    Path({str(begun)!r}).write_text(f'{{os.getpid()}}\\n')\n    time.sleep(600)\n"
        "gpu_checks.run_check, sys.argv = begin, sys.argv[2:]\ngpu_checks.main()\n"
    )
    check.chmod(0o755)
    program = (
        "import sys; from cdiff.benchmarks import gpu_suite; from cdiff.benchmarks.gpu_checks import Settings\n"
        f"sys.executable = {str(check)!r}\n"
        f"gpu_suite.in_a_process('machine', Settings('cpu', True, {str(tmp_path)!r}), 600)\n"
    )
    assert_ends_with(program, begun)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise to end a process with its parent is Linux's")
def test_a_check_that_is_killed_takes_its_tests_along(tmp_path: Path) -> None:
    begun, path = tmp_path / "pid", tmp_path / "test_marked.py"
    path.write_text(
        "import os, time, pytest\nfrom pathlib import Path\n@pytest.mark.gpu\ndef test_one():\n"
        f"    Path({str(begun)!r}).write_text(f'{{os.getpid()}}\\n')\n    time.sleep(600)\n"
    )
    program = (
        "from pathlib import Path; from cdiff.benchmarks import gpu_tests\n"
        f"gpu_tests.marked_files = lambda root: [Path({str(path)!r})]\n"
        "gpu_tests.run_marked_tests()\n"
    )
    assert_ends_with(program, begun)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise to end a process with its parent is Linux's")
def test_a_benchmark_that_is_killed_takes_its_contender_along(tmp_path: Path) -> None:
    """In the middle of an answer, which the contender would go on computing for nobody."""
    python, code, begun = tmp_path / "python", tmp_path / "contender.py", tmp_path / "pid"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{code}' \"$@\"\n")
    code.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom cdiff.benchmarks import contenders\n"
        f"def begin(spec):\n    Path({str(begun)!r}).write_text(f'{{os.getpid()}}\\n')\n    time.sleep(600)\n"
        "contenders.Through, sys.argv = begin, sys.argv[2:]\ncontenders.main()\n"
    )
    python.chmod(0o755)
    program = (
        "import sys; from cdiff.benchmarks.benchmark import Worker\n"
        f"sys.executable = {str(python)!r}\n"
        "Worker({'kind': 'exported', 'threads': 1}).ask('about')\n"
    )
    assert_ends_with(program, begun)


def test_a_library_that_hangs_at_the_end_costs_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch, say, waits five minutes for its compilers; the check is done before that."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import atexit, time\nfrom pathlib import Path\nPath({str(tmp_path / 'begun')!r}).touch()\natexit.register(time.sleep, 60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    found = in_a_process("noise:graph:shipped", replace(CPU, work=str(tmp_path / "work")), 120)
    assert (tmp_path / "begun").exists()
    assert found["status"] == "done"
    assert time.monotonic() - start < 60


def assert_ends_with(program: str, begun: Path) -> None:
    """That the process whose number `begun` is given by `program` ends when the program's own is killed."""
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY) as parent:
        while not (begun.exists() and begun.read_text().endswith("\n")):
            assert parent.poll() is None
            time.sleep(0.1)
        parent.kill()
    pid = int(begun.read_text())
    try:
        end = time.monotonic() + 10
        while lives(pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not lives(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lives(pid: int) -> bool:
    """Whether the process runs: one that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
