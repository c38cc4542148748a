"""Scoring maps that lie in files: as a model's own where they are its own, and one line where they are no maps of these cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.runtime.data.cases import Case, find_cases, read_masks
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scoring.evaluate import Protocol, evaluate, score_cases
from cdiff.runtime.scoring.scores import PER_SLICE
from cdiff.runtime.scoring.written import Written, WrittenMaps, _count, _maps, _report, _shares
from cdiff.runtime.segmenter import Segmenter
from tests.synthetic import write_synthetic_dataset

SAMPLED = {"ged", "ged_no_diagonal"}
"""Scores of a model's runs, which files do not hold."""


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return find_cases(write_synthetic_dataset(tmp_path / "data", 3, raters=3, shape=(24, 20, 4)))["all"]


def write(path: Path, values: np.ndarray[Any, Any], affine: np.ndarray[Any, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4) if affine is None else affine), path)
    return path


def fraction(case: Case) -> np.ndarray[Any, Any]:
    """What the annotators drew as a soft map [H,W,S]."""
    return np.moveaxis(read_masks(case, read_scan(case.scan).grid).mean(1), 0, -1)


def written(folder: Path, cases: list[Case], change: Callable[[np.ndarray[Any, Any]], Any] = lambda soft: soft) -> Path:
    for case in cases:
        write(folder / f"{case.name}.nii.gz", change(fraction(case)), nib.load(case.image).affine)
    return folder


def scores(folder: Path, cases: list[Case], protocol: Protocol | None = None, **more: Any) -> dict[str, Any]:
    return score_cases(WrittenMaps(folder, cases, lambda line: None), cases, protocol or Protocol(), **more)


@pytest.mark.parametrize(
    ("variant", "combine", "runs"),
    [("consensus", "mean", 3), ("consensus", "vote", 3), ("consensus", "mean", 1), ("implicit-ensemble", "mean", 3)],
)
def test_what_segment_wrote_has_the_scores_of_its_model(
    tiny_data: Path, tiny_bundle: Path, tmp_path: Path, variant: str, combine: str, runs: int
) -> None:
    segmenter, cases = Segmenter.open(tiny_bundle), find_cases(tiny_data)["val"]
    segmenter.bundle = replace(segmenter.bundle, manifest=replace(segmenter.manifest, variant=variant))
    chain: dict[str, Any] = {"runs": runs, "steps": 2, "sampler": "ddim", "combine": combine, "seed": 4}
    for case in cases:
        segmenter.segment(case.scan, **chain).save(tmp_path / "maps", case.name, preview=False)
    protocol = Protocol(**chain, slices_per_case=2)
    drawn, found = evaluate(segmenter, cases, protocol), scores(tmp_path / "maps", cases, Protocol(slices_per_case=2))
    assert [found["model"][key] for key in ("name", "variant")] == [drawn["model"]["name"], variant]
    assert {key: found["protocol"][key] for key in chain} == chain
    for one, other in zip(found["cases"], drawn["cases"], strict=True):
        assert one["inputs"] == other["inputs"], "or their differences slice by slice could not be taken"
        assert [one[key] for key in ("case_scores", "volumes")] == [other[key] for key in ("case_scores", "volumes")]
        for mine, theirs in zip(one["slices"], other["slices"], strict=True):
            assert mine | dict.fromkeys(SAMPLED) == theirs | dict.fromkeys(SAMPLED)
    assert (found["ged_samples"]["model"], found["by_runs"]) == (3, []), "its levels"


def test_maps_are_cut_as_their_report_says_and_else_along_the_last_axis() -> None:
    def axis(report: dict[str, Any]) -> int:
        return Written(Path("a_soft.nii.gz"), None, None, report).slice_axis

    assert [axis({"input": {"slice_axis": number}}) for number in (0, 1, 2)] == [0, 1, 2]
    assert [axis(report) for report in ({}, {"input": 3}, {"input": {"slice_axis": None}})] == [2] * 3


def test_a_slice_is_scored_as_it_was_drawn(cases: list[Case], tmp_path: Path) -> None:
    """Along an axis other than the last, as the reports say; in what these differ is not said of all."""
    maps = written(tmp_path / "maps", cases, np.zeros_like)  # what is called as a case is no map where there is a _soft
    for seed, case in enumerate(cases):
        write(maps / f"{case.name}_soft.nii.gz", fraction(case), nib.load(case.image).affine)
        report = {"cdiff": "0", "bundle": "b", "seed": seed, "input": {"slice_axis": 1}}
        (maps / f"{case.name}.json").write_text(json.dumps(report))
    found = scores(maps, cases, Protocol(all_slices=True))
    assert [len(case["slices"]) for case in found["cases"]] == [20] * 3
    assert (found["case_soft_dice_9"]["mean"], found["model"]["name"]) == (1, "b")
    assert "seed" not in found["protocol"]


