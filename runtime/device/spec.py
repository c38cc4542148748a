"""What an engine and the chain tell each other: where tensors lie, what the graphs take, how one is tied to buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cdiff.runtime.device.gpu import Buffer, Gpu


@dataclass(frozen=True)
class Tensor:
    """A graph's input or output where it lies on the device."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def count(self) -> int:
        """Values."""
        return int(np.prod(self.shape))

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * self.dtype.itemsize


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


class Arena:
    """The zeroed buffers of one owner, given back together. The GPU's context must be current for all but `close`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._buffers: list[Buffer] = []

    def take(self, size: int) -> int:
        """The address of `size` new bytes."""
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
