"""From one ONNX graph to one serialised engine: every call to TensorRT's builder, right for 10.16, 11.4 and TensorRT for RTX 1.7."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdiff.export.cancel import Cancel
from cdiff.export.engine_report import Layer, network_layers
from cdiff.runtime.errors import CdiffError

Fraction = Callable[[float], None]
SHOWN = 3
"""Most TensorRT messages that one error quotes."""


@dataclass(frozen=True)
class Request:
    """What to build. free_axes: for each input the (least, best, most) length of its first axis, the only free one.

    capabilities: TensorRT for RTX's targets such as "8.9", empty for TensorRT, which builds for the current GPU. flags: names of
    `BuilderFlag`, hardware: a name of `HardwareCompatibilityLevel`. timing_cache: what an earlier build left, b"" to start one, None
    to keep none.
    """

    graph: Path
    free_axes: dict[str, tuple[int, int, int]]
    capabilities: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    hardware: str | None = None
    workspace_bytes: int | None = None
    timing_cache: bytes | None = None


@dataclass(frozen=True)
class Built:
    """A serialised engine, the layers that the builder was given, the timing cache to keep, and the builder's warnings."""

    plan: memoryview
    layers: list[Layer]
    timing_cache: bytes | None
    warnings: list[str] = field(default_factory=list)


def serialise(trt: Any, request: Request, progress: Fraction | None = None) -> Built:
    """Parse the graph into a strongly typed network and build it; `trt` is the module that `load_trt` gives.

    progress: called with 0..1. Ctrl-C stops the builder at its next step and raises KeyboardInterrupt; a second one ends the
    process. Raises CdiffError when the graph cannot be parsed, an option is refused, or the build fails.
    """
    log = _logger(trt)
    with Cancel() as cancel:
        try:
            builder = trt.Builder(log)
        except (TypeError, RuntimeError) as error:  # how the bindings report a null pointer
            raise _failed(trt, log, "cannot start its builder, which needs an NVIDIA GPU and its driver") from error
        network, parsed = _parse(trt, builder, log, request.graph)
        config = builder.create_builder_config()
        _configure(trt, builder, network, config, request, log)
        cache = _attach_timing_cache(config, request.timing_cache)
        config.progress_monitor = monitor = _monitor(trt, progress or (lambda fraction: None), cancel)
        plan = builder.build_serialized_network(network, config)
        del monitor, parsed  # both must outlive the build
    if cancel.asked:
        raise KeyboardInterrupt
    if plan is None:
        raise _failed(trt, log, f"could not build an engine of {request.graph.name}")
    kept = None if cache is None else bytes(config.get_timing_cache().serialize())
    return Built(memoryview(plan), network_layers(trt, network), kept, list(dict.fromkeys(log.warnings)))


def inspect(trt: Any, plan: memoryview) -> str:
    """What the engine inspector says of every layer, as JSON text; needs the GPU that the engine is for.

    Raises CdiffError when TensorRT does not load what it has just built.
    """
    log = _logger(trt)
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = True  # a version-compatible engine carries some; it was built here, a moment ago
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise _failed(trt, log, "does not load the engine that it has just built")
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _parse(trt: Any, builder: Any, log: Any, graph: Path) -> tuple[Any, Any]:
    """The network, and the parser, which owns the weights until the engine is built."""
    # 10.x needs the flag for types to be kept; 11 has no other networks and ignores it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        said = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
        raise CdiffError(
            f"TensorRT {trt.__version__} cannot read {graph} ({'; '.join(said[:SHOWN]) or 'no reason given'}{more}); "
            "export the model again, or use --engine onnxruntime"
        )
    return network, parser


def _parser_error(parser_error: Any) -> str:
    where = f"{parser_error.node_operator()} {parser_error.node_name()}".strip()
    return f"{where or 'graph'}: {_line(parser_error.desc())}"


def _configure(trt: Any, builder: Any, network: Any, config: Any, request: Request, log: Any) -> None:
    # TF32 is on unless cleared, and would be a silent loss of precision in a float32 bundle.
    config.clear_flag(trt.BuilderFlag.TF32)
    # The graph marks an overflow with a NaN, which no simplification such as 0 * x = 0 may remove.
    for flag in ("STRICT_NANS", *request.flags):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.hardware is not None:
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, request.hardware)
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.capabilities:
        _target(trt, config, request.capabilities)
    profile = builder.create_optimization_profile()
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    if set(names) != set(request.free_axes):
        raise CdiffError(
            f"{request.graph} is not a graph of this version of cdiff (inputs {sorted(names)}): export it again"
        )
    for i, name in enumerate(names):
        rest = tuple(network.get_input(i).shape)[1:]
        profile.set_shape(name, *((length, *rest) for length in request.free_axes[name]))
    if config.add_optimization_profile(profile) < 0:
        raise _failed(trt, log, f"refuses the shapes {request.free_axes} for {request.graph.name}")


def must_build_for(trt: Any, capabilities: Iterable[str]) -> None:
    """Raise CdiffError unless this TensorRT for RTX builds for each of the compute capabilities, such as "8.9"."""
    known = _targets(trt)
    for capability in capabilities:
        if capability not in known:
            raise CdiffError(
                f"TensorRT for RTX {trt.__version__} does not build for compute capability {capability}; it knows "
                f"{', '.join(known)}: use --engine tensorrt, or onnxruntime"
            )


def _targets(trt: Any) -> dict[str, Any]:
    members = trt.ComputeCapability.__members__
    return {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}


def _target(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    known = _targets(trt)
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):  # checked by `must_build_for`
        if not config.set_compute_capability(known[capability], i):
            raise CdiffError(
                f"TensorRT for RTX {trt.__version__} refuses compute capability {capability}: leave it out, or use --engine tensorrt"
            )


def _attach_timing_cache(config: Any, kept: bytes | None) -> Any:
    """Let the build use earlier builds' timings, and return their cache; an empty one where `kept` does not fit or is damaged."""
    if kept is None:
        return None
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _logger(trt: Any) -> Any:
    """A logger that keeps what TensorRT says instead of printing it."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the module is known only now
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(_line(message))
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(_line(message))

    return Log()


def _monitor(trt: Any, progress: Fraction, cancel: Cancel) -> Any:
    """Reports the builder's phases, which have steps and nest in one another, as one fraction that never falls."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[int]] = {}  # by name, outermost first: steps done and steps in all
            self.told = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = [0, max(steps, 1)]
            self.tell()

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name][0] = step + 1
            self.tell()
            return not cancel.asked

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)
            self.tell()

        def tell(self) -> None:
            inner = 0.0
            for done, steps in reversed(list(self.phases.values())):
                inner = min((done + inner) / steps, 1.0)
            if inner >= self.told + 0.005:
                self.told = inner
                progress(inner)

    return Monitor()


def _failed(trt: Any, log: Any, what: str) -> CdiffError:
    said = "; ".join(dict.fromkeys(log.errors[-SHOWN:])) or "it gave no reason"
    short = "give it a larger workspace or fewer rows, or " if re.search("workspace|memory", said) else ""
    # TensorRT for RTX multiplies no float32 matrices on 7.5 (Turing).
    half = "export with --fp16, or " if "FP32 GEMM is not supported" in said else ""
    return CdiffError(f"TensorRT {trt.__version__} {what} ({said}); {half or short}use --engine onnxruntime")


def _line(text: str) -> str:
    return " ".join(str(text).split())
