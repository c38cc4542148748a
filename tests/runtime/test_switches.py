"""What is one for the whole process is as it was when threads that read scans at once are through, whichever ends first."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.scans.picture import opened
from cdiff.runtime.switches import quiet, without_warnings

SECONDS = 20.0
"""How long a thread waits for another: only a failure takes as long."""


def one_within_another(make: Callable[[], AbstractContextManager[object]], seen: Callable[[], object]) -> list[object]:
    """What `seen` gives before anything, in the second thread while it alone is inside, and when both have left, the first to enter first."""
    begun, ended = threading.Event(), threading.Event()
    found = [seen()]

    def first() -> None:
        with make():
            begun.set()
            assert second_in.wait(SECONDS)
        ended.set()

    second_in = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(SECONDS)
    with make():
        second_in.set()
        assert ended.wait(SECONDS)
        found.append(seen())
    thread.join()
    return [*found, seen()]


def warned() -> list[str]:
    """The texts of the warnings that come through."""
    shown: list[str] = []
    before, warnings.showwarning = warnings.showwarning, lambda message, *rest, **more: shown.append(str(message))
    try:
        warnings.warn("the program's own", UserWarning, stacklevel=1)
    finally:
        warnings.showwarning = before
    return shown


@pytest.mark.parametrize("by", ["itself", "a picture"])
def test_a_programs_warnings_are_its_own_again_when_threads_have_read(by: str) -> None:
    """Else a server that reads pictures in threads would never warn of anything again."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(file, "png")

    def reading() -> AbstractContextManager[object]:
        return without_warnings() if by == "itself" else opened(file.getvalue(), Path("a.png"))

    with warnings.catch_warnings(action="always"):
        assert one_within_another(reading, warned) == [["the program's own"], [], ["the program's own"]]


def test_a_librarys_logger_is_as_it_was_when_threads_have_read() -> None:
    logger = logging.getLogger("a.library")
    logger.setLevel(logging.DEBUG)
    levels = one_within_another(lambda: quiet("a.library"), lambda: logger.level)
    assert levels == [logging.DEBUG, logging.ERROR, logging.DEBUG]
