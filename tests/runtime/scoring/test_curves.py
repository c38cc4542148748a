"""Soft Dice by number of runs is what those runs alone would have scored."""

from __future__ import annotations

import numpy as np
import pytest

from cdiff.runtime.scoring.curves import run_counts, soft_dice_by_runs
from cdiff.runtime.scoring.metrics import FIVE, NINE, soft_dice


def _runs(levels: int = 3, runs: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    maps = np.zeros((levels, runs, 16, 18), np.uint8)
    maps[:, :, 3:11, 5:14] = rng.integers(0, 256, size=(levels, runs, 8, 9))
    return maps


@pytest.mark.parametrize("annotators", [3, 10])  # shares of the latter are the thresholds themselves
@pytest.mark.parametrize("combine", ["mean", "vote"])
def test_each_point_is_the_score_of_its_runs(combine: str, annotators: int) -> None:
    runs, rng = _runs(), np.random.default_rng(1)
    truth = np.zeros((16, 18))
    truth[4:12, 4:12] = rng.integers(0, annotators + 1, size=(8, 8)) / annotators
    counts = [1, 2, 4, 6]
    found = soft_dice_by_runs(runs, truth, combine, counts)
    for row, count in zip(found, counts, strict=True):
        levels = runs[:, :count].mean(axis=1) / 255
        soft = (levels >= 0.5 if combine == "vote" else levels).mean(axis=0)
        assert row.tolist() == pytest.approx([soft_dice(soft, truth, FIVE), soft_dice(soft, truth, NINE)], abs=1e-12)


def test_empty_maps() -> None:
    nothing = np.zeros((3, 4, 16, 18), np.uint8)
    assert soft_dice_by_runs(nothing, np.zeros((16, 18)), "mean", [1, 4]).tolist() == [[1, 1], [1, 1]]
    truth = np.zeros((16, 18))
    truth[0, 0] = 1
    assert soft_dice_by_runs(nothing, truth, "mean", [1]) == pytest.approx(0, abs=1e-5)


def test_which_numbers_of_runs() -> None:
    assert run_counts(1) == [1]
    assert run_counts(25) == list(range(1, 26))
    many = run_counts(200)
    assert (many[0], many[-1]) == (1, 200)
    assert len(many) <= 25
    assert many == sorted(set(many))
