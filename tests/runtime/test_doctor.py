"""Doctor: looks without importing torch, and believes nvidia-smi only when it answers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from cdiff.runtime.doctor import Check, diagnose
from cdiff.runtime.engines.registry import EngineStatus
from cdiff.runtime.errors import CdiffError


def _gpu(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> tuple[bool | None, str]:
    """What doctor says of the GPU where `nvidia-smi` is this script."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    (check,) = [check for check in diagnose().sections["GPU"] if check.name == "NVIDIA GPU"]
    return check.ok, check.found + check.remedy


def test_a_gpu_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok, words = _gpu(tmp_path, "echo '0, NVIDIA H200, 143771 MiB, 9.0, 580.1'", monkeypatch)
    assert ok is True
    assert "H200" in words


def test_a_driver_that_fails_is_not_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok, words = _gpu(tmp_path, "echo 'Driver/library version mismatch' >&2; exit 18", monkeypatch)
    assert ok is False
    assert "mismatch" in words


def test_what_reads_other_formats_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dcm2niix may be the system's, without its Python package."""

    def formats() -> dict[str, Check]:
        return {check.name: check for check in diagnose().sections["Commands"] if check.name.startswith("segment: ")}

    assert all(check.ok for check in formats().values())
    monkeypatch.setattr("cdiff.runtime.doctor.find_spec", lambda name: None if name in lacking else find_spec(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    lacking = {"SimpleITK", "dcm2niix", "highdicom"}
    remedy = "pip install '.[formats]' in cdiff's clone"
    assert formats() == {
        "segment: DICOM": Check("segment: DICOM", False, "lacks dcm2niix", remedy),
        "segment: --dicom-seg": Check(
            "segment: --dicom-seg", False, "lacks highdicom", "pip install --no-deps highdicom"
        ),
        "segment: NRRD, MetaImage": Check("segment: NRRD, MetaImage", False, "lacks SimpleITK", remedy),
    }
    (tmp_path / "dcm2niix").touch(mode=0o755)
    assert formats()["segment: DICOM"].ok, "it is read without what writes segmentations"


def test_every_engine_has_a_line() -> None:
    from cdiff.runtime.engines.registry import NAMES

    found = diagnose()
    assert [check.name for check in found.sections["Engines"]] == [*NAMES, "torch"]
    assert found.usable == any(check.ok for check in found.sections["Engines"][:-1])
    for check in found.sections["Engines"]:
        assert check.ok or check.remedy


def test_an_engine_for_a_gpu_that_is_not_there_does_not_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built = [
        EngineStatus("onnxruntime", "1.31.1", ("cpu", "cuda"), "on cuda every step goes through the host: more"),
        EngineStatus("tensorrt", "10.16.1.11", ("cuda",), ""),
    ]
    monkeypatch.setattr("cdiff.runtime.doctor.available_engines", lambda: built)
    monkeypatch.setattr("cdiff.runtime.doctor.visible_gpus", lambda: [])
    none = "for cuda: no NVIDIA GPU was found"
    assert diagnose().sections["Engines"][:-1] == [
        Check("onnxruntime", True, "1.31.1 on cpu", none),
        Check("tensorrt", False, "", none),
    ]
    monkeypatch.setattr("cdiff.runtime.doctor.available_engines", lambda: built[1:])
    assert not diagnose().usable
    monkeypatch.setattr("cdiff.runtime.doctor.available_engines", lambda: built)
    monkeypatch.setattr("cdiff.runtime.doctor.visible_gpus", lambda: ["a GPU"])
    found = [check.found for check in diagnose().sections["Engines"]]
    assert found[:-1] == ["1.31.1 on cpu, cuda", "10.16.1.11 on cuda"]


@pytest.mark.parametrize(
    ("build", "cuda", "gpus", "found", "remedy"),
    [
        ("2.13.0+cpu", "None", ["a GPU"], "2.13.0+cpu on cpu", "a CUDA build"),
        ("2.13.0", "None", ["a GPU"], "2.13.0 on cpu", "a CUDA build"),  # conda's, and the index's for some systems
        ("2.13.0", "'13.0'", ["a GPU"], "2.13.0 on cpu, cuda", ""),
        ("2.11.0+cu130", "'13.0'", [], "2.11.0+cu130 on cpu", "no NVIDIA GPU"),
        (None, "", [], "lacks torch", "[train]"),
    ],
)
def test_pytorch_is_an_engine_on_what_it_was_built_for(
    build: str | None,
    cuda: str,
    gpus: list[str],
    found: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cdiff.runtime.doctor.visible_gpus", lambda: gpus)
    monkeypatch.setattr("cdiff.runtime.doctor._version", lambda name: build if name == "torch" else None)
    # As PyTorch's build writes it.
    (tmp_path / "version.py").write_text(
        f"from typing import Optional\n\n__all__ = ['__version__', 'cuda', 'hip']\n__version__ = '{build}'\ndebug = False\n"
        f"cuda: Optional[str] = {cuda}\ngit_version = 'cf30153c'\nhip: Optional[str] = None\n"
    )
    torch = None if build is None else SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("cdiff.runtime.doctor.find_spec", lambda name: torch if name == "torch" else find_spec(name))
    check = diagnose().sections["Engines"][-1]
    assert (check.name, check.ok, check.found) == ("torch", build is not None, found)
    assert remedy in check.remedy
    assert bool(remedy) == bool(check.remedy)


def test_what_can_build_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT builds where its GPU is, TensorRT for RTX anywhere; neither without its library."""

    def builders() -> dict[str, Check]:
        return {c.name.split()[-1]: c for c in diagnose().sections["Commands"] if c.name.startswith("export --engine")}

    monkeypatch.setattr("cdiff.runtime.doctor.trt_version", lambda flavour: "10.16.1.11")
    monkeypatch.setattr("cdiff.runtime.doctor.visible_gpus", lambda: [])
    found = builders()
    assert (found["tensorrt"].ok, found["tensorrt-rtx"].ok) == (False, True)
    assert "first run" in found["tensorrt"].remedy
    monkeypatch.setattr("cdiff.runtime.doctor.visible_gpus", lambda: ["a GPU"])
    assert builders()["tensorrt"].ok is True

    def missing(flavour: str) -> str:
        raise CdiffError(f"{flavour} is not installed")

    monkeypatch.setattr("cdiff.runtime.doctor.trt_version", missing)
    found = builders()
    assert not found["tensorrt"].ok
    assert "not installed" in found["tensorrt-rtx"].remedy


def test_libraries_that_came_as_wheels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's wheels keep theirs in a package of their own; no library of that name is installed otherwise."""
    (tmp_path / "tensorrt_libs").mkdir()
    (tmp_path / "tensorrt_libs" / "__init__.py").touch()
    (tmp_path / "tensorrt_libs" / "libnvinfer.so.10").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("cdiff.runtime.doctor.ctypes.util.find_library", lambda name: None)
    found = {check.name: check.found for check in diagnose().sections["GPU"]}
    assert found["libnvinfer"] == "libnvinfer.so.10 (wheel)"
