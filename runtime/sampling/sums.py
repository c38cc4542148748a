"""The running sums of a slice over levels and runs, and the maps made from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.engines.base import WindowSums
from cdiff.runtime.sampling.framing import Box, Windows, placed

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class SliceResult:
    """One finished slice, its windows already put together: maps on the part `box` of its grid `shape` [h, w], 0 elsewhere.

    `means` [K,...] float32: at index k-1 the mean over runs of clip((x+1)/2, 0, 1), the fraction of runs that put the
    pixel into map k (the consensus at level k, or whatever else the model draws). `spread` [...] float32: the standard
    deviation over runs (divided by R) of a run's soft map, its mean over levels. `kept` [K,R,...] uint8, or None: each
    run's map, 255 = 1. `index` is the slice's place among those framed, `slice_id` its number in the scan.
    """

    index: int
    slice_id: int
    means: Float32
    spread: Float32
    kept: NDArray[np.uint8] | None
    box: Box
    shape: tuple[int, int]

    @property
    def level_means(self) -> Float32:
        """[K,h,w]: `means` on the whole grid."""
        return placed(self.means, self.box, self.shape)

    @property
    def run_std(self) -> Float32:
        """[h,w]: `spread` on the whole grid."""
        return placed(self.spread, self.box, self.shape)

    @property
    def runs(self) -> NDArray[np.uint8] | None:
        """[K,R,h,w]: `kept` on the whole grid."""
        return None if self.kept is None else placed(self.kept, self.box, self.shape)

    def within(self, box: Box) -> SliceResult:
        """The same result on a larger box, which must contain this one's."""
        rows, columns = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(self.box, box, strict=True))
        height, width = (one.stop - one.start for one in box)

        def put(maps: NDArray[Any]) -> NDArray[Any]:
            return placed(maps, (rows, columns), (height, width))

        kept = None if self.kept is None else put(self.kept)
        return replace(self, means=put(self.means), spread=put(self.spread), kept=kept, box=box)

    def for_masks_from_zero(self) -> SliceResult:
        """The same result for a network whose masks are 0 outside and 1 inside, so that fractions are x, not (x + 1)/2.

        A sampler's last x lies in [-1, 1], so the sums of (x + 1)/2 were never clipped and give the mean and spread of x.
        A mean over runs below 0 counts as 0.
        """
        kept = None if self.kept is None else np.maximum(2 * self.kept.astype(np.int16) - 255, 0).astype(np.uint8)
        return replace(self, means=np.maximum(2 * self.means - 1, 0), spread=2 * self.spread, kept=kept)


class SliceSums:
    """The running sums of each window of one slice, float32: over runs for each level, and over levels for each run."""

    def __init__(self, windows: Windows, levels: int, runs: int, keep_runs: bool) -> None:
        self.windows = windows
        G, size = windows.per_slice, windows.framing.size
        self.level = np.zeros((G, levels, *size), np.float32)
        self.run = np.zeros((G, runs, *size), np.float32)
        self.kept = np.zeros((G, levels, runs, *size), np.uint8) if keep_runs else None

    def add(self, tile: int, level: int, run: int, x: Float32) -> None:
        """Add the final x [H,W] of one row as a fraction, clip((x + 1)/2, 0, 1); `level` counts from 1, `tile` and `run` from 0."""
        fraction = np.clip((x + 1) * np.float32(0.5), 0, 1)
        self.level[tile, level - 1] += fraction
        self.run[tile, run] += fraction
        if self.kept is not None:
            self.kept[tile, level - 1, run] = np.rint(fraction * 255)

    def put(self, tile: int, sums: WindowSums) -> None:
        """Store one window's finished sums, which a device has kept."""
        self.level[tile], self.run[tile] = sums.level, sums.run
        if self.kept is not None and sums.kept is not None:
            self.kept[tile] = sums.kept

    def result(self, index: int, slice_id: int) -> SliceResult:
        """The slice's result on its own grid; the spread over runs is computed there, after the windows are put together."""
        windows, levels, runs = self.windows, self.level.shape[1], self.run.shape[1]
        kept = None
        if self.kept is not None:
            kept = np.stack(  # one level at a time, so that only one is held as float32
                [np.rint(windows.unframe_part(self.kept[:, c].astype(np.float32))) for c in range(levels)]
            ).astype(np.uint8)
        return SliceResult(
            index=index,
            slice_id=slice_id,
            means=windows.unframe_part(self.level / np.float32(runs)),
            spread=windows.unframe_part(self.run / np.float32(levels)).std(axis=0),
            kept=kept,
            box=windows.reach,
            shape=windows.shape,
        )


@dataclass(frozen=True)
class Gathered:
    """The results of all n slices of a scan, in order, stacked: means [n,K,...], spread [n,...] and kept [n,K,R,...] or None.

    All cover the part `box` of the slices' grid `shape` [h, w]. `slice_ids` [n] are the slices' numbers in the scan.
    """

    means: Float32
    spread: Float32
    kept: NDArray[np.uint8] | None
    box: Box
    shape: tuple[int, int]
    slice_ids: NDArray[np.int64]

    @classmethod
    def of(cls, results: Iterable[SliceResult], count: int) -> Gathered:
        """Stack `count` >= 1 results of one box. Each is copied as it comes and released, so that a long scan's maps are in memory only once."""
        found: Gathered | None = None
        for one in results:
            if found is None:
                means, spread = (np.empty((count, *maps.shape), maps.dtype) for maps in (one.means, one.spread))
                kept = None if one.kept is None else np.empty((count, *one.kept.shape), one.kept.dtype)
                found = cls(means, spread, kept, one.box, one.shape, np.empty(count, np.int64))
            found.means[one.index], found.spread[one.index] = one.means, one.spread
            found.slice_ids[one.index] = one.slice_id
            if found.kept is not None and one.kept is not None:
                found.kept[one.index] = one.kept
        assert found is not None, "a scan has a slice"
        return found

    def __iter__(self) -> Iterator[SliceResult]:
        for i, slice_id in enumerate(self.slice_ids):
            kept = None if self.kept is None else self.kept[i]
            yield SliceResult(i, int(slice_id), self.means[i], self.spread[i], kept, self.box, self.shape)
