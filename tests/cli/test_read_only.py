"""A container whose file system is read-only but for the folder of results: no home, no folder for temporary files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cdiff
from tests.runtime.dicom_files import orthogonal, write_series

DEMO = Path(cdiff.__file__).parent / "demo"
NOWHERE = "/proc/nowhere"
"""Not even the superuser can make it."""
CDIFF = f"import tempfile; tempfile.tempdir = {NOWHERE!r}; from cdiff.cli.app import main; main('cdiff')"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MPLCONFIGDIR": NOWHERE, "HOME": NOWHERE}
    return subprocess.run(
        [sys.executable, "-c", CDIFF, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_needs_no_temporary_file_is_done(tmp_path: Path) -> None:
    segment = ("segment", DEMO / "image.nii.gz", "-o", tmp_path, "--fast", "--runs", 1, "--slices", "3:4")
    done = run(*segment, "--no-preview")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "image.json").is_file()


@pytest.mark.parametrize(
    "command", [("segment", DEMO / "image.nii.gz", "-o"), ("evaluate", "--data", DEMO, "--report")]
)
def test_that_no_picture_can_be_drawn_is_told_before_the_work(tmp_path: Path, command: tuple[object, ...]) -> None:
    done = run(*command, tmp_path / "out", "--fast", "--runs", 1)
    assert done.returncode == 2
    assert "set TMPDIR to a folder that can" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_series_that_cannot_be_converted_is_one_line(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", np.zeros((8, 8, 3)), orthogonal())
    done = run("segment", series, "-o", tmp_path / "out", "--no-preview", "-q")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no temporary folder can be made (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command", [("train", "--data", DEMO, "--out"), ("export", DEMO, "--out"), ("benchmark", "--json")]
)
def test_what_asks_pytorch_says_so_in_a_line(tmp_path: Path, command: tuple[object, ...]) -> None:
    """Its import ends in an error that no user would read."""
    nowhere = f"import tempfile; tempfile._candidate_tempdir_list = lambda: [{NOWHERE!r}]; "
    main = "from cdiff.cli.app import main; main('cdiff')"
    done = subprocess.run(
        [sys.executable, "-c", nowhere + main, *map(str, command), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "needs a folder for PyTorch's temporary files" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_the_doctor_works_there() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stderr
