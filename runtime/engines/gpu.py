"""What the engines on a GPU share: the streams, one binding kept for the next scan, and single calls with host arrays."""

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
    """Implements `base.Engine` on `Gpu` number `number`; a subclass says how its graphs are tied to buffers.

    `encoder_stream` and `stream` are the engine's for life, because ONNX Runtime takes its stream when a session is opened.
    Raises CdiffError when PyCUDA, the driver or the GPU is not there.
    """

    name: str
    version: str
    capture = True
    """Whether a step may be captured as a CUDA graph."""
    capturable = True
    """Whether the library stands it; where not, `capture` changes nothing."""

    def __init__(self, number: int) -> None:
        self._binding: DeviceBinding | None = None
        self.turn = threading.Lock()
        self.gpu = Gpu(number)
        self.device = f"cuda:{number}"
        with self.gpu.current():
            self.encoder_stream, self.stream = self.gpu.stream(), self.gpu.stream()

    @abstractmethod
    def prepare(self, rows: int, slots: int) -> tuple[GraphSpec, Connector]:
        """What the graphs take, and the way to tie them to buffers for that many rows and slots. The context is current."""

    def bind(self, rows: int, slots: int) -> DeviceBinding:
        """See `base.Engine.bind`. The last binding is given again for as many rows and no more slots; other numbers close it first.

        So one scan at a time, which is `turn`'s: a second one begins the sums anew.
        """
        if self._binding is not None and self._binding.rows == rows and self._binding.slots >= slots:
            return self._binding
        with self.gpu.current():
            self._drop()
            self.gpu.trim()  # the pool's buffers are of the old sizes, and what a library allocates cannot come from it
            spec, connector = self.prepare(rows, slots)
            streams, capture = (self.encoder_stream, self.stream), self.capture and self.capturable
            self._binding = DeviceBinding(self.gpu, spec, rows, slots, connector, streams, capture=capture)
        return self._binding

    def encode(self, images: Float32) -> NDArray[Any]:
        """See `base.Engine.encode`: one window after another, the features brought back."""
        binding = self.bind(1, 1)
        found = []
        for image in images:
            binding.encode(0, image)
            found.append(binding.features()[0])
        return np.stack(found)

    def denoise(self, x: Float32, features: NDArray[Any], row_slice: Int64, t: Int64, level: Int64) -> Prediction:
        """See `base.Engine.denoise`: for comparisons; everything is carried to the device and back."""
        binding = self.bind(len(x), len(features))
        binding.set_features(features)
        return binding.run(x, row_slice, t, level)

    def close(self) -> None:
        """Give back the binding's memory. The engine can be used again."""
        with self.gpu.current():
            self._drop()
            self.gpu.trim()

    def __del__(self) -> None:
        """What was not closed goes with the engine, the sessions and streams too, whichever thread lets go of it."""
        gpu = vars(self).get("gpu")
        if gpu is None or sys.is_finalizing():  # never opened, or the driver takes it all
            return
        with contextlib.suppress(CdiffError), gpu.current():
            try:
                self._drop()
            finally:
                vars(self).clear()
                gpu.trim()

    def _drop(self) -> None:
        """Let go of the binding while the context is current: PyCUDA cannot free pinned memory and events outside of it in another thread
        than the one that opened the GPU."""
        if self._binding is not None:
            self._binding.close()
            self._binding = None
