"""`cdiff evaluate` with a report folder, curves, groups and the paper's tables, on a tiny trained model; and its mistakes."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.runtime.scoring.publish import OF_A_REPORT

WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def evaluate(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env=WIDE)
    return result.exit_code, result.stdout, result.stderr


def test_a_report_with_everything(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    folder, copy, numbers = tmp_path / "report", tmp_path / "scores.json", tmp_path / "numbers.csv"
    numbers.write_text("table,whose,data,percent,source\n2,somebody else,kidney,87.65,Table 2 of theirs\n")
    command = (
        *("--data", tiny_data, "--model", tiny_bundle, "--runs", 3, "--steps", 2, "--sampler", "ddim", "--seed", 7),
        *("--levels", "vote", "--no-mirror", "--report", folder, "--json", copy, "--steps-curve", "3,1,2"),
        *("--group", "case0[0-9]", "--paper-table", "--beside", numbers, "--worst", 2),
    )
    code, printed, said = evaluate(*command)
    assert code == 0, said
    assert re.search(r"somebody else.*kidney.*87\.65", printed)
    names = {path.name for path in folder.iterdir()}
    tables = {f"{name}.csv" for name in ("scores", "cases", "slices", "reliability", "expected", "runs", "steps")}
    assert names == tables | {
        "scores.json",
        "reliability.png",
        "expected.png",
        "runs.png",
        "steps.png",
        "steps",
        "worst.png",
    }
    assert names == {*OF_A_REPORT, "steps"}
    report = json.loads((folder / "scores.json").read_text())
    assert json.loads(copy.read_text()) == report
    asked = {"runs": 3, "steps": 2, "sampler": "ddim", "seed": 7, "combine": "vote", "mirror": False, "fast": False}
    assert {key: report["protocol"][key] for key in asked} == asked
    assert report["intervals"]["group"] == "case0[0-9]"
    with (folder / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["1", "2", "3"]
    assert float(rows[1]["soft_dice_5"]) == pytest.approx(report["soft_dice_5"]["mean"])

    assert f"{report['ged_no_diagonal']['mean']:.3f}" in printed
    assert f"{report['iou_per_level'][2]['mean']:.3f}" in printed
    assert f"{100 * report['pairwise_dice_annotators']['mean']:.2f}" in printed
    assert "QUBIQ kidney" in printed
    assert "tiny val" in printed
    assert printed.splitlines()[-2:] == [str(copy), str(folder)]

    # The same again computes nothing: the seconds would have changed.
    code, _, said = evaluate(*command)
    assert code == 0
    assert "not computed again" in said
    assert json.loads((folder / "scores.json").read_text()) == report


def test_cases_that_the_model_may_have_learned_from_are_told(
    tiny_data: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Without split folders training holds some cases out, and `evaluate` scores all; or someone names the training split's own folder."""
    cases, model = tmp_path / "cases", tmp_path / "model"
    shutil.copytree(tiny_data / "Validation", cases)
    shutil.copytree(tiny_bundle, model)
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["training"]["data"]["notes"] = ["no validation folder: held out 1 of 6 cases for validation"]
    (model / "manifest.json").write_text(json.dumps(manifest))
    quick = ("--fast", "--limit", 1)
    for told, of, asked in (
        (True, model, ("--data", cases)),
        (False, model, ("--data", cases, "--split", "all")),
        (False, model, ("--data", tiny_data)),
        (False, tiny_bundle, ("--data", cases)),
        (True, tiny_bundle, ("--data", tiny_data / "Training")),
        (False, tiny_bundle, ("--data", tiny_data / "Training", "--split", "all")),
        (False, tiny_bundle, ("--data", tiny_data / "Validation")),
    ):
        code, printed, said = evaluate("--model", of, *asked, *quick)
        assert (code, "the scores are too good" in said) == (0, told), said
    assert " of 1 case\n" in re.sub(" +\n", "\n", printed)
    assert "- to -" not in printed, "one case has no interval"
    code, _, said = evaluate("--data", cases, "--model", model, "--split", "val")
    assert (code, "there is no split val in this data, which has all" in said) == (2, True), said


def test_volumes_and_unmarked_slices_are_printed_where_there_are_some(
    tiny_data: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """In 80 columns no line of the scores is cut or wrapped; 2-D cases have no second set of the same numbers."""
    volumes, pictures = tmp_path / "volumes", tmp_path / "pictures"
    shutil.copytree(tiny_data / "Validation", volumes)
    for path in volumes.rglob("*.nii.gz"):
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj).copy()
        target = pictures / path.relative_to(volumes)
        target.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels[..., 0], image.affine), target)
        if "seg" in path.name:
            voxels[..., 3] = 0
            nib.save(nib.Nifti1Image(voxels, image.affine), path)
    chain = ("--model", tiny_bundle, "--runs", 1, "--steps", 1, "-q")
    printed = {}
    for name, more in (("volumes", ()), ("all", ("--all-slices", "--json", tmp_path / "all.json")), ("pictures", ())):
        data = pictures if name == "pictures" else volumes
        command = ["evaluate", "--data", str(data), *map(str, (*chain, *more))]
        result = CliRunner().invoke(app, command, env=WIDE | {"COLUMNS": "80"})
        assert result.exit_code == 0, result.stderr
        printed[name] = result.stdout.split("Dice of the soft map by threshold")[0]
        assert max(map(len, printed[name].splitlines())) <= 80
    assert [text.count("each case as a whole") for text in printed.values()] == [4, 4, 0]
    report = json.loads((tmp_path / "all.json").read_text())
    assert f"{report['case_soft_dice_5']['mean']:.3f}" in printed["all"]
    unmarked = report["false_positive_slices"]
    assert unmarked["n_slices"] == report["n_cases"] > 0
    assert f"{report['n_cases']} cases, {unmarked['n_slices']} slices unmarked" in printed["all"]
    (line,) = [line for line in printed["all"].splitlines() if "unmarked slices in which the model marks" in line]
    assert f"{unmarked['mean']:.3f}" in line
    assert "unmarked" not in printed["volumes"] + printed["pictures"]


