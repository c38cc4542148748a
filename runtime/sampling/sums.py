"""The running sums of one slice over levels and runs, and the maps that they become (design, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.engines.base import WindowSums
from cdiff.runtime.sampling.framing import Windows

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class SliceResult:
    """One finished slice, on its own grid [h, w] (windows already put together).

    `level_means` [C,h,w] float32: at index c-1 the mean over runs of clip((x+1)/2, 0, 1), the fraction of runs that put the
    pixel in the consensus at level c. `run_std` [h,w] float32: standard deviation over runs (divided by R) of a run's soft
    map, which is its mean over levels. `runs` [C,R,h,w] uint8, when kept: each run's map, 255 = 1. `index` is the slice's
    place among those framed, `slice_id` its number in the scan.
    """

    index: int
    slice_id: int
    level_means: Float32
    run_std: Float32
    runs: NDArray[np.uint8] | None

    def for_masks_from_zero(self) -> SliceResult:
        """The same for a network whose masks are 0 outside and 1 inside: the fractions are of x, not of (x + 1)/2.

        Samplers end with an x in [-1, 1], of which the sums hold (x + 1)/2 unclipped, so the mean and spread of x follow from them.
        What is below 0 in the mean over runs counts as 0.
        """
        runs = None if self.runs is None else np.maximum(2 * self.runs.astype(np.int16) - 255, 0).astype(np.uint8)
        return replace(self, level_means=np.maximum(2 * self.level_means - 1, 0), run_std=2 * self.run_std, runs=runs)


class SliceSums:
    """The running sums of one slice, float32: over runs for each level, over levels for each run, of each of its windows."""

    def __init__(self, windows: Windows, levels: int, runs: int, keep_runs: bool) -> None:
        self.windows = windows
        G, size = windows.per_slice, windows.framing.size
        self.level = np.zeros((G, levels, *size), np.float32)
        self.run = np.zeros((G, runs, *size), np.float32)
        self.kept = np.zeros((G, levels, runs, *size), np.uint8) if keep_runs else None

    def add(self, tile: int, level: int, run: int, x: Float32) -> None:
        """Add the final x [H,W] of one row, as a fraction: clip((x + 1)/2, 0, 1)."""
        fraction = np.clip((x + 1) * np.float32(0.5), 0, 1)
        self.level[tile, level - 1] += fraction
        self.run[tile, run] += fraction
        if self.kept is not None:
            self.kept[tile, level - 1, run] = np.rint(fraction * 255)

    def put(self, tile: int, sums: WindowSums) -> None:
        """Take over one window's finished sums, as a device kept them."""
        self.level[tile], self.run[tile] = sums.level, sums.run
        if self.kept is not None and sums.kept is not None:
            self.kept[tile] = sums.kept

    def result(self, index: int, slice_id: int) -> SliceResult:
        """The means on the slice's own grid; the spread over runs is taken there, after the windows were put together."""
        windows, levels, runs = self.windows, self.level.shape[1], self.run.shape[1]
        kept = None
        if self.kept is not None:
            kept = np.stack(  # one level at a time: only that one becomes float32
                [np.rint(windows.unframe_slice(self.kept[:, c].astype(np.float32))) for c in range(levels)]
            ).astype(np.uint8)
        return SliceResult(
            index=index,
            slice_id=slice_id,
            level_means=windows.unframe_slice(self.level / np.float32(runs)),
            run_std=windows.unframe_slice(self.run / np.float32(levels)).std(axis=0),
            runs=kept,
        )
