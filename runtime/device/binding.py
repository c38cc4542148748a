"""An engine's two graphs connected to one GPU: takes windows, runs whole chains, and returns finished sums.

There are two streams. The encoder's uploads a window, runs the encoder and, once no queued chain needs a slot's old features, copies
the new ones there. The chain's uploads a batch's rows, draws x_T, and runs the steps and sums. They wait for each other only by events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.device.chain import DeviceChain
from cdiff.runtime.device.gpu import Gpu
from cdiff.runtime.device.pending import DeviceSums, check_features, check_state
from cdiff.runtime.device.spec import Arena, Connector, GraphSpec
from cdiff.runtime.engines.base import Float32, Int64, Pending, Prediction, Rows, SumLayout
from cdiff.runtime.sampling.sampler import SamplerTable

IMAGES = 16
"""The most windows held in pinned memory on their way to the encoder."""


class DeviceBinding:
    """Buffers for batches of `rows` rows over `slots` sets of features. Implements `Binding`, `ChainBinding` and `SumBinding`.

    streams: the encoder's and the chain's. capture: replay a step as a CUDA graph; where an engine's launches cannot be captured, they
    are made one by one, and a warning says so once. Raises OutOfMemory when the device has no room, after freeing what it took.
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
        self.gpu, self.spec, self.rows, self.slots = gpu, spec, rows, slots
        self._encode_stream, self._stream = streams
        self._connector, self._arena = connector, Arena(gpu)
        self._sums: DeviceSums | None = None
        self._chain: DeviceChain | None = None
        with gpu.current():
            try:
                self._build(capture)
            except BaseException:
                self._release()
                raise

    def _build(self, capture: bool) -> None:
        gpu, spec, arena = self.gpu, self.spec, self._arena
        self._image = arena.tensor((1, *spec.image), np.float32)
        self._encoded = arena.tensor((1, *spec.features), spec.feature_dtype)
        # Slots not used yet hold zeros, so that a padding row never reads a NaN left in memory.
        self._features = arena.tensor((self.slots, *spec.features), spec.feature_dtype)
        size = spec.image[1:]
        chain = DeviceChain(gpu, arena, self._stream, self.rows, size, self._features, spec.learned, capture)
        images = {"image": self._image, "features": self._encoded}
        self._encode = self._connector.connect("encoder", images, self._encode_stream)
        chain.denoise = self._connector.connect("denoiser", chain.tensors, self._stream)
        self._chain = chain
        self._in_place, self._chained = gpu.event(), gpu.event()
        staging = range(min(IMAGES, 2 * self.slots))
        self._staging = [(gpu.pinned(self._image.size).view(np.float32), gpu.event()) for _ in staging]
        self._turn = 0

    @property
    def chain(self) -> DeviceChain:
        """The chain. Raises RuntimeError once the binding is closed."""
        if self._chain is None:
            raise RuntimeError("this binding was closed")
        return self._chain

    @property
    def captured(self) -> bool | None:
        """Whether a step is replayed as a CUDA graph; None before the first batch."""
        return self.chain.captured

    # Binding ----------------------------------------------------------------------------------------------------------

    def encode(self, slot: int, image: Float32) -> None:
        """Queue the encoder on one window [ch,H,W] float32, and the copy of its features into `slot`.

        Features that are not finite make the next `features`, `run`, `run_chain` or `wait` raise CdiffError.
        """
        gpu, stream, chain, features = self.gpu, self._encode_stream, self.chain, self._encoded
        with gpu.current():
            staged, uploaded = self._staging[self._turn]
            self._turn = (self._turn + 1) % len(self._staging)
            uploaded.synchronize()  # wait until the window that this memory held before was uploaded
            staged[:] = np.ravel(image)
            gpu.upload(self._image.address, staged, stream)
            uploaded.record(stream)
            self._encode()
            chain.kernels.finite(stream, features.address, features.count, features.dtype.itemsize, chain.state)
            stream.wait_for_event(self._chained)
            gpu.copy(self._features.address + slot * features.size, features.address, features.size, stream)
            self._in_place.record(stream)

    def features(self) -> NDArray[Any]:
        """The features in all slots [slots,L,H,W], copied to the host. Raises CdiffError when an encoder output was not finite."""
        out = np.empty(self._features.shape, self._features.dtype)
        with self.gpu.current():
            self._stream.wait_for_event(self._in_place)
            self.gpu.download(out, self._features.address, self._stream)
            check_features(self.chain.finish())
        return out

    def set_features(self, features: NDArray[Any]) -> None:
        """Upload features [slots,L,H,W] into the slots, converted to the type that the graphs take."""
        with self.gpu.current():
            self._stream.wait_for_event(self._in_place)
            self._upload(self._features.address, np.ascontiguousarray(features, self._features.dtype))

    def run(self, x: Float32, slot: Int64, t: Int64, level: Int64) -> Prediction:
        """See `base.Binding.run`: one call of the denoiser with host arrays, for comparisons; the loop runs whole chains."""
        chain, stream = self.chain, self._stream
        with self.gpu.current():
            stream.wait_for_event(self._in_place)
            for tensor, array in ((chain.x, x), (chain.slot, slot), (chain.t, t), (chain.level, level)):
                self._upload(tensor.address, np.ascontiguousarray(array, tensor.dtype))
            assert chain.denoise is not None
            chain.denoise()
            self._chained.record(stream)
            found = [np.empty(chain.x0.shape, np.float32) for one in (chain.x0, chain.mix) if one is not None]
            for out, tensor in zip(found, filter(None, (chain.x0, chain.mix)), strict=True):
                self.gpu.download(out, tensor.address, stream)
            check_features(chain.finish())
        return found[0], (found[1] if chain.mix is not None else None)

    def _upload(self, address: int, array: NDArray[Any]) -> None:
        self.gpu.upload(address, array, self._stream)
        self._stream.synchronize()  # the caller may free or change the array

    # ChainBinding -----------------------------------------------------------------------------------------------------

    def run_chain(self, rows: Rows, table: SamplerTable, seed: int) -> Float32:
        """See `base.ChainBinding.run_chain`; raises CdiffError, naming the row, for a value that is not finite."""
        chain = self.chain
        with self.gpu.current():
            chain.set_table(table)
            chain.queue(rows, table, seed, 1, self._in_place)
            self._chained.record(self._stream)
            x = np.empty(chain.x.shape, np.float32)
            self.gpu.download(x, chain.x.address, self._stream)
            state = chain.finish()
        check_state(state, rows, table)
        return x

    # SumBinding -------------------------------------------------------------------------------------------------------

    def begin(self, layout: SumLayout, table: SamplerTable, seed: int) -> None:
        """See `base.SumBinding.begin`."""
        with self.gpu.current():
            self._wait_for_all()
            self.chain.set_table(table)
            if self._sums is None or self._sums.layout != layout:
                if self._sums is not None:
                    self._sums.close()
                    self._sums = None
                self._sums = DeviceSums(self.gpu, layout, self.spec.image[1:], self.rows)
            self._sums.reset(self._stream)
            self.chain.clear_state()
        self._job = layout, table, seed

    def queue(self, rows: Rows, finished: Sequence[int]) -> Pending:
        """See `base.SumBinding.queue`."""
        assert self._sums is not None, "begin comes first"
        layout, table, seed = self._job
        stream, chain, sums = self._stream, self.chain, self._sums
        with self.gpu.current():
            batch = sums.next_batch(rows, table)
            passed: Callable[[int], None] = lambda step: batch.passed(step, stream)  # noqa: E731
            chain.queue(rows, table, seed, layout.views, self._in_place, batch.began, passed)
            self._chained.record(stream)
            numbers = layout.levels, layout.runs
            chain.kernels.sum(stream, chain.x.address, sums.address, sums.kept, chain.state, *chain.job, *numbers)
            batch.bring_back(finished, chain.state, stream)
        return batch

    # ------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for whatever is queued, free the graph and give the buffers back to the pool."""
        with self.gpu.current():
            self._wait_for_all()
            self._release()

    def _wait_for_all(self) -> None:
        self._encode_stream.synchronize()
        self._stream.synchronize()

    def _release(self) -> None:
        if self._chain is not None:
            self._chain.close()
            self._chain = None
        if self._sums is not None:
            self._sums.close()
            self._sums = None
        self._arena.close()
        self._connector.close()
