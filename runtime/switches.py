"""Switches state of the whole process, such as Python's warning filters, from several threads at once."""

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
    """Share a context that switches process-wide state: the first thread to enter switches it, the last to leave restores it.

    With a context per thread, the first to leave would restore the state while others still need it switched; and one that entered
    while another was inside would save the switched state and restore that, for good.
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
    """A context without Python's warnings, which libraries issue about files that they can read nonetheless."""
    if getattr(
        sys.flags, "context_aware_warnings", False
    ):  # each thread has its own then (Python 3.14, where it is built without the lock)
        return warnings.catch_warnings(action="ignore")
    return _warnings_ignored()


def quiet(name: str) -> AbstractContextManager[None]:
    """A context in which the logger `name`, a library's, passes only errors: the rest would reach the terminal."""
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
