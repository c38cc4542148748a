"""ONNX Runtime's CUDA and TensorRT providers, run on device pointers (I/O binding) and on our streams."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.device.spec import Connector, GraphSpec, Tensor
from cdiff.runtime.engines.base import variance_as_listed
from cdiff.runtime.engines.gpu import GpuEngine
from cdiff.runtime.engines.onnxruntime import CUDA, DENOISER, ENCODER, Provider, cuda_options, failure, open_session
from cdiff.runtime.engines.trt import FILES, Graph, load_trt, writable_cache
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder

TENSORRT = "TensorrtExecutionProvider"
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
NO_TF32 = "NVIDIA_TF32_OVERRIDE"
LOG = logging.getLogger("cdiff")
CAPTURED_SINCE = (1, 31)
"""The first version whose runs can be captured. In older ones, a concatenation of unequal parts copies its table from host memory and
queues the freeing of that memory on the stream: each replay of a capture would free it again, which ends the process."""


class OnnxRuntimeGpuEngine(GpuEngine):
    """A bundle's two graphs through ONNX Runtime on GPU `number`; with `tensorrt` through its TensorRT provider.

    The TensorRT provider compiles a graph for each batch's shapes at the first run and keeps the result in the bundle's cache. It has
    no switch for TF32, so it takes a float32 bundle only where the environment forbids TF32. Raises CdiffError where it does not, and
    when PyCUDA, the provider or the GPU is missing.
    """

    version: str = ort.__version__

    def __init__(self, bundle: Bundle, number: int = 0, *, tensorrt: bool = False) -> None:
        self.name = "onnxruntime-tensorrt" if tensorrt else "onnxruntime"
        if tensorrt and bundle.manifest.precision != "float16" and os.environ.get(NO_TF32) != "0":
            raise CdiffError(
                "onnxruntime-tensorrt would compute this float32 model in TF32 and has no switch for it: "
                f"set {NO_TF32}=0, export with --fp16, or use --engine onnxruntime"
            )
        if tensorrt:
            load_trt("tensorrt")  # importing the module loads TensorRT's libraries, which the provider then finds
        super().__init__(number)
        self.capturable = tuple(map(int, self.version.split(".")[:2])) >= CAPTURED_SINCE
        if not self.capturable:
            since = ".".join(map(str, CAPTURED_SINCE))
            LOG.warning(
                "onnxruntime %s cannot be captured as a CUDA graph, %s can: a step's parts are launched one by one",
                self.version,
                since,
            )
        with self.gpu.current():
            cuda = (CUDA, cuda_options(number))
            encoder, denoiser = (self._tensorrt(bundle, graph, number) if tensorrt else cuda for graph in FILES)
            self._sessions = {
                "encoder": open_session(bundle.encoder, ENCODER, self._on(encoder, self.encoder_stream)),
                "denoiser": open_session(bundle.denoiser, DENOISER, self._on(denoiser, self.stream)),
            }
        self._learned = "mix" in {one.name for one in self._sessions["denoiser"].get_outputs()}
        # Attributes are freed in the order in which they were set, and a session must be closed before the stream that it uses.
        self._outliving = self.encoder_stream, self.stream
        variance_as_listed(bundle, self._learned)

    def prepare(self, rows: int, slots: int) -> tuple[GraphSpec, Connector]:
        """See `GpuEngine.prepare`: the sessions are open already."""
        (image,) = self._sessions["encoder"].get_inputs()
        features = next(one for one in self._sessions["denoiser"].get_inputs() if one.name == "features")
        dtype = np.dtype(TYPES[features.type])
        spec = GraphSpec(tuple(image.shape[1:]), tuple(features.shape[1:]), dtype, self._learned)
        return spec, SessionConnector(self._sessions, self.gpu.number, f"{self.name} {self.version}")

    @staticmethod
    def _on(provider: Provider, stream: Any) -> Provider:
        """The provider with its kernels on one of our streams."""
        return provider[0], provider[1] | {"user_compute_stream": str(stream.handle)}

    @staticmethod
    def _tensorrt(bundle: Bundle, graph: Graph, number: int) -> Provider:
        """The TensorRT provider. Without trt_fp16_enable it builds a strongly typed network: the graph's own types, as exported.

        It names cached engines by the graph's names and shapes, not by its weights, so each graph gets a folder of its own.
        """
        digest = bundle.manifest.files[FILES[graph]]["sha256"]
        cache = make_folder(writable_cache(bundle) / f"onnxruntime_{digest}")
        return TENSORRT, {
            "device_id": str(number),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache),
        }


class SessionConnector:
    """Two sessions connected to one binding's buffers. Implements `Connector`."""

    def __init__(self, sessions: dict[str, ort.InferenceSession], number: int, what: str) -> None:
        self._sessions, self._number, self._what = sessions, number, what

    def connect(self, graph: str, tensors: dict[str, Tensor], stream: Any) -> Callable[[], None]:
        """See `Connector.connect`: every tensor is bound to its address, and a run does not wait for the GPU.

        `stream` must be the one that the session was opened with.
        """
        session = self._sessions[graph]
        bound = session.io_binding()
        inputs = {one.name for one in session.get_inputs()}
        for name, tensor in tensors.items():
            bind = bound.bind_input if name in inputs else bound.bind_output
            bind(name, "cuda", self._number, tensor.dtype.type, list(tensor.shape), tensor.address)
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def queue() -> None:
            try:
                session.run_with_iobinding(bound, options)
            except Exception as error:  # onnxruntime's exceptions share no base class of their own
                raise failure(f"{self._what} failed on cuda:{self._number} in the {graph}", error) from error

        return queue

    def close(self) -> None:
        """Does nothing: ONNX Runtime keeps its memory for the session's life."""
