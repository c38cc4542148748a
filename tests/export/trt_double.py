"""Doubles of TensorRT's Python module: record every call in order, and have exactly the names that the real one of a version has.

The lists of names are the bindings' own; `test_trt_names` compares them with the real bindings wherever those can be had.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

FLAGS = (
    "REFIT GPU_FALLBACK DEBUG DISABLE_TIMING_CACHE EDITABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE DIRECT_IO "
    "VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME ERROR_ON_TIMING_CACHE_MISS DISABLE_COMPILATION_CACHE STRIP_PLAN REFIT_IDENTICAL "
    "WEIGHT_STREAMING REFIT_INDIVIDUAL STRICT_NANS MONITOR_MEMORY DISTRIBUTIVE_INDEPENDENCE"
)
WEAK = "FP16 INT8 BF16 FP8 INT4 FP4 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS REJECT_EMPTY_ALGORITHMS WEIGHTLESS"
PYTHON_PLUGINS = "PREFER_AOT_PYTHON_PLUGINS PREFER_JIT_PYTHON_PLUGINS"

ENUMS: dict[str, dict[str, str]] = {
    "10.16.1.11": {
        "BuilderFlag": f"{FLAGS} {WEAK}",
        "NetworkDefinitionCreationFlag": f"EXPLICIT_BATCH STRONGLY_TYPED {PYTHON_PLUGINS}",
    },
    "11.4.0.106": {
        "BuilderFlag": FLAGS,
        "NetworkDefinitionCreationFlag": f"STRONGLY_TYPED {PYTHON_PLUGINS}",
    },
    "1.7.1.116": {
        "BuilderFlag": f"{FLAGS} REQUIRE_USER_ALLOCATION",
        "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
        "ComputeCapability": "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121",
    },
}
SAME_IN_ALL = {
    "HardwareCompatibilityLevel": "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY",
    "MemoryPoolType": "WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM TACTIC_DRAM TACTIC_SHARED_MEMORY",
    "ProfilingVerbosity": "LAYER_NAMES_ONLY NONE DETAILED",
    "LayerInformationFormat": "ONELINE JSON",
}
CONFIG = {
    "profiling_verbosity",
    "hardware_compatibility_level",
    "progress_monitor",
}
"""The attributes of IBuilderConfig that may be set; TensorRT for RTX has one more."""


class Double:
    """One version's module, `trt` to the code under test. `calls` is what was called; the rest says how it shall behave.

    plan: what a build returns, None for a failure. parse_error: (node, operator, description). half: the precision of the
    network's convolution and of the inspected layer. on_build: called with the config's progress monitor during a build; False stops it.
    """

    def __init__(self, version: str) -> None:
        self.__version__ = version
        self.calls: list[tuple[Any, ...]] = []
        self.plan: bytes | None = b"plan"
        self.parse_error: tuple[str, str, str] | None = None
        self.network_type = self.engine_type = "HALF"
        self.cache_fits = True
        self.starts = True
        self.loads = True
        self.takes_capabilities = True
        self.takes_profiles = True
        self.on_build: Callable[[Any], bool] = lambda monitor: True
        for name, members in {**SAME_IN_ALL, **ENUMS[version]}.items():
            setattr(self, name, enum.IntEnum(name, members, start=0))
        self.LayerType = enum.IntEnum(
            "LayerType", "CONVOLUTION DECONVOLUTION MATRIX_MULTIPLY EINSUM ATTENTION_INPUT SHUFFLE"
        )
        self.ILogger = type("ILogger", (), {"Severity": enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO")})
        self.IProgressMonitor = type("IProgressMonitor", (), {})

    @property
    def rtx(self) -> bool:
        return self.__version__.startswith("1.")

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of that name."""
        return [arguments for called, *rest in self.calls if called == name for arguments in [tuple(rest)]]

    def Builder(self, log: Any) -> Any:
        assert isinstance(log, self.ILogger)
        if not self.starts:
            log.log(self.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return _Builder(self, log)

    def OnnxParser(self, network: Any, log: Any) -> Any:
        return _Parser(self, network)

    def Runtime(self, log: Any) -> Any:
        engine_type = {"HALF": "Half", "FLOAT": "Float", "NONE": ""}[self.engine_type]
        layer = {
            "Name": "conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": engine_type}],
            "TacticName": "sm90_xmma_fprop" if engine_type else "",
        }
        inspector = SimpleNamespace(get_engine_information=lambda kind: json.dumps({"Layers": [layer], "Bindings": []}))
        engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
        runtime = SimpleNamespace(engine_host_code_allowed=False)

        def load(plan: Any) -> Any:
            """A version-compatible engine carries code for the host, which TensorRT loads only where it is told to."""
            self.calls.append(("deserialize", bytes(plan)))
            carries = ("VERSION_COMPATIBLE",) in self.called("set_flag")
            return engine if self.loads and (runtime.engine_host_code_allowed or not carries) else None

        runtime.deserialize_cuda_engine = load
        return runtime

    def _note(self, value: Any, *call: Any) -> Any:
        self.calls.append(call)
        return value


