"""Test-time augmentation by scale (that by reflection is `mirror`): runs see the slice at several sizes, and their maps are combined on its grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import LARGEST_ZOOM, ONE_ZOOM, SMALLEST_ZOOM
from cdiff.runtime.sampling.sums import Gathered, SliceResult

APART = 2**40
"""An offset between the slice numbers of two zooms, larger than the number of slices of any scan."""


def parse_zooms(text: str) -> tuple[float, ...]:
    """The numbers in a text such as "1,1.25". Raises CdiffError where one cannot be read or is not finite."""
    try:
        found = tuple(float(word) for word in text.split(","))
        if not all(map(math.isfinite, found)):
            raise ValueError("no number")
        return found
    except ValueError:
        raise CdiffError(f"zooms {text!r} cannot be read; give numbers with commas between, such as 1,1.25") from None


def check_zooms(zooms: Sequence[float], framing: str) -> tuple[float, ...]:
    """`zooms` as floats. Raises CdiffError for none, repeated or out-of-range zooms, and for those other than 1 unless `framing` is "centre"."""
    found = tuple(float(zoom) for zoom in zooms)
    if not found or not all(SMALLEST_ZOOM <= zoom <= LARGEST_ZOOM for zoom in found) or len(set(found)) < len(found):
        raise CdiffError(
            f"zooms {', '.join(f'{zoom:g}' for zoom in found) or 'of none'} cannot be used; give different numbers from "
            f"{SMALLEST_ZOOM:g} to {LARGEST_ZOOM:g}, such as 1,1.25"
        )
    if found != ONE_ZOOM and framing != "centre":
        raise CdiffError(
            f"a model with framing {framing!r} looks at whole slices; only framing 'centre' takes zooms other than 1"
        )
    return found


def shared_out(runs: int, zooms: Sequence[float]) -> list[tuple[float, int]]:
    """Deal `runs` runs out to the zooms in turn: (zoom, its number of runs) for each zoom that gets any."""
    return [(zoom, n) for k, zoom in enumerate(zooms) if (n := len(range(k, runs, len(zooms)))) > 0]


def numbered(slices: Sequence[int], zoom: float) -> list[int]:
    """The slice numbers to draw noise with at a zoom: equal to `slices` modulo APART, and to `slices` themselves at zoom 1.

    They differ between zooms because runs of the same number would otherwise draw the same noise at each zoom.
    """
    return [(0 if zoom == 1 else round(1000 * zoom)) * APART + number for number in slices]


def together(found: Sequence[Gathered], runs: Sequence[int], covered: Sequence[NDArray[np.bool_]]) -> Gathered:
    """Combine the results of the zooms into those of all runs.

    For each zoom, `found` holds its slices' results, `runs` its number of runs, and `covered` (bool [h,w]) the pixels that its
    window covers: at the others only the remaining zooms count. The spread is that of all runs about their common mean. Kept runs
    alternate between the zooms as `shared_out` deals them, so that the first r are those that a call with r runs would give; where
    a run's window does not reach, it shows the first zoom's run of the same number.
    """
    if len(found) == 1:
        return found[0]
    # Outside all windows the maps are 0, and in a large slice that is most of it.
    boxes = [one.box for one in found]
    rows, columns = (
        slice(min(one.start for one in axis), max(one.stop for one in axis)) for axis in zip(*boxes, strict=True)
    )
    inside = [seen[rows, columns] for seen in covered]
    weights = [n * seen.astype(np.float32) for n, seen in zip(runs, inside, strict=True)]
    total = np.maximum(sum(weights, np.zeros_like(weights[0])), 1)
    joined = (
        _one([part.within((rows, columns)) for part in parts], weights, total, inside)
        for parts in zip(*found, strict=True)
    )
    return Gathered.of(joined, len(found[0].slice_ids))


def _one(
    parts: Sequence[SliceResult],
    weights: Sequence[NDArray[np.float32]],
    total: NDArray[np.float32],
    covered: Sequence[NDArray[np.bool_]],
) -> SliceResult:
    pairs = list(zip(weights, parts, strict=True))
    means = sum((w * part.means for w, part in pairs), np.zeros_like(parts[0].means)) / total
    # The variance of all runs: that within each zoom plus that of the zooms' means.
    soft = means.mean(axis=0)
    square = sum(
        (w * (part.spread**2 + (part.means.mean(axis=0) - soft) ** 2) for w, part in pairs), np.zeros_like(soft)
    )
    kept = [part.kept for part in parts if part.kept is not None]
    joined = None
    if kept:
        first = kept[0]
        joined = np.empty((len(first), sum(one.shape[1] for one in kept), *first.shape[2:]), np.uint8)
        for turn, (one, seen) in enumerate(zip(kept, covered, strict=True)):
            joined[:, turn :: len(kept)] = np.where(seen, one, first[:, : one.shape[1]])
    return replace(
        parts[0],
        means=np.asarray(means, np.float32),
        spread=np.asarray(np.sqrt(square / total), np.float32),
        kept=joined,
    )
