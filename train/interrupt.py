"""Ctrl-C, SIGTERM and SIGHUP end a run between two steps, never inside one, so that what is saved is a state that training passed through."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

ECHO = 2.0
"""Seconds in which further signals are the first one's echo: timeout(1) sends it twice, and batch systems and containers send it to every
process, torchrun among them, which hands it on to its own."""


class Interrupt:
    """As a context manager, turns the first SIGINT, SIGTERM or SIGHUP into `.asked`; one that comes more than `ECHO` after it raises
    KeyboardInterrupt at once, unsaved.

    Ignored signals stay ignored: SIGHUP under nohup, SIGINT in what a script started in the background. Handlers that a program around
    Python has set stay too, since Python could not restore them. Outside the main thread it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # not every system has the last
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = True, now
        elif now - self._since > ECHO:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
