"""Wheels in parts for a machine without a network: what comes out there is what went in, or an error that says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "pack_gpu_wheels.py"
CONTENT = os.urandom(3 * 2**20)  # does not compress, so that it takes several parts


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/__init__.py", "word = 'here'\n")
        archive.writestr("thing/libthing.so.1", CONTENT)
    done = run(SCRIPT, tmp_path / "parts", wheel, "--part-mib", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "packing 3 MiB, about a minute for each 100"
    assert done.stderr.splitlines()[-1] == "  100 %"
    return tmp_path / "parts"


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_there_and_back(parts: Path, tmp_path: Path) -> None:
    pieces = sorted(parts.glob("part.*"))
    assert len(pieces) >= 3 + 1
    assert max(piece.stat().st_size for piece in pieces) <= 2**20
    site = tmp_path / "site"
    done = run(parts / "unpack.py", parts, site)
    assert done.returncode == 0, done.stderr
    assert (site / "thing" / "libthing.so.1").read_bytes() == CONTENT
    assert os.access(site / "thing" / "libthing.so.1", os.X_OK)
    program = subprocess.run(
        [sys.executable, "-c", "import thing; print(thing.word)"],
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert program.stdout == "here\n"


def test_a_part_that_is_missing_or_cut_is_named(parts: Path, tmp_path: Path) -> None:
    second = parts / "part.001"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    done = run(parts / "unpack.py", parts, tmp_path / "site")
    assert done.returncode != 0
    assert "part.001 is damaged" in done.stderr
    second.unlink()
    done = run(parts / "unpack.py", parts, tmp_path / "site")
    assert "part.001 is missing" in done.stderr
    assert not (tmp_path / "site").exists()


def test_what_cannot_be_packed_is_said(tmp_path: Path) -> None:
    for wheel, words in (("nothing.whl", "does not exist"), ("numpy", "name a version")):
        done = run(SCRIPT, tmp_path / "parts", wheel)
        assert done.returncode != 0
        assert words in done.stderr
    assert not (tmp_path / "parts").exists()
