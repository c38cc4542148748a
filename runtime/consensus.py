"""Consensus maps: M^c[x, y] = 1 where at least c of the C annotators drew (Amit et al. 2023, section 3, equation 1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def consensus_maps(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """All consensus levels of the annotators' masks.

    masks: bool [C, ...], one mask an annotator. Returns bool [C, ...]; index c - 1 is level c. Levels are nested:
    level c + 1 lies inside level c.
    """
    votes = masks.sum(axis=0, dtype=np.int64)
    levels = np.arange(1, len(masks) + 1).reshape(-1, *[1] * votes.ndim)
    return np.asarray(votes >= levels)


def soft_label(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The fraction of annotators who included each pixel: bool [C, ...] -> float32 [...], the mean over consensus levels."""
    return np.asarray(masks.mean(axis=0, dtype=np.float64), dtype=np.float32)
