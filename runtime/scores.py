"""One case's maps against its annotators: every score of every marked slice (definitions: docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.metrics import (
    FIVE,
    NINE,
    at_least,
    dice,
    ged,
    pairwise_dice,
    soft_dice,
    soft_dice_of_annotators,
)

PER_SLICE = (
    "soft_dice_5",
    "soft_dice_9",
    "ged",
    "ged_floor",
    "soft_dice_5_annotators",
    "pairwise_dice_annotators",
)
"""The scores with one number a slice; `dice_per_level` has one a slice and level."""


@dataclass(frozen=True)
class Maps:
    """What the model made of some slices: soft [S,H,W], levels [S,C,H,W] in 0..1, samples bool [S,C*R,H,W]."""

    soft: NDArray[np.float32]
    levels: NDArray[np.float32]
    samples: NDArray[np.bool_]


def marked_slices(masks: NDArray[np.bool_], all_raters: bool) -> NDArray[np.int64]:
    """The slices to score, of masks [S,n,H,W]: those that at least one annotator marked, or only those all marked."""
    drew = masks.any(axis=(2, 3))
    return np.flatnonzero(drew.all(axis=1) if all_raters else drew.any(axis=1))


def true_levels(masks: NDArray[np.bool_], levels: int) -> NDArray[np.bool_]:
    """The consensus maps of n annotators at a model's C levels: masks [n,H,W] -> [C,H,W].

    Level c asks for the share c / C of the annotators, that is for at least c n / C of them. With n = C that is the
    paper's "at least c". Computed in whole numbers.
    """
    votes = masks.sum(axis=0, dtype=np.int64) * levels
    return np.stack([votes >= c * len(masks) for c in range(1, levels + 1)])


def score_slices(maps: Maps, masks: NDArray[np.bool_], slice_ids: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """The scores of each slice: maps of the slices `slice_ids`, masks [S,n,H,W] of all slices of the case.

    Yields {"slice", "dice_per_level": [C], and a number for each of PER_SLICE}; None where a score is not defined (a
    comparison among annotators when there is one only).
    """
    for position, index in enumerate(slice_ids):
        drawn, soft, levels = masks[index], maps.soft[position], maps.levels[position]
        truth = drawn.mean(axis=0, dtype=np.float64)
        consensus = true_levels(drawn, len(levels))
        scores = {
            "soft_dice_5": soft_dice(soft, truth, FIVE),
            "soft_dice_9": soft_dice(soft, truth, NINE),
            "ged": ged(maps.samples[position], drawn),
            "ged_floor": ged(consensus, drawn),
            "soft_dice_5_annotators": soft_dice_of_annotators(drawn, FIVE),
            "pairwise_dice_annotators": pairwise_dice(drawn),
        }
        yield {
            "slice": int(index),
            "dice_per_level": [dice(at_least(p, 0.5), m) for p, m in zip(levels, consensus, strict=True)],
            **{name: None if np.isnan(value) else value for name, value in scores.items()},
        }
