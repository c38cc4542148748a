"""How the processes of a benchmark and of the GPU suite end together."""

from __future__ import annotations

import contextlib
import ctypes
import signal


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, were it by a signal that none can catch (prctl(2), Linux alone).

    What outlives its benchmark would take the processors or the GPU that the next one measures on: a contender until its answer, which
    takes minutes, is done; a check of the suite, which has a session of its own, for as long as it likes.
    """
    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
