"""ONNX Runtime with arrays in host memory: the engine for CPUs, and for a GPU where the packages of the device layer are missing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from cdiff import TELEMETRY_OFF
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.device.gpu import parse_device
from cdiff.runtime.engines.base import Binding, Float32, HostBinding, Int64, Prediction
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.forked import kept_in_forks
from cdiff.runtime.host import physical_cores
from cdiff.runtime.words import first_line

if os.environ.get(TELEMETRY_OFF) == "1":
    ort.disable_telemetry_events()  # the variable is too late for a program that imported ONNX Runtime before cdiff

LOG = logging.getLogger("cdiff")
CUDA = "CUDAExecutionProvider"
Provider = tuple[str, dict[str, str]]
ENCODER = frozenset({"image"}), frozenset({"features"})
DENOISER = frozenset({"x", "features", "row_slice", "t", "level"}), frozenset({"x0"})
"""The two graphs' inputs, and the outputs that they must at least have."""
WHO_COMPUTES = "session.record_ep_graph_assignment_info"
HEAVY = frozenset(
    ["Attention", "Conv", "Gemm", "GroupNormalization", "InstanceNormalization", "MatMul", "Resize", "Softmax"]
)
"""What a network's time goes into. Operators on shapes may well run on the CPU beside a GPU: ONNX Runtime puts them there on purpose."""


def cuda_options(gpu: int) -> dict[str, str]:
    """Options of the CUDA provider on GPU number `gpu`.

    TF32 would silently lose precision. A search for the fastest convolution would choose by timing, so that two runs with one seed
    could differ in their bits. Memory grows by what is requested instead of doubling each time.
    """
    return {
        "device_id": str(gpu),
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }


def open_session(
    path: Path, names: tuple[frozenset[str], frozenset[str]], provider: Provider | None = None, *, threads: int = 0
) -> ort.InferenceSession:
    """Open the graph `path` with `provider`, or else the CPU's, and check its inputs and outputs (`names`) and that it runs there.

    threads: the CPU's; 0 leaves the number to ONNX Runtime. Raises CdiffError when the provider is missing from this build or did not
    start or does not take the network's work (ONNX Runtime itself would silently go on with the CPU), when the graph cannot be
    opened, or is not one of ours.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # On the CPU an exception says everything, so the log is silenced; only the log's errors tell why a GPU cannot be used.
    options.log_severity_level = 4 if provider is None else 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if provider is not None:
        where = f"cuda:{provider[1]['device_id']}"
        if provider[0] not in ort.get_available_providers():
            raise CdiffError(
                f"device {where} needs ONNX Runtime's CUDA build, but onnxruntime {ort.__version__} has no {provider[0]}: "
                "pip uninstall onnxruntime, then pip install '.[gpu]' in cdiff's clone; or use --device cpu"
            )
        lacking = load_libraries()
        providers.insert(0, provider)
        options.add_session_config_entry(WHO_COMPUTES, "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise CdiffError(f"{path}: ONNX Runtime {ort.__version__} cannot open it: {error_line(error)}") from error
    kept_in_forks(session)  # freeing a session waits for its threads
    if provider is not None and provider[0] not in session.get_providers():
        raise CdiffError(
            f"ONNX Runtime {ort.__version__} could not start its {provider[0]} on {where} and fell back to the CPU{lacking}: "
            "check that CUDA and cuDNN match it (cdiff doctor shows what is there), or use --device cpu"
        )
    if provider is not None and (left := left_to_the_cpu(session)):
        raise CdiffError(
            f"{path}: ONNX Runtime {ort.__version__}'s {provider[0]} leaves part of the network ({', '.join(sorted(left))}) to the CPU: "
            "use another engine for this GPU (cdiff doctor shows them), or --device cpu"
        )
    found = {item.name for item in session.get_inputs()}, {item.name for item in session.get_outputs()}
    if found[0] != names[0] or not names[1] <= found[1]:
        raise CdiffError(f"{path} is not a graph of this version of cdiff (inputs {sorted(found[0])}): export it again")
    return session


def left_to_the_cpu(session: ort.InferenceSession) -> set[str]:
    """The operators of `HEAVY` that a session opened with `WHO_COMPUTES` runs on the CPU; none where ONNX Runtime is too old to tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return set()
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == "CPUExecutionProvider"]
    return {node.op_type for part in parts for node in part.get_nodes()} & HEAVY


