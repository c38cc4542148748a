"""The GPU suite on a machine without one: plan, processes and resumption."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cdiff.benchmarks import gpu_checks, gpu_suite, gpu_tests
from cdiff.benchmarks.gpu_checks import KINDS, Settings
from cdiff.benchmarks.gpu_measure import flops
from cdiff.benchmarks.gpu_plan import Check, chosen, plan
from cdiff.benchmarks.gpu_report import markdown
from cdiff.benchmarks.gpu_subjects import PAPER, demo_slices, shipped_config, subject
from cdiff.benchmarks.gpu_suite import Suite, in_a_process, main
from cdiff.runtime.bundle import open_bundle, shipped_bundle
from cdiff.runtime.engines.trt import Gpu
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.scan import read_scan
from tests.benchmarks.tiny import CPU
from tests.conftest import REPOSITORY


def test_paper_is_the_protocol_of_the_paper() -> None:
    model = subject(PAPER, small=False)
    network = model.config.network
    assert (network.levels, model.runs, network.T, network.image_size, network.base_channels) == (7, 25, 100, 256, 128)
    counted = flops(model)
    # 0.773 and 0.557 TFLOP, 9.7 PFLOP a slice.
    assert counted["encoder"] == pytest.approx(0.773e12, rel=0.02)
    assert counted["denoiser"] == pytest.approx(0.557e12, rel=0.02)
    assert counted["protocol"] == pytest.approx(9.7e15, rel=0.02)


def test_the_shipped_model_and_scan_are_read_without_their_packages() -> None:
    network = shipped_config().network
    manifest = open_bundle(shipped_bundle()).manifest
    assert (network.levels, network.T, network.target) == (manifest.levels, manifest.T, manifest.target)
    assert (network.image_size, network.image_size) == manifest.image_size
    scan = REPOSITORY / "cdiff" / "demo" / "image.nii.gz"
    np.testing.assert_array_equal(demo_slices(), read_scan(scan).slices)


def test_imports_need_numpy_and_pytorch_alone() -> None:
    """As on a machine where nothing but PyTorch came with it; also without cdiff being installed."""
    program = (
        "import sys, importlib.abc, importlib.metadata as m\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {['typer', 'rich', 'nibabel', 'pycuda', 'tensorrt', 'tensorrt_rtx', 'matplotlib', 'PIL', 'monai', 'safetensors', 'diffusers', 'scipy', 'onnx', 'onnxscript']!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "m.version = lambda name, real=m.version: (_ for _ in ()).throw(m.PackageNotFoundError(name)) if name == 'cdiff' else real(name)\n"
        "import cdiff.benchmarks.gpu_suite as s, cdiff.benchmarks.gpu_checks as c, cdiff.benchmarks.gpu_parity, cdiff.benchmarks.gpu_measure\n"
        "import cdiff; assert cdiff.__version__ == '0+clone'\n"
        "c.open_path('graph', c.subject('shipped', False), c.Settings('cpu'))\n"
        "found = c.run_check('noise:graph:paper', c.Settings('cpu', small=True))\n"
        "assert found['status'] == 'done', found\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_check_of_every_plan_exists() -> None:
    for device, small in (("cuda:0", False), ("cpu", True)):
        names = [check.name for check in plan(device, small)]
        assert len(names) == len(set(names))
        for name in names:
            assert name in ("machine", "tests") or name.split(":")[0] in KINDS
    whole = plan("cuda:0", False)
    for wanted in (
        "published:published:paper",
        "protocol:eager16:paper",
        "protocol:compiled:paper",
        "protocol:graph:paper",
        "parity:graph:shipped",
    ):
        assert any(check.name == wanted for check in whole)
    assert [c.name for c in chosen(whole, "machine,protocol:graph")] == [
        "machine",
        "protocol:graph:paper",
        "protocol:graph:shipped",
    ]
    with pytest.raises(CdiffError, match="--checks nonsense"):
        chosen(whole, "machine,nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out")]) == 2, "a script would take 0 for a measurement"
    planned, said = capsys.readouterr()
    assert "error: nothing was measured: PyTorch" in said
    assert "sees no NVIDIA GPU here" in said
    assert "protocol:graph:paper" in planned
    assert not (tmp_path / "out").exists()
    assert main(["--checks", "nonsense"]) == 2


def test_a_broken_process_costs_one_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(CPU, work=str(tmp_path))
    monkeypatch.setattr(gpu_suite, "settings_json", lambda settings: "not json")
    broken = in_a_process("machine", settings, 60)
    assert broken["status"] == "failed"
    assert "JSONDecodeError" in broken["message"]
    ended = in_a_process("machine", settings, 0.01)
    assert "was ended" in ended["message"]


def test_a_check_keeps_what_it_compiles_where_the_suite_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Home and /tmp may be read-only; who names a folder of the own is heeded."""
    program = tmp_path / "check"
    program.write_text(
        "#!/bin/sh\nfor out; do :; done\n"
        'printf \'{"status": "done", "found": ["%s", "%s", "%s"]}\' "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$TMPDIR" > "$out"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "deep" / "work"
    found = in_a_process("machine", replace(CPU, work=str(work)), 60)["found"]
    assert found[:2] == [str(work / "triton"), str(work / "inductor")]
    assert Path(found[2]).parent == work
    assert not Path(found[2]).exists()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert in_a_process("machine", replace(CPU, work=str(work)), 60)["found"][0] == "/mine"


def test_what_an_engine_refuses_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise CdiffError("this card is not for me")

    monkeypatch.setitem(KINDS, "replay", refuse)
    assert gpu_checks.run_check("replay:tensorrt-rtx:shipped", CPU) | {"seconds": 0} == {
        "status": "refused", "message": "this card is not for me", "seconds": 0
    }  # fmt: skip
    monkeypatch.setitem(KINDS, "replay", lambda *_: 1 / 0)
    assert gpu_checks.run_check("replay:tensorrt:shipped", CPU)["status"] == "failed"


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def outcome(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        ran.append(name)
        return (
            {"status": "refused", "message": "no", "seconds": 0}
            if "graph" in name
            else {"status": "failed", "message": "it broke", "seconds": 1}
        )

    monkeypatch.setattr(gpu_suite, "in_a_process", outcome)
    checks = chosen(plan("cpu", True), "noise,published")
    suite = Suite(tmp_path, CPU, checks, fresh=False)
    suite.run(checks, minutes=0)
    assert not ran
    assert {found["status"] for found in suite.report["checks"].values()} == {"not measured"}
    Suite(tmp_path, CPU, checks, fresh=False).run(checks, minutes=5)
    assert ran == [check.name for check in checks]
    ran.clear()
    again = Suite(tmp_path, CPU, checks, fresh=False)
    again.run(checks, minutes=5)
    assert ran == [check.name for check in checks], "what broke, if a target needs it, before what was refused"
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "| noise:graph:shipped | refused | no |" in page
    with pytest.raises(CdiffError, match="other settings; give --fresh"):
        Suite(tmp_path, Settings("cpu"), checks, fresh=False)
    elsewhere = Suite(tmp_path, replace(CPU, work="elsewhere"), checks, fresh=False)
    assert elsewhere.report["checks"].keys() == {check.name for check in checks}, (
        "graphs in another folder measure the same"
    )
    (tmp_path / "gpu_suite.json").write_text("{")
    with pytest.raises(CdiffError, match="give --fresh"):
        Suite(tmp_path, CPU, checks, fresh=False)


def test_a_report_of_another_gpu_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been carried here; the same card, and a driver that does not tell, are no hindrance."""
    settings, checks = Settings(), [Check("machine", "", 60, 1)]
    suite = Suite(tmp_path, settings, checks, fresh=False)
    suite.report["checks"]["machine"] = {"status": "done", "result": {"gpu": {"name": "NVIDIA H200"}}, "seconds": 1}
    suite.save()
    for names in ([], ["NVIDIA H200"], ["NVIDIA H200", "NVIDIA T4"]):
        monkeypatch.setattr(gpu_suite, "visible_gpus", lambda names=names: [Gpu(name, "9.0", 0) for name in names])
        assert "machine" in Suite(tmp_path, settings, checks, fresh=False).report["checks"]
    monkeypatch.setattr(gpu_suite, "visible_gpus", lambda: [Gpu("NVIDIA T4", "7.5", 0)])
    with pytest.raises(CdiffError, match=r"was measured on NVIDIA H200, but cuda:0 is NVIDIA T4; give --fresh"):
        Suite(tmp_path, settings, checks, fresh=False)
    assert Suite(tmp_path, settings, checks, fresh=True).report["checks"] == {}


def test_what_was_refused_is_tried_again_after_what_was_never_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package may be there by now; what is done stays, and a refusal that there is no time to try again stays too."""
    now, installed, ran = [0.0], [False], []
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def outcome(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        ran.append(name)
        now[0] += 30
        if "tensorrt" in name and not installed[0]:
            return {"status": "refused", "message": "needs tensorrt", "seconds": 30}
        return {"status": "done", "result": {"note": "nothing to replay"}, "seconds": 30}

    monkeypatch.setattr(gpu_suite, "in_a_process", outcome)
    names = ["replay:tensorrt:shipped", "replay:graph:shipped", "replay:tensorrt:paper", "replay:graph:paper"]

    def states(minutes: float) -> list[str]:
        ran.clear()
        checks = [Check(name, "", 40, 1) for name in names]
        suite = Suite(tmp_path, CPU, checks, fresh=False)
        suite.run(checks, minutes)
        return [suite.report["checks"][name]["status"] for name in names]

    assert states(1.5) == ["refused", "done", "refused", "not measured"]
    installed[0] = True
    assert states(1) == ["done", "done", "refused", "done"]
    assert ran == ["replay:graph:paper", "replay:tensorrt:shipped"]
    assert "needs tensorrt" in (tmp_path / "gpu_suite.md").read_text()
    assert states(1) == ["done"] * 4
    assert ran == ["replay:tensorrt:paper"]


def test_the_packages_are_listed_again_when_one_was_installed_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, ran = [False], []

    def outcome(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        ran.append(name)
        if name == "machine":
            return {"status": "done", "result": {"missing": [] if installed[0] else ["onnxscript"]}, "seconds": 1}
        if not installed[0]:
            return {"status": "refused", "message": "needs onnxscript", "seconds": 1}
        return {"status": "done", "result": {}, "seconds": 1}

    monkeypatch.setattr(gpu_suite, "in_a_process", outcome)
    monkeypatch.setattr(gpu_suite, "markdown", lambda report: "")
    checks = [Check("machine", "", 60, 1), Check("noise:graph:shipped", "", 40, 1)]
    for state, missing, called in (
        (False, ["onnxscript"], ["machine", "noise:graph:shipped"]),
        (False, ["onnxscript"], ["noise:graph:shipped"]),
        (True, [], ["noise:graph:shipped", "machine"]),
        (True, [], []),
    ):
        installed[0] = state
        ran.clear()
        suite = Suite(tmp_path, CPU, checks, fresh=False)
        suite.run(checks, minutes=5)
        assert suite.report["checks"]["machine"]["result"]["missing"] == missing
        assert ran == called


def test_the_minutes_begin_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = [0.0], []
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu_suite, "gpu_missing", lambda device: now.__setitem__(0, 30.0))

    def run(suite: Suite, checks: list[Check], minutes: float) -> None:
        given.append(minutes)
        suite.report["checks"]["machine"] = {"status": "done"}

    monkeypatch.setattr(Suite, "run", run)
    assert main(["--out", str(tmp_path), "--minutes", "2", "--checks", "machine"]) == 0
    assert given == [1.5]


def test_a_check_that_cannot_end_in_time_leaves_it_to_a_shorter_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, ran = [0.0], []
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def outcome(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        ran.append(name)
        now[0] += 15
        return {"status": "done", "result": {"note": "nothing to replay"}, "seconds": 15}

    monkeypatch.setattr(gpu_suite, "in_a_process", outcome)
    long, short = "replay:graph:paper", "replay:graph:shipped"
    checks = [Check(long, "", 220, 115), Check(short, "", 60, 15)]
    Suite(tmp_path, CPU, checks, fresh=False).run(checks, minutes=0.5)
    assert ran == [short]
    Suite(tmp_path, CPU, checks, fresh=False).run(checks, minutes=1)
    assert ran == [short, long], "with more than half of what it should take, it is tried"


def test_what_the_targets_need_comes_before_what_compiles() -> None:
    """One run of eight minutes may be all there is."""
    names = [check.name for check in plan("cuda:0", False)]
    needed = (
        "machine",
        "published:published:paper",
        "protocol:graph:paper",
        "parity:graph:shipped",
        "scaling:graph:shipped",
    )
    assert max(map(names.index, needed)) < min(
        i for i, name in enumerate(names) if "compiled" in name or "tuned" in name
    )
    before = [check.expected for check in plan("cuda:0", False) if names.index(check.name) <= names.index(needed[-1])]
    assert sum(before) < 240


def test_a_check_that_the_suite_cuts_short_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--minutes` ends a check that did not come to its own limit: nothing broke, and the same command measures it."""
    now = [0.0]
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        now[0] += seconds
        return {"status": "failed", "message": f"took longer than {seconds:.0f} s and was ended", "seconds": seconds}

    monkeypatch.setattr(gpu_suite, "in_a_process", slow)
    checks = [Check(name, "", 40, 1) for name in ("noise:graph:shipped", "noise:graph:paper")]
    suite = Suite(tmp_path, CPU, checks, fresh=False)
    suite.run(checks, minutes=1)
    found = suite.report["checks"]
    assert found["noise:graph:shipped"]["message"] == "took longer than 40 s and was ended"
    assert found["noise:graph:paper"]["status"] == "not measured"
    assert "the time was up" in found["noise:graph:paper"]["message"]


def test_a_test_that_fails_on_the_gpu_breaks_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test_marked.py"
    monkeypatch.setattr(gpu_tests, "marked_files", lambda root: [path])
    passes, fails = "@pytest.mark.gpu\ndef test_one(): pass\n", "@pytest.mark.gpu\ndef test_two(): assert 0\n"
    skipped = "@pytest.mark.gpu\ndef test_three(): pytest.skip('no card')\ndef test_four(): assert 0\n"
    path.write_text(f"import pytest\n{passes}{skipped}")
    assert gpu_checks.run_check("tests", CPU)["result"] == {"passed": 1, "skipped": 1, "reasons": ["no card"]}
    path.write_text(f"import pytest\n{passes}{fails}")
    found = gpu_checks.run_check("tests", CPU)
    assert (found["status"], found["message"]) == ("failed", "1 of 2 tests failed: test_two")
    path.write_text("import nothing_of_this_name\n")
    assert gpu_checks.run_check("tests", CPU)["status"] == "failed"
    monkeypatch.setenv("PYTEST_PLUGINS", "nothing_of_this_name")
    found = gpu_checks.run_check("tests", CPU)
    assert found["status"] == "refused"
    assert "No module named 'nothing_of_this_name'" in found["message"], "what is missing must be named"
    monkeypatch.setattr(gpu_tests, "marked_files", lambda root: [])
    assert gpu_checks.run_check("tests", CPU)["status"] == "refused"


@pytest.mark.parametrize(("way", "sizes"), [("graph", 2), ("graph-tuned", 1)])
def test_what_is_slow_to_set_up_is_measured_at_one_batch_size(way: str, sizes: int) -> None:
    found = gpu_checks.run_check(f"protocol:{way}:shipped", replace(CPU, seconds=0.1))
    assert len(found["result"]["sweep"]) == sizes


def test_an_engine_without_chains_of_its_own_lists_no_kernels(tmp_path: Path) -> None:
    found = gpu_checks.run_check("kernels:onnxruntime:shipped", replace(CPU, small=False, work=str(tmp_path)))
    assert found["status"] == "refused"
    assert "runs no chain on the device" in found["message"]


@pytest.mark.minutes
def test_the_suite_on_tiny_networks(tmp_path: Path) -> None:
    """A check of most kinds, each in its own process, through the command."""
    checks = "machine,noise:graph,published:published:paper,parity:onnxruntime,protocol:graph:shipped,scaling:graph,kernels,tests"
    command = [sys.executable, "-m", "cdiff.benchmarks.gpu_suite", "--device", "cpu", "--small", "--out", str(tmp_path)]
    command += ["--protocol-seconds", "1", "--minutes", "60", "--checks", checks]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert {found["status"] for found in report["checks"].values()} == {"done"}, done.stdout
    assert report["checks"]["parity:onnxruntime:shipped"]["result"]["maps"]["mean"] < 1e-4
    assert report["checks"]["noise:graph:shipped"]["result"]["max"] < 1e-6
    page = (tmp_path / "gpu_suite.md").read_text()
    assert page == markdown(report)
    assert "tried the suite itself" in page
    assert "## Not measured" not in page
    for title in (
        "Engines",
        "Targets",
        "Whole protocol",
        "Batch sizes",
        "Against PyTorch float32",
        "Kernels of a step",
        "Noise",
        "Seconds per slice",
        "Tests marked gpu",
    ):
        assert f"## {title}" in page
