"""What this machine has for every command, and what each engine lacks; does not import torch and changes nothing."""

from __future__ import annotations

import ctypes.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from cdiff import __version__
from cdiff.runtime.bundle import open_bundle, shipped_bundle
from cdiff.runtime.dicom_seg import HIGHDICOM
from cdiff.runtime.engines.registry import available_engines
from cdiff.runtime.engines.trt import MODULES, trt_version
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.gpus import visible_gpus
from cdiff.runtime.host import physical_cores, processor

TRAIN_EXTRA = "pip install '.[train]' in cdiff's clone"
FORMATS_EXTRA = "pip install '.[formats]' in cdiff's clone"

# Label, and the packages of which any one provides it.
PACKAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ONNX Runtime", ("onnxruntime", "onnxruntime-gpu")),
    ("TensorRT", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")),
    ("TensorRT for RTX", ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings")),
    ("PyCUDA", ("pycuda",)),
    ("CUDA bindings", ("cuda-bindings",)),
    ("NVRTC", ("nvidia-cuda-nvrtc",)),
    ("PyTorch", ("torch",)),
    ("ONNX", ("onnx",)),
    ("ONNX Script", ("onnxscript",)),
    ("safetensors", ("safetensors",)),
    ("dcm2niix", ("dcm2niix",)),
    ("pydicom", ("pydicom",)),
    ("highdicom", ("highdicom",)),
    ("SimpleITK", ("SimpleITK",)),
)
LIBRARIES = ("cuda", "cudart", "cublas", "cudnn", "curand", "nvrtc", "nvinfer")


@dataclass(frozen=True)
class Check:
    """One thing that was checked. ok: None for a plain fact. remedy: what would fix the problem, or make more possible."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Every check by section, and whether at least one engine can run a model here."""

    sections: dict[str, list[Check]]
    usable: bool


def diagnose() -> Diagnosis:
    """Check the machine, the packages, the shipped model and the engines. Whatever is wrong with the machine is a finding, not an error."""
    engines = _engines()
    sections = {
        "Engines": [*engines, _torch()],
        "Commands": _commands(),
        "Machine": _machine(),
        "GPU": _gpu(),
        "Packages": _packages(),
    }
    return Diagnosis(sections, any(check.ok for check in engines))


def _engines() -> list[Check]:
    """The engines that can run here; one that is built for GPUs cannot where there is none."""
    checks, gpu = [], bool(visible_gpus())
    for status in available_engines():
        devices = [device for device in status.devices if gpu or device != "cuda"]
        label = f"{status.version or ''} on {', '.join(devices)}".strip()
        missing = status.missing if len(devices) == len(status.devices) else "for cuda: no NVIDIA GPU was found"
        checks.append(Check(status.name, bool(devices), label if devices else "", missing))
    return checks


def _torch() -> Check:
    """PyTorch as an engine, which `auto` never picks."""
    missing = [name for name in ("torch", "safetensors") if find_spec(name) is None]
    if missing:
        return Check("torch", False, *_ready(missing))
    found = _version("torch") or "?"
    if not _for_cuda():
        return Check("torch", True, f"{found} on cpu", "for cuda: a CUDA build of PyTorch")
    gpu = bool(visible_gpus())
    where = "cpu, cuda" if gpu else "cpu"
    return Check("torch", True, f"{found} on {where}", "" if gpu else "for cuda: no NVIDIA GPU was found")


def _for_cuda() -> bool:
    """Whether PyTorch was built for CUDA, read from its version.py because its version need not say so; True where that cannot be told."""
    spec = find_spec("torch")
    for root in (spec.submodule_search_locations or []) if spec else []:
        try:
            said = (Path(root) / "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        return re.search(r"^cuda\b.*=\s*['\"]", said, re.MULTILINE) is not None
    return True


def _commands() -> list[Check]:
    try:
        model = open_bundle(shipped_bundle())
        shipped = Check(
            "shipped model", True, f"{model.manifest.name}, {model.manifest.levels} levels, its files whole"
        )
    except CdiffError as error:
        shipped = Check("shipped model", False, "", str(error))
    missing = [name for name in ("torch", "lightning_fabric", "safetensors", "tensorboard") if find_spec(name) is None]
    train = Check("train", not missing, *_ready(missing))
    missing += [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    export = Check("export", not missing, *_ready(missing))
    return [shipped, *_formats(), train, export, *_builders()]


def _formats() -> list[Check]:
    """Whether scans besides NIfTI and pictures can be read, and DICOM segmentations written. dcm2niix may be the system's or a wheel."""
    dicom = [] if find_spec("pydicom") else ["pydicom"]
    if shutil.which("dcm2niix") is None and find_spec("dcm2niix") is None:
        dicom.insert(0, "dcm2niix")
    seg = [] if find_spec("highdicom") else ["highdicom"]
    itk = [] if find_spec("SimpleITK") else ["SimpleITK"]
    return [
        Check(f"segment: {what}", not missing, *_ready(missing, remedy))
        for what, missing, remedy in (
            ("DICOM", dicom, FORMATS_EXTRA),
            ("--dicom-seg", seg, HIGHDICOM),
            ("NRRD, MetaImage", itk, FORMATS_EXTRA),
        )
    ]


def _builders() -> list[Check]:
    """Whether engines can be built here: TensorRT builds on the GPU that it builds for, TensorRT for RTX anywhere."""
    checks = []
    for flavour in MODULES:
        name = f"export --engine {flavour}"
        try:
            found = trt_version(flavour)
        except CdiffError as error:
            checks.append(Check(name, False, "", str(error)))
            continue
        waits = flavour == "tensorrt" and not visible_gpus()
        remedy = "no GPU here: the engine is built at the first run on one" if waits else ""
        checks.append(Check(name, not waits, found, remedy))
    return checks


def _ready(missing: list[str], remedy: str = TRAIN_EXTRA) -> tuple[str, str]:
    """`found` and `remedy` of a Check, given the packages that are missing."""
    return (f"lacks {', '.join(missing)}", remedy) if missing else ("ready", "")


def _machine() -> list[Check]:
    return [
        Check("cdiff", None, __version__),
        Check("Python", None, f"{platform.python_version()} ({platform.python_implementation()})"),
        Check("system", None, f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Check("processor", None, f"{processor()}, {physical_cores()} cores to use"),
        Check("memory", None, _memory()),
    ]


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def _gpu() -> list[Check]:
    checks = [_driver()]
    for name in LIBRARIES:
        where = _in_system(name) or _in_wheels(name)
        checks.append(Check(f"lib{name}", None, where or "not found"))
    return checks


def _driver() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("NVIDIA GPU", None, "none: no nvidia-smi on the PATH; only CPU engines can run")
    query = [tool, "--query-gpu=index,name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("NVIDIA GPU", False, "", f"nvidia-smi does not answer ({error}); reinstall the driver")
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode or not lines:
        said = " ".join((answer.stderr or answer.stdout).split()) or "no device listed"
        return Check("NVIDIA GPU", False, "", f"nvidia-smi: {said}")
    return Check("NVIDIA GPU", True, "; ".join(lines))


def _in_system(name: str) -> str | None:
    """The name of a library that the system's loader or compiler finds. To ask the compiler, Python needs a temporary file."""
    try:
        return ctypes.util.find_library(name)
    except OSError:  # a read-only system, with no folder for that file
        return None


def _in_wheels(name: str) -> str | None:
    """The file name of a library that came in a Python wheel: CUDA's lie in nvidia/<part>/lib, TensorRT's in tensorrt_libs."""
    for package, where in (("nvidia", "*/lib/"), ("tensorrt_libs", "")):
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(root).glob(f"{where}lib{name}.so*")):
                return f"{file.name} (wheel)"
    return None


def _packages() -> list[Check]:
    checks = []
    for label, names in PACKAGES:
        installed = [f"{name} {found}" for name in names if (found := _version(name))]
        checks.append(Check(label, None, ", ".join(installed) or "not installed"))
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        checks.append(
            Check(
                "onnxruntime twice",
                False,
                "onnxruntime and onnxruntime-gpu overwrite each other",
                "pip uninstall onnxruntime onnxruntime-gpu, then install the one that you want",
            )
        )
    return checks


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
