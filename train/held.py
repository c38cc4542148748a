"""Keeps a run folder to one training at a time: two would delete each other's checkpoints and write into one log."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdiff.runtime.errors import CdiffError


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keep other trainings out of the folder `run`. Raises CdiffError when another one holds it, or it cannot be opened.

    The lock is the system's and leaves no file; it ends with this process, however that ends. On a file system without such locks, as
    some network ones are, nobody is kept out.
    """
    try:
        handle = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise CdiffError(f"cannot open {run}: {error.strerror}; check the permissions there") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CdiffError(
                f"{run} is being trained by another process; wait until that ends, or choose another --out"
            ) from None
        except OSError:  # no locks on this file system
            pass
        yield
    finally:
        os.close(handle)
