"""A double of PyCUDA and of cuda.bindings' graphs over host memory: addresses are real, our kernels really run, and what is queued
on a stream runs only when somebody waits for it, so that a missing wait or memory used again too early gives wrong numbers."""

from __future__ import annotations

import ctypes
import enum
import gc
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.runtime.device.host_kernels import launch

Op = Callable[[], None]


class Error(Exception): ...


class MemoryError_(Error): ...


class World:
    """The one machine of a test: its memory, streams, contexts, and the record of what was called, in order."""

    def __init__(self, memory: int = 2**30, devices: int = 1, *, hasty: bool = False) -> None:
        self.memory, self.devices = memory, devices
        self.hasty = hasty  # the first stream that is made runs everything at once, the others as late as they can
        self.calls: list[tuple[Any, ...]] = []
        self.streams: dict[int, Stream] = {}
        self.live: dict[int, Allocation] = {}
        self.pinned: list[tuple[int, int]] = []
        self.contexts: list[int] = []
        self.stops = 0
        self.capturing: Stream | None = None
        self.refuse_capture = False
        self.forked = False  # in a child that was forked off, which no driver serves

    def note(self, *call: Any) -> None:
        self.calls.append(call)

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]

    def used(self) -> int:
        return sum(one.size for one in self.live.values())

    def check(self, address: int, size: int) -> None:
        """The range lies in one live allocation."""
        assert any(one.address <= address and address + size <= one.address + one.size for one in self.live.values()), (
            f"{size} bytes at {address:#x} are not on the device"
        )

    def outside_capture(self, what: str) -> None:
        if self.capturing is not None:
            self.capturing.spoiled = True
            raise Error(f"{what}: operation not permitted when stream is capturing")

    def current(self) -> None:
        assert self.contexts, "no context is current"