def test_mistakes_are_said_before_any_work(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    common = ("--data", tiny_data, "--model", tiny_bundle, "--runs", 1, "--steps", 2, "-q")
    folder = ("--report", tmp_path / "report")
    for arguments, words in (
        (("--steps-curve", "1,2"), "--report DIR"),
        (("--worst", "3"), "--report DIR"),
        ((*folder, "--steps-curve", "1,two"), "1,2,5,10,25"),
        ((*folder, "--steps-curve", "0"), "1,2,5,10,25"),
        ((*folder, "--steps-curve", "5,100000"), "100000"),
        ((*folder, "--group", "["), "regular expression"),
        (("--all-raters", "--all-slices"), "give one of the two"),
        ((*folder, "--group", "patient"), "case01"),
    ):
        code, printed, said = evaluate(*common, *arguments)
        assert code == 2, said
        assert words in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert printed == ""
    assert not (tmp_path / "report").exists()


def test_the_labels_of_the_masks_come_from_the_bundle(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """A model of label 2 alone, on label maps in which 3 surrounds it: before, everything above half of the largest was scored."""
    bundle, data = tmp_path / "bundle", tmp_path / "data"
    shutil.copytree(tiny_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["training"]["data"]["labels"] = [2]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(tiny_data / "Validation", data)
    for path in data.rglob("task01_seg*.nii.gz"):
        image = nib.load(path)
        drawn = np.asarray(image.dataobj)
        nib.save(nib.Nifti1Image(np.where(drawn > 0, 2, 3).astype(np.uint8), image.affine), path)
    chain = ("--data", data, "--model", bundle, "--runs", 1, "--steps", 1)
    reports = []
    for name, more in (("stated", ()), ("asked", ("--labels", 2)), ("other", ("--labels", 3))):
        code, _, said = evaluate(*chain, "--json", tmp_path / f"{name}.json", *more)
        assert code == 0, said
        assert ("labels 2 count as inside, as when the model was trained" in said) == (name == "stated")
        assert ("the model was trained with 2" in said) == (name == "other")
        reports.append(json.loads((tmp_path / f"{name}.json").read_text()))
    stated, asked, other = reports
    assert stated["data"]["labels"] == asked["data"]["labels"] == [2]
    assert stated["pairwise_dice_annotators"] == asked["pairwise_dice_annotators"] != other["pairwise_dice_annotators"]


def test_how_masks_are_laid_comes_from_the_bundle(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """One annotator's masks, whose rows run the other way and whose headers say so: laid by these they are what was drawn."""
    bundle, data = tmp_path / "bundle", tmp_path / "data"
    shutil.copytree(tiny_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["training"]["data"]["masks_by"] = "header"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(tiny_data / "Validation", data)
    for path in data.rglob("*.nii.gz"):
        image = nib.load(path)
        here = nib.affines.from_matvec(np.diag([0.8, 0.9, 2.0]), [5, 6, 7])  # tiny data has no orientation of its own
        upright = nib.Nifti1Image(np.asarray(image.dataobj), here)
        turned = upright.as_reoriented(np.array([[0, -1], [1, 1], [2, 1]], float)) if "seg01" in path.name else upright
        nib.save(turned, path)
    chain = ("--data", data, "--runs", 1, "--steps", 1)
    scores = []
    for name, more in (
        ("stated", ("--model", bundle)),
        ("asked", ("--model", tiny_bundle, "--masks-by", "header")),
        ("array", ("--model", bundle, "--masks-by", "array")),
        ("plain", ("--model", tiny_bundle)),
    ):
        code, _, said = evaluate(*chain, "--json", tmp_path / f"{name}.json", *more)
        assert code == 0, said
        assert ("laid where their headers put them, as when the model was trained" in said) == (name == "stated")
        assert ("elsewhere than their image" in said) == (name in ("array", "plain"))
        report = json.loads((tmp_path / f"{name}.json").read_text())
        scores.append((report["pairwise_dice_annotators"], report["data"].get("masks_by")))
    code, _, said = evaluate(
        "--data", tiny_data, "--split", "val", *chain[2:], "--model", tiny_bundle, "--json", tmp_path / "drawn.json"
    )
    assert code == 0, said
    drawn = json.loads((tmp_path / "drawn.json").read_text())["pairwise_dice_annotators"]
    assert scores[:2] == [(drawn, "header")] * 2
    assert scores[2] == scores[3] != (drawn, None)


def test_what_stands_beside_is_read_before_any_work(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    command = (
        "--data",
        tiny_data,
        "--model",
        tiny_bundle,
        "--json",
        tmp_path / "out.json",
        "--beside",
        tmp_path / "none.csv",
    )
    code, _, said = evaluate(*command)
    assert (code, "add --paper-table" in said) == (2, True), said
    code, _, said = evaluate(*command, "--paper-table")
    assert (code, "none.csv cannot be read" in said) == (2, True), said
    assert not list(tmp_path.iterdir())
