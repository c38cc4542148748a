"""A double of TensorRT's Python module: it computes a network in NumPy at the addresses that it was given, and insists on the order
of calls that TensorRT asks for."""

from __future__ import annotations

import ctypes
import enum
from types import ModuleType
from typing import Any

import numpy as np

from tests.runtime.device.fake_cuda import World

SIZE = {"encoder": 1000, "denoiser": 5000}
"""Bytes of working memory of each engine, for the most rows that it takes."""
ROW = 50
"""Bytes of it that one row needs."""


def view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Host memory at an address as an array."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_uint8 * count).from_address(address)
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


class Network:
    """What the two engines compute: `model` is a test engine with encode and denoise, `size` (H, W), features [.,L,H,W] of a type."""

    def __init__(self, model: Any, size: tuple[int, int], L: int, dtype: Any, learned: bool) -> None:
        self.model, self.learned, self.dtype = model, learned, np.dtype(dtype)
        image, features, maps = (-1, 1, *size), (-1, L, *size), (-1, 1, *size)
        i64 = np.dtype(np.int64)
        f32 = np.dtype(np.float32)
        self.inputs: dict[str, dict[str, Any]] = {
            "encoder": {"image": (image, f32)},
            "denoiser": {
                "x": (maps, f32),
                "features": (features, self.dtype),
                **dict.fromkeys(("row_slice", "t", "level"), ((-1,), i64)),
            },
        }
        mix = {"mix": (maps, f32)} if learned else {}
        self.outputs: dict[str, dict[str, Any]] = {
            "encoder": {"features": (features, self.dtype)},
            "denoiser": {"x0": (maps, f32), **mix},
        }

    def compute(self, graph: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        if graph == "encoder":
            arrays["features"][:] = self.model.encode(arrays["image"])
            return
        asked = {name: arrays[name].copy() for name in self.inputs["denoiser"]}
        asked["features"] = asked["features"].astype(np.float32)
        x0, mix = self.model.denoise(**asked)
        arrays["x0"][:] = x0
        if self.learned:
            arrays["mix"][:] = mix


def module(world: World, network: Network, *, rtx: bool = False, max_rows: int = 10**6) -> Any:
    """The module `tensorrt`, or `tensorrt_rtx`."""
    trt: Any = ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    trt.__version__ = "1.7.1.116" if rtx else "10.16.1.11"
    trt.driver = "driver-580"
    trt.refused = ""  # the method that the library refuses

    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        def __init__(self) -> None: ...

    ILogger.Severity = Severity  # type: ignore[attr-defined]

    class IErrorRecorder:
        def __init__(self) -> None: ...

    class TensorIOMode(enum.Enum):
        INPUT, OUTPUT = 1, 2

    class Strategy(enum.Enum):
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    class Specialization(enum.Enum):
        LAZY, EAGER, NONE = range(3)

    class RuntimeCache:
        """Kernels by name; bytes made for another driver are refused, as the library does."""

        def __init__(self) -> None:
            self.kernels: set[str] = set()

        def serialize(self) -> memoryview | None:
            if trt.refused == "serialize":
                return None
            return memoryview(" ".join([trt.driver, *sorted(self.kernels)]).encode())

        def deserialize(self, blob: bytes) -> bool:
            driver, *kernels = bytes(blob).decode().split(" ")
            world.note("deserialize kernels", *kernels)
            if driver != trt.driver:
                return False
            self.kernels |= set(kernels)
            return True

    class Config:
        dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY
        strategy = Strategy.STATIC
        cache: RuntimeCache | None = None

        def create_runtime_cache(self) -> RuntimeCache:
            return RuntimeCache()

        def set_runtime_cache(self, cache: RuntimeCache) -> bool:
            self.cache = cache
            return True

        def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
            self.strategy = strategy

    class Engine:
        def __init__(self, graph: str, recorder: Any) -> None:
            self.graph, self.recorder = graph, recorder
            self.inputs, self.outputs = network.inputs[graph], network.outputs[graph]
            self.tensors = self.inputs | self.outputs
            self.num_io_tensors = len(self.tensors)
            self.device_memory_size_v2 = SIZE[graph]

        def get_tensor_name(self, index: int) -> str:
            return list(self.tensors)[index]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self.tensors[name][0])

        def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
            return self.tensors[name][1]  # type: ignore[no-any-return]

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

        def create_runtime_config(self) -> Config:
            return Config()

        def create_execution_context(self, how: Any) -> Context | None:
            if trt.refused == "create_execution_context":
                return None
            assert (how.strategy if rtx else how) is Strategy.USER_MANAGED
            if rtx:
                assert how.dynamic_shapes_kernel_specialization_strategy is Specialization.EAGER
            return Context(self, how.cache if rtx else None)

    class Context:
        def __init__(self, engine: Engine, kernels: RuntimeCache | None) -> None:
            self.engine, self.kernels = engine, kernels
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}
            self.profile: int | None = None
            self.memory, self.needs = 0, engine.device_memory_size_v2

        def refuse(self, method: str, words: str) -> None:
            """As the bindings do, which make an exception of what the library returns, and not a false."""
            if trt.refused == method:
                self.engine.recorder.report_error("OUT_OF_MEMORY", f"no room in {method}: out of memory")
                raise RuntimeError(words)

        def set_device_memory(self, memory: int, size: int) -> None:
            assert memory % 256 == 0
            world.check(memory, size)
            assert size >= self.needs
            self.memory = memory

        def update_device_memory_size_for_shapes(self) -> int:
            """What the shapes that were set need; 0 where the library cannot tell."""
            assert set(self.engine.inputs) <= set(self.shapes), "every shape comes first"
            if trt.refused == "update_device_memory_size_for_shapes":
                return 0
            self.needs = ROW * self.shapes["image" if self.engine.graph == "encoder" else "x"][0]
            return self.needs

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            assert stream in world.streams
            self.refuse("set_optimization_profile_async", "Error in set optimization profile async.")
            world.note("profile", self.engine.graph, index)
            self.profile = index
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert self.profile is not None, "the profile comes before the shapes"
            world.note("shape", self.engine.graph, name, shape)
            wanted = self.engine.inputs[name][0]
            fits = len(shape) == len(wanted) and all(w in (-1, n) for w, n in zip(wanted, shape, strict=True))
            if not fits or (name == "x" and shape[0] > max_rows):
                self.engine.recorder.report_error("INVALID_ARGUMENT", f"{name} {shape} is not in the profile")
                return False
            self.shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert memory % 256 == 0, "TensorRT asks for 256 bytes of alignment"
            world.note("address", self.engine.graph, name, memory)
            self.addresses[name] = memory
            return name in self.engine.tensors and trt.refused != "set_tensor_address"

        def infer_shapes(self) -> list[str]:
            self.refuse("infer_shapes", "infer_shapes error code: -1")
            missing = [name for name in self.engine.inputs if name not in self.shapes]
            if trt.refused == "one shape":
                return ["level"]
            first = self.shapes["image" if self.engine.graph == "encoder" else "x"][0]
            for name, (shape, _) in self.engine.outputs.items():
                self.shapes[name] = (first, *shape[1:])
            return missing

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (*self.shapes[name], 1) if trt.refused == "get_tensor_shape" else self.shapes[name]

        def execute_async_v3(self, stream: int) -> bool:
            world.current()
            assert self.memory, "no working memory"
            assert set(self.addresses) == set(self.shapes) == set(self.engine.tensors)
            if trt.refused == "execute_async_v3":
                self.engine.recorder.report_error("FAILED_EXECUTION", "launch failure")
                return False
            world.note("execute", self.engine.graph, stream)
            if self.kernels is not None:
                kernel = f"{self.engine.graph}-{'-'.join(map(str, next(iter(self.shapes.values()))))}"
                if kernel not in self.kernels.kernels:
                    world.note("compile", kernel)
                    self.kernels.kernels.add(kernel)
            places = {n: (self.addresses[n], self.shapes[n], self.engine.tensors[n][1]) for n in self.addresses}
            graph = self.engine.graph
            world.streams[stream].put(
                lambda: network.compute(graph, {name: view(*place) for name, place in places.items()})
            )
            return True

    class Runtime:
        error_recorder: Any = None
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, ILogger)
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            name, _, carries = plan.decode().partition("+")
            if name not in SIZE:
                self.logger.log(Severity.ERROR, "the plan is damaged\nand more")
                return None
            if (carries == "host code") != self.engine_host_code_allowed:
                self.logger.log(Severity.ERROR, "host code is allowed where there is none, or not where there is some")
                return None
            return Engine(name, self.error_recorder)

    trt.ILogger, trt.IErrorRecorder, trt.TensorIOMode = ILogger, IErrorRecorder, TensorIOMode
    trt.ExecutionContextAllocationStrategy = Strategy
    if rtx:
        trt.DynamicShapesKernelSpecializationStrategy = Specialization
    trt.Runtime, trt.nptype = Runtime, lambda dtype: dtype.type
    return trt
