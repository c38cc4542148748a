"""Soft Dice against the number of runs (Amit et al. 2023, Fig. 3), computed from one set of runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.scoring.metrics import FIVE, NINE, SLACK, dice_of
from cdiff.runtime.scoring.surface import bounding_box

MOST_POINTS = 25
FIVE_OF_NINE = [NINE.index(h) for h in FIVE]


def run_counts(runs: int) -> list[int]:
    """The numbers of runs that the curve shows: 1 to `runs` up to 25; beyond that at most 25 numbers that grow by a nearly constant factor,
    `runs` included."""
    if runs <= MOST_POINTS:
        return list(range(1, runs + 1))
    return sorted({round(float(r)) for r in np.geomspace(1, runs, MOST_POINTS)})


def soft_dice_by_runs(
    runs: NDArray[np.uint8], truth: NDArray[np.float64], combine: str, counts: list[int]
) -> NDArray[np.float64]:
    """Soft Dice at five and nine thresholds of the maps that the first r runs give, for each r of `counts`: [len(counts), 2].

    runs [K,R,H,W]: every run's maps, 255 = 1, as `Segmenter.segment(keep_runs=True)` keeps them; truth [H,W]: fraction of
    annotators; combine: "mean" or "vote", as there; counts: ascending. The kept maps have 8 bits, so at r = R the value can differ
    from the score of the exact maps where a pixel is within 1/510 of a threshold.
    """
    somewhere = runs.any(axis=(0, 1)) | (truth > 0)
    if not somewhere.any():
        return np.ones((len(counts), 2))
    # Outside this box, prediction and truth are 0, below every threshold.
    rows, columns = bounding_box(somewhere)
    true_masks = np.stack([truth[rows, columns] >= h - SLACK for h in NINE])
    true_sizes = np.count_nonzero(true_masks, axis=(1, 2))
    total = np.zeros((len(runs), *true_masks.shape[1:]), np.float64)
    scores, added = [], 0
    for count in counts:
        total += runs[:, added:count, rows, columns].sum(axis=1, dtype=np.float64)
        added = count
        levels = total / (255 * count)
        soft = (levels >= 0.5 if combine == "vote" else levels).mean(axis=0)
        masks = np.stack([soft >= h - SLACK for h in NINE])
        both = np.count_nonzero(masks & true_masks, axis=(1, 2))
        values = dice_of(np.stack([both, np.count_nonzero(masks, axis=(1, 2)), true_sizes], axis=-1))
        scores.append([values[FIVE_OF_NINE].mean(), values.mean()])
    return np.array(scores)
