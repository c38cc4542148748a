"""What all GPU engines share: the streams, one binding kept for the next scan, and single calls with host arrays."""

from __future__ import annotations

import contextlib
import sys
import threading
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.device.binding import DeviceBinding
from cdiff.runtime.device.gpu import Gpu
from cdiff.runtime.device.spec import Connector, GraphSpec
from cdiff.runtime.engines.base import Float32, Int64, Prediction
from cdiff.runtime.errors import CdiffError


class GpuEngine(ABC):
    """Implements `base.Engine` on GPU `number`; a subclass says how its graphs are connected to buffers.

    An engine keeps its `encoder_stream` and `stream` for life, because ONNX Runtime takes a stream only when a session is opened.
    Raises CdiffError when PyCUDA, the driver or the GPU is missing.
    """

    name: str
    version: str
    capture = True
    """Whether a step should be captured as a CUDA graph."""
    capturable = True
    """Whether the library can be captured; if not, `capture` has no effect."""

    def __init__(self, number: int) -> None:
        self._binding: DeviceBinding | None = None
        self.turn = threading.Lock()
        self.gpu = Gpu(number)
        self.device = f"cuda:{number}"
        with self.gpu.current():
            self.encoder_stream, self.stream = self.gpu.stream(), self.gpu.stream()

    @abstractmethod
    def prepare(self, rows: int, slots: int) -> tuple[GraphSpec, Connector]:
        """What the graphs take, and a connector to buffers for that many rows and slots. Called with the GPU's context current."""

    def bind(self, rows: int, slots: int) -> DeviceBinding:
        """See `base.Engine.bind`. Returns the last binding again for the same number of rows and no more slots, else closes it first.

        So only one scan at a time may use the engine, the one that holds `turn`: a second one would clear its sums.
        """
        if self._binding is not None and self._binding.rows == rows and self._binding.slots >= slots:
            return self._binding
        with self.gpu.current():
            self._drop()
            self.gpu.trim()  # the pool's buffers have the old sizes, and libraries cannot allocate from it
            spec, connector = self.prepare(rows, slots)
            streams, capture = (self.encoder_stream, self.stream), self.capture and self.capturable
            self._binding = DeviceBinding(self.gpu, spec, rows, slots, connector, streams, capture=capture)
        return self._binding

    def encode(self, images: Float32) -> NDArray[Any]:
        """See `base.Engine.encode`: encodes one window after another and brings the features back to the host."""
        binding = self.bind(1, 1)
        found = []
        for image in images:
            binding.encode(0, image)
            found.append(binding.features()[0])
        return np.stack(found)

    def denoise(self, x: Float32, features: NDArray[Any], row_slice: Int64, t: Int64, level: Int64) -> Prediction:
        """See `base.Engine.denoise`. For comparisons: everything is copied to the device and back."""
        binding = self.bind(len(x), len(features))
        binding.set_features(features)
        return binding.run(x, row_slice, t, level)

    def close(self) -> None:
        """Give back the binding's memory. The engine can be used again."""
        with self.gpu.current():
            self._drop()
            self.gpu.trim()

    def __del__(self) -> None:
        """Free what was not closed, sessions and streams included, with the context current, whichever thread drops the engine."""
        gpu = vars(self).get("gpu")
        if gpu is None or sys.is_finalizing():  # never opened; or the process ends, and the driver frees everything
            return
        with contextlib.suppress(CdiffError), gpu.current():
            try:
                self._drop()
            finally:
                vars(self).clear()
                gpu.trim()

    def _drop(self) -> None:
        """Close and drop the binding. The context must be current: without it PyCUDA can free pinned memory and events only in the thread that
        opened the GPU."""
        if self._binding is not None:
            self._binding.close()
            self._binding = None
