"""Metrics against hand computations, the exact rational definition, and the known human scores on real data."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cdiff.runtime.data.cases import find_cases, read_case
from cdiff.runtime.scoring.metrics import (
    FIVE,
    NINE,
    at_least,
    bootstrap_over_cases,
    dice,
    dice_of,
    energy_distance,
    ged,
    iou_of,
    overlap,
    overlap_by_threshold,
    overlap_of_annotators,
    overlap_of_pairs,
    overlap_of_panels,
    overlap_with_each,
    resampled,
    soft_dice,
)


def _mask(*pixels: int, size: int = 8) -> np.ndarray:
    mask = np.zeros((2, size // 2), dtype=bool)
    mask.flat[list(pixels)] = True
    return mask


def test_dice_by_hand() -> None:
    assert dice(_mask(0, 1, 2), _mask(1, 2, 3, 4)) == pytest.approx(4 / 7, abs=1e-6)
    assert dice(_mask(0), _mask(1)) == pytest.approx(0, abs=1e-6)
    assert dice(_mask(), _mask()) == 1
    assert dice(_mask(), _mask(3)) == pytest.approx(0, abs=2e-6)


def test_masks_given_as_numbers_are_read_as_masks() -> None:
    assert dice(_mask(0, 1).astype(np.uint8) * 255, _mask(1)) == dice(_mask(0, 1), _mask(1))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        dice(np.zeros((2, 4), bool), np.zeros((4, 2), bool))
    with pytest.raises(ValueError, match="one shape"):
        soft_dice(np.zeros((1, 4)), np.zeros((3, 4)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("annotators", range(1, 11))
def test_thresholds_see_fractions_exactly(annotators: int, dtype: type) -> None:
    """k of C annotators reach a decimal threshold when k / C >= h in rational arithmetic, in either precision."""
    votes = np.arange(annotators + 1)
    direct = (votes / annotators).astype(dtype)
    summed = np.array([sum([dtype(1) / dtype(annotators)] * k, start=dtype(0)) for k in votes], dtype=dtype)
    for h in NINE:
        exact = [Fraction(int(k), annotators) >= Fraction(str(h)) for k in votes]
        assert at_least(direct, h).tolist() == exact
        assert at_least(summed, h).tolist() == exact


def test_a_step_below_a_threshold_stays_below() -> None:
    """The slack must not lift a real value: the finest map here is 10 annotators times 1,000 runs."""
    assert not at_least(np.float32([0.7 - 1e-4]), 0.7)[0]


def test_soft_dice_by_hand() -> None:
    truth = np.array([[0, 0.25, 0.5, 1.0]])
    pred = np.array([[0, 0.5, 0.5, 0.8]])
    # >= 0.1: 3 of 3; 0.3: {1,2,3} and {2,3}; 0.5: the same; 0.7: {3}; 0.9: {} and {3}
    assert soft_dice(pred, truth, FIVE) == pytest.approx((1 + 4 / 5 + 4 / 5 + 1 + 0) / 5, abs=1e-5)
    assert soft_dice(truth, truth, NINE) == 1


def test_dice_by_threshold_by_hand() -> None:
    truth = np.array([[0, 0.25, 0.5, 1.0]])
    pred = np.array([[0, 0.5, 0.5, 0.8]])
    # Pixels that reach h: pred {1,2,3} to 0.5, {3} to 0.8, none at 0.9; truth {1,2,3} to 0.2, {2,3} to 0.5, {3} above.
    expected = [1, 1, 4 / 5, 4 / 5, 4 / 5, 1, 1, 1, 0]
    np.testing.assert_allclose(dice_of(overlap_by_threshold(pred, truth)), expected, atol=1e-5)
    assert soft_dice(pred, truth, NINE) == pytest.approx(np.mean(expected), abs=1e-5)


def test_iou_by_hand() -> None:
    pairs = [((0, 1, 2), (1, 2, 3, 4)), ((0,), (1,)), ((), (1,)), ((), ())]
    counts = np.stack([overlap(_mask(*a), _mask(*b)) for a, b in pairs])
    assert counts.tolist() == [[2, 3, 4], [0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert iou_of(counts).tolist() == [2 / 5, 0, 0, 1]
    with pytest.raises(ValueError, match="one shape"):
        overlap(np.zeros((2, 4), bool), np.zeros((4, 2), bool))


def test_soft_dice_of_two_empty_maps_is_one() -> None:
    assert soft_dice(np.zeros((4, 4)), np.zeros((4, 4))) == 1


def test_pairwise_dice_is_the_mean_over_pairs() -> None:
    masks = np.stack([_mask(0, 1), _mask(1, 2), _mask(1, 2, 3), _mask()])
    pairs = [dice(a, b) for a, b in combinations(masks, 2)]
    assert dice_of(overlap_of_pairs(masks)).mean() == pytest.approx(sum(pairs) / 6)
    assert overlap_of_pairs(masks[:1]).shape == (0, 3)


def test_annotators_score_by_hand() -> None:
    masks = np.stack([_mask(0, 1), _mask(0), _mask(0)])
    # The first against {0: 1, 1: 0}: 2 of 3 pixels at every threshold. The others against {0: 1, 1: 0.5}: pixel 1 is missed
    # at 0.1, 0.3 and 0.5, so 2/3 there and 1 above.
    first, other = 2 / 3, (3 * 2 / 3 + 2) / 5
    found = dice_of(overlap_of_annotators(masks)[:, ::2]).mean(axis=1)
    assert found == pytest.approx([first, other, other], abs=1e-5)
    assert overlap_of_annotators(masks[:1]).shape == (0, 9, 3)


def test_one_annotator_against_a_map_and_against_the_others_majority_by_hand() -> None:
    masks = np.stack([_mask(0, 1), _mask(0), _mask(0, 2), _mask(0, 1, 2, 3)])

    def panels(masks: np.ndarray) -> float:
        return float(dice_of(overlap_of_panels(masks)).mean())

    assert dice_of(overlap_with_each(_mask(0, 1), masks)).mean() == pytest.approx(
        (1 + 2 / 3 + 2 / 4 + 4 / 6) / 4, abs=1e-6
    )
    # Two of the other three: {0, 2}, {0, 1, 2}, {0, 1} and {0}.
    assert panels(masks) == pytest.approx((2 / 4 + 2 / 4 + 2 / 4 + 2 / 5) / 4, abs=1e-6)
    # Of the other two, one is half: {0, 2}, {0, 1, 2} and {0, 1}.
    assert panels(masks[:3]) == pytest.approx((2 / 4 + 2 / 4 + 2 / 4) / 3, abs=1e-6)
    assert panels(masks[:2]) == dice(masks[0], masks[1])
    assert overlap_of_panels(masks[:1]).shape == (0, 3)


def _ged_plain(samples: np.ndarray, reference: np.ndarray, diagonal: bool = True) -> float:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        either = np.sum(a | b)
        return 1 - (np.sum(a & b) / either if either else 1)

    def mean(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.mean([[distance(a, b) for b in second] for a in first]))

    def within(masks: np.ndarray) -> float:
        pairs = [(i, j) for i in range(len(masks)) for j in range(len(masks)) if diagonal or i != j]
        return float(np.mean([distance(masks[i], masks[j]) for i, j in pairs]))

    return 2 * mean(samples, reference) - within(samples) - within(reference)


def test_energy_distance_against_plain_loops() -> None:
    rng = np.random.default_rng(3)
    samples = rng.random((7, 9, 9)) < rng.random((7, 1, 1))
    samples[2] = False
    reference = rng.random((4, 9, 9)) < 0.3
    reference[1] = False
    assert ged(samples, reference) == pytest.approx(_ged_plain(samples, reference), abs=1e-6)
    found = energy_distance(samples, reference)
    assert found.with_diagonal == ged(samples, reference)
    assert found.no_diagonal == pytest.approx(_ged_plain(samples, reference, diagonal=False), abs=1e-6)


def test_energy_distance_of_a_slice_larger_than_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding up part by part changes nothing."""
    rng = np.random.default_rng(4)
    samples, reference = rng.random((5, 20, 30)) < 0.4, rng.random((3, 20, 30)) < 0.3
    whole = energy_distance(samples, reference)
    monkeypatch.setattr("cdiff.runtime.scoring.metrics.PIXELS_AT_ONCE", 70)
    assert energy_distance(samples, reference) == whole


