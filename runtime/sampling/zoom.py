"""Runs that see the slice at several sizes, in turn, put together on its grid: test-time augmentation by scale, as `mirror` is by reflection."""

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
"""More slices than any scan has."""


def parse_zooms(text: str) -> tuple[float, ...]:
    """The numbers of "1,1.25". Raises CdiffError when they are none."""
    try:
        found = tuple(float(word) for word in text.split(","))
        if not all(map(math.isfinite, found)):
            raise ValueError("no number")
        return found
    except ValueError:
        raise CdiffError(f"zooms {text!r} cannot be read; give numbers with commas between, such as 1,1.25") from None


def check_zooms(zooms: Sequence[float], framing: str) -> tuple[float, ...]:
    """The zooms that the runs of a model of `framing` are to see in turn. Raises CdiffError where they do not fit it."""
    found = tuple(float(zoom) for zoom in zooms)
    if not found or not all(SMALLEST_ZOOM <= zoom <= LARGEST_ZOOM for zoom in found) or len(set(found)) < len(found):
        raise CdiffError(
            f"zooms {', '.join(f'{zoom:g}' for zoom in found) or 'of none'} cannot be used; give different numbers from "
            f"{SMALLEST_ZOOM:g} to {LARGEST_ZOOM:g}, such as 1,1.25"
        )
    if found != ONE_ZOOM and framing != "centre":
        raise CdiffError(
            f"a model of the framing {framing!r} looks at whole slices; only one of 'centre' takes zooms besides 1"
        )
    return found


def shared_out(runs: int, zooms: Sequence[float]) -> list[tuple[float, int]]:
    """Each zoom with its number of runs: as many as the others' or one less; one that gets none is left out."""
    return [(zoom, n) for k, zoom in enumerate(zooms) if (n := len(range(k, runs, len(zooms)))) > 0]


def numbered(slices: Sequence[int], zoom: float) -> list[int]:
    """The numbers by which the noise knows the slices as a zoom shows them: their own modulo APART, and those where the zoom is 1.

    With the same numbers at each zoom, runs of one number would draw the same noise.
    """
    return [(0 if zoom == 1 else round(1000 * zoom)) * APART + number for number in slices]


def together(found: Sequence[Gathered], runs: Sequence[int], covered: Sequence[NDArray[np.bool_]]) -> Gathered:
    """The results of each zoom's runs as those of all runs.

    found: for each zoom its slices. runs: how many each had. covered: bool [h,w], the pixels that its window covers: at the others
    it has no opinion, and the rest decide. The spread is that of all runs about their common mean. Kept runs are in turn of each zoom,
    as `shared_out` deals them, so that the first r are what r runs would be; where a window does not reach, a run shows what the first
    zoom's run of its number does.
    """
    if len(found) == 1:
        return found[0]
    # Around all windows there is nothing, and of a large slice that is most.
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
    # The variance of all runs: that within each zoom, and that of the zooms' means.
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
