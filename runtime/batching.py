"""Every row (slice, level, run) of a scan through the engine, in padded batches of one size, and the running sums (section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.chain import Chain, Timings, check_finite
from cdiff.runtime.engines.base import ChainBinding, Engine, Int64, Rows
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.framing import Windows
from cdiff.runtime.mirror import VIEWS, origin_in, view_of
from cdiff.runtime.noise import Noise
from cdiff.runtime.sampler import SamplerTable

__all__ = ["Progress", "SliceResult", "Timings", "rows_per_batch", "segment_windows"]

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called as progress(done, total) after every denoiser call; both count rows times steps of the whole scan."""

ROWS_PER_BATCH = {"cpu": 8, "cuda": 32}
"""On a CPU larger batches gain nothing and leave the caches: 8 rows of a 1.6 M-parameter network at 128x128 took 24.5 ms a
row on two cores, 64 rows 27 ms and eight times the memory."""


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


@dataclass(frozen=True)
class _Plan:
    """The order of the rows: window by window, in a window run by run, in a run level by level. Run r sees view r % views."""

    windows: Windows
    slice_ids: Int64
    levels: int
    runs: int
    batch: int
    views: int

    @property
    def per_window(self) -> int:
        return self.levels * self.runs

    @property
    def total(self) -> int:
        return len(self.windows) * self.per_window

    @property
    def held(self) -> int:
        """Most windows that one batch can touch: windows i and i + held never meet in one, so they can share a place."""
        return min(len(self.windows), (self.batch - 2) // self.per_window + 2)

    @property
    def slots(self) -> int:
        """Places for features: one for each view of each window held."""
        return self.held * self.views

    def slot(self, window: Any, view: Any) -> Any:
        return window % self.held * self.views + view

    def window_of(self, row: int) -> int:
        return row // self.per_window

    def rows(self, first: int) -> Rows:
        """Rows first .. first + batch - 1, those past the last one being copies of it."""
        number = np.minimum(np.arange(first, first + self.batch), self.total - 1)
        window, within = np.divmod(number, self.per_window)
        slice_, tile = np.divmod(window, self.windows.per_slice)
        run = within // self.levels
        view = run % self.views
        windows = self.windows
        origin = np.asarray(windows.origins, np.int64)[tile]
        return Rows(
            valid=min(self.batch, self.total - first),
            slot=self.slot(window, view),
            slice_id=self.slice_ids[slice_],
            origin=origin_in(view, origin, windows.canvas, windows.framing.size),
            level=within % self.levels + 1,
            run=run,
            canvas=windows.canvas,
        )


class _Sums:
    """The running sums of one slice, float32: over runs for each level, over levels for each run, of each of its windows."""

    def __init__(self, plan: _Plan, keep_runs: bool) -> None:
        self.plan = plan
        G, C, R, size = plan.windows.per_slice, plan.levels, plan.runs, plan.windows.framing.size
        self.level = np.zeros((G, C, *size), np.float32)
        self.run = np.zeros((G, R, *size), np.float32)
        self.kept = np.zeros((G, C, R, *size), np.uint8) if keep_runs else None

    def add(self, tile: int, level: int, run: int, x: Float32) -> None:
        """Add the final x [H,W] of one row, as a fraction: clip((x + 1)/2, 0, 1)."""
        fraction = np.clip((x + 1) * np.float32(0.5), 0, 1)
        self.level[tile, level - 1] += fraction
        self.run[tile, run] += fraction
        if self.kept is not None:
            self.kept[tile, level - 1, run] = np.rint(fraction * 255)

    def result(self, index: int) -> SliceResult:
        """The means on the slice's own grid; the spread over runs is taken there, after the windows were put together."""
        plan = self.plan
        runs = None
        if self.kept is not None:
            runs = np.stack(  # one level at a time: only that one becomes float32
                [np.rint(plan.windows.unframe_slice(self.kept[:, c].astype(np.float32))) for c in range(plan.levels)]
            ).astype(np.uint8)
        return SliceResult(
            index=index,
            slice_id=int(plan.slice_ids[index]),
            level_means=plan.windows.unframe_slice(self.level / np.float32(plan.runs)),
            run_std=plan.windows.unframe_slice(self.run / np.float32(plan.levels)).std(axis=0),
            runs=runs,
        )


def rows_per_batch(total: int, device: str = "cpu") -> int:
    """The padded batch used when none is asked for: at most `ROWS_PER_BATCH`, evened out so that the last one is nearly full."""
    most = ROWS_PER_BATCH[device.split(":")[0]]
    return -(-total // -(-total // most))


def segment_windows(
    engine: Engine,
    windows: Windows,
    table: SamplerTable,
    *,
    levels: int,
    runs: int,
    seed: int = 0,
    batch: int | None = None,
    slice_ids: Sequence[int] | None = None,
    mirror: bool = False,
    keep_runs: bool = False,
    progress: Progress | None = None,
    timings: Timings | None = None,
) -> Iterator[SliceResult]:
    """Yield the result of every slice in order, each as soon as it is finished.

    `levels` is the model's C. Rows run window by window, so a batch may span slices; each window is encoded once, just
    before the first batch that needs it, and at most two slices' sums are alive unless a batch spans more. `slice_ids` [S]
    are the slices' numbers in the scan (0..S-1 by default): they, not the position, enter the noise, so a part of a scan gets
    the maps that it has in the whole. `mirror` lets the runs see the window's mirrored views in turn (`mirror.VIEWS`); their maps are
    mirrored back. Each view is encoded once too. The maps depend on `batch` only through the engine's rounding.
    Raises CdiffError for arguments out of range and when the network returns a value that is not finite.
    """
    if runs < 1 or levels < 1:
        raise CdiffError(f"at least one run and one level are needed, not {runs} runs and {levels} levels")
    if batch is not None and batch < 1:
        raise CdiffError(f"the batch is {batch}, but must hold at least one row")
    ids = np.arange(len(windows.slices)) if slice_ids is None else np.asarray(slice_ids, np.int64)
    if ids.shape != (len(windows.slices),) or (ids < 0).any():
        raise CdiffError(f"{len(windows.slices)} slices need as many slice numbers, 0 or more; not {ids.tolist()}")
    total = len(windows) * levels * runs
    views = min(VIEWS, runs) if mirror else 1
    plan = _Plan(windows, ids, levels, runs, batch or rows_per_batch(total, engine.device), views)
    # Checked here and not at the first result: a generator would only raise once somebody asks it for a slice.
    return _segment(engine, plan, table, seed, Noise(seed), keep_runs, progress, timings or Timings())


def _segment(
    engine: Engine,
    plan: _Plan,
    table: SamplerTable,
    seed: int,
    noise: Noise,
    keep_runs: bool,
    progress: Progress | None,
    timings: Timings,
) -> Iterator[SliceResult]:
    binding = engine.bind(plan.batch, plan.slots)
    chain = Chain(binding, plan.windows.framing.size, table, noise, timings)
    encoded, finished = 0, 0
    open_sums: dict[int, _Sums] = {}
    for first in range(0, plan.total, plan.batch):
        rows = plan.rows(first)
        last = first + rows.valid
        with timings.part("encode"):
            while encoded <= plan.window_of(last - 1):
                image = plan.windows.image(encoded)
                for view in range(plan.views):
                    binding.encode(plan.slot(encoded, view), np.ascontiguousarray(view_of(image, view)))
                encoded += 1
        done = first * len(table)
        report = None if progress is None else _counter(progress, done, rows.valid, plan.total * len(table))
        if isinstance(binding, ChainBinding):
            with timings.part("denoise"):
                x = binding.run_chain(rows, table, seed)
            if report is not None:
                report(len(table))
        else:
            x = chain.run(rows, report)
        timings.rows += plan.batch
        with timings.part("collect"):
            check_finite(rows, x, "the result")
            for i in range(rows.valid):
                index, tile = divmod(plan.window_of(first + i), plan.windows.per_slice)
                if index not in open_sums:
                    open_sums[index] = _Sums(plan, keep_runs)
                run = int(rows.run[i])
                open_sums[index].add(tile, int(rows.level[i]), run, view_of(x[i, 0], run % plan.views))
        while finished < last // (plan.per_window * plan.windows.per_slice):
            with timings.part("collect"):
                result = open_sums.pop(finished).result(finished)
            yield result
            finished += 1


def _counter(progress: Progress, done: int, rows: int, total: int) -> Callable[[int], None]:
    """Report a batch's progress from the number of its steps that are through."""
    return lambda steps: progress(done + rows * steps, total)
