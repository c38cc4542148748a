"""Which engines exist, which can run here or why not, and how the one asked for is opened."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdiff.runtime.device.cuda import INSTALL, missing_packages
from cdiff.runtime.device.gpu import not_there, parse_device
from cdiff.runtime.engines.base import Engine, variance_as_listed
from cdiff.runtime.engines.trt import BuildEngines, Flavour, has_engines, trt_version
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.gpus import visible_gpus

if TYPE_CHECKING:
    from cdiff.runtime.bundle import Bundle

NAMES = ("onnxruntime", "tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt")
"""Every engine of the runtime. The engine `torch` lives in export, because the runtime never imports PyTorch."""
FLAVOURS: dict[str, Flavour] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
AUTO = {"cpu": ("onnxruntime",), "cuda": ("tensorrt", "onnxruntime")}
"""What `auto` tries on each kind of device, in this order."""

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
LOG = logging.getLogger("cdiff")


@dataclass(frozen=True)
class EngineStatus:
    """One engine on this machine: the kinds of device that its installed build supports and, for the others, what is missing.

    `devices` is a subset of ("cpu", "cuda"); whether there really is a GPU shows only when the engine is opened.
    """

    name: str
    version: str | None
    devices: tuple[str, ...]
    missing: str


def available_engines() -> list[EngineStatus]:
    """The state of every engine in `NAMES`, in that order; does not import torch and raises nothing."""
    return [engine_status(name) for name in NAMES]


def engine_status(name: str) -> EngineStatus:
    """The state of one engine of `NAMES`; imports that engine's library and no other. Raises nothing."""
    if name in FLAVOURS:
        return _tensorrt_status(FLAVOURS[name])
    return _onnxruntime_status(name)


def _tensorrt_status(flavour: Flavour) -> EngineStatus:
    try:
        version = trt_version(flavour)
    except CdiffError as error:
        return EngineStatus(flavour, None, (), str(error))
    if lacking := _device_layer_missing():
        return EngineStatus(flavour, version, (), lacking)
    return EngineStatus(flavour, version, ("cuda",), "")


def _device_layer_missing() -> str:
    """What the device layer lacks, and how to get it; "" when it lacks nothing."""
    lacking = missing_packages()
    return f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed: {INSTALL}" if lacking else ""


def _onnxruntime_status(name: str) -> EngineStatus:
    """The state of ONNX Runtime itself, or of its TensorRT provider."""
    if importlib.util.find_spec("onnxruntime") is None:
        return EngineStatus(name, None, (), "onnxruntime is not installed: pip install '.[cpu]' in cdiff's clone")
    try:
        ort: Any = importlib.import_module("onnxruntime")
        providers, version = ort.get_available_providers(), str(ort.__version__)
    except Exception as error:  # a broken installation may raise anything
        reason = f"onnxruntime is installed but broken ({error}): pip install --force-reinstall onnxruntime"
        return EngineStatus(name, None, (), reason)
    if name == "onnxruntime-tensorrt":
        return _through_tensorrt(version, TENSORRT in providers)
    devices = tuple(device for device, provider in (("cpu", CPU), ("cuda", CUDA)) if provider in providers)
    if "cuda" not in devices:
        missing = "for cuda: pip uninstall onnxruntime, then pip install '.[gpu]' in cdiff's clone"
    else:
        lacking = _device_layer_missing()
        missing = f"on cuda every step goes through the host: {lacking}" if lacking else ""
    return EngineStatus(name, version, devices, missing)


def _through_tensorrt(version: str, built_in: bool) -> EngineStatus:
    """The state of the TensorRT provider. ONNX Runtime lists it even without TensorRT's libraries, so these are looked for too."""
    name = "onnxruntime-tensorrt"
    if not built_in:
        reason = "it needs onnxruntime-gpu: pip uninstall onnxruntime, then pip install '.[gpu]' in cdiff's clone"
        return EngineStatus(name, version, (), reason)
    try:
        tensorrt = trt_version("tensorrt")
    except CdiffError as error:
        return EngineStatus(name, version, (), str(error))
    lacking = _device_layer_missing()
    if not tensorrt.startswith("10."):
        lacking = (
            f"this onnxruntime-gpu links to TensorRT 10, and TensorRT {tensorrt} is installed: use --engine tensorrt"
        )
    return EngineStatus(name, version, () if lacking else ("cuda",), lacking)


