"""The interface between an engine and the chain: where tensors lie, what the graphs take, and how a graph is connected to buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cdiff.runtime.device.gpu import Buffer, Gpu


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph, at its address on the device."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def count(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape))

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class GraphSpec:
    """What the two graphs of a bundle take and return. image: (channels, H, W), float32. features: (L, H, W), of `feature_dtype`. learned:
    whether the denoiser returns `mix`."""

    image: tuple[int, int, int]
    features: tuple[int, int, int]
    feature_dtype: np.dtype[Any]
    learned: bool


class Connector(Protocol):
    """An engine's part of one binding."""

    def connect(self, graph: str, tensors: dict[str, Tensor], stream: Any) -> Callable[[], None]:
        """Connect `graph` (`encoder` or `denoiser`) permanently to its tensors, by name; the function returned queues one run on `stream`.

        Called with the GPU's context current. Raises OutOfMemory when the graph's working memory does not fit, CdiffError when the
        graph does not take these shapes.
        """

    def close(self) -> None:
        """Free what `connect` took. Nothing queued may still use it."""


class Arena:
    """The zeroed buffers of one owner, all given back at once. The GPU's context must be current except for `close`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._buffers: list[Buffer] = []

    def take(self, size: int) -> int:
        """The address of `size` new bytes, all zero."""
        buffer = self._gpu.allocate(size, zero=True)
        self._buffers.append(buffer)
        return buffer.address

    def tensor(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """A new tensor of zeros."""
        dtype = np.dtype(dtype)
        return Tensor(self.take(int(np.prod(shape)) * dtype.itemsize), shape, dtype)

    def close(self) -> None:
        """Give everything back to the pool."""
        for buffer in self._buffers:
            self._gpu.release(buffer)
        self._buffers.clear()
