"""Processes that are forked off: none of their parent's threads come along, and a GPU's memory does not either."""

from __future__ import annotations

import ctypes
import os
from typing import Any
from weakref import WeakSet

from cdiff.runtime.errors import CdiffError

_KEPT: WeakSet[Any] = WeakSet()


def must_be_of_this_process(process: int) -> None:
    """Raise CdiffError unless this is the process of that number, where the model was loaded: what computes would wait for threads that are not here."""
    if process != os.getpid():
        raise CdiffError(
            f"this model was loaded in process {process}, which process {os.getpid()} was forked off from without its threads; load it in "
            "this one, with cdiff.load"
        )


def kept_in_forks(thing: Any) -> None:
    """Never let go of `thing` in a process that is forked off while it is there, not even at that process's end: for what joins its threads then.

    The memory is the parent's as long as neither writes to it.
    """
    _KEPT.add(thing)


def _keep() -> None:
    """In the process that was forked off: one reference more to each, which nothing gives back, for Python clears all that it knows at its end."""
    for thing in list(_KEPT):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_keep)
