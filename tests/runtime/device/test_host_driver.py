"""The device layer on the real bindings and a driver in host memory, each time in a process of its own: no other test sees that driver."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cdiff.runtime.device.compiler import SOURCE
from cdiff.runtime.device.kernels import SIGNATURES
from tests.runtime.device.host_kernels import SHIM

HERE = Path(__file__).parent


def unserved(library: Path) -> set[str]:
    """What PyCUDA, where it is installed, wants of libcuda.so.1 when it is loaded, and `library` has not."""

    def names(file: Path, *options: str) -> set[str]:
        done = subprocess.run(["nm", "-D", *options, str(file)], capture_output=True, text=True, check=True)
        return {line.split()[-1] for line in done.stdout.splitlines()}

    spec = importlib.util.find_spec("pycuda")
    wanted = {
        name
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for module in Path(folder).glob("_driver*.so")
        for name in names(module, "--undefined-only")
        if name.startswith("cu") and not name.startswith("curand")
    }
    return wanted - names(library, "--defined-only")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1. Skips where it cannot be built."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("no C++ compiler (g++, with nm) on this machine, or no Linux, to build a driver in host memory")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings is not installed: pip install '.[test]' in cdiff's clone")
    folder = tmp_path_factory.mktemp("driver")
    kernels = [
        SHIM,
        *(f"LAUNCH({name})" for name in SIGNATURES),
        f"#define KERNELS {' '.join(map('KERNEL({})'.format, SIGNATURES))}",
    ]
    (folder / "kernels.cpp").write_text("\n".join(kernels) + "\n")
    library, stubs = folder / "libcuda.so.1", folder / "stubs.cpp"
    flags = [
        "-O1",
        "-std=gnu++17",
        "-ffp-contract=off",
        "-fPIC",
        "-shared",
        f"-I{folder}",
        f'-DSOURCE="{SOURCE}"',
        f"-Wl,-soname,{library.name}",
    ]
    build = [compiler, *flags, "-o", str(library), str(HERE / "host_driver.cpp")]
    for _ in range(2):
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if not (more := unserved(library)):
            break
        # PyCUDA is not loaded without them, and we call none: CUDA_ERROR_NOT_SUPPORTED.
        stubs.write_text("".join(f'extern "C" int {name}() {{ return 801; }}\n' for name in sorted(more)))
        build.append(str(stubs))
    return folder


def said_by(script: str, driver: Path, folder: Path) -> list[str]:
    """Run a script of host_driver.py on the driver; the lines that it, PyCUDA and the driver wrote. Fails where it does."""
    path = ":".join(filter(None, (str(driver), os.environ.get("LD_LIBRARY_PATH"))))
    environment = os.environ | {
        "LD_LIBRARY_PATH": path,
        "HOST_DEVICES": "2",
        "CDIFF_CACHE": str(folder / "user"),
    }
    command = [
        sys.executable,
        "-W",
        "always::UserWarning",
        "-m",
        "tests.runtime.device.host_driver",
        script,
        str(folder),
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=HERE.parents[2], timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_capture_and_replay_by_cuda_bindings(driver: Path, tmp_path: Path) -> None:
    assert said_by("bindings", driver, tmp_path) == ["context 0 released"]


@pytest.mark.skipif(importlib.util.find_spec("pycuda") is None, reason="PyCUDA is not installed: pip install pycuda")
@pytest.mark.parametrize(("script", "contexts"), [("chains", 2), ("threads", 1), ("forked", 1)])
def test_the_layer_on_pycuda(driver: Path, tmp_path: Path, script: str, contexts: int) -> None:
    """Nothing is said but that the contexts are released at the end: no fault, no warning, nothing left."""
    assert sorted(said_by(script, driver, tmp_path)) == [f"context {number} released" for number in range(contexts)]
