"""The driver is asked for its GPUs without any CUDA package; a driver that is not there or fails means none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cdiff.runtime import gpus
from cdiff.runtime.engines.trt import Gpu

# A driver with two GPUs, as far as cdiff asks it.
DRIVER = """
#include <stdio.h>
#include <stddef.h>
int cuInit(unsigned flags) { return flags ? 1 : %d; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 10 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { return snprintf(name, length, "GPU %%d", device) < 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)device << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? device : attribute == 76 ? 9 : -1; return 0; }
"""


def driver(folder: Path, code: str) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in driver")
    (folder / "driver.c").write_text(code)
    library = folder / "libstandin.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "driver.c")], check=True)
    return str(library)


def test_two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "DRIVER", driver(tmp_path, DRIVER % 0))
    assert gpus.visible_gpus() == [Gpu("GPU 10", "10.9", 10 << 30), Gpu("GPU 11", "11.9", 11 << 30)]


@pytest.mark.parametrize("code", [DRIVER % 999, "int cuInit(unsigned flags) { return 0; }"])
def test_a_driver_that_fails_and_one_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(gpus, "DRIVER", driver(tmp_path, code))
    assert gpus.visible_gpus() == []


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "DRIVER", str(tmp_path / "libcuda.so.1"))
    assert gpus.visible_gpus() == []