def open_engine(
    bundle: Bundle,
    name: str = "auto",
    device: str = "cpu",
    *,
    threads: int | None = None,
    build: BuildEngines | None = None,
) -> Engine:
    """Open the bundle's graphs with the engine called `name` on `device` (`cpu`, `cuda` or `cuda:N`).

    `auto` picks the first engine of `AUTO` that can run on that device here (TensorRT only where an engine is cached or can be built);
    the caller should show the `name`, `version` and `device` of the engine returned. threads: for the CPU, by default the physical
    cores available. build: builds TensorRT engines where the cache has none for this GPU.
    Raises CdiffError when the engine or the device is unknown or cannot run here; another one is never substituted silently.
    """
    must_run(name, device)
    number = parse_device(device)
    kind = "cpu" if number is None else "cuda"
    if name != "auto":
        return _open(bundle, name, number, threads, build)
    reasons = []
    for picked in AUTO[kind]:
        state = engine_status(picked)
        if kind not in state.devices:
            reasons.append(f"{picked}: {state.missing}")
        elif picked == "tensorrt" and build is None and not has_engines(bundle, "tensorrt"):
            reasons.append("tensorrt: no engine was built; cdiff export BUNDLE --engine tensorrt builds one")
        else:
            return _open(bundle, picked, number, threads, build)
    raise CdiffError(f"no engine can run on {device} here: {'; '.join(reasons)}")


def must_run(name: str, device: str) -> None:
    """Raise CdiffError where the engine called `name` or the device is unknown, or that engine cannot run there. For `auto` only the device
    is checked; `open_engine` finds out the rest."""
    if name not in ("auto", *NAMES):
        known = f"use one of auto, {', '.join(NAMES)}"
        if name == "torch":  # known to `cdiff.load`, and taken there before this is asked
            raise CdiffError(
                f"the engine torch is not for this, only for segmenting and evaluating (cdiff.load); {known}"
            )
        raise CdiffError(f"engine {name!r} is not known; {known} or, with an installed PyTorch, torch")
    kind = "cpu" if parse_device(device) is None else "cuda"
    if name == "auto" or kind in (state := engine_status(name)).devices:
        return
    if state.devices:
        raise CdiffError(
            f"{state.name} does not run on {device} here: {state.missing or 'it needs a GPU, such as --device cuda:0'}"
        )
    raise CdiffError(f"{state.name} cannot run here: {state.missing}")


def _open(bundle: Bundle, name: str, number: int | None, threads: int | None, build: BuildEngines | None) -> Engine:
    if name in FLAVOURS:
        from cdiff.runtime.engines.tensorrt import TensorRtEngine

        return TensorRtEngine(bundle, FLAVOURS[name], number or 0, build)
    if number is not None:
        if name == "onnxruntime-tensorrt" or not missing_packages():
            from cdiff.runtime.engines.onnxruntime_gpu import OnnxRuntimeGpuEngine

            return OnnxRuntimeGpuEngine(bundle, number, tensorrt=name == "onnxruntime-tensorrt")
        count = len(visible_gpus())
        if number >= count:  # ONNX Runtime's own message would blame libraries that it could not load
            raise not_there(number, count)
        LOG.warning("on cuda:%d every step goes through the host, which is slow: %s", number, _device_layer_missing())
    from cdiff.runtime.engines.onnxruntime import OnnxRuntimeEngine

    device = "cpu" if number is None else f"cuda:{number}"
    engine = OnnxRuntimeEngine(bundle.encoder, bundle.denoiser, device, threads=threads)
    variance_as_listed(bundle, engine.learned_variance)
    return engine
