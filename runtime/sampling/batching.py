"""Pushes every row (slice, level, run) of a scan through the engine, in padded batches of one size, and keeps the running sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdiff.runtime.engines.base import (
    Binding,
    ChainBinding,
    Engine,
    Int64,
    LimitedRows,
    Pending,
    Rows,
    SumBinding,
    SumLayout,
)
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.chain import Chain, Timings, check_finite
from cdiff.runtime.sampling.framing import Windows
from cdiff.runtime.sampling.mirror import VIEWS, origin_in, view_of
from cdiff.runtime.sampling.noise import Noise
from cdiff.runtime.sampling.sampler import SamplerTable
from cdiff.runtime.sampling.sums import SliceResult, SliceSums

__all__ = ["Progress", "SliceResult", "Timings", "most_rows", "most_rows_of", "rows_per_batch", "segment_windows"]

Progress = Callable[[int, int], None]
"""Called as progress(done, total) after every denoiser call, or a few times per batch where a device runs whole chains; both
numbers count rows times steps over the whole scan."""

ROWS_PER_BATCH = {"cpu": 8, "cuda": 256}
"""On a CPU larger batches gain nothing and no longer fit the caches: with a 1.6 M-parameter network at 128x128 on two cores, a
batch of 8 rows took 24.5 ms per row, one of 64 rows 27 ms per row and eight times the memory. On a GPU the limit holds a whole
slice (7 levels x 25 runs are 175 rows), enough to keep any GPU busy at any image size that the network makes sense for."""
MAX_VALUES = 2**31 - 1
"""The most values in one tensor that every kernel on a GPU can index."""
ROW_MAPS = 40
"""Memory reserved for a row, in maps of float16. TensorRT for RTX 1.7 plans 31 for the shipped network in half precision and 19
for a reduced paper network; what the kernels chosen on a real GPU need beyond that has not been measured."""


@dataclass(frozen=True)
class _Plan:
    """The order of the rows: windows outermost, then runs, levels innermost. Run r sees view r % views."""

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
        """The most windows that one batch can touch. Windows i and i + held never occur in one batch, so they can share a place."""
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
        """Rows first .. first + batch - 1; those past the plan's last row are copies of it."""
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


