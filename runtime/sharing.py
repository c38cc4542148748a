"""Shares a scan's slices out among several engines, one thread each: the same maps, sooner."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import replace
from typing import Any

from cdiff.runtime.engines.base import Engine, OneScanAtATime
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import Progress, Timings, segment_windows
from cdiff.runtime.sampling.framing import Windows
from cdiff.runtime.sampling.sampler import SamplerTable
from cdiff.runtime.sampling.sums import Gathered, SliceResult

# The ids of the engines whose turn the current context holds: a progress callback runs within the scan that it reports on.
_HELD: ContextVar[frozenset[int]] = ContextVar("_HELD", default=frozenset())


def segment_shared(
    engines: Sequence[Engine],
    windows: Windows,
    table: SamplerTable,
    *,
    slice_ids: Sequence[int],
    timings: Timings,
    progress: Progress | None = None,
    **options: Any,
) -> Gathered:
    """The results of all slices, in order; engine k of n computes the k-th of n nearly equal parts of the slices.

    The arguments, `options` included, are those of `segment_windows`. Noise depends on a slice's number, so the maps do not depend
    on which engine computes them, except through the batches' make-up. `timings` sums those of the engines. An error in one engine
    stops the others after their current slice and is raised. Several threads may call this with the same engines.
    Raises CdiffError where `progress` calls it for an engine that takes one scan at a time: it would wait for itself.
    """
    if any(id(engine) in _HELD.get() for engine in engines):
        raise CdiffError(
            f"progress cannot segment with the model that it reports on: {engines[0].name} on {engines[0].device} takes one scan at a "
            "time; segment the other scan after this one, or open the model a second time"
        )
    total = len(windows.slices)
    if len(engines) == 1:
        shared: dict[str, Any] = {"slice_ids": slice_ids, "progress": progress, "timings": timings}
        with _turn(engines[0]):
            return Gathered.of(segment_windows(engines[0], windows, table, **shared, **options), total)
    edges = [total * k // len(engines) for k in range(len(engines) + 1)]
    meter, stop = _Meter(progress), threading.Event()

    def work(k: int) -> tuple[list[SliceResult], Timings]:
        first, end = edges[k], edges[k + 1]
        mine = Timings()
        found: list[SliceResult] = []
        if first == end:
            return found, mine
        share = replace(windows, slices=windows.slices[first:end])
        rest: dict[str, Any] = {
            "slice_ids": slice_ids[first:end],
            "progress": meter.part(k, total, end - first),
            "timings": mine,
        }
        try:
            with _turn(engines[k]):
                for result in segment_windows(engines[k], share, table, **rest, **options):
                    found.append(replace(result, index=result.index + first))
                    if stop.is_set():
                        break
        except BaseException:
            stop.set()
            raise
        return found, mine

    with ThreadPoolExecutor(len(engines), "cdiff-gpu") as pool:
        running = [pool.submit(copy_context().run, work, k) for k in range(len(engines))]
        try:
            parts = [one.result() for one in running]
        except BaseException:  # Ctrl-C too: otherwise the threads would go on to the end of their share
            stop.set()
            raise
    for _, mine in parts:
        vars(timings).update(vars(timings + mine))
    return Gathered.of((result for found, _ in parts for result in found), total)


@contextmanager
def _turn(engine: Engine) -> Iterator[None]:
    """Hold the engine's turn, where it takes one scan at a time, for the block that computes a scan with it."""
    if not isinstance(engine, OneScanAtATime):
        yield
        return
    with engine.turn:
        token = _HELD.set(_HELD.get() | {id(engine)})
        try:
            yield
        finally:
            _HELD.reset(token)


class _Meter:
    """Combines the progress of several threads into one report."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._done: dict[int, int] = {}

    def part(self, k: int, slices: int, share: int) -> Callable[[int, int], None] | None:
        """The progress function for thread k, which computes `share` of all `slices`; its total is scaled up to all slices."""
        progress = self._progress
        if progress is None:
            return None

        def report(done: int, total: int) -> None:
            with self._lock:
                self._done[k] = done
                progress(sum(self._done.values()), total // share * slices)

        return report
