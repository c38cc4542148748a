"""The engine `torch` and the training on a GPU that is emulated: devices, captures, replays and waits as on one, numbers by the processor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.export.test_torch_fused import must_interpret

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "emulated_gpu"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C++ compiler (g++) on this machine, or no Linux, to build what PyTorch's CPU build lacks")
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch is built for CUDA: it has a GPU's guard of its own, and a GPU shows more")
    built, package = tmp_path_factory.mktemp("driver") / "driver.so", Path(torch.__file__).parent
    include, libraries = package / "include", package / "lib"
    subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{include}", HERE / "driver.cpp", f"-L{libraries}",
         f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu", "-o", built], check=True,
    )  # fmt: skip
    return built


def on_it(driver: Path, *arguments: str, **variables: str) -> str:
    """What pytest prints of those tests in a process of its own: the emulated GPU stays for good."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulated_gpu.cuda", "-p", "no:cacheprovider"]
    environment = os.environ | {"CDIFF_EMULATED_GPU": str(driver), **variables}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_what_the_emulated_gpu_says(driver: Path) -> None:
    """The tests of emulated_gpu/on_it.py."""
    assert " passed" in on_it(driver, "tests/emulated_gpu/on_it.py")


@pytest.mark.minutes
def test_what_it_says_of_our_kernels(driver: Path) -> None:
    """The default of a GPU, its kernels by Triton's interpreter."""
    must_interpret()
    assert "1 passed" in on_it(driver, "tests/emulated_gpu/on_it.py", "-k", "our_kernels", TRITON_INTERPRET="1")


@pytest.mark.minutes
def test_the_gpu_suite_runs_on_it(driver: Path) -> None:
    assert " passed" in on_it(driver, "tests/emulated_gpu/suite_on_it.py")
