"""How `cdiff data check` words what it found: no model is there yet, and every case is told from the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.cli.data import _print as print_report
from cdiff.runtime.data.datacheck import Check
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
        f"error unreadable case03: {image} has shape 32 x 32 x 4 x 3; 4 channels on the last axis are needed, or one file for each, named together by "
        "a case's folder or a table" in lines
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
    drawn: list[Path] = []

    def draw(path: Path, _: object, channels: int, axis: int, name: str, note: str) -> None:
        drawn.append(path)
        assert note.endswith("other pictures show"), "of one channel nothing is left out"

    monkeypatch.setattr("cdiff.runtime.pictures.sheet.write_sheet", draw)
    sheet = f"{tiny_data.name}_sheet.png"
    for options, files in (((), [sheet]), (("--no-sheet",), []), (("--sheet", "a.png"), ["a.png"])):
        result = CliRunner().invoke(app, ["data", "check", str(tiny_data), "--json", "a.json", *options])
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-1 - len(files) :] == ["a.json", *files], "for a program to read"
        assert [str(path) for path in drawn] == files
        assert json.loads((tmp_path / "a.json").read_text())["layout"] == "cases"
        drawn.clear()
    monkeypatch.chdir(tiny_data)
    assert CliRunner().invoke(app, ["data", "check", "."]).exit_code == 0
    assert [str(path) for path in drawn] == [sheet], "by the folder's own name"


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


def dice(mean: float | None, low: float | None = None, high: float | None = None, slices: int = 0) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "n_slices": slices}


def a_report(**changes: Any) -> dict[str, Any]:
    """A report of which no two numbers are the same."""
    splits = {
        "train": {"cases": 3, "unlabelled": 0, "slices": 14, "marked_slices": 13, "slices_all_marked": 12},
        "val": {"cases": 2, "unlabelled": 1, "slices": 11, "marked_slices": 10, "slices_all_marked": 9},
    }
    agreement = dice(0.5, 0.4, 0.6, 23) | {"by_annotator": {"a": 0.51, "b": 0.52, "c": 0.53}, "averaged": "how"}
    plan = {"train": {"cases": 4, "cases_found": 5, "slices": 20}, "val": {"cases": 1, "cases_found": 1, "slices": 1}}
    report = {
        **{"data": "/data", "layout": "cases", "task": "task01", "labels": [], "masks_by": "array", "findings": []},
        "annotators": {"names": ["a", "b", "c"], "cases_by_number": {"3": 4, "2": 1}},
        "image": {
            **{"channels": 1, "modalities": [], "sizes": {"32 x 32": 3, "16 x 16": 2}},
            "spacings_mm": {"1": 5, "2": 4, "3": 3, "4": 2},
        },
        "splits": {name: row | {"pairwise_dice": dice(0.7 + len(name) / 100)} for name, row in splits.items()},
        "class_balance": {"pixels_at_least": [0.125, 0.0625]},
        "pairwise_dice": agreement | {"slices_all_marked": dice(0.75, 0.7, 0.8, 21)},
        "training": {"possible": True, "reasons": [], "levels": 3, "image_channels": 2, "notes": ["one", "two"]} | plan,
    }
    return report | changes


def shown(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the command prints of a report, single-spaced."""
    monkeypatch.setattr("cdiff.cli.console.out.width", 400)
    print_report(Check(report, [], 1))
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_each_number_of_a_check_stands_in_its_own_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = a_report()
    assert shown(report, monkeypatch, capsys) == [
        "Data",
        "folder /data",
        "layout cases; structure task01",
        "annotators 3 in 4 cases, 2 in 1 case (a, b, c)",
        "channels 1 (one)",
        "sizes 32 x 32 (3), 16 x 16 (2)",
        "spacing, mm 1 (5), 2 (4), 3 (3), 4 (2)",
        "split cases slices marked by all pairwise Dice",
        "train 3 14 13 12 0.750",
        "val 2 + 1 without masks 11 10 9 0.730",
        "Agreement",
        "pixels marked by 12.5 % at least 1, 6.25 % at least 2",
        "pairwise Dice 0.500 (0.400 to 0.600) over 23 marked slices; 0.750 over 21 that all marked",
        "each with the others a 0.510, b 0.520, c 0.530",
        "averaged how",
        "Findings",
        "none nothing odd was found",
        "Training with the default settings",
        "levels 3",
        "channels 2",
        "cases train 4 of 5 cases, 20 slices; val 1 of 1 case, 1 slice",
        "note one",
        "note two",
    ]
    report |= {"labels": [1, 4], "masks_by": "header", "task": None, "class_balance": {"pixels_at_least": []}}
    report["image"] |= {"channels": 2, "modalities": ["t1", "t2"], "spacings_mm": {str(n): n for n in range(1, 7)}}
    report["pairwise_dice"] = dice(None) | {"slices_all_marked": dice(None)}
    report["training"] |= {"possible": False}
    lines = shown(report, monkeypatch, capsys)
    assert lines[2] == "layout cases; structure unnamed; labels [1, 4] count as inside; masks laid by their headers"
    assert lines[4] == "channels 2 (t1, t2)"
    assert "channels 2 (unnamed)" in shown(
        report | {"image": report["image"] | {"modalities": []}}, monkeypatch, capsys
    )
    assert lines[6] == "spacing, mm 1 (1), 2 (2), 3 (3), 4 (4) and 2 others"
    assert lines[-4:] == ["Agreement", "pixels marked by -", "Findings", "none nothing odd was found"]


def test_data_on_which_no_training_could_start_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once the table and the files are there."""
    report = a_report(training={"possible": False, "reasons": ["no case", "no slice"]})
    monkeypatch.setattr("cdiff.runtime.data.datacheck.check_data", lambda *_, **__: Check(report, [], 1))
    out = tmp_path / "a.json"
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--json", str(out)])
    assert (result.exit_code, result.stderr) == (2, "error: training cannot start: no case; no slice\n")
    assert result.stdout.splitlines()[-1] == str(out), "there is no sheet, for no case can be read"
    assert json.loads(out.read_text()) == report


def test_findings_of_one_kind_stand_together_and_the_rest_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finding(kind: str, case: str, text: str) -> dict[str, str]:
        return {"severity": "warning", "kind": kind, "case": case, "split": "train", "text": text}

    found = [finding("empty", name, "alike") for name in "abcd"] + [finding("image", "a", "other")]
    found += [finding("empty", "e", f"text {n}") for n in range(2, 7)]
    start = ["warning empty 4 cases: alike", *(f"warning empty e: text {n}" for n in range(2, 7))]
    lines = shown(a_report(findings=found), monkeypatch, capsys)
    lines = lines[lines.index("Findings") + 1 :]
    assert lines[:7] == [*start, "warning image a: other"]
    found += [finding("empty", name, "text 7") for name in "fg"] + [finding("empty", "f", "text 8")]
    lines = shown(a_report(findings=found), monkeypatch, capsys)
    lines = lines[lines.index("Findings") + 1 :]
    rest = "warning empty ... and 3 more of this kind (--json has them all)"
    assert lines[:8] == [*start, rest, "warning image a: other"]