def load_libraries() -> str:
    """Load CUDA's and cuDNN's libraries where they came as wheels. Returns which of CUDA's are missing, in brackets for an error's text, or ""."""
    with contextlib.redirect_stdout(io.StringIO()) as said:  # ONNX Runtime prints failures
        ort.preload_dlls()
    look_for_cudnn()
    failed = [line for line in said.getvalue().splitlines() if line.startswith("Failed to load")]
    return f" ({'; '.join(failed)})" if failed else ""


@functools.cache
def look_for_cudnn() -> None:
    """Warn once if cuDNN is missing: ONNX Runtime (1.31, for one) starts on a GPU without it, and then its convolutions fail or are slow."""
    for name in ("libcudnn.so.9", "libcudnn.so"):  # in the order in which the CUDA provider looks for it
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            return
    if sys.platform == "linux":
        LOG.warning(
            "cuDNN 9 was not found (libcudnn.so.9); without it ONNX Runtime's convolutions fail or are slow on a GPU: "
            "pip install nvidia-cudnn-cu13, or add cuDNN's folder to LD_LIBRARY_PATH"
        )


class OnnxRuntimeEngine:
    """A bundle's two graphs, one session each. Implements `base.Engine`.

    It uses plain `run` calls: for arrays in host memory, I/O binding and preallocated outputs measured the same within 1 %.
    threads: the CPU's, by default the physical cores available. Raises CdiffError when a graph cannot be opened, is not
    one of ours, or the device is missing (ONNX Runtime itself would silently go on with the CPU).
    """

    name = "onnxruntime"
    version: str = ort.__version__

    def __init__(self, encoder: Path, denoiser: Path, device: str = "cpu", *, threads: int | None = None) -> None:
        gpu = parse_device(device)
        self.device = "cpu" if gpu is None else f"cuda:{gpu}"
        self.threads = threads or physical_cores()
        provider = None if gpu is None else (CUDA, cuda_options(gpu))
        self._encoder = open_session(encoder, ENCODER, provider, threads=self.threads)
        self._denoiser = open_session(denoiser, DENOISER, provider, threads=self.threads)
        self.learned_variance = "mix" in {output.name for output in self._denoiser.get_outputs()}

    def encode(self, images: Float32) -> NDArray[Any]:
        """See `base.Engine.encode`; float16 when the graph is in half precision."""
        features = np.asarray(self._run(self._encoder, {"image": images}, ["features"])[0])
        slices, *size = len(images), *images.shape[2:]
        fits = features.ndim == 4 and [features.shape[0], *features.shape[2:]] == [slices, *size]
        if not fits or features.dtype not in (np.float32, np.float16):
            wanted = f"[{slices}, channels, {', '.join(map(str, size))}] float32 or float16"
            raise CdiffError(
                f"the encoder's features are {list(features.shape)} {features.dtype}, not {wanted}: export the model again"
            )
        return features

    def denoise(self, x: Float32, features: NDArray[Any], row_slice: Int64, t: Int64, level: Int64) -> Prediction:
        """See `base.Engine.denoise`."""
        feed = {"x": x, "features": features, "row_slice": row_slice, "t": t, "level": level}
        names = ["x0", "mix"] if self.learned_variance else ["x0"]
        found = self._run(self._denoiser, feed, names)
        for name, one in zip(names, found, strict=True):
            if (one.shape, one.dtype) != (x.shape, x.dtype):
                is_, wanted = (f"{list(array.shape)} {array.dtype}" for array in (one, x))
                raise CdiffError(f"the denoiser's {name} is {is_}, not {wanted}: export the model again")
        return found[0], (found[1] if self.learned_variance else None)

    def bind(self, rows: int, slots: int) -> Binding:
        """See `base.Engine.bind`."""
        return HostBinding(self, rows, slots)

    def _run(self, session: ort.InferenceSession, feed: dict[str, Any], names: list[str] | None = None) -> list[Any]:
        try:
            return list(session.run(names, feed))
        except Exception as error:
            shapes = ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in feed.items())
            raise failure(f"ONNX Runtime failed on {self.device} with {shapes}", error) from error


def failure(what: str, error: Exception) -> CdiffError:
    """The error for a run that ONNX Runtime refused; an OutOfMemory where the reason is memory."""
    text = str(error).lower()
    lacking = any(word in text for word in ("out of memory", "failed to allocate", "alloc_failed", "bad_alloc"))
    return (OutOfMemory if lacking else CdiffError)(f"{what}: {error_line(error)}")


def error_line(error: Exception) -> str:
    """The first line of an exception's text, without ONNX Runtime's status code in front."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", first_line(error))
