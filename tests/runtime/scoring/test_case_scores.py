"""Scores of a case as a whole, and slices that nobody marked: by hand, against the volume itself, resumed, in groups."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from cdiff.runtime.data.cases import Case, find_cases, read_case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.scan import Scan, read_scan
from cdiff.runtime.scoring.evaluate import Protocol
from cdiff.runtime.scoring.metrics import FIVE, NINE, bootstrap_over_cases, dice, soft_dice
from cdiff.runtime.scoring.publish import write_report
from cdiff.runtime.scoring.scores import (
    PER_CASE,
    PER_CASE_LEVEL,
    PER_CASE_THRESHOLD,
    PER_LEVEL,
    PER_SLICE,
    CaseTally,
    SliceMaps,
    score_slice,
)
from cdiff.runtime.stack import Stack
from tests.runtime.known_maps import KnownMaps, case_in, run, without_seconds
from tests.synthetic import write_synthetic_dataset

ALL = Protocol(all_slices=True)
OF_ALL_SLICES = ("brier", "brier_floor", "crps")
"""The means over slices that take those that nobody marked."""


def tally_of(levels: NDArray[Any], masks: NDArray[Any]) -> dict[str, Any]:
    """The row of a case of rows of pixels: the model's level maps [S,C,W], the annotators' masks [S,n,W]."""
    maps = levels[:, :, None].astype(np.float32)
    runs = np.rint(255 * maps[:, :, None]).astype(np.uint8)
    tally = CaseTally(masks[:, :, None].astype(bool), np.arange(len(masks)), "mean")
    grid = read_scan(np.zeros((1, levels.shape[-1], len(levels))), slice_axis=2).grid
    tally.add(Stack(maps, np.zeros_like(maps[:, 0]), runs), 0, grid)
    return tally.row()


@dataclass
class Blob(KnownMaps):
    """Marks the corner [0:2, 0:3], which no annotator marks, at all levels of the slices named."""

    corners: tuple[int, ...] = ()

    def segment(self, scan: Scan, **asked: Any) -> Any:
        result = super().segment(scan, **asked)
        for place in set(self.corners) & set(range(asked["slices"].start, asked["slices"].stop)):
            result.stack.maps[place - asked["slices"].start, :, :2, :3] = 1
            result.stack.runs[place - asked["slices"].start, :, :, :2, :3] = 255
        return result


def unmark(cases: list[Case], slices: list[int]) -> None:
    """Take every annotator's marks out of these slices of the cases."""
    for path in (path for case in cases for path in case.masks):
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj).copy()
        voxels[..., slices] = 0
        nib.save(nib.Nifti1Image(voxels, image.affine), path)


