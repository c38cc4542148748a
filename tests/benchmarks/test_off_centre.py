"""Pointing beside a structure: where cases are pointed at, and that the scores are of maps drawn there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest

import cdiff
from cdiff.benchmarks import off_centre
from cdiff.benchmarks.off_centre import DIRECTIONS, PIXELS, beside, main, measure, summary
from cdiff.runtime.data.cases import Case, find_cases
from cdiff.runtime.scoring.metrics import bootstrap_over_cases, soft_dice
from cdiff.runtime.segmenter import Segmenter
from tests.conftest import REPOSITORY
from tests.synthetic import write_synthetic_dataset

DEMO = REPOSITORY / "cdiff" / "demo"


def test_cases_are_pointed_at_in_all_directions_as_far() -> None:
    assert beside((64, 60), 0, 3) == (64, 60)
    assert beside((10, 20), 8, 1) == (16, 14), "three eighths of a turn"
    places = {beside((0, 0), 12, number) for number in range(DIRECTIONS)}
    assert len(places) == DIRECTIONS
    assert all(abs(math.hypot(*place) - 12) < 1 for place in places)
    assert np.abs(np.sum(list(places), axis=0)).max() == 0


def test_scores_are_compared_with_pointing_at_the_middle() -> None:
    def rows(*scores: float) -> list[dict[str, object]]:
        return [
            {
                "pixels": pixels,
                "slice": k,
                "soft_dice_5": score - 0.01 * pixels,
                "dice_each": score,
                "expected_dice": None if pixels == 16 and k == 0 else score / 2,
                "missed": pixels == 16 and k == 0,
            }
            for pixels in PIXELS
            for k, score in enumerate(scores)
        ]

    found = summary([rows(0.5, 1.0), rows(0.75)], PIXELS)
    assert [one["pixels"] for one in found] == list(PIXELS)
    assert found[0]["soft_dice_5"] == bootstrap_over_cases([[0.5, 1.0], [0.75]]).to_json(), "over cases"
    assert [found[3]["difference"][end] for end in ("mean", "low", "high")] == pytest.approx([-0.08] * 3)
    shares = [pytest.approx(2 / 3) if pixels == 16 else 0 for pixels in PIXELS]
    assert [one["missed"] for one in found] == [one["empty"] for one in found] == shares
    # What is expected stands beside what was found of the same slices.
    assert [found[5][name]["mean"] for name in ("expected_dice", "dice_each")] == [0.5, 1]
    assert [found[0][name]["mean"] for name in ("expected_dice", "dice_each")] == [0.375, 0.75]


def test_what_is_measured_of_a_slice_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "Validation" / "case01"
    folder.mkdir(parents=True)
    masks = np.zeros((4, 16, 16, 4), np.uint8)
    masks[:2, 8, 8, 0] = masks[2:, 0, 0, 0] = 1  # a tie: most marked nothing
    masks[:, 8, 8, 1] = masks[:3, 8, 9, 1] = 1
    masks[:, 8, 8, 2] = 1
    masks[:3, 8, 8, 3] = 1  # not by all
    for name, values in (("image", masks[0]), *((f"task01_seg0{k + 1}", mask) for k, mask in enumerate(masks))):
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"{name}.nii.gz")
    soft = np.zeros((3, 16, 16), np.float32)
    soft[0, 4, 4], soft[1, 8, 8], soft[2, 4, 4] = 0.6, 0.6, 0.9
    asked: list[dict[str, Any]] = []

    def segment(scan: object, **how: Any) -> SimpleNamespace:
        asked.append(how)
        return SimpleNamespace(stack=SimpleNamespace(soft=soft))

    (case,) = find_cases(tmp_path)["val"]
    rows = measure(cast(Segmenter, SimpleNamespace(segment=segment)), case, 1, (0, 4), None)
    assert [(row["pixels"], row["slice"]) for row in rows] == [(pixels, k) for pixels in (0, 4) for k in range(3)]
    assert [row["missed"] for row in rows[:3]] == [False, False, True]
    assert [row["dice_each"] for row in rows[:3]] == pytest.approx([0, 0.75, 0], abs=1e-5)
    truth = masks.mean(axis=0)
    assert [row["soft_dice_5"] for row in rows[:3]] == [soft_dice(soft[k], truth[..., k]) for k in range(3)]
    assert [how["at"] for how in asked] == [(8, 8, 0), (11, 5, 0)]
    assert all(how | {"at": 0} == {"at": 0, "slices": slice(0, 3), "fast": True, "seed": 0} for how in asked)


def test_the_cases_that_were_asked_for_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_synthetic_dataset(tmp_path, {"Validation": 3, "Testing": 2}, raters=2, shape=(16, 16, 2))
    seen: list[tuple[Any, ...]] = []

    def measured(model: object, case: Case, *rest: Any) -> list[dict[str, Any]]:
        seen.append((case.scan.parent.parent.name, *rest))
        return []

    monkeypatch.setattr(off_centre, "measure", measured)
    monkeypatch.setattr(cdiff, "load", lambda: None)
    assert main(["--data", str(root), "--limit", "2"]) == 2
    assert main(["--data", str(root), "--split", "test", "--pixels", "0,3", "--slices-per-case", "1"]) == 2
    assert seen == [("Validation", k, PIXELS, None) for k in range(2)] + [("Testing", k, (0, 3), 1) for k in range(2)]


@pytest.mark.slow
def test_the_maps_are_those_of_the_place_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = tmp_path / "data" / "Validation" / "case01"
    case.mkdir(parents=True)
    for path in DEMO.glob("*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., 2:4], image.affine), case / path.name)
    out = tmp_path / "out.json"
    assert main(["--data", str(tmp_path / "data"), "--pixels", "0,8", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert (report["split"], report["cases"], report["slices"]) == ("val", 1, 2)
    (demo,) = find_cases(tmp_path / "data")["val"]
    row, column = beside((64, 64), 8, 0)
    result = cdiff.load().segment(demo.scan, at=(row, column, 0), slices=(0, 2), fast=True)
    soft = result.soft
    truth = np.mean([nib.load(path).get_fdata() for path in demo.masks], axis=0)
    wanted = np.mean([soft_dice(soft[..., k], truth[..., k]) for k in range(2)])
    assert report["found"][1]["soft_dice_5"]["mean"] == pytest.approx(wanted)
    expected = np.mean([one["mask"] for one in result.report["expected_dice"]["slices"]])
    assert report["found"][1]["expected_dice"]["mean"] == pytest.approx(expected, abs=1e-4)
    assert "8 pixels beside: soft Dice" in capsys.readouterr().out


def test_data_that_it_cannot_measure_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_synthetic_dataset(tmp_path / "flat", {"Validation": 1}, raters=4, shape=(40, 40))
    assert main(["--data", str(root)]) == 2
    assert "case01 is not a volume" in capsys.readouterr().err
    root = write_synthetic_dataset(tmp_path / "empty", {"Validation": 1}, raters=4, shape=(40, 40, 2))
    mask = next(root.rglob("*seg01*"))
    nib.save(nib.Nifti1Image(np.zeros((40, 40, 2), np.uint8), nib.load(mask).affine), mask)
    assert main(["--data", str(root)]) == 2
    assert "no slice of the split val was marked by all" in capsys.readouterr().err
