"""A scan's slices shared out among several engines, one thread each: the same maps, sooner."""

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

# Whose turn is held by what called us, by the engines' identities: a progress callback runs within the scan that it is about.
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
    """The results of all slices, in order; engine k of n takes the k-th part of the slices, all parts being as equal as can be.

    The arguments are `segment_windows`'s; `options` are its others. The noise belongs to a slice's number, so the maps do not
    depend on who computed them but for the batch's make-up. `timings` adds the engines' up. The first error of any of them
    stops the others after the slice that they are at, and is raised. Several threads may call it with the same engines.
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
        except BaseException:  # Ctrl-C too: the threads would go on to the end of their share
            stop.set()
            raise
    for _, mine in parts:
        vars(timings).update(vars(timings + mine))
    return Gathered.of((result for found, _ in parts for result in found), total)


@contextmanager
def _turn(engine: Engine) -> Iterator[None]:
    """Within it a scan may be computed with the engine."""
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
    """One progress report out of several threads'."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._done: dict[int, int] = {}

    def part(self, k: int, slices: int, share: int) -> Callable[[int, int], None] | None:
        """Progress of thread k, whose share is `share` of all `slices`: both count alike for a slice."""
        progress = self._progress
        if progress is None:
            return None

        def report(done: int, total: int) -> None:
            with self._lock:
                self._done[k] = done
                progress(sum(self._done.values()), total // share * slices)

        return report