def test_the_two_conventions_by_hand() -> None:
    """d({0,1}, {1,2}) = 2/3. Both sets hold both masks: cross 1/3; with the diagonal 1/3 each, without it 2/3 each."""
    both = np.stack([_mask(0, 1), _mask(1, 2)])
    found = energy_distance(both, both)
    assert found.with_diagonal == pytest.approx(0)
    assert found.no_diagonal == pytest.approx(2 / 3 - 2 * 2 / 3)
    assert np.isnan(energy_distance(both[:1], both).no_diagonal)
    assert np.isnan(energy_distance(both, both[:1]).no_diagonal)


def test_without_the_diagonal_the_number_of_samples_does_not_matter() -> None:
    """Samples and annotators of one distribution: the U-statistic is 0 on average, the V-statistic shrinks with the samples."""
    rng = np.random.default_rng(5)

    def draw(count: int) -> np.ndarray:
        return np.arange(12)[None] < rng.integers(4, 10, size=(count, 1))

    few = [energy_distance(draw(2), draw(4)) for _ in range(400)]
    many = [energy_distance(draw(8), draw(4)) for _ in range(400)]
    assert abs(np.mean([d.no_diagonal for d in few])) < 0.02
    assert abs(np.mean([d.no_diagonal for d in many])) < 0.02
    assert np.mean([d.with_diagonal for d in few]) > 1.5 * np.mean([d.with_diagonal for d in many])


