"""One thing after another in three steps that overlap: the next is read and the last written while the engine works."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import one_line

Item = TypeVar("Item")
Ready = TypeVar("Ready")
Made = TypeVar("Made")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome(Generic[Item, Value]):
    """What became of one item: the `value` that its last step gave, or the `error` that one of its steps raised."""

    item: Item
    value: Value | None = None
    error: CdiffError | None = None


def overlapped(
    items: Iterable[Item],
    read: Callable[[Item], Ready],
    work: Callable[[Item, Ready], Made],
    write: Callable[[Item, Made], Value],
) -> Generator[Outcome[Item, Value], None, None]:
    """Read, work on and write every item; yields what became of each, in order, once its own steps are through.

    `work` runs in the caller's thread, while one other thread reads the next item and another writes the last. Neither goes
    further, so that at most three items are in memory, however many there are. An item's CdiffError is its own outcome, as one for which
    the memory is not enough is, and the others go on; any other exception ends the whole. However it ends (Ctrl-C, a caller that stops asking), what is being
    written is waited for, so that nothing is left half-written. Close the generator (`contextlib.closing`) to have that at once.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "cdiff-write") as writer, ThreadPoolExecutor(1, "cdiff-read") as reader:

        def begin() -> tuple[Item, Future[Ready]] | None:
            """The next item, its reading under way or next in line; None at the end."""
            return next(((item, reader.submit(read, item)) for item in source), None)

        def worked(item: Item, reading: Future[Ready]) -> Future[Value]:
            """One item's writing, handed over; or a future that holds the error which came before it."""
            try:
                return writer.submit(write, item, work(item, reading.result()))
            except (CdiffError, MemoryError) as error:
                failed: Future[Value] = Future()
                failed.set_exception(error)
                return failed

        try:
            ahead = begin()
            behind: deque[tuple[Item, Future[Value]]] = deque()
            while ahead is not None:
                item, reading = ahead
                wait([reading])  # who makes the next item may do so in the array of this one
                ahead = begin()
                behind.append((item, worked(item, reading)))
                del reading  # or the item as it was read would stay in memory for one round more
                while len(behind) > 1 or (behind and behind[0][1].done()):
                    yield _outcome(*behind.popleft())
            if behind:
                yield _outcome(*behind.popleft())
        finally:
            reader.shutdown(wait=False, cancel_futures=True)


def _outcome(item: Item, writing: Future[Value]) -> Outcome[Item, Value]:
    error = writing.exception()
    if isinstance(error, CdiffError):
        _let_go(error)
        return Outcome(item, error=error)
    if isinstance(error, MemoryError):
        _let_go(error)
        return Outcome(
            item, error=CdiffError(f"the memory is not enough ({one_line(error)}); name a part of it with slices")
        )
    return Outcome(item, value=writing.result())


def _let_go(error: BaseException) -> None:
    """Clear the variables of the functions that an error came through, which would keep the scan and its maps as long as the error is kept,
    and in a cycle beyond that. Where it came from can still be shown."""
    known: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in known:
        traceback.clear_frames(one.__traceback__)
        known.append(one)
        one = one.__cause__ or one.__context__