class _Builder:
    def __init__(self, double: Double, log: Any) -> None:
        self.double, self.log = double, log

    def create_network(self, flags: int = 0) -> Any:
        return self.double._note(_Network(self.double), "create_network", flags)

    def create_builder_config(self) -> Any:
        return self.double._note(_Config(self.double), "create_builder_config")

    def create_optimization_profile(self) -> Any:
        return SimpleNamespace(set_shape=lambda *a: self.double._note(None, "set_shape", *a))

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        self.double.calls.append(("build_serialized_network",))
        if not self.double.on_build(config.progress_monitor):
            return None
        if self.double.plan is None:
            self.log.log(self.double.ILogger.Severity.ERROR, "no tactics within\n workspace limit")
        return self.double.plan


class _Network:
    num_layers = 2

    def __init__(self, double: Double) -> None:
        self.double = double
        self.inputs: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, number: int) -> Any:
        return self.inputs[number]

    def get_layer(self, number: int) -> Any:
        tensor = SimpleNamespace(dtype=f"DataType.{self.double.network_type}")
        kind = (self.double.LayerType.CONVOLUTION, self.double.LayerType.SHUFFLE)[number]
        return SimpleNamespace(type=kind, name="conv", num_inputs=1, get_input=lambda i: tensor)


class _Parser:
    def __init__(self, double: Double, network: _Network) -> None:
        self.double, self.network = double, network

    def parse_from_file(self, path: str) -> bool:
        self.double.calls.append(("parse_from_file", path))
        if "encoder" in path:
            shapes = {"image": (-1, 1, 16, 16)}
        else:
            shapes = {"x": (-1, 1, 16, 16), "features": (-1, 4, 16, 16), "row_slice": (-1,), "t": (-1,), "level": (-1,)}
        self.network.inputs = [SimpleNamespace(name=name, shape=shape) for name, shape in shapes.items()]
        return self.double.parse_error is None

    @property
    def num_errors(self) -> int:
        return 0 if self.double.parse_error is None else 1

    def get_error(self, number: int) -> Any:
        assert self.double.parse_error is not None
        node, operator, description = self.double.parse_error
        return SimpleNamespace(node_name=lambda: node, node_operator=lambda: operator, desc=lambda: description)


class _Config:
    def __init__(self, double: Double) -> None:
        self.__dict__.update(double=double, cache=None)

    def __setattr__(self, name: str, value: Any) -> None:
        allowed = CONFIG | ({"num_compute_capabilities"} if self.double.rtx else set())
        if name not in allowed:
            raise AttributeError(f"IBuilderConfig has no attribute {name}")
        self.double.calls.append(("set", name, value))
        self.__dict__[name] = value

    def set_flag(self, flag: Any) -> None:
        self.double.calls.append(("set_flag", flag.name))

    def clear_flag(self, flag: Any) -> None:
        self.double.calls.append(("clear_flag", flag.name))

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.double.calls.append(("set_memory_pool_limit", pool.name, size))

    def add_optimization_profile(self, profile: Any) -> int:
        return self.double._note(0 if self.double.takes_profiles else -1, "add_optimization_profile")

    def create_timing_cache(self, data: bytes) -> Any:
        return self.double._note(SimpleNamespace(data=data), "create_timing_cache", data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.double.calls.append(("set_timing_cache", cache.data, ignore_mismatch))
        self.__dict__["cache"] = cache
        return self.double.cache_fits or not cache.data

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"timings after " + self.cache.data)

    def __getattr__(self, name: str) -> Any:
        if name == "set_compute_capability" and self.double.rtx:
            takes = self.double.takes_capabilities
            return lambda capability, index: self.double._note(takes, "set_compute_capability", capability.name, index)
        raise AttributeError(f"IBuilderConfig has no attribute {name}")
