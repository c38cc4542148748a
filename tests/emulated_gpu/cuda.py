"""`torch.cuda` of the emulated GPU, as a plugin of pytest's: what it loads must be there before PyTorch is.

CDIFF_EMULATED_GPU names the library that driver.cpp became.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

assert "torch" not in sys.modules, "PyTorch asks once what there is"
ctypes.CDLL(os.environ["CDIFF_EMULATED_GPU"])

import torch  # noqa: E402

from tests.emulated_gpu import tensors  # noqa: E402
from tests.emulated_gpu.tensors import STATE, Capture, Emulated, OnGpu, wait  # noqa: E402

REPLAYS: list[int] = []
"""What each replay of a graph launched, in order: how many operations."""


class Stream:
    """All streams are one here, and in order."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("cuda:0")

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None:
        wait("a stream is waited for")


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        wait("an event is waited for")

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1000


class Graph:
    """torch.cuda.CUDAGraph."""

    capture: Capture | None = None

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        assert self.capture is not None, "nothing was captured"
        assert STATE.capture is None, "a replay within a capture"
        self.capture.replay()
        REPLAYS.append(len(self.capture.launches))


@contextlib.contextmanager
def captured(graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    """torch.cuda.graph."""
    assert STATE.capture is None, "a capture within a capture"
    STATE.capture = capture = Capture()
    try:
        yield
    except Exception:  # as PyTorch says of the end of a capture that broke
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
    finally:
        STATE.capture = None
        capture.end()
    graph.capture = capture


class Device:
    """torch.cuda.device."""

    def __init__(self, device: Any) -> None:
        assert torch.device(device) == torch.device("cuda:0")

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class WithoutGradients(torch.no_grad):
    """For torch.inference_mode, which tensors like ours cannot be made in."""

    def __new__(cls, mode: bool = True) -> Any:
        return super().__new__(cls) if mode else contextlib.nullcontext()

    def __init__(self, mode: bool = True) -> None:
        super().__init__()


def install() -> None:
    """Have PyTorch see the GPU, in every thread of this process, for good."""
    current, gib = threading.local(), 2**30

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, current.stream = now(), stream
        try:
            yield
        finally:
            current.stream = before

    def now(device: Any = None) -> Stream:
        if not hasattr(current, "stream"):
            current.stream = Stream()
        return current.stream  # type: ignore[no-any-return]

    about = {"name": "an emulated GPU", "major": 9, "minor": 0, "total_memory": 8 * gib, "multi_processor_count": 1}
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None, "is_initialized": lambda: True, "is_available": lambda: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda device: None,
        "current_stream": now, "stream": on, "synchronize": lambda device=None: wait("the GPU is waited for"),
        "is_bf16_supported": lambda including_emulation=True: True, "empty_cache": lambda: None,
        "get_device_name": lambda device=None: about["name"], "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(**about),
        "mem_get_info": lambda device=None: (6 * gib, 8 * gib), "manual_seed_all": lambda seed: None,
        "graph": captured, "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    kinds = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "device": Device}
    for name, kind in kinds.items():
        setattr(torch.cuda, name, kind)
    torch.inference_mode = WithoutGradients  # type: ignore[misc, assignment]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign, assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a weight's place cannot be changed below it
    run = threading.Thread.run

    def emulated(thread: threading.Thread) -> None:
        with Emulated():
            run(thread)

    threading.Thread.run = emulated  # type: ignore[method-assign]
    Emulated().__enter__()


def interpreted() -> None:
    """Have Triton's interpreter launch kernels as the GPU's own."""
    from triton.runtime.interpreter import GridExecutor

    plain = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        assert len({isinstance(value, OnGpu) for value in given}) == 1, "a kernel reads one device's memory"
        tensors.launched(lambda *a, **k: plain(self, *a, **k), args, kwargs)

    GridExecutor.__call__ = launch


install()
if "TRITON_INTERPRET" in os.environ:
    interpreted()
