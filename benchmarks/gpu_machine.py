"""The GPU suite's check `machine`: the GPU, its measured rates, the packages, and what every engine says of this machine."""

from __future__ import annotations

import ctypes.util
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cdiff.runtime.engines.registry import available_engines

Keep = Callable[[dict[str, Any]], None]
"""Is given a check's result as far as it is known, since what comes after may break or reach its time limit."""

PACKAGES: tuple[tuple[str, ...], ...] = (
    ("torch",), ("triton",), ("numpy",), ("onnx",), ("onnxscript",), ("onnxruntime-gpu", "onnxruntime"), ("tensorrt-cu13", "tensorrt"),
    ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13", "tensorrt-rtx"), ("pycuda",), ("cuda-bindings",), ("nvidia-cuda-nvrtc",),
    ("safetensors",), ("nibabel",),
)  # fmt: skip
"""Packages of which any one provides the same; the first is the one that docs/gpu.md installs."""


def describe_machine(device: str, keep: Keep) -> dict[str, Any]:
    """Versions, the GPU, its measured rates, and what every engine says of this machine; the rates first, since a target needs them."""
    import torch

    from cdiff.benchmarks.gpu_measure import matmul_rates

    found: dict[str, Any] = {
        "gpu": {}, "python": platform.python_version(), "cores": os.cpu_count(),
        "packages": {name: number for names in PACKAGES for name in names if (number := installed(name))},
        "missing": [names[0] for names in PACKAGES if not any(map(installed, names))],
        "libnvinfer": ctypes.util.find_library("nvinfer"), "engines": {}, "matmul_flop_per_s": matmul_rates(device),
    }  # fmt: skip
    keep(found)
    if device != "cpu":
        about = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": about.name, "capability": f"{about.major}.{about.minor}", "bytes": about.total_memory,
            "multiprocessors": about.multi_processor_count, "driver": driver(), "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }  # fmt: skip
        keep(found)
        found["gpu"]["copy_bytes_per_s"] = copy_rate(device)
    keep(found)
    states = available_engines()
    return found | {
        "engines": {one.name: {"version": one.version, "devices": list(one.devices), "missing": one.missing} for one in states}
    }  # fmt: skip


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str:
    """The driver's version as the kernel states it, or an empty text."""
    path = Path("/proc/driver/nvidia/version")
    if not path.exists():
        return ""
    words = path.read_text().split("\n")[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def copy_rate(device: str) -> float:
    """Bytes per second that a copy within the device's memory reads and writes, taken together."""
    import torch

    from cdiff.benchmarks.gpu_measure import least
    from cdiff.export.torch_chain import wait

    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(10):
            target.copy_(source)
        wait(device)

    return 10 * 2 * source.numel() / least(copies)
