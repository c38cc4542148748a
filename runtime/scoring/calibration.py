"""The soft map as a probability: Brier score, CRPS, reliability and calibration error; AUROC of the uncertainty.

The probability is that an annotator drawn at random from a case's annotators includes the pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.scoring.metrics import SLACK

BINS = 10
"""Bins of equal width: 0 to below 0.1, 0.1 to below 0.2, ..., 0.9 to 1."""

Float64 = NDArray[np.float64]


def brier(soft: NDArray[Any], fraction: NDArray[Any]) -> Float64:
    """Brier score of each pixel, the mean over annotators i of (p - A_i)^2, which is (p - f)^2 + f (1 - f).

    soft: the probability p; fraction: f, the share of annotators who include the pixel, in the same shape. No map can avoid the
    second term, because annotators differ. (Brier 1950.)
    """
    p, f = np.asarray(soft, np.float64), np.asarray(fraction, np.float64)
    return np.asarray((p - f) ** 2 + f * (1 - f))


def crps(levels: NDArray[Any], consensus: NDArray[np.bool_]) -> Float64:
    """Continuous ranked probability score of each pixel's number of annotators K, divided by C: [C,H,W], [C,H,W] -> [H,W].

    levels: P(K >= c) at index c-1; consensus: whether K >= c. For whole numbers, the integral over k of (F(k) - 1[K <= k])^2 is
    the sum over c of (P(K >= c) - 1[K >= c])^2; divided by C it is the score of the fraction K / C, 0 to 1.
    """
    return np.asarray(np.mean((np.asarray(levels, np.float64) - consensus) ** 2, axis=0))


def reliability(soft: NDArray[Any], fraction: NDArray[Any]) -> Float64:
    """The sums for a reliability diagram, over arrays of any (equal) shape: [3, BINS], the count of pixels, sum of p and sum of f per bin of p."""
    p, f = np.ravel(soft).astype(np.float64), np.ravel(fraction).astype(np.float64)
    place = np.clip(np.floor((p + SLACK) * BINS).astype(np.int64), 0, BINS - 1)
    return np.stack([np.bincount(place, weights, BINS) for weights in (np.ones_like(p), p, f)])


def ece(table: Float64) -> NDArray[np.float64]:
    """Expected calibration error of tables made by `reliability`, [..., 3, BINS] -> [...]: the mean over all pixels of
    |mean p - mean f| in the pixel's bin. NaN where a table has no pixels. (Naeini et al. 2015, Guo et al. 2017.)
    """
    pixels, predicted, observed = np.moveaxis(table, -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.abs(predicted - observed).sum(axis=-1) / pixels.sum(axis=-1))


def auroc(score: NDArray[Any], wanted: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the chance that a wanted pixel's score is above another pixel's, ties counting one half.

    score, wanted: of equal shape. Scores within SLACK are ties: the entropies of 1/3 and 2/3 are equal, but neither fraction is
    exact in single precision. NaN when no pixel, or every pixel, is wanted.
    """
    values = np.asarray(score, np.float64)
    hits = values[np.asarray(wanted, bool)]
    others = np.sort(values[~np.asarray(wanted, bool)])
    if not hits.size or not others.size:
        return float("nan")
    below = np.searchsorted(others, hits - SLACK, "left").sum(dtype=np.float64)
    up_to = np.searchsorted(others, hits + SLACK, "right").sum(dtype=np.float64)
    return float((below + up_to) / 2 / (hits.size * others.size))
