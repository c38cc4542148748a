"""One case's maps against its annotators: every score of every marked slice (definitions: docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from cdiff.runtime.results import Stack

PER_SLICE = (
    "soft_dice_5",
    "soft_dice_9",
    "ged",
    "ged_floor",
    "soft_dice_5_annotators",
    "soft_dice_9_annotators",
    "pairwise_dice_annotators",
)
"""The scores with one number a slice; `dice_per_level` has one a slice and level."""


def marked_slices(masks: NDArray[np.bool_], all_raters: bool) -> NDArray[np.int64]:
    """The slices to score, of masks [S,n,H,W]: those that at least one annotator marked, or only those all marked."""
    readers = np.count_nonzero(masks.any(axis=(2, 3)), axis=1)
    return np.flatnonzero(readers >= (masks.shape[1] if all_raters else 1))


def true_levels(masks: NDArray[np.bool_], levels: int) -> NDArray[np.bool_]:
    """The consensus maps of n annotators at a model's C levels: masks [n,H,W] -> [C,H,W].

    Level c asks for the share c / C of the annotators, that is for at least c n / C of them. With n = C that is the
    paper's "at least c". Computed in whole numbers.
    """
    votes = masks.sum(axis=0, dtype=np.int64) * levels
    return np.stack([votes >= c * len(masks) for c in range(1, levels + 1)])


def score_slices(
    stack: Stack, first: int, masks: NDArray[np.bool_], slice_ids: NDArray[np.int64]
) -> Iterator[dict[str, Any]]:
    """The scores of the slices `slice_ids` of a case.

    stack: the model's maps, with every run's, of the slices from `first` on; masks [S,n,H,W]: all slices of the case.
    Yields {"slice", "dice_per_level": [C], and a number for each of PER_SLICE}; None where a score is not defined (a
    comparison among annotators when there is one only).
    """
    if stack.runs is None:
        raise ValueError("the energy distance needs the maps of every run: segment with keep_runs")
    soft, level_maps = stack.soft, stack.levels
    for index in slice_ids:
        drawn, place = masks[index], index - first
        levels, runs = level_maps[place], stack.runs[place]
        truth = drawn.mean(axis=0, dtype=np.float64)
        consensus = true_levels(drawn, len(levels))
        samples = stack.variant.to_samples(runs, len(levels))
        scores = {
            "soft_dice_5": soft_dice(soft[place], truth, FIVE),
            "soft_dice_9": soft_dice(soft[place], truth, NINE),
            "ged": ged(samples, drawn),
            "ged_floor": ged(consensus, drawn),
            "soft_dice_5_annotators": soft_dice_of_annotators(drawn, FIVE),
            "soft_dice_9_annotators": soft_dice_of_annotators(drawn, NINE),
            "pairwise_dice_annotators": pairwise_dice(drawn),
        }
        yield {
            "slice": int(index),
            "dice_per_level": [dice(at_least(p, 0.5), m) for p, m in zip(levels, consensus, strict=True)],
            **{name: None if np.isnan(value) else value for name, value in scores.items()},
        }
