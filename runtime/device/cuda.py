"""Imports the CUDA packages when they are first needed, with an error that says what to install where one is missing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import first_line

INSTALL = "pip install pycuda 'cuda-bindings<14' 'nvidia-cuda-nvrtc<14' (see docs/gpu.md for what goes together)"
PACKAGES = {
    "pycuda.driver": "pycuda",
    "cuda.bindings.driver": "cuda-bindings",
    "cuda.bindings.nvrtc": "cuda-bindings",
}
"""The modules that the device layer needs, and the packages that provide them."""


class OutOfMemory(CdiffError):
    """There is no memory, usually a GPU's, for a batch of this size; a smaller one may fit."""


def need(module: str) -> Any:
    """Import one of the modules in `PACKAGES`. Raises CdiffError, naming the package to install, when that fails."""
    package = PACKAGES[module]
    if module == "pycuda.driver":
        _load_curand()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise CdiffError(f"{package} is installed, but lacks {error.name}: {INSTALL}") from error
        raise CdiffError(f"a GPU needs {package}, which is not installed: {INSTALL}") from None
    except Exception as error:  # a missing library: ImportError, OSError, or one of cuda-pathfinder's own
        raise CdiffError(f"{package} is installed but cannot be loaded ({first_line(error)}): {INSTALL}") from error


def _load_curand() -> None:
    """Load cuRAND, which PyCUDA links to: if it came as a wheel, the system's loader finds it only once it is loaded in the process."""
    with contextlib.suppress(Exception):  # without it, PyCUDA's import raises its own error or does not need it
        importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("curand")


def missing_packages() -> list[str]:
    """The packages of `PACKAGES` that are not installed here, each once; imports none of them."""
    found = []
    for module, package in PACKAGES.items():
        try:
            there = importlib.util.find_spec(module.rpartition(".")[0]) is not None
        except ModuleNotFoundError:
            there = False
        if not there and package not in found:
            found.append(package)
    return found


def driver_call(function: str, *arguments: Any) -> Any:
    """Call a function of `cuda.bindings.driver` by name; returns what follows the status: None, one value or a tuple.

    For any status but success it raises OutOfMemory, or CdiffError with the driver's message.
    """
    module = need("cuda.bindings.driver")
    try:
        status, *values = getattr(module, function)(*arguments)
    except RuntimeError as error:  # the driver library is missing, or has no such function
        raise CdiffError(f"{function}: {first_line(error)}; install or update the NVIDIA driver") from error
    if int(status) == 0:
        return values[0] if len(values) == 1 else tuple(values) if values else None
    _, text = module.cuGetErrorString(status)
    words = text.decode() if isinstance(text, bytes) else str(text)
    if status == module.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemory(f"{function}: the GPU is out of memory; use a smaller batch")
    raise CdiffError(f"{function} failed: {words} ({getattr(status, 'name', status)})")
