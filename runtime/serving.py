"""The code that runs inside a Triton Inference Server's Python backend: one request is one slice, with its whole reverse chain.

`cdiff export --triton` writes a model repository whose model.py imports `TritonPythonModel` from here.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.prepared import Prepared
from cdiff.runtime.segmenter import Segmenter
from cdiff.runtime.stack import entropy
from cdiff.runtime.words import one_line

BUNDLE = "bundle"
"""The bundle's folder inside the model's version folder."""
OPTIONAL = ("seed", "runs", "steps")
OUTPUTS = ("soft", "levels", "uncertainty")


class Cancelled(Exception):
    """The client is no longer waiting for the answer."""


class TritonPythonModel:
    """The interface of Triton's Python backend. Parameters of config.pbtxt: `engine`, `sampler`, `fast`, `batch`; "" means not given."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle beside model.py onto the instance's device. Raises CdiffError, which Triton shows, when that fails, and for
        parameters with which no request could be answered."""
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        _check_numpy(self._triton)
        if (kind := args["model_instance_kind"]) not in ("GPU", "CPU"):
            raise CdiffError(f"instance_group is of kind {kind!r}, which names no device; use KIND_GPU or KIND_CPU")
        device = f"cuda:{int(args['model_instance_device_id'])}" if kind == "GPU" else "cpu"
        config = json.loads(args["model_config"])
        given = {name: value.get("string_value", "") for name, value in config.get("parameters", {}).items()}
        self._fast, self._batch = _switch("fast", given.get("fast", "")), _count("batch", given.get("batch", ""))
        self._sampler = given.get("sampler") or None
        bundle = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self.segmenter = Segmenter.open(bundle, given.get("engine") or "auto", device)
        self.segmenter.sampling(sampler=self._sampler, fast=self._fast)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request, in order; an error in one does not affect the others."""
        return [self._answer_or_lack_memory(request) for request in requests]

    def finalize(self) -> None:
        """Release the engine and its memory."""
        del self.segmenter

    def _answer_or_lack_memory(self, request: Any) -> Any:
        """`_answer`, or a refusal where there is too little memory for the runs that are asked for: an uncaught error would fail every request."""
        try:
            return self._answer(request)
        except MemoryError as error:
            lacking = (
                f"the server's memory is not enough ({one_line(error)}); ask for fewer runs, or of a smaller slice"
            )
            return self._refusal(CdiffError(lacking), self._triton.TritonError.INTERNAL)

    def _answer(self, request: Any) -> Any:
        triton = self._triton
        try:
            prepared, asked = self._read(request)
        except CdiffError as error:
            return self._refusal(error, triton.TritonError.INVALID_ARG)
        try:
            maps = self._maps(request, prepared, asked)
        except CdiffError as error:  # the engine's error: the same request may succeed elsewhere or later
            return self._refusal(error, triton.TritonError.INTERNAL)
        except Cancelled as error:
            return self._refusal(error, triton.TritonError.CANCELLED)
        return triton.InferenceResponse(output_tensors=[triton.Tensor(name, maps[name]) for name in OUTPUTS])

    def _refusal(self, error: Exception, code: int) -> Any:
        return self._triton.InferenceResponse(output_tensors=[], error=self._triton.TritonError(str(error), code))

    def _read(self, request: Any) -> tuple[Prepared, dict[str, int | None]]:
        """The slice, ready for the engine, and the numbers that the request gives. Raises CdiffError when either is invalid."""
        image = self._tensor(request, "image")
        channels = self.segmenter.manifest.image_channels
        if image.ndim != 3 or image.shape[0] != channels:
            raise CdiffError(
                f"image has the shape {list(image.shape)}; this model takes [{channels}, H, W], one slice as it was acquired"
            )
        asked = {name: self._number(request, name) for name in OPTIONAL}
        self.segmenter.sampling(asked["runs"], asked["steps"], self._sampler, self._fast, asked["seed"] or 0)
        scan = image[0] if channels == 1 else np.moveaxis(image, 0, -1)
        return self.segmenter.prepare(np.ascontiguousarray(scan)), asked

    def _maps(self, request: Any, scan: Prepared, asked: dict[str, int | None]) -> dict[str, NDArray[np.float32]]:
        """soft [H,W], levels [C,H,W] and uncertainty [2,H,W] of one slice. Raises Cancelled when the client no longer waits for them."""

        def progress(done: int, total: int) -> None:
            if request.is_cancelled():
                raise Cancelled("the request was cancelled by its client")

        result = self.segmenter.segment(
            scan,
            runs=asked["runs"],
            steps=asked["steps"],
            sampler=self._sampler,
            fast=self._fast,
            seed=asked["seed"] or 0,
            batch=self._batch,
            progress=progress,
        )
        stack = result.stack
        soft = stack.soft[0]
        return {"soft": soft, "levels": stack.levels[0], "uncertainty": np.stack([entropy(soft), stack.spread[0]])}

    def _tensor(self, request: Any, name: str) -> NDArray[Any]:
        tensor = self._triton.get_input_tensor_by_name(request, name)
        if tensor is None:
            raise CdiffError(f"the request has no input {name!r}")
        return np.asarray(tensor.as_numpy())

    def _number(self, request: Any, name: str) -> int | None:
        """An optional input of one whole number; None when the request leaves it out."""
        if self._triton.get_input_tensor_by_name(request, name) is None:
            return None
        values = self._tensor(request, name).ravel()
        if len(values) != 1:
            raise CdiffError(f"input {name!r} holds {len(values)} values, but must hold one whole number")
        return int(values[0])


def _switch(name: str, given: str) -> bool:
    """A parameter that is on or off; "" is off. Raises CdiffError for any word but true and false."""
    if (word := given.strip().lower()) not in ("true", "false", ""):
        raise CdiffError(f'the parameter {name} of config.pbtxt is {given!r}; use "true" or "false"')
    return word == "true"


def _count(name: str, given: str) -> int | None:
    """A parameter that is a whole number of at least one, or left out. Raises CdiffError for anything else."""
    if not given.strip():
        return None
    if not given.strip().isdecimal() or int(given) < 1:
        raise CdiffError(f"the parameter {name} of config.pbtxt is {given!r}; use a whole number of at least 1")
    return int(given)


def _check_numpy(triton: Any) -> None:
    """Raise CdiffError where the server's Python backend reads NumPy 2's arrays wrongly: images as zeros, maps as empty.

    pybind11 before 2.12 reads an array's item size from where NumPy 1 kept it. Such backends raise no error. So a tensor is made by
    the backend itself, as those of a request are, and what it holds is compared.
    """
    sent = np.arange(1, 4, dtype=np.float32)
    made = triton.Tensor.from_dlpack("probe", triton.Tensor("probe", sent))
    if not np.array_equal(made.as_numpy(), sent):
        raise CdiffError(
            f"this server's Python backend was built for NumPy 1 and misreads the arrays of NumPy {np.__version__}: images would be "
            "zeros and maps empty; use Triton Inference Server 24.11 or newer"
        )
