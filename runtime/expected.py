"""The overlap that a soft map itself predicts for its mask, before anyone has drawn the structure (docs/maps.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def expected_counts(soft: NDArray[Any], mask: NDArray[np.bool_]) -> Float64:
    """Pixel counts from which `expected_dice` follows: [...,h,w] -> [...,3] float64.

    They are those that `mask` and the mask of an annotator drawn at random are expected to share, those of `mask`, and those
    expected in the annotator's. soft: the probability that the annotator includes the pixel. A volume's counts are the sums of
    its slices'.
    """
    shared = np.sum(soft, axis=(-2, -1), where=mask, dtype=np.float64)
    return np.stack([shared, mask.sum(axis=(-2, -1)), np.sum(soft, axis=(-2, -1), dtype=np.float64)], axis=-1)


def expected_dice(counts: Float64) -> Float64:
    """Dice of the expected counts, 2 E|a and b| / (|a| + E|b|): [...,3] -> [...], NaN where the mask is empty.

    This is not the expected Dice itself, which would also depend on how pixels vary together.
    """
    shared, own, other = np.moveaxis(counts, -1, 0)
    return np.asarray(np.divide(2 * shared, own + other, out=np.full(own.shape, np.nan), where=own > 0))
