"""The real PyCUDA and cuda.bindings on the driver of host_driver.cpp: what runs there, in a process of its own, where that driver is found."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from cdiff.runtime.device.chain import DeviceChain
from cdiff.runtime.device.cuda import OutOfMemory, driver_call
from cdiff.runtime.device.gpu import Gpu
from cdiff.runtime.device.graph import Graph
from cdiff.runtime.engines.tensorrt import TensorRtEngine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.gpus import DRIVER, visible_gpus
from cdiff.runtime.sampling.sampler import sampler_table
from tests.runtime.device import fake_tensorrt
from tests.runtime.device.conftest import open_engine
from tests.runtime.device.test_device_chain import same
from tests.runtime.sampling.test_batching import SCHEDULE, SIZE, FakeEngine, framed, run, scan

HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
TABLE, WINDOWS = sampler_table("ddpm", SCHEDULE, 4), framed(scan((3, SIZE, SIZE)))


class HostStream:
    """A stream by its handle, on which Python's functions are queued as an engine queues its kernels."""

    kept: ClassVar[list[Any]] = []  # a graph may run them until the process ends

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def put(self, op: Callable[[], None]) -> None:
        def call(_: Any) -> None:
            gc.disable()  # no call of the driver is allowed in here, and what is collected may make one
            op()
            gc.enable()

        function = HOST_FUNCTION(call)
        self.kept.append(function)
        if status := ctypes.CDLL(DRIVER).cuLaunchHostFunc(ctypes.c_void_p(self.handle), function, None):
            raise RuntimeError(f"cuLaunchHostFunc: status {status}")


class Streams:
    """Any handle that the driver knows; it says itself which it does not."""

    def __getitem__(self, handle: int) -> HostStream:
        return HostStream(handle)

    def __contains__(self, handle: object) -> bool:
        return type(handle) is int


class HostWorld:
    """What the double of TensorRT asks of the machine that it runs on: the rules are the driver's."""

    streams = Streams()

    def note(self, *call: Any) -> None: ...
    def check(self, address: int, size: int) -> None: ...
    def current(self) -> None: ...


def opened(folder: Path, number: int = 0) -> TensorRtEngine:
    """An engine of the double of TensorRT, on the real PyCUDA."""
    network = fake_tensorrt.Network(FakeEngine(), (SIZE, SIZE), 2, np.float32, False)
    world: Any = HostWorld()
    return open_engine(pytest.MonkeyPatch(), folder, fake_tensorrt.module(world, network), number)[0]


def free(number: int) -> int:
    """Bytes free on a GPU."""
    gpu = Gpu(number)
    with gpu.current():
        return gpu.memory()[0]


def bindings(_: Path) -> None:
    """cuda.bindings alone: a step is captured and replayed, what spoils it is told, and the stream serves again."""
    assert [gpu.name for gpu in visible_gpus()] == ["Double", "Double"]
    driver_call("cuInit", 0)
    driver_call("cuCtxPushCurrent", driver_call("cuDevicePrimaryCtxRetain", driver_call("cuDeviceGet", 0)))
    handle = driver_call("cuStreamCreate", 1)
    stream, seen = HostStream(int(handle)), list[str]()
    for _ in range(2):
        graph = Graph(stream, lambda: stream.put(lambda: seen.append("step")))
        for _ in range(3):
            graph.launch()
        assert seen == []
        driver_call("cuStreamSynchronize", handle)
        assert seen == ["step"] * 3
        seen.clear()
        graph.close()

        def spoiling() -> None:
            with pytest.raises(CdiffError):
                driver_call("cuMemAlloc", 16)

        with pytest.raises(CdiffError, match="cuMemAlloc failed: operation not permitted when stream is capturing"):
            Graph(stream, lambda: driver_call("cuMemAlloc", 16))
        with pytest.raises(
            CdiffError, match=r"cuStreamEndCapture failed: .*previous error.*\(CUDA_ERROR_STREAM_CAPTURE_INV"
        ):
            Graph(stream, spoiling)
    with pytest.raises(OutOfMemory):
        driver_call("cuMemAlloc", 2**40)
    driver_call("cuStreamDestroy", handle)
    driver_call("cuCtxPopCurrent")
    driver_call("cuDevicePrimaryCtxRelease", 0)


def chains(folder: Path) -> None:
    """Whole scans on two GPUs: the maps are the host's, and an engine's memory goes with it."""
    want, start = run(FakeEngine(), WINDOWS, TABLE, batch=12), [free(0), free(1)]
    engines = [opened(folder, number) for number in (0, 1)]
    for batch in (12, 5):
        for engine in engines:
            same(run(engine, WINDOWS, TABLE, batch=batch), want)
            assert engine.bind(batch, 1).captured
    with pytest.raises(OutOfMemory, match=r"cuda:0 \(Double\) has 0\.\d GiB free"):
        engines[0].bind(10**7, 2)
    same(run(engines[0], WINDOWS, TABLE, batch=5), want)
    engines[1].close()
    engines.clear()
    del engine
    assert [free(0), free(1)] == start


def threads(folder: Path) -> None:
    """While one thread captures a step, another takes and clears memory; and the engine is dropped in a third."""
    start, gpu, step, capturing, done = free(0), Gpu(0), DeviceChain._step, threading.Event(), threading.Event()
    held, steps = [opened(folder)], list[int]()

    def slow(chain: DeviceChain) -> None:
        steps.append(1)
        if len(steps) == 3:  # the first two are not captured
            capturing.set()
            assert done.wait(60)
        step(chain)

    def other() -> None:
        assert capturing.wait(60)
        with gpu.current():
            gpu.release(gpu.allocate(1000, zero=True))
            gpu.trim()
        done.set()

    DeviceChain._step = slow  # type: ignore[method-assign]
    beside = threading.Thread(target=other)
    beside.start()
    same(run(held[0], WINDOWS, TABLE, batch=12), run(FakeEngine(), WINDOWS, TABLE, batch=12))
    beside.join()
    assert held[0].bind(12, 1).captured
    dropping = threading.Thread(target=held.clear)
    dropping.start()
    dropping.join()
    assert free(0) == start


def forked(folder: Path) -> None:
    """A child that was forked off is refused in a line; it ends without a word more."""
    engine = opened(folder)
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        same(run(engine, WINDOWS, TABLE, batch=12), run(FakeEngine(), WINDOWS, TABLE, batch=12))
        return
    with pytest.raises(CdiffError, match=r"^cuda:0 \(Double\): cuCtxPushCurrent failed: initialization error$"):
        engine.bind(12, 2)
    os._exit(0)


if __name__ == "__main__":
    {"bindings": bindings, "chains": chains, "threads": threads, "forked": forked}[sys.argv[1]](Path(sys.argv[2]))
