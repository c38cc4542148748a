"""Captures what is queued on a stream as a CUDA graph and replays it, through cuda.bindings on the stream's handle."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cdiff.runtime.device.cuda import driver_call, need
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import first_line


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Collect Python's garbage before the block, and none within it.

    An older graph or GPU memory that only a reference cycle keeps alive is freed whenever the collector happens to run, and in the
    middle of a capture that would break the capture.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Graph:
    """What `queue` puts on `stream`, captured once; `launch` replays it there. The GPU's context must be current.

    The capture is thread-local (CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), so that other threads may use the GPU meanwhile.
    `queue` must have run outside a capture before. Raises CdiffError when something that `queue` does cannot be captured; the stream
    has then left capture again. Raises OutOfMemory only where the graph itself has no room: an engine's own memory error within a capture
    becomes a plain CdiffError, because it means that nothing can be allocated there, however much is free.
    """

    def __init__(self, stream: Any, queue: Callable[[], None]) -> None:
        driver = need("cuda.bindings.driver")
        self._stream = driver.CUstream(stream.handle)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with nothing_collected():
            driver_call("cuStreamBeginCapture", self._stream, mode)
            try:
                queue()
            except Exception as error:  # an engine's, or PyCUDA's where a library's call has broken the capture
                self._abandon(driver)
                raise CdiffError(first_line(error)) from error
            except BaseException:
                self._abandon(driver)
                raise
            graph = driver_call("cuStreamEndCapture", self._stream)
        try:
            self._executable = driver_call("cuGraphInstantiate", graph, 0)
        finally:
            driver_call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Queue one replay; returns at once."""
        driver_call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Free the graph. Nothing queued may still use it."""
        if self._executable is not None:
            driver_call("cuGraphExecDestroy", self._executable)
            self._executable = None

    def _abandon(self, driver: Any) -> None:
        """End a capture that failed, whatever its state, without raising: the caller sees the error that broke it."""
        status, graph = driver.cuStreamEndCapture(self._stream)
        if int(status) == 0 and int(graph) != 0:
            driver.cuGraphDestroy(graph)