def test_energy_distance_by_hand() -> None:
    one, other = _mask(0, 1)[None], _mask(1, 2)[None]
    assert ged(one, one) == pytest.approx(0)
    assert ged(one, other) == pytest.approx(2 * (1 - 1 / 3))
    both = np.concatenate([one, other])
    # 2 * mean(0, 2/3) - 0 - mean(0, 2/3, 2/3, 0)
    assert ged(one, both) == pytest.approx(2 * (1 / 3) - 1 / 3)


def test_energy_distance_needs_masks() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ged(np.zeros((0, 2, 4), bool), _mask()[None])
    with pytest.raises(ValueError, match="one shape"):
        ged(np.zeros((1, 2, 4), bool), np.zeros((1, 4, 2), bool))


def test_rounding_makes_no_distance_negative() -> None:
    """Of masks and the same masks several times over; without the limit seven of the twenty are -2e-16."""
    for seed in range(20):
        masks = np.random.default_rng(seed).random((3, 6, 6)) < 0.4
        assert 0 <= ged(np.repeat(masks, 7, axis=0), masks) < 1e-12


def test_bootstrap_mean_is_over_slices() -> None:
    interval = bootstrap_over_cases([[1.0, 1.0, 1.0], [0.0]])
    assert interval.mean == pytest.approx(0.75)
    assert interval.n_slices == 4
    assert interval.low == 0
    assert interval.high == 1


def test_bootstrap_draws_cases_not_slices() -> None:
    """Ten copies of a case's slices add no knowledge: the interval stays as wide as without the copies."""
    values = np.random.default_rng(0).random(20)
    once = bootstrap_over_cases([[v] for v in values])
    often = bootstrap_over_cases([[v] * 10 for v in values])
    assert often.low == pytest.approx(once.low)
    assert often.high == pytest.approx(once.high)


def test_the_draws_of_a_report_are_made_once_and_cannot_be_changed() -> None:
    assert resampled(7) is resampled(7)
    assert (resampled(7).sum(axis=1) == 7).all()
    with pytest.raises(ValueError, match="read-only"):
        resampled(7)[0, 0] = 1


def test_groups_are_drawn_together() -> None:
    """Cases of one patient: the interval is that of the patients, and the names' order does not matter."""
    values = np.random.default_rng(2).random(12)
    patients = bootstrap_over_cases([[v, v] for v in values])
    cases = [[v] for v in values for _ in range(2)]
    names = [f"patient{i}" for i in range(12) for _ in range(2)]
    grouped = bootstrap_over_cases(cases, groups=names)
    assert grouped == patients
    alone = bootstrap_over_cases(cases)
    assert grouped.mean == alone.mean
    assert grouped.low is not None
    assert alone.low is not None
    assert grouped.low < alone.low
    assert bootstrap_over_cases(cases, groups=["one"] * 24).low is None


def test_bootstrap_covers_the_true_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nominal 95 %; 40 cases of unequal numbers of slices, which share a case effect."""
    monkeypatch.setattr("cdiff.runtime.scoring.metrics.RESAMPLES", 500)
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        cases = [rng.normal(rng.normal(0.5, 0.1), 0.05, size=rng.integers(1, 8)) for _ in range(40)]
        interval = bootstrap_over_cases(cases)
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 0.5 <= interval.high
    assert 0.88 <= hits / 300 <= 0.99


def test_bootstrap_leaves_undefined_scores_out() -> None:
    interval = bootstrap_over_cases([[float("nan"), 0.5], [float("nan")], [1.0]])
    assert interval.mean == pytest.approx(0.75)
    assert interval.n_slices == 2
    assert bootstrap_over_cases([[float("nan")]]).mean is None
    alone = bootstrap_over_cases([[0.5, 0.7]])
    assert alone.mean == pytest.approx(0.6)
    assert alone.low is None


def test_the_known_human_scores_on_real_data(lidc: Path) -> None:
    """351 slices of the Testing split were marked by all four; their scores, as the data's notes state them to a digit
    in the third place, come from other code: 0.770 (0.7695 here), 0.762, and 0.924 for three readers against all four.
    """
    pairs, humans, three = [], [], []
    for case in find_cases(lidc)["test"]:
        for masks in read_case(case)[1]:
            if masks.any(axis=(1, 2)).all():
                pairs.append(dice_of(overlap_of_pairs(masks)).mean())
                humans.append(dice_of(overlap_of_annotators(masks)[:, ::2]).mean())
                three += [soft_dice(np.delete(masks, i, 0).mean(0), masks.mean(0)) for i in range(4)]
    assert len(pairs) == 351
    assert np.mean(pairs) == pytest.approx(0.770, abs=1e-3)
    assert np.mean(humans) == pytest.approx(0.762, abs=1e-3)
    assert np.mean(three) == pytest.approx(0.924, abs=1e-3)
