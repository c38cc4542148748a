"""Which engines exist, which can run here and why not, and opening the one that was asked for (design, section 4)."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdiff.runtime.engines.base import Engine
from cdiff.runtime.errors import CdiffError

if TYPE_CHECKING:
    from cdiff.runtime.bundle import Bundle
    from cdiff.runtime.engines.trt import BuildEngines

NAMES = ("onnxruntime", "tensorrt", "tensorrt-rtx")
"""Every engine there is; `auto` takes the first that can run on the device."""

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True)
class EngineStatus:
    """One engine on this machine: the kinds of device it is built for here and, for the others, what is missing.

    `devices` is a subset of ("cpu", "cuda"); that a GPU is really there shows only when the engine is opened.
    """

    name: str
    version: str | None
    devices: tuple[str, ...]
    missing: str

    @property
    def available(self) -> bool:
        """Whether it can run at all here."""
        return bool(self.devices)


def available_engines() -> list[EngineStatus]:
    """The state of every engine in `NAMES`, in that order; imports no torch and raises nothing."""
    return [_onnxruntime_status(), *(_without_engine(name) for name in NAMES[1:])]


def _without_engine(name: str) -> EngineStatus:
    reason = f"this version of cdiff does not run {name}; on a GPU use onnxruntime-gpu (pip install 'cdiff[gpu]') with --engine onnxruntime --device cuda:0"
    return EngineStatus(name, None, (), reason)


def _onnxruntime_status() -> EngineStatus:
    if importlib.util.find_spec("onnxruntime") is None:
        return EngineStatus("onnxruntime", None, (), "onnxruntime is not installed: pip install 'cdiff[cpu]'")
    try:
        ort: Any = importlib.import_module("onnxruntime")
        providers = ort.get_available_providers()
    except (ImportError, OSError, AttributeError) as error:
        reason = f"onnxruntime is installed but broken ({error}): pip install --force-reinstall onnxruntime"
        return EngineStatus("onnxruntime", None, (), reason)
    devices = tuple(device for device, provider in (("cpu", CPU), ("cuda", CUDA)) if provider in providers)
    missing = "" if "cuda" in devices else "for cuda: onnxruntime-gpu in place of onnxruntime, pip install 'cdiff[gpu]'"
    return EngineStatus("onnxruntime", str(ort.__version__), devices, missing)


def open_engine(
    bundle: Bundle,
    name: str = "auto",
    device: str = "cpu",
    *,
    threads: int | None = None,
    build: BuildEngines | None = None,
) -> Engine:
    """Open the bundle's graphs with the engine called `name` on `device` (`cpu`, `cuda` or `cuda:N`).

    `auto` picks the first engine of `NAMES` that is built for that device here; the caller shows the engine's `name`, `version`
    and `device`, which are the picked one's. `threads` is for the CPU, by default the physical cores available.
    `build` makes the TensorRT engines that a GPU has none of yet; without it that is an error which names the command.
    Raises CdiffError when the engine or the device is unknown or cannot run here: never another one in silence.
    """
    if name not in ("auto", *NAMES):
        raise CdiffError(f"engine {name!r} is not known; use one of auto, {', '.join(NAMES)}")
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise CdiffError(f"device {device!r} is not known; use cpu, cuda or cuda:N")
    states = [state for state in available_engines() if name in ("auto", state.name)]
    if not any(kind in state.devices for state in states):
        reasons = "; ".join(state.missing for state in states if name != "auto" or state.devices)
        raise CdiffError(f"no engine can run on {device} here: {reasons}" if name == "auto" else f"{name}: {reasons}")

    from cdiff.runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle.encoder, bundle.denoiser, device, threads=threads)
