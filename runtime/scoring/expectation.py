"""Whether the Dice that maps predict for their own masks comes true, over the slices of an evaluation (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from cdiff.runtime.scoring.metrics import members_of, percentile_interval, resampled

Float64 = NDArray[np.float64]
BINS = 10
"""Bins of equal width in the expected Dice: 0 to below 0.1, ..., 0.9 to 1."""
EXPECTED, FOUND = "expected_dice", "dice_each"


def pairs_of(row: Mapping[str, Any]) -> Float64:
    """[slices, 2]: the expected Dice and the one found, for those slices of a case where both are defined."""
    found = [(one[EXPECTED], one[FOUND]) for one in row["slices"] if None not in (one[EXPECTED], one[FOUND])]
    return np.array(found, np.float64).reshape(-1, 2)


def expectation_bins(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float | int | None]]:
    """For each bin of the expected Dice: its limits, its number of slices, and their mean expected and found Dice."""
    pairs = np.concatenate([pairs_of(row) for row in rows])
    place = np.clip(np.floor(pairs[:, 0] * BINS).astype(np.int64), 0, BINS - 1)
    counts, expected, found = (np.bincount(place, weights, BINS) for weights in (None, *pairs.T))
    return [
        {
            "from": i / BINS,
            "to": (i + 1) / BINS,
            "slices": int(n),
            "expected": float(expected[i] / n) if n else None,
            "found": float(found[i] / n) if n else None,
        }
        for i, n in enumerate(counts)
    ]


def rank_correlation(rows: Sequence[Mapping[str, Any]], groups: Sequence[str] | None) -> dict[str, float | int | None]:
    """Spearman's rank correlation between the slices' expected and found Dice, as "mean", with its 95 % interval over cases (groups).

    Ranks are always those among all slices, in the draws of the interval too. Values are None where they are not defined.
    """
    pairs = [pairs_of(row) for row in rows]
    every = np.concatenate(pairs)
    result: dict[str, float | int | None] = {"mean": None, "low": None, "high": None, "n_slices": len(every)}
    if not len(every):
        return result
    ranks = np.stack([rankdata(column) for column in every.T], axis=-1)
    parts = np.split(ranks - ranks.mean(axis=0), np.cumsum([len(one) for one in pairs])[:-1])
    if groups is not None:
        parts = [np.concatenate([parts[i] for i in members]) for members in members_of(groups)]
    sums = np.array([_sums(part) for part in parts if len(part)])
    whole = _correlation(sums.sum(axis=0))
    if np.isnan(whole):
        return result
    result["mean"] = float(whole)
    if len(sums) > 1:
        draws = _correlation(resampled(len(sums)) @ sums)
        result["low"], result["high"] = percentile_interval(draws[~np.isnan(draws)])
    return result


def _sums(part: Float64) -> Float64:
    """The sums [6] over pairs [slices,2] that `_correlation` takes."""
    x, y = part.T
    return np.array([len(part), x.sum(), y.sum(), x @ x, y @ y, x @ y])


def _correlation(sums: Float64) -> Float64:
    """Pearson's correlation from sums [...,6]: n and the sums of x, y, x^2, y^2 and x y. NaN where x or y does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.maximum(xx - x**2 / n, 0) * np.maximum(yy - y**2 / n, 0)
    varies = spread > 1e-9 * np.maximum(xx * yy, 1)
    return np.asarray(np.divide(xy - x * y / n, np.sqrt(spread), out=np.full(n.shape, np.nan), where=varies))
