"""The kernels compile for every architecture that matters, without a GPU; what was compiled is kept, and found again."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdiff.runtime.device import compiler, cuda
from cdiff.runtime.device.kernels import SIGNATURES
from cdiff.runtime.errors import CdiffError

pytest.importorskip(
    "cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install '.[test]' in cdiff's clone"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CDIFF_CACHE", str(tmp_path / "cache"))
    return compiler.cache_folder()


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_every_kernel_compiles(arch: str) -> None:
    binary = compiler.compile_source(compiler.SOURCE.read_text(encoding="utf-8"), arch)
    assert binary.startswith(b"\x7fELF")
    for name in SIGNATURES:
        assert f".text.{name}\0".encode() in binary


def test_the_arguments_are_those_of_the_source() -> None:
    # A letter too few would shift every argument after it.
    source = compiler.SOURCE.read_text(encoding="utf-8")
    for name, letters in SIGNATURES.items():
        parameters = source.split(f"__global__ void {name}(")[1].split(")")[0].split(",")
        found = ["P" if "*" in one else "Q" if "u64" in one else "i" for one in parameters]
        assert "".join(found) == letters, name
    assert source.count("__global__") == len(SIGNATURES)


def test_a_kernel_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_source(source: str, arch: str) -> bytes:
        compiled.append(arch)
        return f"cubin {arch}".encode()

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    assert [compiler.cubin(arch) for arch in ("sm_80", "sm_90", "sm_80")] == [
        b"cubin sm_80",
        b"cubin sm_90",
        b"cubin sm_80",
    ]
    assert compiled == ["sm_80", "sm_90"]
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-G"))
    compiler.cubin("sm_80")
    monkeypatch.setattr(compiler, "version", lambda: "99.0")
    compiler.cubin("sm_80")
    assert compiled == ["sm_80", "sm_90", "sm_80", "sm_80"], "other options and another NVRTC have kernels of their own"
    assert len(list(cache.iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CDIFF_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(compiler, "compile_source", lambda source, arch: b"cubin")
    assert compiler.cubin("sm_80") == b"cubin"


@pytest.mark.parametrize(
    ("source", "arch", "said"),
    [
        (
            'extern "C" __global__ void f() { nothing(); }',
            "sm_80",
            r"for sm_80: kernels.cu\(1\): error: identifier \"nothing\"",
        ),
        ("", "sm_1", "for sm_1: nvrtc: error: invalid value for --gpu-architecture"),
    ],
)
def test_what_nvrtc_refuses_is_one_line(source: str, arch: str, said: str) -> None:
    with pytest.raises(CdiffError, match=said) as error:
        compiler.compile_source(source, arch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            ModuleNotFoundError("No module named 'pycuda'", name="pycuda"),
            "a GPU needs pycuda, which is not installed: pip install",
        ),
        (ModuleNotFoundError("No module named 'pytools'", name="pytools"), "pycuda is installed, but lacks pytools"),
        (
            ImportError("libcuda.so.1: cannot open shared object file"),
            r"pycuda is installed but cannot be loaded \(libcuda",
        ),
    ],
)
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str) -> None:
    def fail(name: str) -> Any:
        raise raised

    monkeypatch.setattr(cuda.importlib, "import_module", fail)
    with pytest.raises(CdiffError, match=said):
        cuda.need("pycuda.driver")


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a driver here")
def test_pycuda_finds_a_curand_that_came_as_a_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for PyCUDA's import, which fails unless the library that it links to is in the process."""
    loaded: list[str] = []

    def import_module(name: str) -> Any:
        if name == "cuda.pathfinder":
            return SimpleNamespace(load_nvidia_dynamic_lib=loaded.append)
        if name == "pycuda.driver" and "curand" not in loaded:
            raise ImportError("libcurand.so.10: cannot open shared object file: No such file or directory")
        return name

    monkeypatch.setattr(cuda.importlib, "import_module", import_module)
    assert cuda.need("pycuda.driver") == "pycuda.driver"


def test_without_a_driver_the_real_binding_s_error_is_one_line() -> None:
    with pytest.raises(CdiffError, match="cuGraphDestroy") as error:
        cuda.driver_call("cuGraphDestroy", 0)
    assert "\n" not in str(error.value)
