"""Capture of what is queued on a stream as a CUDA graph, and its replay, by cuda.bindings on the stream's handle."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from cdiff.runtime.device.cuda import driver_call, need
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import first_line


class Graph:
    """What `queue` puts on `stream`, captured once; `launch` replays it there. The GPU's context must be current.

    The capture is the thread's own (CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), so that other threads may use the GPU meanwhile.
    `queue` must have run outside of a capture before. Raises CdiffError when something that was queued cannot be captured; the stream is
    then out of capture again. OutOfMemory is for the graph itself: what an engine says of memory within a capture is that nothing can be
    allocated there, however much is free.
    """

    def __init__(self, stream: Any, queue: Callable[[], None]) -> None:
        self._stream = need("cuda.bindings.driver").CUstream(stream.handle)
        collecting = gc.isenabled()
        gc.disable()  # what PyCUDA frees in the midst of a capture spoils it, and stays taken
        try:
            graph = self._capture(queue)
        finally:
            if collecting:
                gc.enable()
        try:
            self._executable = driver_call("cuGraphInstantiate", graph, 0)
        finally:
            driver_call("cuGraphDestroy", graph)

    def _capture(self, queue: Callable[[], None]) -> Any:
        driver = need("cuda.bindings.driver")
        driver_call(
            "cuStreamBeginCapture", self._stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        )
        try:
            queue()
        except Exception as error:  # an engine's, or PyCUDA's where a library's call has spoiled the capture
            self._abandon(driver)
            raise CdiffError(first_line(error)) from error
        except BaseException:
            self._abandon(driver)
            raise
        return driver_call("cuStreamEndCapture", self._stream)

    def launch(self) -> None:
        """Queue one replay; returns at once."""
        driver_call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Free the graph. Nothing queued may still use it."""
        if self._executable is not None:
            driver_call("cuGraphExecDestroy", self._executable)
            self._executable = None

    def _abandon(self, driver: Any) -> None:
        """End a capture that failed, whatever state it is in; the error that broke it is what the caller sees."""
        status, graph = driver.cuStreamEndCapture(self._stream)
        if int(status) == 0 and int(graph) != 0:
            driver.cuGraphDestroy(graph)
