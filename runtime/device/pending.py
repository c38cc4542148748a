"""The running sums on the device, and queued batches, which return as finished windows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.device.gpu import Buffer, Gpu
from cdiff.runtime.device.layout import GOOD, STATE, place_of_bad
from cdiff.runtime.engines.base import Rows, SumLayout, WindowSums, features_not_finite
from cdiff.runtime.sampling.chain import not_finite
from cdiff.runtime.sampling.sampler import SamplerTable

POLL = 5e-4
"""Seconds between two queries of an event. Python's sleep can be interrupted by Ctrl-C, a wait inside the driver cannot."""
MARKS = 10
"""How many times at most a chain's progress is reported."""
IN_FLIGHT = 2
"""Batches that may be queued but not yet waited for."""


def check_features(state: NDArray[np.void]) -> None:
    """Raise CdiffError if the device's State [1] says that an encoder output was not finite."""
    if state["bad_features"][0]:
        raise features_not_finite()


def check_state(state: NDArray[np.void], rows: Rows, table: SamplerTable) -> None:
    """Raise CdiffError, naming the row, if the device's State [1], read back after a batch, says that a value was not finite."""
    check_features(state)
    bad = int(state["bad"][0])
    if bad != GOOD:
        what, row = place_of_bad(bad, len(rows.slot), table)
        raise not_finite(rows, what, row)


class DeviceSums:
    """Sums for `layout.places` windows of `size` (H, W), and pinned memory for the windows that `IN_FLIGHT` batches of `rows` rows finish."""

    def __init__(self, gpu: Gpu, layout: SumLayout, size: tuple[int, int], rows: int) -> None:
        self.gpu, self.layout, self.size = gpu, layout, size
        self.maps, self.kept_maps = layout.levels + layout.runs, layout.levels * layout.runs if layout.keep_runs else 0
        area = size[0] * size[1]
        self.bytes, self.kept_bytes = self.maps * area * 4, self.kept_maps * area
        self._buffer: Buffer | None = None
        self._kept: Buffer | None = None
        self._batches: list[QueuedBatch] = []
        # A batch of `rows` rows completes at most this many windows.
        most = -(-rows // (layout.levels * layout.runs))
        try:
            self._buffer = gpu.allocate(layout.places * self.bytes)
            self._kept = gpu.allocate(layout.places * self.kept_bytes) if layout.keep_runs else None
            self._batches = [QueuedBatch(self, most) for _ in range(IN_FLIGHT)]
        except BaseException:  # no room on the device, or no memory to pin on the host
            self.close()
            raise
        self._next = 0

    @property
    def address(self) -> int:
        """The address of the sums [places, K + R, H, W] float32."""
        assert self._buffer is not None, "closed"
        return self._buffer.address

    @property
    def kept(self) -> int:
        """The address of the runs' maps [places, K, R, H, W] uint8; 0 where they are not kept."""
        return 0 if self._kept is None else self._kept.address

    def reset(self, stream: Any) -> None:
        """Queue the zeroing of the sums, and forget the batches that were queued."""
        self.gpu.clear(self.address, self.layout.places * self.bytes, stream)
        for batch in self._batches:
            batch.waited = True

    def next_batch(self, rows: Rows, table: SamplerTable) -> QueuedBatch:
        """The object for the next batch. Raises RuntimeError unless the batch that used it before was waited for."""
        batch = self._batches[self._next]
        if not batch.waited:
            raise RuntimeError(f"{IN_FLIGHT} batches are queued; wait for the first of them")
        self._next = (self._next + 1) % IN_FLIGHT
        batch.begin(rows, table)
        return batch

    def close(self) -> None:
        """Give the buffers back, and drop the batches, so that no reference cycle with these sums keeps their pinned memory alive."""
        self._batches.clear()
        for buffer in (self._buffer, self._kept):
            if buffer is not None:
                self.gpu.release(buffer)
        self._buffer = self._kept = None


class QueuedBatch:
    """One batch that was queued. Implements `base.Pending`; each object is reused for every second batch."""

    def __init__(self, sums: DeviceSums, most: int) -> None:
        self._sums, self._gpu = sums, sums.gpu
        self._staging = self._gpu.pinned(most * sums.bytes)
        self._kept_staging = self._gpu.pinned(most * sums.kept_bytes) if sums.kept_bytes else None
        self._state = self._gpu.pinned(STATE.itemsize)
        self.began, self.ended, self._arrived = (self._gpu.event() for _ in range(3))
        self._marks = [self._gpu.event() for _ in range(MARKS)]
        self._marked: list[int] = []
        self._windows = 0
        self.waited = True
        self.seconds = 0.0

    def begin(self, rows: Rows, table: SamplerTable) -> None:
        """Start on a new batch; the arrays that the previous one returned are no longer valid."""
        self._rows, self._table = rows, table
        self._marked.clear()
        self.waited = False

    def passed(self, step: int, stream: Any) -> None:
        """Note that a step was queued, and record an event after about every tenth of the steps."""
        if step * MARKS // len(self._table) > len(self._marked):
            self._marks[len(self._marked)].record(stream)
            self._marked.append(step)

    def bring_back(self, places: Sequence[int], state: int, stream: Any) -> None:
        """Queue the copies of these places' sums and of the state to the host, and the zeroing of those sums."""
        gpu, sums = self._gpu, self._sums
        self.ended.record(stream)
        for i, place in enumerate(places):
            gpu.download(
                self._staging[i * sums.bytes : (i + 1) * sums.bytes], sums.address + place * sums.bytes, stream
            )
            gpu.clear(sums.address + place * sums.bytes, sums.bytes, stream)
            if self._kept_staging is not None:
                part = self._kept_staging[i * sums.kept_bytes : (i + 1) * sums.kept_bytes]
                gpu.download(part, sums.kept + place * sums.kept_bytes, stream)
        gpu.download(self._state, state, stream)
        self._arrived.record(stream)
        self._windows = len(places)

    def wait(self, report: Callable[[int], None] | None = None) -> list[WindowSums]:
        """See `base.Pending.wait`."""
        if self.waited:
            raise RuntimeError("this batch was waited for already, or another scan was begun on the same binding")
        with self._gpu.current():
            for step, mark in zip(self._marked, self._marks, strict=False):
                if report is not None:
                    _until(mark)
                    report(step)
            _until(self._arrived)
            self.seconds = self.began.time_till(self.ended) * 1e-3
        self.waited = True
        check_state(self._state.view(STATE), self._rows, self._table)
        return [self._window(i) for i in range(self._windows)]

    def _window(self, i: int) -> WindowSums:
        sums, layout, size = self._sums, self._sums.layout, self._sums.size
        maps = self._staging[i * sums.bytes : (i + 1) * sums.bytes].view(np.float32).reshape(sums.maps, *size)
        kept = None
        if self._kept_staging is not None:
            part = self._kept_staging[i * sums.kept_bytes : (i + 1) * sums.kept_bytes]
            kept = part.reshape(layout.levels, layout.runs, *size)
        return WindowSums(maps[: layout.levels], maps[layout.levels :], kept)


def _until(event: Any) -> None:
    while not event.query():
        time.sleep(POLL)
