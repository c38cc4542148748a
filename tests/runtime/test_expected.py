"""What overlap a map expects of its own mask: by hand, against masks drawn from the map, in the report of a scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cdiff
from cdiff.runtime.expected import expected_counts, expected_dice
from cdiff.runtime.report import DOUBTFUL, about_expected, expectation
from cdiff.runtime.scoring.metrics import dice
from cdiff.runtime.stack import Stack
from cdiff.runtime.variants import CONSENSUS, IMPLICIT_ENSEMBLE


def counted(soft: np.ndarray) -> np.ndarray:
    return expected_counts(soft, soft >= 0.5)


def test_by_hand() -> None:
    """Of 0.9, 0.5 and 0.4 the mask has the first two: 2 (0.9 + 0.5) / (2 + 1.8)."""
    soft = np.array([[0.9, 0.5], [0.4, 0.0]])
    assert counted(soft).tolist() == pytest.approx([1.4, 2, 1.8])
    assert float(expected_dice(counted(soft))) == pytest.approx(2.8 / 3.8)


def test_a_map_that_is_sure_expects_its_mask_to_be_right_and_an_empty_mask_expects_nothing() -> None:
    maps = np.zeros((3, 4, 5), np.float32)
    maps[0, 1:3, 1:3] = 1
    maps[1] = 0.49
    assert expected_dice(counted(maps)).tolist() == pytest.approx([1, np.nan, np.nan], nan_ok=True)


def test_it_is_the_mean_dice_with_masks_that_are_drawn_from_the_map() -> None:
    """Annotators whose pixels come out as the map says: their mean Dice with its mask is what it expects, whatever else it holds."""
    rng = np.random.default_rng(5)
    for sure in (0.6, 1.0, 3.0):
        distance = np.hypot(*np.mgrid[-20:20, -20:20]) - 12
        soft = 1 / (1 + np.exp(sure * distance / 3))
        drawn = [dice(soft >= 0.5, rng.random(soft.shape) < soft) for _ in range(400)]
        assert float(expected_dice(counted(soft))) == pytest.approx(np.mean(drawn), abs=0.003)


def test_a_scans_slices_count_together_as_one_mask() -> None:
    rng = np.random.default_rng(1)
    maps = rng.random((3, 2, 6, 7), dtype=np.float32)
    maps[2] = 0.2
    soft = maps.mean(axis=1)
    found = expectation(Stack(maps, maps.std(axis=1)), range(4, 7))
    mask = soft >= 0.5
    assert found["mask"] == pytest.approx(2 * soft[mask].sum() / (mask.sum() + soft.sum()), abs=1e-4)
    assert [one["slice"] for one in found["slices"]] == [4, 5, 6]
    assert found["slices"][0]["mask"] == pytest.approx(
        2 * soft[0][mask[0]].sum() / (mask[0].sum() + soft[0].sum()), abs=1e-4
    )
    assert found["slices"][2]["mask"] is None
    empty = expectation(Stack(maps[2:], maps[2:].std(axis=1)), range(1))
    assert empty == {"mask": None, "slices": [{"slice": 0, "mask": None}]}


def test_little_is_told_and_enough_is_not() -> None:
    assert about_expected({"mask": None}, CONSENSUS) == about_expected({"mask": DOUBTFUL}, CONSENSUS) == []
    (note,) = about_expected({"mask": 0.31}, CONSENSUS)
    assert "0.31" in note
    assert "an annotator's mask" in note
    assert "the true mask" in about_expected({"mask": 0.31}, IMPLICIT_ENSEMBLE)[0]


def test_the_note_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdiff.runtime.report.DOUBTFUL", 1.01)
    scan = Path(cdiff.__file__).parent / "demo" / "image.nii.gz"
    report = cdiff.load().segment(scan, fast=True, runs=1, zooms=(1.0,), slices="3:4").report
    assert f"a Dice of only {report['expected_dice']['mask']:.2f} between this mask" in report["warnings"][-1]
