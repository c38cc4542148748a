"""Masks of one annotator that fit the other annotators' better when turned: stored in another orientation than the rest.

One mask that does so says nothing, for annotators disagree; the same turn in most of an annotator's masks does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Turn = Callable[[NDArray[np.bool_]], NDArray[np.bool_]]
TURNS: dict[str, Turn] = {
    "mirrored along the first axis of their slices": lambda mask: mask[:, ::-1],
    "mirrored along the second axis of their slices": lambda mask: mask[:, :, ::-1],
    "turned by 180 degrees": lambda mask: mask[:, ::-1, ::-1],
    "with the axes of their slices exchanged": lambda mask: mask.swapaxes(1, 2),
    "turned by 90 degrees": lambda mask: np.rot90(mask, 1, axes=(1, 2)),
    "turned by 90 degrees the other way": lambda mask: np.rot90(mask, 3, axes=(1, 2)),
    "with the axes of their slices exchanged, turned by 180 degrees": lambda mask: mask.swapaxes(1, 2)[:, ::-1, ::-1],
}
"""Each turn of slices [S, H, W], by its name in words; the last four keep the shape only of square slices."""
LEAST_CASES = 3
LEAST_GAIN = 0.1
NEARLY = 0.05


def gains(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """By how much each mask of a case would fit the others better if it were turned: [n, turns], NaN where that cannot be said.

    masks: [S, n, H, W]. A mask fits by its soft Dice, over the case, with the mean of the others.
    """
    n = masks.shape[1]
    out = np.full((n, len(TURNS)), np.nan)
    votes = masks.sum(axis=1, dtype=np.int32)
    for i in range(n):
        others = votes - masks[:, i]
        size = (n - 1) * np.count_nonzero(masks[:, i]) + others.sum()
        both = np.any(masks[:, i], axis=(1, 2)) & np.any(others, axis=(1, 2))  # no turn adds a slice to these
        if not both.any():
            continue
        mask, others = masks[both, i], others[both]
        shared = others[mask].sum()
        for k, turn in enumerate(TURNS.values()):
            if (turned := turn(mask)).shape == mask.shape:
                out[i, k] = 2 * (others[turned].sum() - shared) / size
    return out


def how_turned(of_cases: Sequence[NDArray[np.float64]]) -> str | None:
    """In words how an annotator's masks seem to be turned, or None. of_cases: a row of `gains` for each of its cases.

    The turn that fits best on average has to be best, or nearly so, in more than half of at least LEAST_CASES cases, and better than none by
    LEAST_GAIN on average. Nearly: of a structure on the slices' middle line, mirrored and turned by 180 degrees fit alike.
    """
    table = np.array([row for row in of_cases if np.isfinite(row).any()])
    if len(table) < LEAST_CASES:
        return None
    number = np.isfinite(table).sum(axis=0)
    means = np.where(number > 0, np.nansum(table, axis=0) / np.maximum(number, 1), -np.inf)
    best = int(means.argmax())
    often = np.count_nonzero(table[:, best] > np.nanmax(table, axis=1) - NEARLY) * 2 > len(table)
    return list(TURNS)[best] if often and means[best] > LEAST_GAIN else None
