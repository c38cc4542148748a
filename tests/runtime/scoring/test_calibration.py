"""Brier, CRPS, reliability, ECE and AUROC against hand computations, their definitions in loops, and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from cdiff.runtime.scoring.calibration import BINS, auroc, brier, crps, ece, reliability
from cdiff.runtime.scoring.scores import true_levels
from cdiff.runtime.stack import entropy


def _annotators(count: int = 4, shape: tuple[int, int] = (6, 7)) -> np.ndarray:
    return np.random.default_rng(1).random((count, *shape)) < 0.4


def test_brier_is_the_mean_over_annotators() -> None:
    masks, p = _annotators(), np.random.default_rng(2).random((6, 7)).astype(np.float32)
    plain = np.mean([(p.astype(np.float64) - mask) ** 2 for mask in masks], axis=0)
    np.testing.assert_allclose(brier(p, masks.mean(axis=0)), plain, atol=1e-12)


def test_brier_by_hand() -> None:
    # All four, none, half of them: certain and right, certain and wrong, and the best there is: f (1 - f).
    np.testing.assert_allclose(brier(np.array([1.0, 1.0, 0.5]), np.array([1.0, 0.0, 0.5])), [0, 1, 0.25])


def test_brier_is_smallest_at_the_fraction() -> None:
    """Proper: no other map scores better than the annotators' own fraction."""
    f = _annotators().mean(axis=0)
    best = brier(f, f).mean()
    assert best == pytest.approx((f * (1 - f)).mean())
    for shift in (-0.1, 0.05, 0.3):
        assert brier(np.clip(f + shift, 0, 1), f).mean() > best


def test_crps_is_the_integral_of_the_squared_difference() -> None:
    """By numerical integration over k / C of (F(k) - 1[K <= k])^2, F a step function that jumps at 0, 1 ... C."""
    masks = _annotators(3)
    levels = np.sort(np.random.default_rng(3).random((3, 6, 7)), axis=0)[::-1]  # P(K >= c) falls with c
    votes = masks.sum(axis=0)
    grid = (np.arange(3000) + 0.5) / 1000  # 0 to 3 annotators
    integral = np.zeros((6, 7))
    for k in grid:
        # P(K <= k) = 1 - P(K >= floor(k) + 1)
        distribution = 1 - levels[int(k)]
        integral += (distribution - (votes <= k)) ** 2
    np.testing.assert_allclose(crps(levels, true_levels(masks, 3)), integral / 1000 / 3, atol=1e-9)


def test_crps_of_one_annotator_is_the_brier_score() -> None:
    mask, p = _annotators(1), np.random.default_rng(4).random((1, 6, 7))
    np.testing.assert_allclose(crps(p, mask), brier(p[0], mask.mean(axis=0)))


def test_reliability_and_ece_by_hand() -> None:
    # Bin 0: two pixels, mean p 0.05, mean f 0; bin 5: one pixel, p 0.55, f 0.75; bin 9: one of p 1, f 1.
    p, f = np.array([0.0, 0.1 - 1e-4, 0.55, 1.0]), np.array([0.0, 0.0, 0.75, 1.0])
    table = reliability(p, f)
    assert table.shape == (3, BINS)
    assert table[0].tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert table[2].tolist() == [0, 0, 0, 0, 0, 0.75, 0, 0, 0, 1]
    assert float(ece(table)) == pytest.approx((2 * 0.04995 + 1 * 0.2 + 0) / 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_at_a_bins_edge_belongs_above_it(dtype: type) -> None:
    """7 of 10 annotators are 0.69999999 in single precision."""
    tenths = (np.arange(11) / 10).astype(dtype)
    assert reliability(tenths, tenths)[0].tolist() == [1] * 9 + [2]


def test_ece_of_the_fraction_itself_is_zero_and_of_nothing_undefined() -> None:
    f = _annotators().mean(axis=0)
    assert float(ece(reliability(f, f))) == 0
    assert np.isnan(ece(np.zeros((3, BINS))))
    tables = np.stack([reliability(f, f), 3 * reliability(np.clip(f + 0.2, 0, 1), f)])
    assert ece(tables).tolist() == [0, float(ece(tables[1]))], "each over its own pixels"


def test_tables_add_up() -> None:
    """The parts of a picture summed are the picture: cases and slices may be added in any order."""
    rng = np.random.default_rng(5)
    p, f = rng.random((2, 8, 9))
    np.testing.assert_allclose(reliability(p[:3], f[:3]) + reliability(p[3:], f[3:]), reliability(p, f))


def test_auroc_by_hand() -> None:
    score = np.array([0.9, 0.8, 0.8, 0.1])
    # Wanted 0.9 and 0.8 against 0.8 and 0.1: three pairs right, one tied.
    assert auroc(score, np.array([True, True, False, False])) == (3 + 0.5) / 4
    assert auroc(score, score > 0.5) == 1
    assert auroc(-score, score > 0.5) == 0
    assert auroc(np.zeros(4), np.array([True, False, True, False])) == 0.5


@pytest.mark.parametrize("parts", [3, 10, 25])
def test_fractions_as_far_from_one_half_on_either_side_are_a_tie(parts: int) -> None:
    """k and n - k of n are equally uncertain, however single precision rounds them."""
    few = np.arange(1, (parts + 1) // 2)
    entropies = entropy((np.concatenate([few, parts - few]) / parts).astype(np.float32)).reshape(2, -1)
    for below, above in entropies.T:
        assert auroc(np.array([below, above]), np.array([True, False])) == 0.5


def test_auroc_is_mann_whitneys_u() -> None:
    rng = np.random.default_rng(6)
    score = np.round(rng.random((20, 20)), 1)  # many ties
    wanted = rng.random((20, 20)) < 0.2 + 0.3 * score
    u = mannwhitneyu(score[wanted], score[~wanted]).statistic
    assert auroc(score, wanted) == pytest.approx(u / (wanted.sum() * (~wanted).sum()))


def test_auroc_needs_both_kinds() -> None:
    assert np.isnan(auroc(np.ones(3), np.ones(3, bool)))
    assert np.isnan(auroc(np.ones(3), np.zeros(3, bool)))
    assert np.isnan(auroc(np.ones(0), np.zeros(0, bool)))