def means(report: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    """The scores' means, those by level or threshold one after another."""
    return [entry["mean"] for name in names for entry in np.atleast_1d(np.array(report[name], object))]


def test_two_slices_by_hand() -> None:
    """Two annotators. The large slice is drawn perfectly; the small one is missed, and a pixel elsewhere is drawn by all."""
    masks = np.zeros((2, 2, 8), bool)
    masks[0, 0, :6] = masks[0, 1, :4] = True
    masks[1, 0, :2] = masks[1, 1, :1] = True
    levels = np.zeros((2, 2, 8))
    levels[0, 0, :6] = levels[0, 1, :4] = levels[1, :, 7] = 1
    row = tally_of(levels, masks)
    scores, (large, small) = row["case_scores"], row["slices"]
    # Level 1: 6 pixels of 7 and 8 are in both; level 2: 4 of 5 and 5.
    assert scores["case_dice_per_level"] == pytest.approx([12 / 15, 8 / 10], abs=1e-6)
    assert scores["case_iou_per_level"] == [6 / 9, 4 / 6]
    # 0.1 to 0.5 read level 1, the others level 2.
    assert scores["case_dice_per_threshold"] == pytest.approx([12 / 15] * 5 + [8 / 10] * 4, abs=1e-6)
    assert scores["case_soft_dice_5"] == pytest.approx((3 * 12 / 15 + 2 * 8 / 10) / 5, abs=1e-6)
    assert scores["case_soft_dice_9"] == pytest.approx(0.8, abs=1e-6)
    # The annotators have 8 and 5 pixels, 5 of them in both; each is all that the other is compared with.
    for name in ("soft_dice_5_annotators", "soft_dice_9_annotators", "pairwise_dice_annotators"):
        assert scores[f"case_{name}"] == pytest.approx(10 / 13, abs=1e-6)
    # At one half the model marks 7 pixels: 6 of the first annotator's 8, 4 of the second's 5. Each annotator is the other's panel.
    assert scores["case_dice_each"] == pytest.approx((12 / 15 + 8 / 12) / 2, abs=1e-6)
    assert scores["case_dice_each_annotators"] == pytest.approx(10 / 13, abs=1e-6)
    assert scores["case_dice_each_difference"] == pytest.approx((12 / 15 + 8 / 12) / 2 - 10 / 13, abs=1e-6)
    assert (large["dice_each"], small["dice_each"]) == pytest.approx(((1 + 8 / 10) / 2, 0), abs=1e-5)
    assert large["auroc_run_std"] is None, "one run differs from none"
    # The mean over the slices is another number.
    assert (large["soft_dice_5"], small["soft_dice_5"]) == pytest.approx((1, 0), abs=1e-5)
    assert row["volumes"]["predicted_voxels"] == [7, 5]
    assert row["volumes"]["true_voxels"] == [8, 5]
    # Pixels, sum of the map and of the annotators' shares where the map is 0, 0.5 and 1; near the small slice are pixels 0 to 3.
    whole, near = (np.array(row["reliability"][region])[:, [0, 5, 9]].tolist() for region in ("whole", "near"))
    assert whole == [[9, 2, 5], [0, 1, 5], [1.5, 1, 4]]
    assert near == [[6, 2, 4], [0, 1, 4], [1.5, 1, 4]]


def test_a_case_scores_as_its_volume_does(cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as thresholding the whole volume's map, though the slices come one by one and in two parts."""
    monkeypatch.setattr("cdiff.runtime.scoring.evaluate.RUNS_AT_ONCE", 2 * 3 * 2 * 24 * 20)
    report = run(KnownMaps(tmp_path / "b", 3, shift=1), cases)
    for case, row in zip(cases, report["cases"], strict=True):
        masks = read_case(case)[1]
        truth = masks.mean(axis=1)
        soft = np.roll(truth, 1, axis=-1)
        scores = row["case_scores"]
        assert scores["case_soft_dice_5"] == pytest.approx(soft_dice(soft, truth, FIVE), abs=1e-12)
        assert scores["case_soft_dice_9"] == pytest.approx(soft_dice(soft, truth, NINE), abs=1e-12)
        others = [soft_dice(masks[:, i], np.delete(masks, i, axis=1).mean(axis=1), NINE) for i in range(3)]
        assert scores["case_soft_dice_9_annotators"] == pytest.approx(np.mean(others), abs=1e-12)
        each = [dice(soft >= 0.5, mask) for mask in masks.swapaxes(0, 1)]
        panels = [dice(np.delete(masks, i, axis=1).sum(axis=1) >= 1, masks[:, i]) for i in range(3)]
        assert scores["case_dice_each"] == pytest.approx(np.mean(each), abs=1e-12)
        assert scores["case_dice_each_annotators"] == pytest.approx(np.mean(panels), abs=1e-12)
    values = [row["case_scores"]["case_soft_dice_5"] for row in report["cases"]]
    found = report["case_soft_dice_5"]
    assert found == {"mean": pytest.approx(np.mean(values)), "low": found["low"], "high": found["high"], "n_cases": 4}
    assert found["low"] < found["mean"] < found["high"]
    assert found["mean"] != pytest.approx(report["soft_dice_5"]["mean"], abs=1e-3)


def test_a_2d_case_scores_as_its_slice_does(tmp_path: Path) -> None:
    found = find_cases(write_synthetic_dataset(tmp_path / "data", 3, raters=3, shape=(24, 20)))["all"]
    report = run(KnownMaps(tmp_path / "b", 3, shift=1, noise=0.5), found)
    for name in (*PER_CASE, *PER_CASE_LEVEL, PER_CASE_THRESHOLD):
        plain = name.removeprefix("case_")
        assert means(report, (name,)) == means(report, (plain,))
        for row in report["cases"]:
            assert row["case_scores"][name] == row["slices"][0][plain] == row["means"][plain]
    assert report["case_soft_dice_5"]["low"] == report["soft_dice_5"]["low"] < 1
    assert report["false_positive_slices"] == {"mean": None, "low": None, "high": None, "n_slices": 0}


def test_what_finds_the_pixels_where_annotators_disagree() -> None:
    """Two annotators differ in pixels 2 and 3; near what they marked are pixels 0 to 5."""
    masks = np.zeros((2, 1, 8), bool)
    masks[0, 0, :4] = masks[1, 0, :2] = True
    soft = np.array([[1, 1, 0.5, 0.25, 0, 0, 0, 0.5]], np.float32)
    spread = np.array([[0.5, 0, 0.4, 0.3, 0, 0, 0.35, 0.6]], np.float32)
    maps = SliceMaps(soft, np.stack([soft, soft]), masks, spread, masks)
    found = score_slice(maps)
    assert found["auroc_run_std"] == pytest.approx((4 / 6 + 3 / 6) / 2)
    assert found["auroc_run_std_near"] == 3 / 4
    assert found["auroc_entropy"] == pytest.approx((5.5 / 6 + 5 / 6) / 2)
    assert found["auroc_entropy_near"] == 1
    alone = score_slice(replace(maps, run_std=None))
    assert alone["auroc_run_std"] is alone["auroc_run_std_near"] is None


def test_a_level_that_is_empty_in_a_whole_case() -> None:
    """Both empty: 1, as in a slice; one of them: 0. That a slice of it scores 1 does not lift the case."""
    masks = np.zeros((2, 2, 8), bool)
    masks[:, 0, :3] = True
    levels = np.zeros((2, 2, 8))
    levels[:, 0, :3] = 1
    both = tally_of(levels, masks)["case_scores"]
    assert both["case_dice_per_level"] == both["case_iou_per_level"] == [1, 1]
    assert both["case_pairwise_dice_annotators"] == pytest.approx(0, abs=1e-6)
    levels[0, 1, 0] = 1
    row = tally_of(levels, masks)
    assert [scores["dice_per_level"][1] for scores in row["slices"]] == pytest.approx([0, 1], abs=1e-5)
    assert row["case_scores"]["case_dice_per_level"] == pytest.approx([1, 0], abs=1e-5)
    assert row["case_scores"]["case_iou_per_level"] == [1, 0]


def test_a_case_of_one_annotator_or_of_another_number(cases: list[Case], tmp_path: Path) -> None:
    alone = tally_of(np.ones((2, 1, 8)), np.ones((2, 1, 8), bool))["case_scores"]
    assert alone["case_soft_dice_5"] == 1
    assert alone["case_soft_dice_5_annotators"] is alone["case_pairwise_dice_annotators"] is None
    assert alone["case_dice_each"] == 1
    assert alone["case_dice_each_annotators"] is alone["case_dice_each_difference"] is None

    cases[1].masks[2].unlink()
    cases = [case_in(case.image.parent) for case in cases]
    report = run(KnownMaps(tmp_path / "b", 3), cases, Protocol(raters="use"))
    masks = read_case(cases[1])[1]
    votes = masks.sum(axis=1)
    soft = np.mean([3 * votes >= c * 2 for c in (1, 2, 3)], axis=0)  # what three levels can say of two annotators
    scores = report["cases"][1]["case_scores"]
    assert scores["case_soft_dice_9"] == pytest.approx(soft_dice(soft, votes / 2, NINE), abs=1e-12)
    assert scores["case_dice_per_level"] == [1, 1, 1]
    assert report["case_soft_dice_9"]["n_cases"] == 4


def test_what_a_model_marks_where_nobody_did_counts(cases: list[Case], tmp_path: Path) -> None:
    """Slices 0 and 3 of two cases are unmarked; in slice 0 the model marks six pixels. Case 1 is marked nowhere."""
    unmark(cases[:2], [0, 3])
    unmark(cases[:1], [1, 2])
    segmenter = Blob(tmp_path / "b", 3, shift=1, corners=(0,))
    told: list[str] = []
    marked = run(segmenter, cases, notice=told.append)
    assert "no slice marked by any annotator" in told[0]
    assert (marked["n_cases"], marked["n_slices"]) == (3, 10)
    assert marked["false_positive_slices"]["mean"] is None

    told.clear()
    report = run(segmenter, cases, ALL, notice=told.append)
    assert told == []
    assert report["protocol"]["all_slices"] is True
    assert report["left_out"]["no_marked_slice"] == []
    assert (report["n_cases"], report["n_slices"]) == (4, 16)
    assert segmenter.asked[-4:] == [(case.name, slice(0, 4)) for case in cases]
    # Two of the six unmarked slices, one in each of two cases: 1 of 4, and 1 of 2.
    found = report["false_positive_slices"]
    assert (found["mean"], found["low"], found["high"]) == (pytest.approx(2 / 6), 0.25, 0.5)
    assert found["n_slices"] == 6
    assert [s["false_positive_slices"] for s in report["cases"][0]["slices"]] == [1, 0, 0, 0]
    assert [s["false_positive_slices"] for s in report["cases"][1]["slices"]] == [1, None, None, 0]

    # Comparisons of shapes are those of the marked slices, as before.
    shapes = tuple(name for name in PER_SLICE if name not in (*OF_ALL_SLICES, "false_positive_slices"))
    for name in (*shapes, *PER_LEVEL, "dice_per_threshold"):
        assert report[name] == marked[name], name
    assert report["by_runs"] == marked["by_runs"]
    for name in ("soft_dice_5", "soft_dice_9"):  # a case counts with each of its marked slices, here 0, 2, 4 and 4
        assert report["by_runs"][-1][name] == pytest.approx(report[name], abs=1e-6)
    assert report["ece_near"] == marked["ece_near"]
    # Those of pixels are of all slices: nobody can disagree in an unmarked one.
    assert [report[name]["n_slices"] for name in OF_ALL_SLICES] == [16] * 3
    assert report["brier_floor"]["mean"] == pytest.approx(marked["brier_floor"]["mean"] * 10 / 16)
    assert report["cases"][0]["slices"][0]["brier"] == report["cases"][0]["slices"][0]["crps"] == 6 / (24 * 20)
    assert report["ece"]["n_slices"] == 16
    assert sum(row["pixels"] for row in report["reliability"]["whole"]) == 16 * 24 * 20

    # The case as a whole: nothing to find and something found, 0; six pixels too many beside those of slices 1 and 2.
    empty, small, *_ = report["cases"]
    assert empty["case_scores"]["case_soft_dice_5"] == pytest.approx(0, abs=1e-6)
    assert empty["case_scores"]["case_pairwise_dice_annotators"] == 1
    before = marked["cases"][0]
    truth = np.array(before["volumes"]["true_voxels"])
    dice = np.array(before["case_scores"]["case_dice_per_level"])
    assert small["volumes"]["predicted_voxels"] == (truth + 6).tolist()
    assert small["case_scores"]["case_dice_per_level"] == pytest.approx(dice * 2 * truth / (2 * truth + 6), abs=1e-6)
    assert report["volume_error_voxels_per_level"][0]["signed"]["n_cases"] == 4
    json.dumps(report, allow_nan=False)


def test_nothing_marked_by_anyone_anywhere(cases: list[Case], tmp_path: Path) -> None:
    """The whole data set is healthy: nothing is near a structure, and a model that stays silent is right."""
    unmark(cases, [0, 1, 2, 3])
    report = run(KnownMaps(tmp_path / "b", 3), cases, ALL)
    assert report["soft_dice_5"] == {"mean": None, "low": None, "high": None, "n_slices": 0}
    assert report["ece_near"] == {"mean": None, "low": None, "high": None, "n_slices": 0}
    assert report["by_runs"][0]["soft_dice_5"]["mean"] is None
    assert report["case_soft_dice_5"] == {"mean": 1, "low": 1, "high": 1, "n_cases": 4}
    assert report["false_positive_slices"] == {"mean": 0, "low": 0, "high": 0, "n_slices": 16}
    write_report(tmp_path / "report" / "scores.json", report)


def test_a_sample_of_all_slices(cases: list[Case], tmp_path: Path) -> None:
    """The second and the last of all four, marked or not: with the marked ones alone it would be the middle of three."""
    unmark(cases, [3])
    segmenter = Blob(tmp_path / "b", 3, corners=(3,))
    report = run(segmenter, cases, replace(ALL, slices_per_case=2))
    assert segmenter.asked[:2] == [("case01", slice(1, 2)), ("case01", slice(3, 4))]
    assert report["soft_dice_5"]["n_slices"] == report["false_positive_slices"]["n_slices"] == 4
    assert report["false_positive_slices"]["mean"] == 1


def test_all_slices_and_those_of_all_raters_exclude_each_other() -> None:
    with pytest.raises(CdiffError, match="--all-raters leaves out slices that --all-slices would score"):
        Protocol(all_raters=True, all_slices=True)


def test_rows_of_marked_slices_do_not_serve_for_all(cases: list[Case], tmp_path: Path) -> None:
    """Which slices are scored is part of the protocol; the same protocol goes on."""
    unmark(cases, [0])
    out, told = tmp_path / "scores.json", list[str]()
    with pytest.raises(KeyboardInterrupt):
        run(Blob(tmp_path / "b", 3, stop_after=2), cases, out=out)
    with pytest.raises(KeyboardInterrupt):
        run(Blob(tmp_path / "b", 3, stop_after=3, corners=(0,)), cases, ALL, out=out, notice=told.append)
    assert "all_slices False (now True)" in told[0]
    rest = Blob(tmp_path / "b", 3, corners=(0,))
    resumed = run(rest, cases, ALL, out=out)
    assert [name for name, _ in rest.asked] == ["case04"]
    whole = run(Blob(tmp_path / "b", 3, corners=(0,)), cases, ALL)
    assert without_seconds(resumed) == without_seconds(whole)


def test_groups_of_cases(cases: list[Case], tmp_path: Path) -> None:
    """Intervals of a case's own scores, too, draw patients."""
    named = [replace(case, name=f"p{i // 2}_scan{i % 2}") for i, case in enumerate(cases)]
    report = run(KnownMaps(tmp_path / "b", 3, shift=1), named, group="p[0-9]+")
    values = [row["case_scores"]["case_soft_dice_5"] for row in report["cases"]]
    expected = bootstrap_over_cases([values[:2], values[2:]])
    found = report["case_soft_dice_5"]
    assert (found["mean"], found["low"], found["high"]) == (expected.mean, expected.low, expected.high)
    assert report["case_dice_per_level"][2]["n_cases"] == 4


def test_the_tables_have_them(cases: list[Case], tmp_path: Path) -> None:
    unmark(cases[:1], [0])
    report = run(Blob(tmp_path / "b", 3, shift=1, corners=(0,)), cases, ALL)
    write_report(tmp_path / "report" / "scores.json", report)
    tables = {}
    for name in ("scores", "cases", "slices"):
        with (tmp_path / "report" / f"{name}.csv").open(newline="") as file:
            tables[name] = list(csv.DictReader(file))
    scores = {(row["score"], row["at"]): row for row in tables["scores"]}
    for key, value in (
        (("case_soft_dice_5", ""), report["case_soft_dice_5"]),
        (("case_dice_per_level", "level 3"), report["case_dice_per_level"][2]),
        (("case_dice_per_threshold", "threshold 0.2"), report["case_dice_per_threshold"][1]),
    ):
        assert float(scores[key]["low"]) == pytest.approx(value["low"], rel=1e-8)
        assert scores[key]["n"] == "4"
    assert scores["false_positive_slices", ""]["n"] == "1"
    first, row = report["cases"][0]["case_scores"], tables["cases"][0]
    for column, number in (
        ("case_soft_dice_9", first["case_soft_dice_9"]),
        ("case_iou_level_2", first["case_iou_per_level"][1]),
        ("case_dice_threshold_0.9", first["case_dice_per_threshold"][8]),
        ("dice_threshold_0.9", report["cases"][0]["means"]["dice_per_threshold"][8]),
    ):
        assert float(row[column]) == pytest.approx(number, rel=1e-8)
    assert (row["slices"], row["false_positive_slices"]) == ("4", "1")
    unmarked, beside = tables["slices"][:2]
    assert (unmarked["soft_dice_5"], unmarked["empty_level_1"], unmarked["dice_threshold_0.1"]) == ("", "", "")
    assert (unmarked["false_positive_slices"], beside["false_positive_slices"]) == ("1", "")
