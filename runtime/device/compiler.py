"""Compiles kernels.cu to a cubin for one architecture, with NVRTC (which needs no GPU), and caches it on the disk."""

from __future__ import annotations

import contextlib
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from cdiff.runtime.device.cuda import need
from cdiff.runtime.engines.trt import user_cache
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_bytes
from cdiff.runtime.words import first_line

SOURCE = Path(__file__).with_name("kernels.cu")
OPTIONS = ("--std=c++17", "-fmad=false")
"""Without contraction to fused multiply-adds, the update rounds as the host's does. NVRTC's division and square root are correctly rounded by
default."""


def cubin(arch: str) -> bytes:
    """The compiled kernels for `arch`, such as `sm_90`: from the cache, or compiled now and then cached.

    The cache's key is the source, the options, the architecture and NVRTC's version. A cache that cannot be written is no
    error. Raises CdiffError when NVRTC is missing or does not accept the source or the architecture.
    """
    path = cache_folder() / f"kernels-{arch}-{_key(arch)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    binary = compile_source(SOURCE.read_text(encoding="utf-8"), arch)
    with contextlib.suppress(CdiffError):  # a read-only home: compiled again next time, which takes about a second
        write_bytes(path, binary)
    return binary


def compile_source(source: str, arch: str) -> bytes:
    """Compile CUDA C++ text to a cubin for `arch`. Raises CdiffError with NVRTC's first error line."""
    nvrtc = need("cuda.bindings.nvrtc")
    program = _ok(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    try:
        options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={arch}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            log = bytearray(_ok(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CdiffError(
                f"NVRTC {version()} could not compile the kernels for {arch}: {_reason(nvrtc, status, log)}"
            )
        binary = bytearray(_ok(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _ok(nvrtc, nvrtc.nvrtcGetCUBIN(program, binary))
        return bytes(binary)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@cache
def version() -> str:
    """NVRTC's version, such as `13.0`. Raises CdiffError when its library is missing."""
    nvrtc = need("cuda.bindings.nvrtc")
    try:
        major, minor = _ok(nvrtc, nvrtc.nvrtcVersion())
    except CdiffError:
        raise
    except Exception as error:  # cuda-pathfinder's own exception for a library that is not found
        raise CdiffError(
            f"NVRTC's library is not there ({first_line(error)}): pip install 'nvidia-cuda-nvrtc>=13,<14'"
        ) from error
    return f"{major}.{minor}"


def cache_folder() -> Path:
    """Where compiled kernels are kept: beside the user's cache of engines."""
    return user_cache().parent / "kernels"


def _key(arch: str) -> str:
    parts = [SOURCE.read_text(encoding="utf-8"), *OPTIONS, arch, version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _ok(nvrtc: Any, answer: Any) -> Any:
    status, *values = answer
    if int(status) != 0:
        _, text = nvrtc.nvrtcGetErrorString(status)
        raise CdiffError(f"NVRTC failed: {text.decode() if isinstance(text, bytes) else text}")
    return values[0] if len(values) == 1 else tuple(values)


def _reason(nvrtc: Any, status: Any, log: bytearray) -> str:
    """The first line of the log that names an error, or the status in words where there is none."""
    lines = log.decode(errors="replace").strip("\0\n ").splitlines()
    named = [line.strip() for line in lines if "error" in line]
    if named:
        return named[0]
    _, text = nvrtc.nvrtcGetErrorString(status)
    return text.decode() if isinstance(text, bytes) else str(text)
