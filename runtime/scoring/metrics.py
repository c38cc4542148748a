"""Scores against several annotators: Dice and soft Dice (Amit et al. 2023, section 4), GED (Kohl et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIVE: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
NINE: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SMOOTH = 1e-6
# Maps are float32 fractions such as 3/10 or a mean over runs: rounding puts them up to 1e-7 off a decimal threshold, on either
# side. Half a millionth is far above that and far below the step of any map, 1 / (annotators x runs).
SLACK = 5e-7

Counts = NDArray[np.int64]
"""[..., 3]: the numbers of pixels in both masks of a pair, in the first, in the second. A volume's are the sums of its slices'."""


def at_least(values: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """`values >= threshold`, where a difference within SLACK counts as equal, so that the rounding of decimal fractions does not matter."""
    return np.asarray(np.asarray(values, dtype=np.float64) >= threshold - SLACK)


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> Counts:
    """The counts [3] for Dice and IoU of two masks of equal shape. Raises ValueError if the shapes differ."""
    _same_shape(a, b)
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    return np.array([np.count_nonzero(mask) for mask in (first & second, first, second)], np.int64)


def dice_of(counts: Counts) -> NDArray[np.float64]:
    """Dice of each pair, (2 |a and b| + s) / (|a| + |b| + s), s = 1e-6: [..., 3] -> [...]; two empty masks score 1.

    The smoothing is the published code's.
    """
    both, first, second = np.moveaxis(counts, -1, 0)
    return np.asarray((2.0 * both + SMOOTH) / (first + second + SMOOTH))


def iou_of(counts: Counts) -> NDArray[np.float64]:
    """Intersection over union of each pair, |a and b| / |a or b|: [..., 3] -> [...]; two empty masks score 1."""
    both, first, second = np.moveaxis(counts, -1, 0)
    either = first + second - both
    return np.asarray(np.divide(both, either, out=np.ones(either.shape), where=either > 0))


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Dice of two masks of equal shape: see `dice_of`. Raises ValueError if the shapes differ."""
    return float(dice_of(overlap(a, b)))


def overlap_by_threshold(pred: NDArray[Any], truth: NDArray[Any], thresholds: Sequence[float] = NINE) -> Counts:
    """The overlap of pred >= h and truth >= h for each threshold h, [K, 3].

    pred, truth: fractions of annotators in 0..1, of equal shape (one slice: [H, W]). K is the number of thresholds. Equality
    with a threshold counts as reaching it, whatever the rounding (see `at_least`). Raises ValueError if the shapes differ.
    """
    _same_shape(pred, truth)
    return np.stack([overlap(at_least(pred, h), at_least(truth, h)) for h in thresholds])


def soft_dice(pred: NDArray[Any], truth: NDArray[Any], thresholds: Sequence[float] = FIVE) -> float:
    """Mean over thresholds h of Dice(pred >= h, truth >= h), which is 1 where both are empty at h.

    For pred, truth and errors see `overlap_by_threshold`.
    """
    return float(dice_of(overlap_by_threshold(pred, truth, thresholds)).mean())


def overlap_of_pairs(masks: NDArray[np.bool_]) -> Counts:
    """The overlap of every pair of annotators' masks, bool [n, ...] -> [n (n - 1) / 2, 3]."""
    pairs = [overlap(masks[i], masks[j]) for i in range(len(masks)) for j in range(i)]
    return np.array(pairs, np.int64).reshape(-1, 3)


def overlap_of_annotators(masks: NDArray[np.bool_]) -> Counts:
    """The human reference: each annotator's mask, as a soft map, against the fraction among the *other* annotators.

    masks: bool [n, ...] -> [n, 9, 3] for the thresholds NINE, as in `overlap_by_threshold`; [0, 9, 3] for a single annotator.
    """
    others, total = len(masks) - 1, masks.sum(axis=0, dtype=np.float64)
    counts = [overlap_by_threshold(mask, (total - mask) / others, NINE) for mask in masks if others]
    return np.array(counts, np.int64).reshape(-1, len(NINE), 3)


def overlap_with_each(mask: NDArray[np.bool_], masks: NDArray[np.bool_]) -> Counts:
    """The overlap of one mask with each annotator's, bool [...] and [n, ...] -> [n, 3]."""
    return np.array([overlap(mask, one) for one in masks], np.int64).reshape(-1, 3)


def overlap_of_panels(masks: NDArray[np.bool_]) -> Counts:
    """The human counterpart of `overlap_with_each`: for each annotator, what at least half of the others marked, with that annotator's mask.

    masks: bool [n, ...] -> [n, 3]; [0, 3] for a single annotator.
    """
    others, votes = len(masks) - 1, masks.sum(axis=0, dtype=np.int64)
    counts = [overlap(2 * (votes - mask) >= others, mask) for mask in masks if others]
    return np.array(counts, np.int64).reshape(-1, 3)


@dataclass(frozen=True)
class EnergyDistance:
    """The squared generalised energy distance, in the two common conventions.

    with_diagonal: the means within the sets run over all m^2 and n^2 pairs, including each mask with itself (the V-statistic of
    Kohl et al. 2018): never negative, 0 for two equal sets, larger for fewer samples. no_diagonal: these means run only over
    pairs of different masks (the U-statistic): not biased by the number of independent samples, but possibly negative; NaN when a
    set has only one mask.
    """

    with_diagonal: float
    no_diagonal: float


