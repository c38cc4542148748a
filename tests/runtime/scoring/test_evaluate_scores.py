"""Every score of maps that are known: perfect, moved, noisy, empty; one annotator, one run; groups of cases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.data.cases import Case, find_cases, read_case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scoring.metrics import bootstrap_over_cases
from cdiff.runtime.scoring.scores import (
    PER_CASE,
    PER_CASE_LEVEL,
    PER_CASE_THRESHOLD,
    PER_LEVEL,
    PER_SLICE,
    PER_THRESHOLD,
    true_levels,
)
from cdiff.runtime.scoring.tables import cases_table
from cdiff.runtime.stack import Stack
from tests.runtime.known_maps import KnownMaps, case_in, run
from tests.synthetic import write_synthetic_dataset


def test_perfect_maps_score_one(cases: list[Case], tmp_path: Path) -> None:
    report = run(KnownMaps(tmp_path / "b", 3), cases)
    assert (report["n_slices"], report["n_cases"]) == (16, 4)
    assert report["soft_dice_5"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n_slices": 16}
    assert report["soft_dice_9"]["mean"] == 1
    for name in ("dice_per_level", "hd95_px_per_level", "case_iou_per_level", "volume_error_voxels_per_level"):
        assert [entry["level"] for entry in report[name]] == [1, 2, 3]
    assert all(entry["mean"] == 1 for entry in report["dice_per_level"])
    assert report["ged"]["mean"] == pytest.approx(report["ged_floor"]["mean"])
    assert report["soft_dice_5_annotators"]["mean"] < 1
    assert report["protocol"] == {
        **{"runs": 2, "steps": 5, "sampler": "ddim", "fast": False, "combine": "mean", "seed": 0},
        **{
            "mirror": False,
            "zooms": [1.0],
            "all_raters": False,
            "all_slices": False,
            "slices_per_case": None,
            "raters": "skip",
        },
    }
    json.dumps(report, allow_nan=False)


def test_maps_beside_the_truth_score_less(cases: list[Case], tmp_path: Path) -> None:
    """The score of the report is the mean over slices, and maps are compared with their own slice."""
    report = run(KnownMaps(tmp_path / "b", 3, shift=2), cases)
    scores = [s["soft_dice_5"] for case in report["cases"] for s in case["slices"]]
    assert 0.2 < report["soft_dice_5"]["mean"] < 0.95
    assert report["soft_dice_5"]["mean"] == pytest.approx(np.mean(scores))
    assert report["soft_dice_5"]["low"] <= report["soft_dice_5"]["mean"] <= report["soft_dice_5"]["high"]
    assert report["ged"]["mean"] > report["ged_floor"]["mean"]
    assert set(PER_SLICE) <= set(report)
    difference = report["dice_each"]["mean"] - report["dice_each_annotators"]["mean"]
    assert report["dice_each_difference"]["mean"] == pytest.approx(difference)
    assert difference < 0


def test_every_score_of_perfect_maps(cases: list[Case], tmp_path: Path) -> None:
    """What is known of maps that are the truth, score by score; the grid has 0.7 x 0.8 x 2.5 mm."""
    report = run(KnownMaps(tmp_path / "b", 3), cases)
    assert [entry["mean"] for entry in report["dice_per_threshold"]] == [1] * 9
    for name, value in (("iou", 1), ("hd95_px", 0), ("hd95_mm", 0)):
        assert [entry["mean"] for entry in report[f"{name}_per_level"]] == [value] * 3
    # In the last slice the third annotator marked nothing: nobody has pixels at level 3 there, nor has the model.
    assert [entry["n_slices"] for entry in report["hd95_px_per_level"]] == [16, 16, 12]
    assert [entry["n_both_empty"] for entry in report["hd95_px_per_level"]] == [0, 0, 4]
    assert [entry["n_model_empty"] + entry["n_annotators_empty"] for entry in report["hd95_px_per_level"]] == [0] * 3
    assert report["brier"]["mean"] == pytest.approx(report["brier_floor"]["mean"])
    assert report["brier_near"]["mean"] == pytest.approx(report["brier_floor_near"]["mean"])
    assert report["crps"]["mean"] == report["crps_near"]["mean"] == 0
    assert report["ece"]["mean"] == pytest.approx(0, abs=1e-6)
    assert report["ece"]["n_slices"] == 16
    assert report["auroc_entropy"]["mean"] == report["auroc_entropy_near"]["mean"] == 1
    assert report["auroc_run_std"]["mean"] == 0.5  # two equal runs: it says nothing
    assert report["ged_samples"] == {"model": 6, "annotators": [3]}
    for unit in ("voxels", "ml"):
        for entry in report[f"volume_error_{unit}_per_level"]:
            assert entry["signed"] == entry["absolute"] == {"mean": 0, "low": 0, "high": 0, "n_cases": 4}


def test_maps_moved_by_two_pixels_by_hand(cases: list[Case], tmp_path: Path) -> None:
    """The second axis has 0.8 mm a pixel. A shape moved along it keeps its volume; its left and right ends are 2 pixels off."""
    report = run(KnownMaps(tmp_path / "b", 3, shift=2), cases)
    for pixels, mm in zip(report["hd95_px_per_level"], report["hd95_mm_per_level"], strict=True):
        assert 1 < pixels["mean"] <= 2
        assert 0.7 * pixels["mean"] < mm["mean"] <= 2 * float(np.float32(0.8))
    assert all(entry["absolute"]["mean"] == 0 for entry in report["volume_error_voxels_per_level"])
    case = report["cases"][0]
    drawn = read_case(cases[0])[1]
    votes = drawn.sum(axis=1)
    assert case["volumes"]["true_voxels"] == [int((votes >= c).sum()) for c in (1, 2, 3)]
    assert case["volumes"]["voxel_ml"] == pytest.approx(0.7 * 0.8 * 2.5 / 1000)


def test_volume_error_by_hand(cases: list[Case], tmp_path: Path) -> None:
    """A model that says at every level what one of its levels says: the error is the difference of the true volumes."""

    class OneLevel(KnownMaps):
        def segment(self, scan: Path, **asked: Any) -> Any:
            result = super().segment(scan, **asked)
            stack = result.stack
            levels = np.repeat(stack.levels[:, 1:2], 3, axis=1)
            result.stack = Stack(levels, stack.run_std, np.repeat(stack.runs[:, 1:2], 3, axis=1))
            return result

    report = run(OneLevel(tmp_path / "b", 3), cases)
    true = np.array([case["volumes"]["true_voxels"] for case in report["cases"]], float)
    expected = true[:, 1:2] - true
    for level, entry in enumerate(report["volume_error_ml_per_level"]):
        ml = expected[:, level] * 0.7 * 0.8 * 2.5 / 1000
        assert entry["signed"]["mean"] == pytest.approx(ml.mean())
        assert entry["absolute"]["mean"] == pytest.approx(np.abs(ml).mean())
    assert report["volume_error_ml_per_level"][0]["signed"]["mean"] < 0 < report["volume_error_ml_per_level"][2]["signed"]["mean"]  # fmt: skip


def test_a_placeholder_for_spacing_measures_in_pixels_only(cases: list[Case], tmp_path: Path) -> None:
    for case in cases:
        image = nib.load(case.image)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), np.eye(4)), case.image)
    report = run(KnownMaps(tmp_path / "b", 3, shift=1), cases)
    assert all(entry["mean"] is None for entry in report["hd95_mm_per_level"])
    assert all(entry["mean"] is not None for entry in report["hd95_px_per_level"])
    assert all(entry["signed"]["n_cases"] == 0 for entry in report["volume_error_ml_per_level"])
    assert report["cases"][0]["volumes"]["voxel_ml"] is None
    row = cases_table(report)[0]
    for name in ("predicted_ml", "true_ml", "volume_error_ml"):
        assert [row[f"{name}_level_{c}"] for c in (1, 2, 3)] == [None] * 3


def test_noisy_runs_get_better_together(cases: list[Case], tmp_path: Path) -> None:
    """The curve: its last point is the score, more runs are better, and the spread finds where annotators disagree."""
    report = run(KnownMaps(tmp_path / "b", 3, noise=0.8, R=5), cases)
    curve = report["by_runs"]
    assert [point["runs"] for point in curve] == [1, 2, 3, 4, 5]
    for name in ("soft_dice_5", "soft_dice_9"):
        assert curve[-1][name]["mean"] == pytest.approx(report[name]["mean"], abs=1e-6)
        assert curve[0][name]["mean"] < curve[-1][name]["mean"]
        assert curve[-1][name]["low"] == pytest.approx(report[name]["low"], abs=1e-6)
    assert 0 < report["ece"]["mean"] < 1
    assert report["brier"]["mean"] > report["brier_floor"]["mean"]
    assert sum(row["pixels"] for row in report["reliability"]["whole"]) == 16 * 24 * 20


def test_one_annotator_and_one_run(tmp_path: Path) -> None:
    """What needs a second annotator or run is not defined; the rest is."""
    data = write_synthetic_dataset(tmp_path / "data", 2, raters=1, shape=(24, 20))
    report = run(KnownMaps(tmp_path / "b", 1, R=1), find_cases(data)["all"])
    missing = {name for name in PER_SLICE if report[name]["mean"] is None}
    assert missing == {
        *("ged_no_diagonal", "auroc_entropy", "auroc_entropy_near", "auroc_run_std", "auroc_run_std_near"),
        *("soft_dice_5_annotators", "soft_dice_9_annotators", "pairwise_dice_annotators"),
        *("dice_each_annotators", "dice_each_difference", "false_positive_slices"),
    }
    assert report["brier_floor"]["mean"] == report["crps"]["mean"] == 0
    assert [point["runs"] for point in report["by_runs"]] == [1]
    assert report["volume_error_ml_per_level"][0]["signed"]["n_cases"] == 0  # a 2-D image has no volume
    assert report["volume_error_voxels_per_level"][0]["signed"]["n_cases"] == 2
    json.dumps(report, allow_nan=False)


def test_a_model_that_marks_nothing(cases: list[Case], tmp_path: Path) -> None:
    class Nothing(KnownMaps):
        def segment(self, scan: Path, **asked: Any) -> Any:
            result = super().segment(scan, **asked)
            result.stack = Stack(
                *(np.zeros_like(part) for part in (result.stack.levels, result.stack.run_std, result.stack.runs))
            )
            return result

    report = run(Nothing(tmp_path / "b", 3), cases)
    assert report["soft_dice_5"]["mean"] < 0.2
    for level, entry in enumerate(report["hd95_px_per_level"]):
        assert entry["mean"] is None
        assert entry["n_model_empty"] == (16, 16, 12)[level]
    assert report["reliability"]["near"][0]["pixels"] > 0
    assert report["reliability"]["near"][1] == {
        "from": 0.1,
        "to": 0.2,
        "pixels": 0,
        "predicted": None,
        "observed": None,
    }
    assert report["ece_near"]["mean"] == pytest.approx(report["reliability"]["near"][0]["observed"])
    assert report["auroc_entropy"]["mean"] == 0.5
    json.dumps(report, allow_nan=False)


def test_groups_are_resampled_together(cases: list[Case], tmp_path: Path) -> None:
    """Two cases of each of two patients; with or without a bracket, the same groups."""
    segmenter = KnownMaps(tmp_path / "b", 3, shift=1)
    named = [replace(case, name=f"p{i // 2}_scan{i % 2}") for i, case in enumerate(cases)]
    alone = run(segmenter, named)
    assert (alone["intervals"]["resampled"], alone["intervals"]["units"]) == ("cases", 4)
    reports = [run(segmenter, named, group=pattern) for pattern in ("p[0-9]+", "(p[0-9]+)_scan")]
    for report in reports:
        assert (report["intervals"]["resampled"], report["intervals"]["units"]) == ("groups of cases", 2)
        assert [case["group"] for case in report["cases"]] == ["p0", "p0", "p1", "p1"]
        scores = [[s["soft_dice_5"] for case in report["cases"][i : i + 2] for s in case["slices"]] for i in (0, 2)]
        assert report["soft_dice_5"] == bootstrap_over_cases(scores).to_json()
        assert report["soft_dice_5"]["mean"] == pytest.approx(alone["soft_dice_5"]["mean"])
    one = run(segmenter, named, group="scan")  # a single group has no interval, whatever the score
    errors = (kind for entry in one["volume_error_voxels_per_level"] for kind in (entry["signed"], entry["absolute"]))
    by_runs = (point[name] for point in one["by_runs"] for name in ("soft_dice_5", "soft_dice_9"))
    of_parts = (
        entry for name in (*PER_LEVEL, *PER_CASE_LEVEL, PER_THRESHOLD, PER_CASE_THRESHOLD) for entry in one[name]
    )
    of_all = (one[name] for name in (*PER_SLICE, *PER_CASE, "ece", "ece_near", "expected_dice_rank"))
    assert {score["low"] for score in (*errors, *by_runs, *of_parts, *of_all)} == {None}
    assert alone["case_soft_dice_5"]["low"] < alone["case_soft_dice_5"]["high"]
    for pattern, message in (("p0", "p1_scan0"), ("(", "regular expression")):
        segmenter.asked.clear()
        with pytest.raises(CdiffError, match=message):
            run(segmenter, named, group=pattern)
        assert segmenter.asked == []  # said before any work


def test_levels_of_another_number_of_annotators() -> None:
    """Level c of C asks for at least c n / C of n annotators: 2 of 4 levels is one half, whoever counts."""
    masks = np.arange(4)[:, None, None] < np.arange(5)[None, None, :]  # pixel k was marked by k of 4
    assert true_levels(masks, 4).sum(axis=(1, 2)).tolist() == [4, 3, 2, 1]
    assert true_levels(masks, 2).sum(axis=(1, 2)).tolist() == [3, 1]
    assert true_levels(masks[:3], 4)[:, 0].tolist() == [[k * 4 >= c * 3 for k in (0, 1, 2, 3, 3)] for c in (1, 2, 3, 4)]


def test_real_cases(lidc: Path, tmp_path: Path) -> None:
    """Eight nodules of five patients, four readers each; maps that are the truth moved by a pixel."""
    cases = find_cases(lidc)["test"][:8]
    report = run(KnownMaps(tmp_path / "b", 4, shift=1), cases, group="LIDC-IDRI-[0-9]+")
    assert (report["n_cases"], report["intervals"]["units"]) == (8, 5)
    for case in report["cases"]:
        (mm,) = {
            float(size) for size in nib.load(lidc / "Testing" / case["case"] / "image.nii.gz").header.get_zooms()[:2]
        }
        for scores in case["slices"]:
            for pixels, length in zip(scores["hd95_px_per_level"], scores["hd95_mm_per_level"], strict=True):
                assert (pixels is None) == (length is None)
                assert pixels is None or (0 < pixels <= 1 and length == pytest.approx(mm * pixels))
            assert scores["brier"] > scores["brier_floor"]
            assert scores["brier_near"] > scores["brier"]
            for iou, dice in zip(scores["iou_per_level"], scores["dice_per_level"], strict=True):
                assert dice == pytest.approx(2 * iou / (1 + iou), abs=1e-5)
            assert scores["ged"] > scores["ged_floor"]
            assert scores["ged_no_diagonal"] < scores["ged"]
        truth = read_case(case_in(lidc / "Testing" / case["case"]))[1].sum(axis=1)
        assert case["volumes"]["predicted_voxels"] == case["volumes"]["true_voxels"]
        assert case["volumes"]["true_voxels"] == [int((truth >= c).sum()) for c in (1, 2, 3, 4)]
    # A map with four values that is calibrated but for the pixel's move.
    assert 0 < report["ece_near"]["mean"] < 0.2
    assert report["auroc_entropy_near"]["mean"] > 0.5
