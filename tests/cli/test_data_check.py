"""How `cdiff data check` words what it found: no model is there yet, and every case is told from the others."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.runtime.errors import CdiffError
from tests.runtime.dicom_files import orthogonal, write_series
from tests.synthetic import write_synthetic_dataset


def findings(data: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the findings, single-spaced."""
    monkeypatch.setattr("cdiff.cli.console.out.width", 400)
    result = CliRunner().invoke(app, ["data", "check", str(data), "--no-sheet", "-q"])
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    start = lines.index("Findings") + 1
    return lines[start : lines.index("", start)]


def test_a_name_in_two_splits_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_synthetic_dataset(tmp_path / "data", {"Training": 3, "Validation": 2}, 3, (32, 32, 4))
    for case in ("Training/case02", "Validation/case02", "Training/case03"):
        path = data / case / "task01_seg01.nii.gz"
        mask = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros_like(np.asarray(mask.dataobj)), mask.affine), path)
    assert "note empty case02 in train, case03, case02 in val: seg01 marked nothing" in findings(data, monkeypatch)


def test_nothing_is_said_of_a_network_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_synthetic_dataset(tmp_path / "four", {"Training": 4, "Validation": 1}, 3, (32, 32, 4), channels=4)
    image = data / "Training" / "case03" / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((32, 32, 4, 3), np.uint8), np.eye(4)), image)
    lines = findings(data, monkeypatch)
    assert (
        f"error unreadable case03: {image} has shape 32 x 32 x 4 x 3; 4 channels on the last axis are needed" in lines
    )
    assert "error training 1 file of training or validation cases cannot be used (named in the findings)" in lines
    assert "model" not in " ".join(lines)
    grey = write_synthetic_dataset(tmp_path / "colours", {"Training": 3, "Validation": 1}, 3, (32, 32), channels=3)
    for number, case in enumerate(sorted(grey.glob("*/case*"))):
        (case / "image.nii.gz").unlink()
        shape = (32, 32) if number == 1 else (32, 32, 3)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, shape, np.uint8)).save(case / "image.png")
    lines = findings(grey, monkeypatch)
    assert "note image case02: the grey picture was used for each of the three channels" in lines
    assert "model" not in " ".join(lines)


def test_the_report_and_the_sheet_are_two_files(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one name the sheet took the report's place; and a sheet that was asked for and was not is told before the work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to("both.png")
    for options, says in (
        (("--json", "both.png", "--sheet", "./both.png"), "would both be both.png"),
        (("--json", "both.png", "--sheet", "link.png"), "would both be both.png"),
        (("--json", f"{tiny_data.name}_sheet.png"), f"would both be {tiny_data.name}_sheet.png"),
        (("--sheet", "both.png", "--no-sheet"), "--sheet both.png and --no-sheet contradict each other"),
        (("--sheet", "sheet.pdf"), "--sheet sheet.pdf would hold a PNG; give it a name that ends in .png"),
    ):
        result = CliRunner().invoke(app, ["data", "check", str(tiny_data), *options])
        assert result.exit_code == 2
        assert says in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["link.png"]


def test_a_report_that_cannot_be_written_is_told_before_the_work(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("cdiff.load", "cdiff.runtime.data.datacheck.check_data", "cdiff.benchmarks.benchmark.benchmark"):
        monkeypatch.setattr(work, None)
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path / ("x" * 300), "is too long for the name of a file (300 bytes of at most 255); give a shorter one"),
        (tmp_path / "file/report.json", "file is not a folder, or lies below a file"),
    ):
        for command in (("data", "check", tiny_data), ("evaluate", "--data", tiny_data), ("benchmark",)):
            result = CliRunner().invoke(app, [*map(str, command), "--json", str(path)])
            assert result.exit_code == 2
            assert says in result.output


@pytest.mark.parametrize(
    ("command", "ends"),
    [
        (("data", "check", "cases.csv"), "mhd"),
        (("data", "check", "cases.csv"), "nhdr"),
        (("evaluate", "--maps", "maps", "--data", "cases.csv"), "mhd"),
        (("benchmark", "--scan", "scan.mhd"), "mhd"),
    ],
)
def test_no_report_replaces_the_voxels_that_a_header_names(
    command: tuple[str, ...], ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the table names the header alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cdiff.benchmarks.benchmark.benchmark", None)
    (tmp_path / "maps").mkdir()
    for name in ("scan", "one", "two"):
        image = sitk.GetImageFromArray(np.zeros((2, 8, 8), np.uint8))
        sitk.WriteImage(image, str(tmp_path / f"{name}.{ends}"))
    (tmp_path / "cases.csv").write_text(f"case,image,mask1,mask2\na,scan.{ends},one.{ends},two.{ends}\n")
    raw = tmp_path / "scan.raw"
    before = raw.read_bytes()
    result = CliRunner().invoke(app, [*command, "--json", str(raw)])
    assert f"error: {raw} is one of the files that are read, and would be replaced" in result.stderr
    assert result.exit_code == 2
    assert raw.read_bytes() == before


@pytest.mark.parametrize("command", [("data", "check"), ("evaluate", "--maps", "maps", "--data")])
def test_no_report_replaces_a_slice_of_a_series_or_the_file_of_a_structure(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither stands in the table by its own name."""
    monkeypatch.chdir(tmp_path)
    write_series(tmp_path / "ct", np.zeros((8, 8, 2), np.int16), orthogonal())
    for folder in ("maps", "masks"):
        (tmp_path / folder).mkdir()
    (structures := tmp_path / "masks/all.dcm").write_bytes(b"DICM")
    (tmp_path / "cases.csv").write_text("case,image,mask1,mask2\none,ct,masks/all.dcm#A,masks/all.dcm#B\n")
    for path in (next((tmp_path / "ct").iterdir()), structures):
        before = path.read_bytes()
        result = CliRunner().invoke(app, [*command, "cases.csv", "--json", str(path)])
        assert result.exit_code == 2
        assert f"error: {path} is one of the files that are read, and would be replaced" in result.stderr
        assert path.read_bytes() == before


def test_a_full_disk_costs_no_table(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, report: object) -> None:
        raise CdiffError(f"cannot write {path}: no space left on device")

    monkeypatch.setattr("cdiff.runtime.files.write_json", full)  # imported with the command
    result = CliRunner().invoke(
        app, ["data", "check", str(tiny_data), "--no-sheet", "--json", str(tmp_path / "x.json")]
    )
    assert result.exit_code == 2
    assert "no space left" in result.output
    assert "pairwise Dice" in result.output