class Allocation:
    def __init__(self, world: World, size: int) -> None:
        self.world, self.size = world, size
        self.bytes = np.full(size + 256, 0xFF, np.uint8)  # NaN, whatever it is read as
        self.address = -(-self.bytes.ctypes.data // 256) * 256
        world.live[self.address] = self

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        del self.world.live[self.address]


class Marker:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.done = stream, False

    def pass_(self) -> None:
        self.done = True


class Stream:
    def __init__(self, world: World, flags: int) -> None:
        assert flags == 1, "a stream that waits for the default one stalls when another library uses that"
        world.current()
        self.world, self.queue, self.handle = world, list[Op](), 4096 + len(world.streams)
        self.graph: list[Op] | None = None
        self.spoiled = False
        world.streams[self.handle] = self

    def put(self, op: Op) -> None:
        (self.queue if self.graph is None else self.graph).append(op)
        if self.world.hasty and self.handle == 4096:
            self.drain()

    def drain(self, until: Marker | None = None) -> None:
        while self.queue and not (until is not None and until.done):
            self.queue.pop(0)()

    def synchronize(self) -> None:
        self.world.outside_capture("synchronize")
        self.world.stops += bool(self.queue)
        self.world.note("synchronize", self.handle)
        self.drain()

    def wait_for_event(self, event: Event) -> None:
        self.world.outside_capture("wait_for_event")
        marker = event.marker
        if marker is not None:
            self.put(lambda: marker.stream.drain(marker))


class Event:
    def __init__(self, world: World) -> None:
        world.current()
        self.world, self.marker = world, None

    marker: Marker | None

    def record(self, stream: Stream | None = None) -> Event:
        self.world.outside_capture("record")
        if stream is None:  # the default stream, where the double does at once what it is asked
            self.marker = None
            return self
        self.marker = Marker(stream)
        stream.put(self.marker.pass_)
        return self

    def synchronize(self) -> Event:
        if self.marker is not None and not self.marker.done:
            self.world.outside_capture("synchronize")
            self.world.stops += 1
            self.marker.stream.drain(self.marker)
        return self

    def query(self) -> bool:
        self.synchronize()
        return True

    def time_till(self, end: Event) -> float:
        assert self.marker is not None
        assert self.marker.done
        assert end.marker is not None
        assert end.marker.done
        return 1.0


class Function:
    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name

    def prepare(self, types: str) -> Function:
        self.types = types
        return self

    def prepared_async_call(self, grid: Any, block: Any, stream: Stream, *arguments: Any) -> None:
        self.world.current()
        assert len(arguments) == len(self.types)
        assert all(type(one) is int for one in arguments), f"{self.name}: {arguments}"
        assert isinstance(grid, tuple)
        assert isinstance(block, tuple)
        assert block[1:] == (1, 1)
        for letter, one in zip(self.types, arguments, strict=True):
            if letter == "P" and one:
                self.world.check(one, 1)
        self.world.note("launch", self.name, stream.handle, arguments)
        stream.put(lambda: launch(self.name, grid, block[0], *arguments))


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class Handle(list[Op]):
    """What a graph would launch; a number to whoever asks, as the bindings' own handles are."""

    def __int__(self) -> int:
        return id(self)


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> World:
    """Put the double in place of pycuda and cuda.bindings.driver for one test."""
    world = World(**options)
    for name, module in {"pycuda": ModuleType("pycuda"), "pycuda.driver": _pycuda(world)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", _driver(world))
    monkeypatch.setattr("cdiff.runtime.device.kernels.cubin", lambda arch: f"cubin for {arch}".encode())
    return world


def _pycuda(world: World) -> ModuleType:
    driver: Any = ModuleType("pycuda.driver")
    driver.Error, driver.MemoryError = Error, MemoryError_

    class Context:
        def __init__(self, number: int) -> None:
            self.number, self.attached = number, True

        def push(self) -> None:
            if world.forked:
                raise Error("cuCtxPushCurrent failed: initialization error")
            world.contexts.append(self.number)

        @staticmethod
        def pop() -> None:
            world.contexts.pop()

        @staticmethod
        def synchronize() -> None:
            raise AssertionError("an error, which spoils the capture, while another thread captures on the same GPU")

        def detach(self) -> None:
            self.attached = False

        def __del__(self) -> None:
            world.note("context dropped", self.attached)

    class Device:
        def __init__(self, number: int) -> None:
            assert number < world.devices
            self.number = number

        @staticmethod
        def count() -> int:
            return world.devices

        def retain_primary_context(self) -> Context:
            return Context(self.number)

        def name(self) -> str:
            return "Double"

        def compute_capability(self) -> tuple[int, int]:
            return 9, 0

    class Module:
        def __init__(self, binary: bytes) -> None:
            assert binary == b"cubin for sm_90"

        def get_function(self, name: str) -> Function:
            return Function(world, name)

    def mem_alloc(size: int) -> Allocation:
        world.current()
        world.outside_capture("mem_alloc")
        if world.used() + size > world.memory:
            raise MemoryError_("cuMemAlloc failed: out of memory")
        return Allocation(world, size)

    def pagelocked_empty(shape: int, dtype: Any) -> Any:
        world.current()
        array = np.full(shape, 0xFF, dtype)
        world.pinned.append((array.ctypes.data, array.ctypes.data + array.nbytes))
        weakref.finalize(array, lambda: world.note("unpinned", bool(world.contexts))).atexit = False
        return array

    def is_pinned(array: Any) -> bool:
        return any(low <= array.ctypes.data < high for low, high in world.pinned)

    def memcpy_htod_async(address: int, source: Any, stream: Stream) -> None:
        assert source.flags.c_contiguous
        world.check(address, source.nbytes)
        # Pageable memory is read before the call returns, pinned memory when the copy's turn comes.
        kept = source if is_pinned(source) else source.copy()
        stream.put(lambda: ctypes.memmove(address, kept.ctypes.data, kept.nbytes))

    def memcpy_dtoh_async(target: Any, address: int, stream: Stream) -> None:
        assert target.flags.c_contiguous
        world.check(address, target.nbytes)
        stream.put(lambda: ctypes.memmove(target.ctypes.data, address, target.nbytes))

    def memcpy_dtod_async(target: int, source: int, size: int, stream: Stream) -> None:
        world.check(target, size)
        world.check(source, size)
        stream.put(lambda: ctypes.memmove(target, source, size))

    def memset_d8(address: int, value: int, size: int) -> None:
        world.check(address, size)
        ctypes.memset(address, value, size)

    def memset_d8_async(address: int, value: int, size: int, stream: Stream) -> None:
        world.check(address, size)
        stream.put(lambda: ctypes.memset(address, value, size))

    driver.init = lambda: None
    driver.Context, driver.Device = Context, Device
    driver.Stream, driver.Event = (lambda flags=0: Stream(world, flags)), (lambda: Event(world))
    driver.mem_get_info = lambda: (world.memory - world.used(), world.memory)
    driver.module_from_buffer = Module
    for function in (
        *(mem_alloc, pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async, memcpy_dtod_async),
        *(memset_d8, memset_d8_async),
    ):
        setattr(driver, function.__name__, function)
    return driver


def _driver(world: World) -> ModuleType:
    """cuda.bindings.driver, as far as graphs go: a status and the values, in a tuple."""
    driver: Any = ModuleType("cuda.bindings.driver")

    class Mode(enum.IntEnum):
        CU_STREAM_CAPTURE_MODE_GLOBAL = 0
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1

    def begin(stream: int, mode: Mode) -> tuple[Result]:
        assert mode == Mode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        assert world.capturing is None, "a capture is begun twice"
        assert not gc.isenabled(), "an older graph that is collected within a capture breaks it"
        world.note("begin capture", stream)
        world.capturing = world.streams[stream]
        world.capturing.graph, world.capturing.spoiled = [], world.refuse_capture
        return (Result.CUDA_SUCCESS,)

    def end(stream: int) -> tuple[Result, Any]:
        assert not gc.isenabled(), "the capture has not ended yet"
        captured, world.capturing = world.capturing, None
        assert captured is world.streams[stream], "a capture is ended that was not begun"
        world.note("end capture", stream)
        ops, captured.graph = captured.graph, None
        if captured.spoiled:
            return Result.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        return Result.CUDA_SUCCESS, Handle(ops)

    def instantiate(graph: Any, flags: int) -> tuple[Result, Any]:
        assert flags == 0
        return Result.CUDA_SUCCESS, list(graph)

    def go(executable: Any, stream: int) -> tuple[Result]:
        world.note("graph launch", stream)
        for op in executable:
            world.streams[stream].put(op)
        return (Result.CUDA_SUCCESS,)

    def destroy(name: str) -> Callable[[Any], tuple[Result]]:
        def call(_: Any) -> tuple[Result]:
            world.note(name)
            return (Result.CUDA_SUCCESS,)

        return call

    driver.CUresult, driver.CUstreamCaptureMode, driver.CUstream = Result, Mode, int
    driver.cuStreamBeginCapture, driver.cuStreamEndCapture = begin, end
    driver.cuGraphInstantiate, driver.cuGraphLaunch = instantiate, go
    driver.cuGraphDestroy, driver.cuGraphExecDestroy = destroy("graph destroyed"), destroy("executable destroyed")
    driver.cuGetErrorString = lambda status: (Result.CUDA_SUCCESS, f"status {int(status)}".encode())
    return driver