def test_levels_are_the_axis_that_the_soft_map_lacks(tmp_path: Path) -> None:
    soft = write(tmp_path / "a_soft.nii", np.zeros((8, 6, 3)))
    for shape, levels in (((8, 6, 3, 4), 4), ((8, 6, 3, 1), 1), ((8, 6, 3), 1)):
        assert _count(write(tmp_path / "a_levels.nii", np.zeros(shape)), soft) == levels
    soft = write(tmp_path / "b_soft.nii", np.zeros((8, 6, 1, 1)))  # of a scan with such axes
    assert _count(write(tmp_path / "b_levels.nii", np.zeros((8, 6, 1, 4))), soft) == 4


def test_what_rounding_puts_beyond_0_and_1_is_cut_there(cases: list[Case], tmp_path: Path) -> None:
    values = np.zeros((24, 20, 4))
    values[0, 0], values[1, 1] = 1 + 5e-6, -5e-6
    path = write(tmp_path / "a.nii.gz", values, nib.load(cases[0].image).affine)
    maps = _maps(path, read_scan(cases[0].scan).grid, 1)
    assert (maps.min(), maps.max()) == (0, 1)


def test_a_json_file_that_is_no_report_says_nothing_of_a_map(tmp_path: Path) -> None:
    known = '{"cdiff": "1", "runs": 1}'
    for text, said in ((known, json.loads(known)), ('{"runs": 1}', {}), ("[1]", {}), ("{", {})):
        (tmp_path / "a.json").write_text(text)
        assert _report(tmp_path / "a.json") == said


def test_a_soft_map_alone_is_read_as_levels(cases: list[Case], tmp_path: Path) -> None:
    found = scores(written(tmp_path / "maps", cases), cases, Protocol(all_slices=True))
    assert found["model"] == found["model"] | {"name": "maps", "variant": "maps", "levels": 3}
    for name in ("soft_dice_5", "soft_dice_9", "case_soft_dice_9"):
        assert found[name]["mean"] == 1
    assert [level["mean"] for level in found["dice_per_level"]] == [1, 1, 1]
    assert found["ece"]["mean"] < 1e-6
    assert found["ged"]["mean"] == pytest.approx(found["ged_floor"]["mean"])
    assert found["auroc_run_std"]["mean"] is None
    rounded = scores(written(tmp_path / "rounded", cases, lambda soft: soft * (1 + 5e-6)), cases)
    exact = scores(tmp_path / "maps", cases)
    for name in ("auroc_entropy", "crps", "brier_near", "dice_each"):
        assert rounded[name]["mean"] == pytest.approx(exact[name]["mean"], abs=1e-5), "above 1 by a file's scale factor"
    worse = scores(written(tmp_path / "half", cases, lambda soft: soft / 2), cases)
    assert [case["volumes"]["predicted_voxels"][2] for case in worse["cases"]] == [0, 0, 0], (
        "none reaches (3 - 1/2) / 3"
    )
    assert worse["soft_dice_5"]["mean"] < 0.9


