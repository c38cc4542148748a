"""Ctrl-C and SIGTERM during a long call into a C++ library; Python's own handlers would run only after the call returns."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM)


class Cancel:
    """As a context manager: `asked` turns true on the first SIGINT or SIGTERM; the second ends the process at once.

    While the main thread is in C++, Python only records a signal. It also writes the signal's number to a pipe, which a thread of
    ours reads, so that the library's next progress call can stop the work. The second signal does not wait for the library: use
    this only where no file is being written. Outside the main thread, where handlers cannot be set, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> Cancel:
        if threading.current_thread() is threading.main_thread():
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            threading.Thread(target=self._listen, args=(reading,), daemon=True).start()
            before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            handlers = {number: signal.signal(number, lambda *_: None) for number in ASKING}
            self._undo = [
                *(lambda n=number, h=handler: signal.signal(n, h) for number, handler in handlers.items()),
                lambda: signal.set_wakeup_fd(before),
                lambda: os.close(writing),  # ends the thread
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()

    def _listen(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number in ASKING and self.asked:
                    os._exit(128 + number)
                self.asked |= number in ASKING
        os.close(reading)
