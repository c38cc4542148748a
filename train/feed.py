"""Prepares the next steps while the device works on this one. A step's data depend only on (seed, step), so preparing them early
changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from cdiff.train.rows import Rows

Prepare = Callable[[int, int], list[Rows]]


class Feed:
    """A context manager: `take(k, window)` returns `prepare(k, window)`, begun up to `ahead` steps earlier in as many threads.

    Threads, not processes: the slices exist once in memory, and cutting windows and drawing noise let other threads run.
    """

    def __init__(self, prepare: Prepare, ahead: int) -> None:
        self.prepare, self.ahead = prepare, ahead
        self._waiting: dict[tuple[int, int], Future[list[Rows]]] = {}
        self._threads = ThreadPoolExecutor(max(1, ahead), thread_name_prefix="cdiff-feed")

    def take(self, k: int, window: int) -> list[Rows]:
        """The rows of step k at windows of `window` pixels. Raises what `prepare` raised."""
        if self.ahead == 0:
            return self.prepare(k, window)
        for step in range(k, k + 1 + self.ahead):
            if (step, window) not in self._waiting:
                self._waiting[step, window] = self._threads.submit(self.prepare, step, window)
        ready = self._waiting.pop((k, window))
        # Windows grow once in a run; what was prepared at the old size is of no use then.
        for key in [key for key in self._waiting if key[0] <= k or key[1] != window]:
            self._waiting.pop(key).cancel()
        return ready.result()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
