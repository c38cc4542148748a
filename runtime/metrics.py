"""Scores against several annotators: Dice and soft Dice (Amit et al. 2023, section 4), GED (Kohl et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIVE: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
NINE: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SMOOTH = 1e-6
# Maps are float32 fractions such as 3/10 or a mean over runs: they miss a decimal threshold by up to 1e-7, on either
# side. Half of a millionth is far above that and far below the step of any map, 1 / (annotators x runs).
SLACK = 5e-7


def at_least(values: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """`values >= threshold`, however a decimal fraction was rounded: within SLACK counts as equal."""
    return np.asarray(np.asarray(values, dtype=np.float64) >= threshold - SLACK)


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Dice of two masks of one shape: (2 |a and b| + s) / (|a| + |b| + s), s = 1e-6; two empty masks score 1.

    The smoothing is the published code's. Raises ValueError if the shapes differ.
    """
    _same_shape(a, b)
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    both = np.count_nonzero(first & second)
    return (2.0 * both + SMOOTH) / (np.count_nonzero(first) + np.count_nonzero(second) + SMOOTH)


def soft_dice(pred: NDArray[Any], truth: NDArray[Any], thresholds: Sequence[float] = FIVE) -> float:
    """Mean over thresholds h of Dice(pred >= h, truth >= h).

    pred, truth: fractions of annotators in 0..1, of one shape (one slice: [H, W]). Equality with a threshold
    counts as reaching it, whatever the rounding (see `at_least`). Raises ValueError if the shapes differ.
    """
    _same_shape(pred, truth)
    return float(np.mean([dice(at_least(pred, h), at_least(truth, h)) for h in thresholds]))


def pairwise_dice(masks: NDArray[np.bool_]) -> float:
    """Mean Dice over all pairs of masks, bool [n, ...]; NaN when there are fewer than two."""
    count = len(masks)
    pairs = [dice(masks[i], masks[j]) for i in range(count) for j in range(i)]
    return float(np.mean(pairs)) if pairs else float("nan")


def soft_dice_of_annotators(masks: NDArray[np.bool_], thresholds: Sequence[float] = FIVE) -> float:
    """The human reference: each annotator's mask, as a soft map, scored against the mean of the others' masks.

    masks: bool [n, ...]. Mean over the n annotators; NaN when there are fewer than two.
    """
    count = len(masks)
    if count < 2:
        return float("nan")
    total = masks.sum(axis=0, dtype=np.float64)
    scores = [soft_dice(mask, (total - mask) / (count - 1), thresholds) for mask in masks]
    return float(np.mean(scores))


def ged(samples: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Squared generalised energy distance 2 E[d(S, Y)] - E[d(S, S')] - E[d(Y, Y')], with d = 1 - IoU.

    samples: bool [m, ...], reference: bool [n, ...]. The last two means run over all m^2 and n^2 pairs, each mask
    with itself included (the V-statistic of Kohl et al. 2018), so two equal sets score 0. Two empty masks have IoU 1.
    Raises ValueError if a set is empty or the shapes differ.
    """
    if not len(samples) or not len(reference):
        raise ValueError("the energy distance needs at least one mask in each set")
    _same_shape(samples[0], reference[0])
    cross, within, between = (
        _iou_distances(a, b).mean() for a, b in ((samples, reference), (samples, samples), (reference, reference))
    )
    # 1 - IoU is of negative type, so the distance is never below 0 but for rounding.
    return max(0.0, float(2 * cross - within - between))


def _iou_distances(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 - IoU of every pair: bool [m, ...], [n, ...] -> float64 [m, n]."""
    # Pixel counts below 2^24 are exact in float32, and a slice has fewer.
    rows = a.reshape(len(a), -1).astype(np.float32)
    columns = b.reshape(len(b), -1).astype(np.float32)
    both = (rows @ columns.T).astype(np.float64)
    either = np.add.outer(rows.sum(axis=1), columns.sum(axis=1)).astype(np.float64) - both
    return np.asarray(1 - np.divide(both, either, out=np.ones_like(both), where=either > 0))


@dataclass(frozen=True)
class Interval:
    """A mean over slices with its 95 % bootstrap interval over cases, and how many slices entered it."""

    mean: float | None
    low: float | None
    high: float | None
    n_slices: int

    def to_json(self) -> dict[str, float | int | None]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n_slices": self.n_slices}


def bootstrap_over_cases(
    scores: Sequence[Sequence[float]], *, resamples: int = 2000, seed: int = 0, coverage: float = 0.95
) -> Interval:
    """Mean over all slices, with a percentile interval from resampling whole cases (a cluster bootstrap).

    scores: for each case, its slices' scores; NaN means undefined there and is left out. Slices of one case resemble
    each other, so cases, not slices, are drawn with replacement; a draw's value is the mean over all its slices. The
    interval is None when fewer than two cases have a score, the mean too when none has.
    """
    kept = [values[~np.isnan(values)] for values in (np.asarray(case, dtype=np.float64) for case in scores)]
    kept = [values for values in kept if values.size]
    if not kept:
        return Interval(None, None, None, 0)
    sums = np.array([values.sum() for values in kept])
    counts = np.array([values.size for values in kept], dtype=np.float64)
    mean = float(sums.sum() / counts.sum())
    if len(kept) < 2:
        return Interval(mean, None, None, int(counts.sum()))
    draws = np.random.default_rng(seed).multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=resamples)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [(1 - coverage) / 2, (1 + coverage) / 2])
    return Interval(mean, float(low), float(high), int(counts.sum()))


def _same_shape(a: NDArray[Any], b: NDArray[Any]) -> None:
    if np.shape(a) != np.shape(b):
        raise ValueError(f"maps of one shape are compared, not {np.shape(a)} with {np.shape(b)}")