def energy_distance(samples: NDArray[np.bool_], reference: NDArray[np.bool_]) -> EnergyDistance:
    """2 E[d(S, Y)] - E[d(S, S')] - E[d(Y, Y')] with d = 1 - IoU; two empty masks have IoU 1.

    samples: bool [m, ...], reference: bool [n, ...]. Raises ValueError if a set is empty or the shapes differ.
    """
    if not len(samples) or not len(reference):
        raise ValueError("the energy distance needs at least one mask in each set")
    _same_shape(samples[0], reference[0])
    m, n = len(samples), len(reference)
    distances = _iou_distances(np.concatenate([samples.reshape(m, -1), reference.reshape(n, -1)]))
    cross, within, between = distances[:m, m:].mean(), distances[:m, :m].sum(), distances[m:, m:].sum()
    # 1 - IoU is of negative type, so with the diagonal only rounding can make the distance negative.
    with_diagonal = max(0.0, float(2 * cross - within / m**2 - between / n**2))
    if m < 2 or n < 2:
        return EnergyDistance(with_diagonal, float("nan"))
    return EnergyDistance(with_diagonal, float(2 * cross - within / (m * (m - 1)) - between / (n * (n - 1))))


def ged(samples: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """The energy distance with the diagonal, that of Kohl et al. 2018: see `energy_distance`."""
    return energy_distance(samples, reference).with_diagonal


PIXELS_AT_ONCE = 65536


def _iou_distances(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 - IoU of every pair: bool [n, pixels] -> float64 [n, n], the diagonal 0.

    Takes a part of the pixels at a time, because hundreds of samples of a large slice would not fit in memory as floats. Counts in
    a part are below 2^24 and therefore exact in float32.
    """
    both = np.zeros((len(masks), len(masks)))
    for first in range(0, masks.shape[1], PIXELS_AT_ONCE):
        part = masks[:, first : first + PIXELS_AT_ONCE]
        part = part[:, part.any(axis=0)].astype(np.float32)
        both += part @ part.T
    size = np.diagonal(both)
    either = np.add.outer(size, size) - both
    return np.asarray(1 - np.divide(both, either, out=np.ones_like(both), where=either > 0))


RESAMPLES, COVERAGE, SEED = 2000, 0.95, 0


@dataclass(frozen=True)
class Interval:
    """A mean over slices, its 95 % bootstrap interval over cases, and the number of slices that entered it."""

    mean: float | None
    low: float | None
    high: float | None
    n_slices: int

    def to_json(self) -> dict[str, float | int | None]:
        return asdict(self)


def bootstrap_over_cases(scores: Sequence[Sequence[float]], *, groups: Sequence[str] | None = None) -> Interval:
    """Mean over all slices, with a percentile interval from resampling whole cases (a cluster bootstrap).

    scores: for each case, its slices' scores; NaN means undefined and is left out. Slices of one case resemble
    each other, so cases, not slices, are drawn with replacement; a draw's value is the mean over all its slices. groups:
    a name for each case (its patient, say); cases with the same name are then drawn together. The interval is None when
    fewer than two cases (groups) have a score, and the mean too when none has.
    """
    kept = [values[~np.isnan(values)] for values in (np.asarray(case, dtype=np.float64) for case in scores)]
    if groups is not None:
        kept = [np.concatenate([kept[i] for i in members]) for members in members_of(groups)]
    kept = [values for values in kept if values.size]
    if not kept:
        return Interval(None, None, None, 0)
    sums = np.array([values.sum() for values in kept])
    counts = np.array([values.size for values in kept], dtype=np.float64)
    mean = float(sums.sum() / counts.sum())
    if len(kept) < 2:
        return Interval(mean, None, None, int(counts.sum()))
    draws = resampled(len(kept))
    low, high = percentile_interval((draws @ sums) / (draws @ counts))
    return Interval(mean, low, high, int(counts.sum()))


def members_of(groups: Sequence[str]) -> list[list[int]]:
    """The indices at which each name occurs in `groups`, names in the order of their first occurrence."""
    members: dict[str, list[int]] = {}
    for place, name in enumerate(groups):
        members.setdefault(name, []).append(place)
    return list(members.values())


@lru_cache(maxsize=2)  # a report needs some hundred intervals, nearly all over the same number of cases
def resampled(units: int) -> NDArray[np.int64]:
    """How often each unit occurs in each bootstrap draw: [RESAMPLES, units], each row summing to `units`. The same on every call; read-only."""
    drawn = np.random.default_rng(SEED).multinomial(units, np.full(units, 1 / units), size=RESAMPLES)
    drawn.flags.writeable = False
    return drawn


def percentile_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The central interval that holds the share COVERAGE of the draws' values [resamples]."""
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def _same_shape(a: NDArray[Any], b: NDArray[Any]) -> None:
    if np.shape(a) != np.shape(b):
        raise ValueError(f"maps of one shape are compared, not {np.shape(a)} with {np.shape(b)}")
