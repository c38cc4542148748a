"""How the processes of a benchmark and of the GPU suite end together."""

from __future__ import annotations

import contextlib
import ctypes
import signal


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, even by a signal that cannot be caught (prctl(2), Linux only).

    A process that outlives its benchmark would keep processors or the GPU from the next measurement: a contender until its answer is
    done, which takes minutes; a check of the suite, which has a session of its own, for as long as it runs.
    """
    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
