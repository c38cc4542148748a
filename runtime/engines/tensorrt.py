"""TensorRT and TensorRT for RTX: engines from the cache, run on device addresses and on our streams.

Written for the Python bindings of TensorRT 10.16, 11.4 and TensorRT for RTX 1.7.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.device.gpu import Buffer
from cdiff.runtime.device.spec import Connector, GraphSpec, Tensor
from cdiff.runtime.engines.base import variance_as_listed
from cdiff.runtime.engines.gpu import GpuEngine
from cdiff.runtime.engines.hostcode import must_be_trusted
from cdiff.runtime.engines.jit import JitFile
from cdiff.runtime.engines.trt import (
    BuildEngines,
    Flavour,
    Gpu,
    Profile,
    cached_rows,
    load_trt,
    open_or_build,
    profile_for,
)
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import most_rows

LOG = logging.getLogger("cdiff")
RUNS = 25
"""Runs per slice that a newly built engine is made for, unless a batch needs more rows."""
KEPT_ERRORS = 20


class TensorRtEngine(GpuEngine):
    """A bundle's two engines of one flavour on GPU `number`, built by `build` where the cache has none for that GPU.

    Engines are looked up in `bind`, when a batch's size is known. Raises CdiffError when TensorRT, PyCUDA or the GPU is missing.
    """

    def __init__(self, bundle: Bundle, flavour: Flavour, number: int = 0, build: BuildEngines | None = None) -> None:
        self._trt = load_trt(flavour)
        self.name, self.version = flavour, str(self._trt.__version__)
        super().__init__(number)
        self._bundle, self._flavour, self._build = bundle, flavour, build
        self._messages, self._logger, self._recorder = listeners(self._trt)
        # Not a method: connectors keep it, and a bound method would make a reference cycle with the engine, which must free its memory as soon
        # as it is dropped.
        self.failure = partial(refusal, f"{self.name} {self.version} on {self.device}", self._messages)
        with self.gpu.current():
            try:
                self._runtime = self._trt.Runtime(self._logger)
            except TypeError as error:  # what the bindings raise when the library returns no runtime
                raise self.failure(f"its runtime did not start ({error})") from error
        self._runtime.error_recorder = self._recorder
        self._loaded: tuple[Path, Path] | None = None
        self._engines: dict[str, Any] = {}
        self._kernels: dict[str, JitFile] = {}

    def prepare(self, rows: int, slots: int) -> tuple[GraphSpec, Connector]:
        """See `GpuEngine.prepare`: finds or builds the engines for these shapes and loads them."""
        gpu = self._here()
        needed = Profile(rows, rows, rows, slots)
        try:
            pair = open_or_build(self._bundle, self._flavour, gpu, needed)
        except CdiffError:
            if self._build is None:
                raise
            usual = profile_for(self._bundle.manifest, RUNS, gpu.free_bytes)
            wide = Profile(1, rows, max(rows, usual.max_rows), max(slots, usual.slots))
            pair = open_or_build(self._bundle, self._flavour, gpu, wide, self._build)
        if self._loaded != pair[:2]:
            self._engines.clear()
            for graph, path in (("encoder", pair.encoder), ("denoiser", pair.denoiser)):
                self._engines[graph] = self._load(graph, path, path in pair.host_code)
            self._loaded = pair[:2]
        spec = self._spec()
        variance_as_listed(self._bundle, spec.learned)
        return spec, TrtConnector(self, self._engines, self._kernels, self._trt)

    @cached_property
    def most_rows(self) -> int:
        """See `base.LimitedRows`: the rows that the cached engine for this GPU takes, else those that one would be built for. Found only once."""
        manifest = self._bundle.manifest
        with self.gpu.current():
            gpu = self._here()
        built = cached_rows(self._bundle, self._flavour, gpu)
        return built or most_rows(manifest.features_channels, manifest.image_size, gpu.free_bytes)

    def _here(self) -> Gpu:
        return Gpu(self.gpu.name, self.gpu.capability, self.gpu.memory()[0])

    def _load(self, graph: str, path: Path, host_code: bool) -> Any:
        runtime, plan = self._runtime, path.read_bytes()
        digest = hashlib.sha256(plan).hexdigest()
        if host_code:
            must_be_trusted(path, digest)
        runtime.engine_host_code_allowed = host_code
        self._messages.clear()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.failure(f"{path} cannot be loaded; remove its folder, and it will be built again")
        self._kernels[graph] = JitFile(path, digest, self.version, self.gpu.name)
        return engine

    def _spec(self) -> GraphSpec:
        """The shapes and types that the loaded engines state."""
        encoder, denoiser = self._engines["encoder"], self._engines["denoiser"]
        image, features = (tuple(encoder.get_tensor_shape(name))[1:] for name in ("image", "features"))
        dtype = np.dtype(self._trt.nptype(encoder.get_tensor_dtype("features")))
        return GraphSpec(image, features, dtype, "mix" in tensor_names(denoiser))

    def close(self) -> None:
        """See `GpuEngine.close`; the engines are loaded again when they are needed."""
        super().close()
        with self.gpu.current():
            self._engines.clear()
        self._loaded = None


class TrtConnector:
    """Execution contexts for one binding, whose working memory we allocate. Implements `Connector`."""

    def __init__(self, owner: TensorRtEngine, engines: dict[str, Any], kernels: dict[str, JitFile], trt: Any) -> None:
        """kernels: for each graph, the file that keeps the kernels compiled by TensorRT for RTX."""
        self._engines, self._trt, self._gpu, self._fail = engines, trt, owner.gpu, owner.failure
        self._kernels = kernels
        self._messages = owner._messages
        self._contexts: list[Any] = []
        self._caches: list[Any] = []
        self._memory: list[Buffer] = []

    def connect(self, graph: str, tensors: dict[str, Tensor], stream: Any) -> Callable[[], None]:
        """See `Connector.connect`: the profile and every shape and address are set once, before the first run."""
        trt, engine, fail = self._trt, self._engines[graph], self._fail
        self._check(graph, engine, tensors)
        self._messages.clear()
        context, keep = self._context(graph, engine)
        if context is None:
            raise fail(f"no execution context for the {graph}")
        self._contexts.append(context)
        try:
            context.set_optimization_profile_async(0, stream.handle)
        except RuntimeError as error:  # the bindings raise it where TensorRT refuses
            raise fail(f"the {graph}'s optimisation profile cannot be set") from error
        stream.synchronize()  # setting the profile queues copies, which must be done before anything runs
        for name, place in tensors.items():
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT and not context.set_input_shape(
                name, place.shape
            ):
                raise fail(f"the {graph} does not take {name} {list(place.shape)}")
            if not context.set_tensor_address(name, place.address):
                raise fail(f"the {graph} does not take an address for {name}")
        try:
            unknown = list(context.infer_shapes())
        except RuntimeError as error:  # any failure except inputs without a shape, which are returned
            raise fail(f"the {graph}'s shapes do not go together ({error})") from error
        if unknown:
            raise fail(f"the {graph} lacks the shape of {', '.join(unknown)}")
        for name, place in tensors.items():
            if (found := tuple(context.get_tensor_shape(name))) != place.shape:
                raise fail(f"the {graph}'s {name} is {list(found)}, not {list(place.shape)}")
        memory = self._working_memory(engine, context)
        self._memory.append(memory)
        context.set_device_memory(memory.address, memory.size)
        handle = stream.handle

        def queue() -> None:
            nonlocal keep
            if not context.execute_async_v3(handle):
                raise fail(f"the {graph} did not run")
            if keep is not None:  # after the first run, everything that these shapes need is compiled
                keep()
                keep = None

        return queue

    def _working_memory(self, engine: Any, context: Any) -> Buffer:
        """Memory for the most rows that the engine takes or, where that does not fit, for the rows that the context was given: otherwise a
        batch that was halved for lack of memory would need as much as before. Raises OutOfMemory."""
        most = int(engine.device_memory_size_v2)
        try:
            return self._gpu.allocate(most)
        except OutOfMemory:
            enough = int(context.update_device_memory_size_for_shapes())
            if not 0 < enough < most:  # 0: TensorRT cannot tell
                raise
        return self._gpu.allocate(enough)

    def close(self) -> None:
        """Drop the contexts, then give back their memory."""
        self._contexts.clear()
        self._caches.clear()
        for buffer in self._memory:
            self._gpu.release(buffer)
        self._memory.clear()

    def _context(self, graph: str, engine: Any) -> tuple[Any, Callable[[], None] | None]:
        """A context whose working memory we provide; and a function that saves the kernels compiled in its first run, or None."""
        trt = self._trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        specialisation = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialisation is None:
            return engine.create_execution_context(strategy), None
        # TensorRT for RTX compiles kernels when it runs. Compile eagerly, so that the same kernels serve from the first call on: by
        # default better ones replace them in the middle of a scan, which a captured graph would miss and which would change the bits.
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(strategy)
        runtime_config.dynamic_shapes_kernel_specialization_strategy = specialisation.EAGER
        runtime_cache, kept = runtime_config.create_runtime_cache(), self._kernels[graph]
        known = kept.read()
        if known is not None and not runtime_cache.deserialize(known):
            LOG.info("kernels compiled before do not fit this driver or GPU (%s); compiled again", self._said())
        if not runtime_config.set_runtime_cache(runtime_cache):
            raise self._fail(f"the {graph} takes no cache of compiled kernels")
        self._caches.append(runtime_cache)

        def keep() -> None:
            compiled = runtime_cache.serialize()
            if compiled is None:
                LOG.info("TensorRT for RTX does not give its compiled kernels to be kept: %s", self._said())
            elif bytes(compiled) != known:
                kept.write(bytes(compiled))

        return engine.create_execution_context(runtime_config), keep

    def _said(self) -> str:
        """TensorRT's messages so far, which are then cleared so that a later error does not repeat them."""
        said = "; ".join(self._messages) or "it gave no reason"
        self._messages.clear()
        return said

    def _check(self, graph: str, engine: Any, tensors: dict[str, Tensor]) -> None:
        """Raise CdiffError unless the engine's tensors have the expected names and types."""
        names = tensor_names(engine)
        if names != set(tensors):
            raise CdiffError(
                f"the {graph}'s engine has the tensors {sorted(names)}, not {sorted(tensors)}: export the bundle again"
            )
        for name, place in tensors.items():
            found = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name)))
            if found != place.dtype:
                raise CdiffError(f"the {graph}'s engine has {name} as {found}, not {place.dtype}: build it again")


