"""Forked processes, which inherit neither their parent's threads nor its GPU memory."""

from __future__ import annotations

import ctypes
import os
from typing import Any
from weakref import WeakSet

from cdiff.runtime.errors import CdiffError

_KEPT: WeakSet[Any] = WeakSet()


def must_be_of_this_process(process: int) -> None:
    """Raise CdiffError unless `process`, which loaded the model, is this one: in a fork, its engine would wait for threads that do not exist."""
    if process != os.getpid():
        raise CdiffError(
            f"this model was loaded in process {process}, and process {os.getpid()} was forked from it without its threads; load the model in "
            "this process, with cdiff.load"
        )


def kept_in_forks(thing: Any) -> None:
    """Keep `thing` alive in every process forked while it exists, even when that process ends.

    For objects that join their threads when they are freed: in a fork those threads do not exist. It costs no memory there as long
    as neither process writes to it.
    """
    _KEPT.add(thing)


def _keep() -> None:
    """In the forked process: take one more reference to each, never released, because Python clears all ordinary ones when it exits."""
    for thing in list(_KEPT):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_keep)
