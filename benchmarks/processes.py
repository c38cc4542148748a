"""How the GPU suite's processes end together."""

from __future__ import annotations

import contextlib
import ctypes
import signal


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, were it by a signal that none can catch (prctl(2), Linux alone).

    The suite puts a check into a session of its own, which outlives it otherwise, and would keep the GPU that the next run measures on.
    """
    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