def most_rows(channels: int, size: tuple[int, int], free_bytes: int | None = None, asked: int | None = None) -> int:
    """The most rows of one batch on a GPU for a network of L = `channels` and images of `size` (H, W).

    It is the smallest of three limits: what fits into 70 % of `free_bytes` at ROW_MAPS maps of float16 per row, a map being L
    channels at the full image size (no limit where None); what keeps the widest tensor, of 4 maps per row, within MAX_VALUES;
    and `asked`, or else `ROWS_PER_BATCH`. It is never below 1: too little memory is no error here.
    """
    map_values = channels * size[0] * size[1]
    fit = min(asked or ROWS_PER_BATCH["cuda"], MAX_VALUES // (4 * map_values))
    if free_bytes is not None:
        fit = min(fit, int(0.7 * free_bytes) // (ROW_MAPS * 2 * map_values))
    return max(fit, 1)


def most_rows_of(engines: Sequence[Engine], channels: int, size: tuple[int, int]) -> int:
    """The most rows of a batch on a GPU that every one of `engines` takes, unless the user asks for more: an engine's own limit
    (`LimitedRows`), or else `most_rows` for a network of L = `channels` and images of `size` (H, W)."""
    usual = most_rows(channels, size)
    return min(one.most_rows if isinstance(one, LimitedRows) else usual for one in engines)


def rows_per_batch(total: int, device: str = "cpu", per_window: int | None = None, most: int | None = None) -> int:
    """The default batch size for `total` rows: at most `ROWS_PER_BATCH`, and evened out so that the last batch is nearly full.

    On a GPU it is the `per_window` rows of one window that are divided evenly, so that a slice is one batch where possible;
    `most` (see `most_rows_of`) is the limit where it is lower.
    """
    kind = device.split(":")[0]
    rows, limit = total, ROWS_PER_BATCH[kind]
    if kind != "cpu":
        rows, limit = min(total, per_window or total), min(limit, most or limit)
    return -(-rows // -(-rows // limit))


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

    `levels` is K, the number of maps that the model draws per slice: one per level, one per annotator, or one. Rows run
    window by window, so a batch may span slices; each window is encoded once, just before the first batch that needs it,
    and at most two slices' sums are alive unless a batch spans more. `slice_ids` [S] are the slices' numbers in the scan
    (0..S-1 by default). Noise depends on them and not on the position, so part of a scan gets the same maps as in the
    whole. `mirror` lets the runs see the window's mirrored views in turn (`mirror.VIEWS`), each encoded once; their maps
    are mirrored back. The maps depend on `batch` only through the engine's rounding.
    Raises CdiffError for arguments out of range, and while iterating when the network returns a value that is not finite.
    """
    if runs < 1:
        raise CdiffError(f"at least one run is needed, not {runs}")
    if batch is not None and batch < 1:
        raise CdiffError(f"the batch is {batch}, but must hold at least one row")
    ids = np.arange(len(windows.slices)) if slice_ids is None else np.asarray(slice_ids, np.int64)
    if ids.shape != (len(windows.slices),) or (ids < 0).any():
        raise CdiffError(f"{len(windows.slices)} slices need as many slice numbers, 0 or more; not {ids.tolist()}")
    total = len(windows) * levels * runs
    views = min(VIEWS, runs) if mirror else 1
    rows = batch or rows_per_batch(total, engine.device, levels * runs)
    plan = _Plan(windows, ids, levels, runs, rows, views)
    # This function is no generator, so the checks above raise now and not when the first slice is asked for.
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
    loop = _Loop(engine, binding, plan, len(table), keep_runs, progress, timings)
    if isinstance(binding, SumBinding):
        return loop.on_device(binding, table, seed)
    return loop.on_host(Chain(binding, plan.windows.framing.size, table, noise, timings), seed)


class _Loop:
    """Runs the batches of a plan one after another and yields the slices as they finish."""

    def __init__(
        self,
        engine: Engine,
        binding: Binding,
        plan: _Plan,
        steps: int,
        keep_runs: bool,
        progress: Progress | None,
        timings: Timings,
    ) -> None:
        self.engine = engine  # keeps it alive: an engine that is freed takes its binding with it
        self.binding, self.plan, self.steps, self.keep_runs = binding, plan, steps, keep_runs
        self.progress, self.timings = progress, timings
        self.encoded, self.finished = 0, 0
        self.sums: dict[int, SliceSums] = {}

    def on_host(self, chain: Chain, seed: int) -> Iterator[SliceResult]:
        """Run the plan with x returned after every batch and the sums kept on the host."""
        plan, binding, timings = self.plan, self.binding, self.timings
        for first in range(0, plan.total, plan.batch):
            rows = plan.rows(first)
            self._encode(first + rows.valid)
            report = self._report(first, rows.valid)
            if isinstance(binding, ChainBinding):
                with timings.part("denoise"):
                    x = binding.run_chain(rows, chain.table, seed)
                timings.calls += self.steps
                if report is not None:
                    report(self.steps)
            else:
                x = chain.run(rows, report)
            timings.rows += plan.batch
            with timings.part("collect"):
                check_finite(rows, x, "the result")
                for i in range(rows.valid):
                    sums, tile = self._sums_of(plan.window_of(first + i))
                    run = int(rows.run[i])
                    sums.add(tile, int(rows.level[i]), run, view_of(x[i, 0], run % plan.views))
            yield from self._results(first + rows.valid)

    def on_device(self, binding: SumBinding, table: SamplerTable, seed: int) -> Iterator[SliceResult]:
        """Run the plan with the sums kept by the binding. Each batch is queued before the one before it is awaited, so the device never idles."""
        plan, timings = self.plan, self.timings
        binding.begin(SumLayout(plan.held, plan.levels, plan.runs, plan.views, self.keep_runs), table, seed)
        waiting: tuple[int, int, Pending] | None = None
        for first in range(0, plan.total, plan.batch):
            rows = plan.rows(first)
            self._encode(first + rows.valid)
            with timings.part("queue"):
                finished = self._windows_finished(first, rows.valid)
                pending = binding.queue(rows, [window % plan.held for window in finished])
            timings.rows += plan.batch
            timings.calls += self.steps
            if waiting is not None:
                yield from self._collect(*waiting)
            waiting = first, rows.valid, pending
        if waiting is not None:
            yield from self._collect(*waiting)

    def _collect(self, first: int, valid: int, pending: Pending) -> Iterator[SliceResult]:
        windows = pending.wait(self._report(first, valid))
        self.timings.denoise += pending.seconds
        with self.timings.part("collect"):
            for window, found in zip(self._windows_finished(first, valid), windows, strict=True):
                sums, tile = self._sums_of(window)
                sums.put(tile, found)
        yield from self._results(first + valid)

    def _windows_finished(self, first: int, valid: int) -> range:
        """The windows whose last row is among rows first .. first + valid - 1."""
        return range(first // self.plan.per_window, (first + valid) // self.plan.per_window)

    def _encode(self, end: int) -> None:
        """Encode every view of the windows that rows below `end` need and that are not encoded yet."""
        plan = self.plan
        with self.timings.part("encode"):
            while self.encoded <= plan.window_of(end - 1):
                image = plan.windows.image(self.encoded)
                for view in range(plan.views):
                    self.binding.encode(plan.slot(self.encoded, view), np.ascontiguousarray(view_of(image, view)))
                self.encoded += 1

    def _sums_of(self, window: int) -> tuple[SliceSums, int]:
        """The sums of the slice that a window belongs to, and the window's number within that slice."""
        plan = self.plan
        index, tile = divmod(window, plan.windows.per_slice)
        if index not in self.sums:
            self.sums[index] = SliceSums(plan.windows, plan.levels, plan.runs, self.keep_runs)
        return self.sums[index], tile

    def _results(self, end: int) -> Iterator[SliceResult]:
        """The slices that rows below `end` finish and that were not yielded yet."""
        while self.finished < end // (self.plan.per_window * self.plan.windows.per_slice):
            with self.timings.part("collect"):
                index = self.finished
                result = self.sums.pop(index).result(index, int(self.plan.slice_ids[index]))
            yield result
            self.finished += 1

    def _report(self, first: int, valid: int) -> Callable[[int], None] | None:
        """A function that reports a batch's progress, given how many of its steps are done; None if nobody wants reports."""
        progress, done, total = self.progress, first * self.steps, self.plan.total * self.steps
        if progress is None:
            return None
        return lambda steps: progress(done + valid * steps, total)
