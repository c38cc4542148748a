"""Nothing is reported to anyone: ONNX Runtime's telemetry, which is on by default, is off in every process that runs cdiff."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SEGMENT = (
    "import cdiff, pathlib\n"
    "demo = pathlib.Path(cdiff.__file__).parent / 'demo' / 'image.nii.gz'\n"
    "cdiff.load().segment(demo, fast=True, runs=1, slices='3:4')\n"
)


def run(program: str, home: Path, **variables: str) -> str:
    """The program's output, in a process whose user has an empty home; ONNX Runtime is silent by itself where CI is set."""
    hidden = {"CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME", "XDG_DATA_HOME"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"HOME": str(home)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        SEGMENT,
        "from cdiff.cli.app import app\nfrom typer.testing import CliRunner\nassert CliRunner().invoke(app, ['doctor']).exit_code == 0\n",
    ],
    ids=["segment", "doctor"],
)
def test_onnxruntime_keeps_no_record_and_no_identity_of_the_machine(program: str, tmp_path: Path) -> None:
    run(program, tmp_path)
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if "onnxruntime" in path], "its events wait there to be sent"


def test_a_program_that_imported_onnxruntime_first_is_silenced_too(tmp_path: Path) -> None:
    watched = (
        "import onnxruntime\n"
        "called = []\n"
        "onnxruntime.disable_telemetry_events = lambda: called.append(1)\n"
        f"{SEGMENT}print(len(called))\n"
    )
    assert run(watched, tmp_path).strip() == "1"


def test_whoever_asks_for_the_reports_keeps_them(tmp_path: Path) -> None:
    program = "import cdiff, os\nprint(os.environ['ORT_DISABLE_TELEMETRY'])\n"
    assert run(program, tmp_path, ORT_DISABLE_TELEMETRY="0").strip() == "0"
    assert run(program, tmp_path).strip() == "1"