def tensor_names(engine: Any) -> set[str]:
    """The names of an engine's inputs and outputs."""
    return {str(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)}


def refusal(who: str, messages: list[str], what: str) -> CdiffError:
    """The error for something that TensorRT refused, with its message (`messages` is then cleared); an OutOfMemory where the reason is memory."""
    said = messages[0] if messages else "it gave no reason"  # later errors follow from the first
    lacking = any(word in " ".join(messages).lower() for word in ("out of memory", "outofmemory", "failed_allocation"))
    messages.clear()
    kind = OutOfMemory if lacking else CdiffError
    return kind(f"{who}: {what}: {said}")


def listeners(trt: Any) -> tuple[list[str], Any, Any]:
    """A list that collects TensorRT's errors, and the logger and error recorder that fill it.

    Errors end up in our exceptions; everything less severe goes to the logger `cdiff` at level debug.
    """
    messages: list[str] = []

    def keep(text: object) -> None:
        line = " ".join(str(text).split())
        if line and line not in messages:
            messages.append(line)
            del messages[:-KEPT_ERRORS]

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                keep(message)
            else:
                LOG.debug("TensorRT: %s", message)

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        """Method names are those that the bindings look up from C++: they document `num_errors` but call `get_num_errors`."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._errors: list[tuple[Any, str]] = []

        def get_num_errors(self) -> int:
            return len(self._errors)

        def num_errors(self) -> int:
            return len(self._errors)

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1]

        def has_overflowed(self) -> bool:
            return len(self._errors) >= KEPT_ERRORS

        def clear(self) -> None:
            self._errors.clear()

        def report_error(self, code: Any, description: str) -> bool:
            if len(self._errors) < KEPT_ERRORS:
                self._errors.append((code, description))
            keep(f"{getattr(code, 'name', code)}: {description}")
            return False  # do not ask TensorRT to stop: the call's own result tells whether it failed

    return messages, Logger(), Recorder()
