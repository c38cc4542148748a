"""The reverse chain of one padded batch on the device: a step is captured as a CUDA graph and replayed.

A step runs the network, then noise and update in one kernel, and then increments the step's number. Everything that changes between
steps or batches is read from device memory, so one graph serves every sampler, seed and slice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.device.gpu import Gpu
from cdiff.runtime.device.graph import Graph
from cdiff.runtime.device.kernels import Kernels
from cdiff.runtime.device.layout import GOOD, STATE, STEP, BatchBlock, step_table
from cdiff.runtime.device.spec import Arena, Tensor
from cdiff.runtime.engines.base import Rows
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.sampler import SamplerTable

LOG = logging.getLogger("cdiff")
WARM_UPS = 2
"""Steps launched plainly before the capture: the first calls of an engine set up things, which must not happen inside a capture."""
TABLE_ROWS = 1024
"""Steps that the table's buffer holds at first; a longer table gets a larger buffer."""


class DeviceChain:
    """x [B,1,H,W] and everything that a step needs, on `stream`. The GPU's context must be current in every method.

    features: the tensor [slots,L,H,W] that the rows share. captured: None until the first batch, then whether a step is replayed as a graph.
    """

    def __init__(
        self,
        gpu: Gpu,
        arena: Arena,
        stream: Any,
        rows: int,
        size: tuple[int, int],
        features: Tensor,
        learned: bool,
        capture: bool,
    ) -> None:
        self._gpu, self._arena, self.stream = gpu, arena, stream
        self.block = BatchBlock(rows)
        self.batch = arena.take(self.block.size)
        self._table_size = TABLE_ROWS * STEP.itemsize
        self._table = arena.take(self._table_size)
        self.state = arena.take(STATE.itemsize)
        maps = (rows, 1, *size)
        self.x, self.x0, self._previous = (arena.tensor(maps, np.float32) for _ in range(3))
        self.mix = arena.tensor(maps, np.float32) if learned else None
        self.t = arena.tensor((rows,), np.int64)
        self.slot = Tensor(self.batch + self.block.slot, (rows,), np.dtype(np.int64))
        self.level = Tensor(self.batch + self.block.level, (rows,), np.dtype(np.int64))
        self.kernels = Kernels(gpu, rows, size)
        self.tensors = {
            **{"x": self.x, "features": features, "row_slice": self.slot, "t": self.t, "level": self.level},
            **({"x0": self.x0} if self.mix is None else {"x0": self.x0, "mix": self.mix}),
        }
        self.denoise: Callable[[], None] | None = None
        self.captured: bool | None = None if capture else False
        self._graph: Graph | None = None
        self._uploads = [(gpu.pinned(self.block.size), gpu.event()) for _ in range(2)]
        self._turn = 0
        self.clear_state()

    @property
    def job(self) -> tuple[int, int]:
        """The addresses of the batch's Job and of its Rows."""
        return self.batch, self.batch + self.block.row

    def queue(
        self,
        rows: Rows,
        table: SamplerTable,
        seed: int,
        views: int,
        ready: Any,
        began: Any = None,
        passed: Callable[[int], None] | None = None,
    ) -> None:
        """Queue a batch's rows and its chain, which leaves the last x in `self.x`.

        views: slots per window. ready: the event recorded after the features' copies. began: an event to record before x_T is drawn.
        passed: called with 1, 2, ... after each step is queued.
        """
        staged, uploaded = self._uploads[self._turn]
        self._turn = 1 - self._turn
        uploaded.synchronize()  # the upload of the batch before the last used this memory
        self.block.fill(staged, rows, table, seed, views)
        self._gpu.upload(self.batch, staged, self.stream)
        uploaded.record(self.stream)
        self.stream.wait_for_event(ready)
        if self.captured is None:
            self._capture()
        if began is not None:
            began.record(self.stream)
        self._start()
        for step in range(len(table)):
            if self._graph is not None:
                self._graph.launch()
            else:
                self._step()
            if passed is not None:
                passed(step + 1)

    def _capture(self) -> None:
        """Capture a step, after launching a few plainly on the rows already uploaded; the chain must be started again afterwards."""
        for _ in range(WARM_UPS):
            self._start()
            self._step()
        try:
            self._graph = Graph(self.stream, self._step)
            self.captured = True
        except OutOfMemory:
            raise
        except CdiffError as error:
            self.captured = False
            LOG.warning("a step cannot be captured as a CUDA graph, so its parts are launched one by one: %s", error)

    def _start(self) -> None:
        maps = self.x.address, self._previous.address, self.t.address
        self.kernels.start(self.stream, *maps, self.state, *self.job, self._table)

    def _step(self) -> None:
        assert self.denoise is not None, "the network was not connected"
        self.denoise()
        mix = 0 if self.mix is None else self.mix.address
        maps = self.x.address, self.x0.address, mix, self._previous.address, self.t.address
        self.kernels.update(self.stream, *maps, self.state, *self.job, self._table)
        self.kernels.advance(self.stream, self.state)

    def set_table(self, table: SamplerTable) -> None:
        """Upload a sampler's table, once everything queued is done. The graph reads it from a fixed address, so a larger table, which needs
        a new buffer, drops the graph, and the next batch captures one again."""
        steps = step_table(table)
        self.stream.synchronize()
        if steps.nbytes > self._table_size:
            self._table, self._table_size = self._arena.take(steps.nbytes), steps.nbytes
            if self._graph is not None:
                self._graph.close()
                self._graph, self.captured = None, None
        self._gpu.upload(self._table, steps.view(np.uint8), self.stream)
        self.stream.synchronize()

    def clear_state(self) -> None:
        """Reset the device's State to "nothing bad seen"."""
        state = np.zeros(1, STATE)
        state["bad"] = GOOD
        self._gpu.upload(self.state, state.view(np.uint8), self.stream)
        self.stream.synchronize()

    def finish(self) -> NDArray[np.void]:
        """Wait for the stream, return the device's State [1] and reset it."""
        state = np.zeros(1, STATE)
        self._gpu.download(state.view(np.uint8), self.state, self.stream)
        self.stream.synchronize()
        self.clear_state()
        return state

    def close(self) -> None:
        """Free the graph. Nothing queued may still use it."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        self.denoise = None
