"""A pipeline of three overlapping steps: the next item is read and the last one written while the engine works on the current one."""

from __future__ import annotations

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
    """What became of one item: the `value` that its last step returned, or the `error` that one of its steps raised."""

    item: Item
    value: Value | None = None
    error: CdiffError | None = None


def overlapped(
    items: Iterable[Item],
    read: Callable[[Item], Ready],
    work: Callable[[Item, Ready], Made],
    write: Callable[[Item, Made], Value],
) -> Generator[Outcome[Item, Value], None, None]:
    """Read, work on and write every item; yield the outcome of each, in order, once its own steps are done.

    `work` runs in the caller's thread, while one other thread reads the next item and another writes the last. Neither runs
    further ahead or behind, so at most three items are in memory. A CdiffError, or a lack of memory, becomes the outcome of its
    item, and the others go on; any other exception ends everything, one that `items` raise after the outcomes of what they had given.
    However it ends (Ctrl-C, a caller that stops asking), the write under way is waited for, so that nothing is left half-written. To
    make that happen at once, close the generator (`contextlib.closing`).
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "cdiff-write") as writer, ThreadPoolExecutor(1, "cdiff-read") as reader:

        def begin() -> tuple[Item, Future[Ready]] | None:
            """The next item with its reading submitted; None at the end."""
            return next(((item, reader.submit(read, item)) for item in source), None)

        def worked(item: Item, reading: Future[Ready]) -> Future[Value]:
            """Work on an item and submit its writing; or a future that holds the error of its reading or working."""
            try:
                return writer.submit(write, item, work(item, reading.result()))
            except (CdiffError, MemoryError) as error:
                failed: Future[Value] = Future()
                failed.set_exception(error)
                return failed

        failed_source: Exception | None = None
        try:
            ahead = begin()
            behind: deque[tuple[Item, Future[Value]]] = deque()
            while ahead is not None:
                item, reading = ahead
                wait([reading])  # `items` may reuse this item's array for the next one
                try:
                    ahead = begin()
                except Exception as error:
                    ahead, failed_source = None, error
                behind.append((item, worked(item, reading)))
                del reading  # otherwise what was read would stay in memory for another round
                while len(behind) > 1 or (behind and behind[0][1].done()):
                    yield _outcome(*behind.popleft())
            if behind:
                yield _outcome(*behind.popleft())
            if failed_source is not None:
                raise failed_source
        finally:
            failed_source = None  # else it and this frame, its scans included, would keep each other
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
    """Take an error's traceback away, and those of its causes: frames keep their variables and, from Python 3.12 on, the frames that called
    them, so the scan, its maps and what the caller holds would live as long as the error."""
    left, done = [error], set[int]()
    while left:
        one = left.pop()
        one.__traceback__ = None
        done.add(id(one))
        left += [other for other in (one.__cause__, one.__context__) if other is not None and id(other) not in done]
