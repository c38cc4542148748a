"""One GPU through PyCUDA: its primary context, streams, events, pooled device buffers and pinned staging memory.

PyTorch, ONNX Runtime and TensorRT use the primary context too, so they can work beside this module. It is current only inside
`with gpu.current()`, which the other methods need: PyCUDA aborts a process that ends with a context left on its stack. The
context is kept until the process ends, as CUDA's runtime keeps it, and then released by `detach`: when a context object is merely
dropped, PyCUDA calls cuCtxDetach, which is not meant for primary contexts and leaves it current in the thread.
"""

from __future__ import annotations

import atexit
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.device.cuda import OutOfMemory, need
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import first_line

NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: the stream does not wait for the default stream, which other libraries in the process may use."""


@dataclass(frozen=True)
class Buffer:
    """Device memory: its address (aligned to 256 bytes, as cuMemAlloc's always are) and its size in bytes."""

    address: int
    size: int
    allocation: Any


def parse_device(device: str) -> int | None:
    """The GPU's number for `cuda` (0) and `cuda:N`; None for `cpu`. Raises CdiffError for anything else."""
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,9}))?", device)
    if match is None:
        raise CdiffError(f"device {device!r} is not known; use cpu, cuda or cuda:N")
    return None if device == "cpu" else int(match[1] or 0)


def not_there(number: int, count: int) -> CdiffError:
    """The error for GPU `number` where the driver shows only `count` GPUs."""
    there = f"only cuda:0 to cuda:{count - 1}" if count > 1 else "only cuda:0" if count else "no GPU at all"
    return CdiffError(f"cuda:{number} is not there: the driver shows {there}")


class Gpu:
    """GPU number `number`. Raises CdiffError when PyCUDA, the driver or that GPU is missing."""

    def __init__(self, number: int) -> None:
        self._driver = driver = need("pycuda.driver")
        try:
            driver.init()
            count = int(driver.Device.count())
            if number >= count:
                raise not_there(number, count)
            device = driver.Device(number)
            self.name = str(device.name())
            major, minor = device.compute_capability()
            self._context = device.retain_primary_context()
        except driver.Error as error:
            raise CdiffError(f"cuda:{number} cannot be used: {first_line(error)}; see cdiff doctor") from error
        atexit.register(self._context.detach)
        self.number = number
        self.capability, self.arch = f"{major}.{minor}", f"sm_{major}{minor}"
        self._free: list[Buffer] = []

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the primary context current in this thread for a `with` block; may be nested.

        PyCUDA's errors leave the block as CdiffError, its out-of-memory error as OutOfMemory.
        """
        driver = self._driver
        try:
            self._context.push()
            try:
                yield
            finally:
                driver.Context.pop()
        except driver.MemoryError as error:
            raise OutOfMemory(f"cuda:{self.number} ({self.name}) is out of memory: {first_line(error)}") from error
        except driver.Error as error:
            raise CdiffError(f"cuda:{self.number} ({self.name}): {first_line(error)}") from error

    def memory(self) -> tuple[int, int]:
        """Free and total device memory in bytes; what the pool holds counts as used."""
        free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, size: int, *, zero: bool = False) -> Buffer:
        """`size` bytes of device memory, from the pool if it has a free buffer of exactly that size; `zero` clears them.

        When the device is full, the pool's free buffers are released and the allocation is tried again. Raises OutOfMemory.
        """
        size = max(size, 1)
        buffer = next((one for one in self._free if one.size == size), None)
        if buffer is not None:
            self._free.remove(buffer)
        else:
            try:
                allocation = self._driver.mem_alloc(size)
            except self._driver.MemoryError:
                self.trim()
                try:
                    allocation = self._driver.mem_alloc(size)
                except self._driver.MemoryError:
                    free = self.memory()[0]
                    raise OutOfMemory(
                        f"cuda:{self.number} ({self.name}) has {free / 2**30:.1f} GiB free and {size / 2**30:.1f} GiB more "
                        "are needed; use a smaller batch"
                    ) from None
            buffer = Buffer(int(allocation), size, allocation)
        if zero:
            self._driver.memset_d8(buffer.address, 0, size)
            # Work on the default stream is not ordered with that on our streams, so wait for it, by an event: waiting for the whole context
            # is an error while another thread captures a step on this GPU, and breaks its capture.
            self._driver.Event().record().synchronize()
        return buffer

    def release(self, buffer: Buffer) -> None:
        """Give a buffer back to the pool. Nothing queued may still use it."""
        self._free.append(buffer)

    def trim(self) -> None:
        """Give the pool's free buffers back to the device."""
        for buffer in self._free:
            buffer.allocation.free()
        self._free.clear()

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Page-locked host memory, uint8 [size], which can be copied to and from the device asynchronously."""
        array: NDArray[np.uint8] = self._driver.pagelocked_empty(max(size, 1), np.uint8)
        return array

    def stream(self) -> Any:
        """A new stream, independent of the default one; TensorRT and ONNX Runtime take its `handle`."""
        return self._driver.Stream(NON_BLOCKING)

    def event(self) -> Any:
        """A new event that can be timed (`time_till`, in milliseconds)."""
        return self._driver.Event()

    def upload(self, address: int, source: NDArray[Any], stream: Any) -> None:
        """Queue a copy of a contiguous array to the device; it is asynchronous only from pinned memory."""
        self._driver.memcpy_htod_async(address, source, stream)

    def download(self, target: NDArray[Any], address: int, stream: Any) -> None:
        """Queue a copy from the device into a contiguous array."""
        self._driver.memcpy_dtoh_async(target, address, stream)

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        """Queue a copy of `size` bytes on the device."""
        self._driver.memcpy_dtod_async(target, source, size, stream)

    def clear(self, address: int, size: int, stream: Any) -> None:
        """Queue the zeroing of `size` bytes."""
        self._driver.memset_d8_async(address, 0, size, stream)

    def module(self, binary: bytes) -> Any:
        """Load a cubin; `get_function` gives its kernels."""
        return self._driver.module_from_buffer(binary)
