"""What is one for the whole process, such as Python's filters of warnings, switched by several threads at once."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


def for_all_threads(
    switched: Callable[[], AbstractContextManager[object]],
) -> Callable[[], AbstractContextManager[None]]:
    """Of a context that switches something of the whole process: the first thread to enter switches it, the last to leave switches it back.

    Each for itself, a thread that leaves would give back what others still compute without; and one that entered while another was inside
    would leave the process as that one had it, for good.
    """
    lock, stack, inside = threading.Lock(), ExitStack(), 0

    @contextmanager
    def entered() -> Iterator[None]:
        nonlocal inside
        with lock:
            if inside == 0:
                stack.enter_context(switched())
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if inside == 0:
                    stack.close()

    return entered


_warnings_ignored = for_all_threads(lambda: warnings.catch_warnings(action="ignore"))


def without_warnings() -> AbstractContextManager[object]:
    """Without Python's warnings, which libraries raise of files that they can use all the same."""
    if getattr(
        sys.flags, "context_aware_warnings", False
    ):  # each thread has its own then (Python 3.14, where it is built without the lock)
        return warnings.catch_warnings(action="ignore")
    return _warnings_ignored()


def quiet(name: str) -> AbstractContextManager[None]:
    """Without the remarks of a library, by the name of its logger, which would reach the terminal."""
    return _errors_alone(name)()


@functools.cache  # a few names
def _errors_alone(name: str) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def errors_alone() -> Iterator[None]:
        logger = logging.getLogger(name)
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)

    return for_all_threads(errors_alone)
