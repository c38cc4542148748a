"""ONNX Runtime: the engine of every machine; on a CPU, or through its CUDA provider when that is asked for and really there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from cdiff.runtime.engines.base import Binding, Float32, HostBinding, Int64, Prediction
from cdiff.runtime.engines.cores import physical_cores
from cdiff.runtime.errors import CdiffError

CUDA = "CUDAExecutionProvider"
DENOISER_INPUTS = {"x", "features", "row_slice", "t", "level"}


def parse_device(device: str) -> int | None:
    """None for `cpu`, the GPU's number for `cuda` (0) and `cuda:N`. Raises CdiffError for anything else."""
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise CdiffError(f"device {device!r} is not known; use cpu, cuda or cuda:N")
    return None if device == "cpu" else int(match[1] or 0)


class OnnxRuntimeEngine:
    """A bundle's two graphs in one session each. Implements `base.Engine`.

    Plain `run` calls: with arrays in host memory, I/O binding and outputs allocated beforehand measured the same within 1 %.
    `threads` is the CPU's, by default the physical cores available. Raises CdiffError when a graph cannot be opened, is not
    one of ours, or the device is not there: ONNX Runtime itself would go on with the CPU in silence.
    """

    name = "onnxruntime"
    version: str = ort.__version__

    def __init__(self, encoder: Path, denoiser: Path, device: str = "cpu", *, threads: int | None = None) -> None:
        gpu = parse_device(device)
        if gpu is not None and CUDA not in ort.get_available_providers():
            raise CdiffError(
                f"device {device} needs ONNX Runtime's CUDA build, but onnxruntime {ort.__version__} has none: "
                "pip uninstall onnxruntime, then pip install 'cdiff[gpu]'; or use --device cpu"
            )
        self.device = "cpu" if gpu is None else f"cuda:{gpu}"
        self.threads = threads or physical_cores()
        self._encoder = self._session(encoder, gpu, {"image"}, {"features"})
        self._denoiser = self._session(denoiser, gpu, DENOISER_INPUTS, {"x0"})
        self.learned_variance = "mix" in {output.name for output in self._denoiser.get_outputs()}

    def _session(self, path: Path, gpu: int | None, inputs: set[str], outputs: set[str]) -> ort.InferenceSession:
        """Open one graph and check that it is what its name says and runs where it was asked to."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = (
            3  # errors are raised; warnings about its own optimiser are not the user's business
        )
        providers: list[Any] = ["CPUExecutionProvider"]
        if gpu is not None:
            ort.preload_dlls()  # CUDA's and cuDNN's libraries where they came as wheels
            # TF32 would be a silent loss of precision.
            providers.insert(0, (CUDA, {"device_id": gpu, "use_tf32": "0"}))
        try:
            session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's own classes have no common base of theirs
            raise CdiffError(f"{path}: ONNX Runtime {ort.__version__} cannot open it: {_line(error)}") from error
        if gpu is not None and CUDA not in session.get_providers():
            raise CdiffError(
                f"ONNX Runtime {ort.__version__} could not start its CUDA provider on cuda:{gpu} and fell back to the CPU: "
                "check that CUDA and cuDNN match it (cdiff doctor shows what is there), or use --device cpu"
            )
        found = {item.name for item in session.get_inputs()}, {item.name for item in session.get_outputs()}
        if found[0] != inputs or not outputs <= found[1]:
            raise CdiffError(
                f"{path} is not a graph of this version of cdiff (inputs {sorted(found[0])}): export it again"
            )
        return session

    def encode(self, images: Float32) -> NDArray[Any]:
        """See `base.Engine.encode`; float16 when the graph is in half precision."""
        return np.asarray(self._run(self._encoder, {"image": images})[0])

    def denoise(self, x: Float32, features: NDArray[Any], row_slice: Int64, t: Int64, level: Int64) -> Prediction:
        """See `base.Engine.denoise`."""
        feed = {"x": x, "features": features, "row_slice": row_slice, "t": t, "level": level}
        found = self._run(self._denoiser, feed, ["x0", "mix"] if self.learned_variance else ["x0"])
        return found[0], (found[1] if self.learned_variance else None)

    def bind(self, rows: int, slots: int) -> Binding:
        """See `base.Engine.bind`."""
        return HostBinding(self, rows, slots)

    def _run(self, session: ort.InferenceSession, feed: dict[str, Any], names: list[str] | None = None) -> list[Any]:
        try:
            return list(session.run(names, feed))
        except Exception as error:
            shapes = ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in feed.items())
            raise CdiffError(f"ONNX Runtime failed on {self.device} with {shapes}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first line of an exception's text, without ONNX Runtime's status code in front."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text.splitlines()[0])