def test_slices_that_were_not_drawn_are_not_scored(cases: list[Case], tmp_path: Path) -> None:
    told: list[str] = []

    def drawn(soft: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.where(np.arange(4) < 2, soft, np.nan)

    source = WrittenMaps(written(tmp_path / "maps", cases, drawn), cases, told.append)
    protocol = Protocol(all_slices=True)
    found = score_cases(source, cases, protocol, notice=told.append)
    assert [[row["slice"] for row in case["slices"]] for case in found["cases"]] == [[0, 1]] * 3
    assert found["soft_dice_5"]["mean"] == 1
    assert found["left_out"]["slices_without_maps"] == {case.name: 2 for case in cases}
    assert any("no map (NaN) on 6 slices to score; left out" in line for line in told)
    sample = score_cases(source, cases, Protocol(all_slices=True, slices_per_case=1))
    assert [case["slices"][0]["slice"] for case in sample["cases"]] == [1, 1, 1], "the middle of those there are"


def test_maps_without_a_slice_to_score_and_cases_without_their_image_are_one_line(
    cases: list[Case], tmp_path: Path
) -> None:
    folder = written(tmp_path / "maps", cases, lambda soft: soft * np.nan)
    with pytest.raises(
        CdiffError,
        match=r"no case is left to score: the number of annotators differs .* in 0 cases, .* in 0 cases; the maps of 3 cases are NaN on every slice",
    ):
        scores(folder, cases)
    cases[1].image.unlink()
    with pytest.raises(CdiffError, match=r"case02/image\.nii\.gz does not exist"):
        scores(folder, cases)


def test_maps_of_a_picture_and_of_cases_in_folders_are_found(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "data", {"Training": 1, "Validation": 1}, raters=2, shape=(24, 20))
    found = find_cases(root)
    cases = [found["train"][0], found["val"][0]]
    named = [Case(f"{split}/{case.name}", case.image, case.masks) for split, case in zip("ab", cases, strict=True)]
    for place in ("a/case01_soft", "b_case01_soft"):
        write(tmp_path / "maps" / f"{place}.nii", fraction(cases[place[0] == "b"]), nib.load(cases[0].image).affine)
    assert scores(tmp_path / "maps", named)["soft_dice_9"]["mean"] == 1


@pytest.mark.parametrize("deep", [False, True])
def test_a_map_may_be_a_picture_in_grey(tmp_path: Path, deep: bool) -> None:
    shades = np.arange(240, dtype=np.uint8).reshape(12, 20)
    data = tmp_path / "data" / "case01"
    data.mkdir(parents=True)
    Image.fromarray(shades).save(data / "image.png")
    for reader, least in (("seg01", 51), ("seg02", 102)):
        Image.fromarray(255 * (shades >= least).astype(np.uint8)).save(data / f"task01_{reader}.png")
    white = 65535 if deep else 255
    soft = np.where(shades >= 102, white, np.where(shades >= 51, white // 2 + 1, 0)).astype(np.uint16)
    (tmp_path / "maps").mkdir()
    path = tmp_path / "maps" / "case01.png"
    Image.fromarray(soft if deep else soft.astype(np.uint8)).save(path)
    cases = find_cases(tmp_path / "data")["all"]
    found = scores(tmp_path / "maps", cases)
    assert found["soft_dice_9"]["mean"] == 1
    assert found["brier"]["mean"] == pytest.approx(found["brier_floor"]["mean"], abs=1e-5)
    Image.fromarray(np.stack([shades] * 3, axis=-1)).save(path)
    with pytest.raises(CdiffError, match=r"case01.png is not in grey \(mode RGB\)"):
        scores(tmp_path / "maps", cases)
    path.unlink()
    path.symlink_to(data / "image.png")
    with pytest.raises(CdiffError, match="is the image of case01, not a map of it"):
        scores(tmp_path / "maps", cases)


def test_white_is_1_in_every_grey_that_a_map_may_have(tmp_path: Path) -> None:
    shares = np.array([[0, 1], [1, 0]])
    grey: tuple[tuple[str, Any, str], ...] = (
        ("1", shares > 0, "png"), ("L", shares * 255, "png"), ("I;16", shares * 65535, "png"), ("I;16", shares * 65535, "tif"),
        ("I;16B", shares * 65535, "tif"), ("F", shares / 1, "tif"),
    )  # fmt: skip
    kinds = {"1": bool, "L": np.uint8, "I;16": np.uint16, "I;16B": ">u2", "F": np.float32}
    for mode, values, suffix in grey:
        path = tmp_path / f"map.{suffix}"
        Image.fromarray(values.astype(kinds[mode])).save(path)
        with Image.open(path) as picture:
            assert picture.mode == mode
        np.testing.assert_array_equal(_shares(path), shares)


def test_a_map_without_a_report_is_not_said_to_be_of_another_file(cases: list[Case], tmp_path: Path) -> None:
    told: list[str] = []
    source = WrittenMaps(written(tmp_path / "maps", cases), cases, told.append)
    assert source.read(cases[0], source.odd())[2].all()
    assert told == []


def test_a_level_is_drawn_where_at_least_half_of_its_runs_drew_it(cases: list[Case], tmp_path: Path) -> None:
    soft, affine = fraction(cases[0]), nib.load(cases[0].image).affine
    drawn = np.stack([soft > (level - 0.5) / 3 for level in (1, 2, 3)], axis=-1)
    dice, apart = [], []
    for share in (0.5, 0.4):
        write(tmp_path / "maps" / f"{cases[0].name}_soft.nii.gz", soft, affine)
        write(tmp_path / "maps" / f"{cases[0].name}_levels.nii.gz", share * drawn, affine)
        found = scores(tmp_path / "maps", cases[:1], Protocol(all_slices=True))
        dice.append([level["mean"] for level in found["dice_per_level"]])
        apart.append(found["ged"]["mean"] - found["ged_floor"]["mean"])
    assert dice[0] == [1, 1, 1]
    assert max(dice[1]) < 0.5
    assert apart[0] == pytest.approx(0)
    assert apart[1] > 0.1, "the energy distance is of the same masks"
    assert _maps(write(tmp_path / "one.nii", soft[..., :1]), Grid((24, 20, 1), 2), 1).shape == (1, 1, 24, 20)
    with pytest.raises(CdiffError, match="different shapes"):  # of a picture's map
        _maps(write(tmp_path / "deep.nii", soft), Grid((24, 20), None), 1)


def test_maps_that_are_edited_are_scored_again(cases: list[Case], tmp_path: Path) -> None:
    folder, out = written(tmp_path / "maps", cases), tmp_path / "scores.json"
    first = scores(folder, cases, out=out)
    written(folder, cases[1:2], lambda soft: 1 - soft)
    assert scores(folder, cases, out=out)["soft_dice_5"]["mean"] < first["soft_dice_5"]["mean"] == 1


@pytest.mark.parametrize("removed", [False, True])
def test_maps_that_change_while_they_are_scored_are_told(cases: list[Case], tmp_path: Path, removed: bool) -> None:
    """The report would name the hash of maps that were not scored."""
    folder, out = written(tmp_path / "maps", cases), tmp_path / "scores.json"
    second = folder / f"{cases[1].name}.nii.gz"

    def replace(done: int, total: int) -> None:
        """When the first case is done."""
        if removed:
            second.unlink(missing_ok=True)
        else:
            write(second, np.zeros(nib.load(second).shape, np.float32))

    with pytest.raises(CdiffError, match=rf"^{cases[1].name}: {second} has changed since the evaluation began"):
        scores(folder, cases, out=out, progress=replace)
    assert not out.exists()


def test_a_map_of_another_file_is_told(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    case = find_cases(tiny_data)["val"][0]
    Segmenter.open(tiny_bundle).segment(case.scan, runs=1, steps=1).save(tmp_path / "maps", case.name, preview=False)
    told: list[str] = []
    score_cases(WrittenMaps(tmp_path / "maps", [case], told.append), [case], Protocol())
    assert told == []
    report = tmp_path / "maps" / f"{case.name}.json"
    other = json.loads(report.read_text())
    other["input"]["sha256"] = "0" * 64
    report.write_text(json.dumps(other))
    score_cases(WrittenMaps(tmp_path / "maps", [case], told.append), [case], Protocol())
    assert told == [
        f"{case.name}: by its report {case.name}_soft.nii.gz was drawn from a file that is not {case.image}"
    ]


def _nan_somewhere(soft: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    soft[3, 3, 1] = np.nan
    return soft


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda soft: soft * 3, "holds values from 0 to 3; a map is a share of annotators"),
        (lambda soft: soft - 0.5, "holds values from -0.5"),
        (lambda soft: soft + np.inf, "holds values"),
        (lambda soft: soft[:, 1:], "different shapes (24 x 20 x 4 and 24 x 19 x 4)"),
        (_nan_somewhere, "is NaN in a part of a slice"),
    ],
)
def test_what_is_no_map_of_the_case_is_one_line(
    cases: list[Case], tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(CdiffError) as refused:
        scores(written(tmp_path / "maps", cases, change), cases)
    assert message in str(refused.value)
    assert "case01.nii.gz" in str(refused.value)


def test_a_map_that_lies_elsewhere_is_refused(cases: list[Case], tmp_path: Path) -> None:
    turned = np.diag([-1.0, 1, 2, 1])
    for case in cases:
        image = nib.load(case.image)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([1.0, 1, 2, 1])), case.image)
        write(tmp_path / "maps" / f"{case.name}.nii.gz", fraction(case), turned)
    with pytest.raises(CdiffError, match="different affines"):
        scores(tmp_path / "maps", cases)


def test_missing_maps_and_levels_of_different_numbers_are_named(cases: list[Case], tmp_path: Path) -> None:
    folder = written(tmp_path / "maps", cases[:1])
    with pytest.raises(CdiffError, match=r"2 of 3 cases without a map in .* \(case02, case03\).*case02_soft.nii.gz"):
        WrittenMaps(folder, cases, print)
    for number, case in enumerate(cases):
        write(folder / f"{case.name}_soft.nii.gz", fraction(case))
        if number:
            write(folder / f"{case.name}_levels.nii.gz", np.repeat(fraction(case)[..., None], 1 + number, axis=-1))
    with pytest.raises(CdiffError, match=r"case01: no file of levels in .*, where case02 has one"):
        WrittenMaps(folder, cases, print)
    with pytest.raises(CdiffError, match="case02 has 2 levels and case03 3"):
        WrittenMaps(folder, cases[1:], print)
    write(folder / "case02_levels.nii.gz", np.zeros((24, 20, 4, 3)))
    two_slices, one_level = np.arange(4)[:, None] < 2, np.arange(3) == 1
    for nan, said in ((two_slices, "other slices than case03_soft.nii.gz"), (one_level, "a part of a slice")):
        write(folder / "case03_levels.nii.gz", np.where(nan, np.nan, np.zeros((24, 20, 4, 3))))
        with pytest.raises(CdiffError, match=f"case03_levels.nii.gz is NaN in {said}"):
            scores(folder, cases[1:])
    with pytest.raises(CdiffError, match="is not a folder of maps"):
        WrittenMaps(folder / "case01.nii.gz", cases, print)


def test_the_command(cases: list[Case], tmp_path: Path) -> None:
    data, maps, report = tmp_path / "data", written(tmp_path / "maps", cases), tmp_path / "report"
    command = ["evaluate", "--data", str(data), "--maps", str(maps)]
    result = CliRunner().invoke(app, [*command, "--report", str(report), "--worst", "2", "--paper-table"])
    assert result.exit_code == 0, result.output
    assert "maps read from files" in " ".join(result.stdout.split())
    assert {path.name for path in report.iterdir()} == {
        "scores.json", "scores.csv", "cases.csv", "slices.csv", "reliability.csv", "reliability.png", "expected.csv", "expected.png",
        "worst.png",
    }  # fmt: skip
    assert json.loads((report / "scores.json").read_text())["protocol"] == {
        "all_raters": False, "all_slices": False, "slices_per_case": None, "raters": "skip",
    }  # fmt: skip
    assert (report / "slices.csv").read_text().count("\n") == 13
    assert all(name in (report / "scores.csv").read_text() for name in PER_SLICE)
    for more, name in ((["--fast"], "fast"), (["--engine", "torch"], "engine"), (["--model", "m"], "model")):
        refused = CliRunner().invoke(app, [*command, *more])
        assert refused.exit_code == 2
        assert f"--{name} says how a model draws maps, but --maps names maps that are drawn already" in refused.stderr
    refused = CliRunner().invoke(app, [*command, "--report", str(report), "--steps-curve", "1,2"])
    assert "--steps-curve says how" in refused.stderr


def test_maps_of_a_killed_segmentation_are_not_scored(cases: list[Case], tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    for case in cases:
        write(maps / f"{case.name}_soft.nii.gz", fraction(case), nib.load(case.image).affine)
    scores(maps, cases)
    left = json.dumps({"outputs": {f"{cases[1].name}_soft.nii.gz": {}}})
    (maps / ".part-0.json").write_text(left)
    with pytest.raises(CdiffError, match=f"^{cases[1].name}: .* was killed while it put them in place; segment again"):
        scores(maps, cases)
    (maps / f"{cases[1].name}.json").write_text('{"cdiff": "0"}')  # segmented again
    scores(maps, cases)


def test_voxels_beside_a_maps_header_that_change_are_scored_anew(cases: list[Case], tmp_path: Path) -> None:
    itk = pytest.importorskip("SimpleITK")
    folder, case, out = tmp_path / "maps", cases[0], tmp_path / "scores.json"
    folder.mkdir()
    dice = []
    for fault in (0, 1):  # all as the annotators drew, then the opposite: of one header
        soft = np.abs(fault - fraction(case)).astype(np.float32)
        image = itk.GetImageFromArray(np.transpose(soft))
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        itk.WriteImage(image, str(folder / f"{case.name}.mhd"))
        dice.append(scores(folder, [case], out=out)["soft_dice_5"]["mean"])
    assert dice[0] == pytest.approx(1)
    assert dice[1] < 0.5
