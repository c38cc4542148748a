"""Names of files in other encodings, alphabets and locales: told or taken, and never a crash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.synthetic import write_synthetic_dataset

MODULE = [sys.executable, "-m", "cdiff.cli"]


def test_a_name_in_another_encoding_is_told_and_no_crash(tmp_path: Path) -> None:
    data = write_synthetic_dataset(tmp_path / "data", 2, raters=2, shape=(8, 8, 2))
    try:
        os.rename(data / "case01", os.fsencode(data) + b"/M\xfcller")
    except OSError:
        pytest.skip("this file system takes no such name")
    done = subprocess.run(
        [*MODULE, "data", "check", data, "--no-sheet", "--json", tmp_path / "check.json"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict", "COLUMNS": "200"},
    )
    assert done.returncode == 2
    assert b"M\\xfcller/image.nii.gz has a name that is not UTF-8; rename" in done.stdout
    assert b"Traceback" not in done.stderr
    assert "unreadable" in (tmp_path / "check.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(("encoding", "name"), [("latin-1", b"M\xfcller \\u2603"), ("ascii", b"M\\xfcller \\u2603")])
def test_a_name_that_the_locale_has_no_signs_for_is_no_crash(tmp_path: Path, encoding: str, name: bytes) -> None:
    write_synthetic_dataset(tmp_path / "data", 1, raters=1, shape=(8, 8, 2))
    (tmp_path / "data/case01").rename(tmp_path / "data/Müller ☃")
    done = subprocess.run(
        [*MODULE, "segment", tmp_path / "data", "-o", tmp_path / "maps", "--fast", "--runs", "1", "--no-preview", "-q"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert name + b"_soft.nii.gz" in done.stdout


@pytest.mark.parametrize("named", ["scan", "model"])
def test_a_locale_that_is_not_utf8_is_told_as_that(named: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """A file's name was said not to be UTF-8, which it is; a bundle's path gave ONNX Runtime's words on its constructor."""
    shutil.copytree(tiny_bundle, bundle := tmp_path / ("Müller" if named == "model" else "bundle"))
    scan = tmp_path / ("Müller.nii.gz" if named == "scan" else "scan.nii.gz")
    scan.write_bytes(b"read later")
    command = [*MODULE, "segment", scan, "--model", bundle, "-o", tmp_path / "maps", "-q"]
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, env=os.environ | old, text=True, check=False)
    assert done.returncode == 2
    assert "cannot read; set PYTHONUTF8=1" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_name_that_the_pictures_font_lacks_is_no_trouble(tmp_path: Path) -> None:
    """matplotlib warned of every sign of it, in two lines each."""
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(tmp_path / "患者.png")
    command = [*MODULE, "segment", str(tmp_path / "患者.png"), "-o", str(tmp_path / "maps"), "--fast", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout == f"{tmp_path}/maps/患者_preview.png\n"
    assert [line for line in done.stderr.splitlines() if not line.startswith("note: 患者: ")] == []
