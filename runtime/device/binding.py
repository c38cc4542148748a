"""An engine's two graphs and our kernels on one GPU: whole chains replayed as a CUDA graph, the sums kept there (section 4).

Two streams. The encoder's: upload of a window, encoder, and, once the chains queued so far need the old features no more, their
copy into a slot. The chain's: upload of a batch's rows, x_T, the steps, the sums. Each waits for the other by events alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.device.gpu import Buffer, Gpu
from cdiff.runtime.device.graph import Graph
from cdiff.runtime.device.kernels import Kernels
from cdiff.runtime.device.layout import GOOD, STATE, STEP, BatchBlock, step_table
from cdiff.runtime.device.pending import DeviceSums, QueuedBatch, bad_features, check_state
from cdiff.runtime.engines.base import Float32, Int64, Pending, Prediction, Rows, SumLayout
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampler import SamplerTable

LOG = logging.getLogger("cdiff")
WARM_UPS = 2
"""Steps launched plainly before the capture: the first calls of an engine set up what must not happen inside one."""
TABLE_ROWS = 1024
"""Steps that a table's buffer holds at first; a longer table takes a larger one."""


@dataclass(frozen=True)
class Tensor:
    """A graph's input or output where it lies on the device."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class GraphSpec:
    """What the two graphs of a bundle take and give: image (channels, H, W) float32, features (L, H, W), and whether `mix` is there."""

    image: tuple[int, int, int]
    features: tuple[int, int, int]
    feature_dtype: np.dtype[Any]
    learned: bool


class Connector(Protocol):
    """What an engine does for one binding."""

    def connect(self, graph: str, tensors: dict[str, Tensor], stream: Any) -> Callable[[], None]:
        """Tie `graph` (`encoder` or `denoiser`) to its tensors by name, for good; the function returned queues one run on `stream`.

        Called with the GPU's context current. Raises OutOfMemory when its working memory does not fit, CdiffError when the graph does
        not take such shapes.
        """

    def close(self) -> None:
        """Give back what `connect` took; nothing queued uses it any more."""


class DeviceBinding:
    """Buffers for batches of `rows` rows over `slots` sets of features. Implements `Binding`, `ChainBinding` and `SumBinding`.

    streams: the encoder's and the chain's. capture: replay a step as a CUDA graph. Where an engine's launches cannot be captured they are made one by one, which a
    warning says once; `captured` tells. Raises OutOfMemory when the device has no room; what was taken is given back then.
    """

    def __init__(
        self,
        gpu: Gpu,
        spec: GraphSpec,
        rows: int,
        slots: int,
        connector: Connector,
        streams: tuple[Any, Any],
        *,
        capture: bool = True,
    ) -> None:
        self._encode_stream, self._stream = streams
        self.gpu, self.spec, self.rows, self.slots = gpu, spec, rows, slots
        self.captured: bool | None = None if capture else False
        self._connector = connector
        self._encode: Callable[[], None] = _closed
        self._denoise: Callable[[], None] = _closed
        self._buffers: list[Buffer] = []
        self._graph: Graph | None = None
        self._sums: DeviceSums | None = None
        with gpu.current():
            try:
                self._build()
            except BaseException:
                self._release()
                raise

    def _build(self) -> None:
        gpu, spec, B = self.gpu, self.spec, self.rows
        height, width = spec.image[1:]
        f32, i64 = np.dtype(np.float32), np.dtype(np.int64)
        self._block = BatchBlock(B)
        self._batch = self._take(self._block.size)
        self._table_size = TABLE_ROWS * STEP.itemsize
        self._table = self._take(self._table_size)
        self._state = self._take(STATE.itemsize)
        maps = (B, 1, height, width)
        self._image = self._tensor((1, *spec.image), f32)
        self._encoded_features = self._tensor((1, *spec.features), spec.feature_dtype)
        # Places not used yet hold zeros, so that a padding row never meets a NaN left in memory.
        self._features = self._tensor((self.slots, *spec.features), spec.feature_dtype)
        self._x, self._x0, self._previous = (self._tensor(maps, f32) for _ in range(3))
        self._mix = self._tensor(maps, f32) if spec.learned else None
        self._t = self._tensor((B,), i64)
        self._encoded, self._chained = gpu.event(), gpu.event()
        self._kernels = Kernels(gpu, B, (height, width))

        images = {"image": self._image, "features": self._encoded_features}
        self._encode = self._connector.connect("encoder", images, self._encode_stream)
        tensors = {
            "x": self._x,
            "features": self._features,
            "row_slice": Tensor(self._batch + self._block.slot, (B,), i64),
            "t": self._t,
            "level": Tensor(self._batch + self._block.level, (B,), i64),
            "x0": self._x0,
        }
        if self._mix is not None:
            tensors["mix"] = self._mix
        self._denoise = self._connector.connect("denoiser", tensors, self._stream)
        self._staging = [(gpu.pinned(self._image.size).view(np.float32), gpu.event()) for _ in range(2 * self.slots)]
        self._uploads = [(gpu.pinned(self._block.size), gpu.event()) for _ in range(2)]
        self._next_image, self._next_upload = 0, 0

    # Binding ----------------------------------------------------------------------------------------------------------

    def encode(self, slot: int, image: Float32) -> None:
        """Queue the encoder on one window [ch,H,W] float32; its features come to lie at place `slot`.

        Features that are not finite are an error of the next `run`, `run_chain` or `wait`.
        """
        gpu, stream = self.gpu, self._encode_stream
        with gpu.current():
            staged, uploaded = self._staging[self._next_image]
            self._next_image = (self._next_image + 1) % len(self._staging)
            uploaded.synchronize()  # of the window that this memory held long ago
            staged[:] = np.ravel(image)
            gpu.upload(self._image.address, staged, stream)
            uploaded.record(stream)
            self._encode()
            features = self._encoded_features
            count = features.size // features.dtype.itemsize
            self._kernels.finite(stream, features.address, count, features.dtype.itemsize, self._state)
            stream.wait_for_event(self._chained)
            gpu.copy(self._features.address + slot * features.size, features.address, features.size, stream)
            self._encoded.record(stream)

    def features(self) -> NDArray[Any]:
        """The features in all places [slots,L,H,W], brought back. Raises CdiffError when an encoder's output was not finite."""
        out = np.empty(self._features.shape, self._features.dtype)
        with self.gpu.current():
            self._stream.wait_for_event(self._encoded)
            self.gpu.download(out, self._features.address, self._stream)
            self._finish()
        return out

    def set_features(self, features: NDArray[Any]) -> None:
        """Put features [slots,L,H,W] of the graphs' own type into their places."""
        with self.gpu.current():
            self._stream.wait_for_event(self._encoded)
            self.gpu.upload(self._features.address, np.ascontiguousarray(features, self._features.dtype), self._stream)
            self._stream.synchronize()

    def run(self, x: Float32, slot: Int64, t: Int64, level: Int64) -> Prediction:
        """One call of the denoiser with host arrays; see `base.Binding.run`. For comparisons: the loop runs whole chains."""
        gpu, stream = self.gpu, self._stream
        with gpu.current():
            stream.wait_for_event(self._encoded)
            for address, array in (
                (self._x.address, np.ascontiguousarray(x, np.float32)),
                (self._batch + self._block.slot, np.ascontiguousarray(slot, np.int64)),
                (self._t.address, np.ascontiguousarray(t, np.int64)),
                (self._batch + self._block.level, np.ascontiguousarray(level, np.int64)),
            ):
                gpu.upload(address, array, stream)
                stream.synchronize()  # the array is the caller's
            self._denoise()
            self._chained.record(stream)
            x0 = np.empty(self._x0.shape, np.float32)
            mix = np.empty(self._x0.shape, np.float32) if self._mix is not None else None
            gpu.download(x0, self._x0.address, stream)
            if mix is not None and self._mix is not None:
                gpu.download(mix, self._mix.address, stream)
            self._finish()
        return x0, mix

    # ChainBinding -----------------------------------------------------------------------------------------------------

    def run_chain(self, rows: Rows, table: SamplerTable, seed: int) -> Float32:
        """See `base.ChainBinding.run_chain`; raises CdiffError, naming the row, for a value that is not finite."""
        with self.gpu.current():
            self._set_table(table)
            self._queue_chain(rows, table, seed, 1)
            x = np.empty(self._x.shape, np.float32)
            self.gpu.download(x, self._x.address, self._stream)
            state = self._finish()
        check_state(state, rows, table)
        return x

    # SumBinding -------------------------------------------------------------------------------------------------------

    def begin(self, layout: SumLayout, table: SamplerTable, seed: int) -> None:
        """See `base.SumBinding.begin`."""
        gpu = self.gpu
        with gpu.current():
            self._encode_stream.synchronize()
            self._stream.synchronize()
            self._set_table(table)
            if self._sums is None or self._sums.layout != layout:
                if self._sums is not None:
                    self._sums.close()
                    self._sums = None
                self._sums = DeviceSums(gpu, layout, self.spec.image[1:], self.rows)
            self._sums.reset(self._stream)
            self._clear_state()
        self._job = layout, table, seed

    def queue(self, rows: Rows, finished: Sequence[int]) -> Pending:
        """See `base.SumBinding.queue`."""
        assert self._sums is not None, "begin comes first"
        layout, table, seed = self._job
        stream, kernels = self._stream, self._kernels
        with self.gpu.current():
            batch = self._sums.next_batch(rows, table)
            self._queue_chain(rows, table, seed, layout.views, batch)
            numbers = layout.levels, layout.runs
            job, row = self._batch, self._batch + self._block.row
            kernels.sum(stream, self._x.address, self._sums.address, self._sums.kept, self._state, job, row, *numbers)
            batch.bring_back(finished, self._state, stream)
        return batch

    # ------------------------------------------------------------------------------------------------------------------

    def _queue_chain(
        self, rows: Rows, table: SamplerTable, seed: int, views: int, batch: QueuedBatch | None = None
    ) -> None:
        """Queue rows and chain; x then holds the last x. `batch` gets events along the way."""
        gpu, stream = self.gpu, self._stream
        staged, uploaded = self._uploads[self._next_upload]
        self._next_upload = 1 - self._next_upload
        uploaded.synchronize()  # of the batch before the last, which was waited for
        self._block.fill(staged, rows, table, seed, views)
        gpu.upload(self._batch, staged, stream)
        uploaded.record(stream)
        stream.wait_for_event(self._encoded)
        if self.captured is None:
            self._prepare_graph()
        if batch is not None:
            batch.began.record(stream)
        self._start()
        for step in range(len(table)):
            if self._graph is not None:
                self._graph.launch()
            else:
                self._queue_step()
            if batch is not None:
                batch.passed(step + 1, stream)
        self._chained.record(stream)

    def _prepare_graph(self) -> None:
        """Capture a step, after a few that were launched plainly on the rows that are there; the chain starts anew afterwards."""
        for _ in range(WARM_UPS):
            self._start()
            self._queue_step()
        try:
            self._graph = Graph(self._stream, self._queue_step)
            self.captured = True
        except OutOfMemory:
            raise
        except CdiffError as error:
            self.captured = False
            LOG.warning("a step cannot be captured as a CUDA graph, so its parts are launched one by one: %s", error)

    def _start(self) -> None:
        addresses = (buffer.address for buffer in (self._x, self._previous, self._t))
        job, row = self._batch, self._batch + self._block.row
        self._kernels.start(self._stream, *addresses, self._state, job, row, self._table)

    def _queue_step(self) -> None:
        """Network, then noise and update in one kernel, then step on: what the graph holds."""
        self._denoise()
        mix = 0 if self._mix is None else self._mix.address
        addresses = self._x.address, self._x0.address, mix, self._previous.address, self._t.address
        job, row = self._batch, self._batch + self._block.row
        self._kernels.update(self._stream, *addresses, self._state, job, row, self._table)
        self._kernels.advance(self._stream, self._state)

    def _set_table(self, table: SamplerTable) -> None:
        """Upload a sampler's table. The graph reads it from its place, so it is captured anew when that has to grow."""
        steps = step_table(table)
        self._stream.synchronize()
        if steps.nbytes > self._table_size:
            self._table, self._table_size = self._take(steps.nbytes), steps.nbytes
            if self._graph is not None:
                self._graph.close()
                self._graph, self.captured = None, None
        self.gpu.upload(self._table, steps.view(np.uint8), self._stream)
        self._stream.synchronize()

    def _finish(self) -> NDArray[np.void]:
        """Wait for the chain's stream; the state that it left, which starts anew. Raises CdiffError for bad features."""
        state = np.zeros(1, STATE)
        self.gpu.download(state.view(np.uint8), self._state, self._stream)
        self._stream.synchronize()
        self._clear_state()
        if state["bad_features"][0]:
            raise bad_features()
        return state

    def _clear_state(self) -> None:
        state = np.zeros(1, STATE)
        state["bad"] = GOOD
        self.gpu.upload(self._state, state.view(np.uint8), self._stream)
        self._stream.synchronize()

    def _take(self, size: int) -> int:
        """The address of a new zeroed buffer that belongs to this binding."""
        buffer = self.gpu.allocate(size, zero=True)
        self._buffers.append(buffer)
        return buffer.address

    def _tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        return Tensor(self._take(int(np.prod(shape)) * dtype.itemsize), shape, dtype)

    def close(self) -> None:
        """Free the graph and give the buffers back to the pool; whatever is queued is waited for."""
        with self.gpu.current():
            self._encode_stream.synchronize()
            self._stream.synchronize()
            self._release()

    def _release(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        if self._sums is not None:
            self._sums.close()
            self._sums = None
        for buffer in self._buffers:
            self.gpu.release(buffer)
        self._buffers.clear()
        self._encode = self._denoise = _closed
        self._connector.close()


def _closed() -> None:
    raise RuntimeError("this binding was closed")
