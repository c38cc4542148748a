"""What `auto` picks on a GPU, and what doctor says of engines that lack something: by doubles of the libraries."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.doctor import diagnose
from cdiff.runtime.engines import onnxruntime as plain
from cdiff.runtime.engines import onnxruntime_gpu, registry, tensorrt
from cdiff.runtime.engines.registry import NAMES, available_engines, open_engine
from cdiff.runtime.engines.trt import RECORD, RECORD_FORMAT, EngineKey, Profile
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import DENOISER

GPU_BUILD = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


class Machine:
    """A machine with some libraries, and the engines that were opened on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.opened = monkeypatch, list[tuple[Any, ...]]()
        manifest = SimpleNamespace(files={DENOISER: {"sha256": "this model's"}}, variance="fixed")
        self.bundle = cast(
            Bundle,
            SimpleNamespace(encoder=Path("e"), denoiser=Path("d"), engines=folder / "engines", manifest=manifest),
        )
        monkeypatch.setenv("CDIFF_CACHE", str(folder / "cache"))
        self.has()
        for module, name in (
            (tensorrt, "TensorRtEngine"),
            (onnxruntime_gpu, "OnnxRuntimeGpuEngine"),
            (plain, "OnnxRuntimeEngine"),
        ):
            monkeypatch.setattr(module, name, self._opener(name))

    def _opener(self, name: str) -> Any:
        class Opened(str):
            learned_variance = False

        def open_(*arguments: Any, **options: Any) -> str:
            self.opened.append((name, *arguments[1:], options))
            return Opened(name)

        return open_

    def has(
        self, providers: list[str] = GPU_BUILD, tensorrt: str | None = "10.16.1.11", missing: tuple[str, ...] = ()
    ) -> None:
        def version(flavour: str) -> str:
            if tensorrt is None or flavour != "tensorrt":
                raise CdiffError(f"{flavour} is not installed: pip install it")
            return tensorrt

        ort: Any = ModuleType("onnxruntime")
        ort.get_available_providers, ort.__version__ = (lambda: providers), "1.31.1"
        self.patch.setattr(registry, "trt_version", version)
        self.patch.setattr(registry, "missing_packages", lambda: list(missing))
        found = SimpleNamespace(util=importlib.util, import_module=lambda name: ort)
        self.patch.setattr(registry, "importlib", found)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def cache(folder: Path, graph: str) -> None:
    """The record of an engine of that graph."""
    key = EngineKey("denoiser", "tensorrt", "10.16.1.11", "H200", ("9.0",), "float16", Profile(1, 8, 8, 8), graph)
    (folder / key.folder_name()).mkdir(parents=True)
    record = {"format": RECORD_FORMAT, "key": key.to_json(), "sha256": "0"}
    (folder / key.folder_name() / RECORD).write_text(json.dumps(record))


def test_auto_prefers_tensorrt_where_an_engine_can_be_had(machine: Machine, tmp_path: Path) -> None:
    build = cast(Any, lambda *_: None)
    assert open_engine(machine.bundle, "auto", "cuda:2", build=build) == "TensorRtEngine"
    assert machine.opened.pop() == ("TensorRtEngine", "tensorrt", 2, build, {})
    assert open_engine(machine.bundle, "auto", "cuda:2") == "OnnxRuntimeGpuEngine"
    assert machine.opened.pop() == ("OnnxRuntimeGpuEngine", 2, {"tensorrt": False})
    cache(tmp_path / "cache" / "engines", "another model's")
    assert open_engine(machine.bundle, "auto", "cuda:2") == "OnnxRuntimeGpuEngine"
    cache(tmp_path / "engines", "this model's")
    assert open_engine(machine.bundle, "auto", "cuda:2") == "TensorRtEngine"
    assert open_engine(machine.bundle, "auto", "cpu", build=build) == "OnnxRuntimeEngine"
    machine.has(tensorrt=None)
    assert open_engine(machine.bundle, "auto", "cuda", build=build) == "OnnxRuntimeGpuEngine"
    machine.has(["CPUExecutionProvider"], tensorrt=None)
    with pytest.raises(
        CdiffError,
        match=r"no engine can run on cuda here: tensorrt: tensorrt is not installed.*; onnxruntime: for cuda: pip uninstall",
    ):
        open_engine(machine.bundle, "auto", "cuda", build=build)


def test_what_is_asked_for_is_opened_or_refused(machine: Machine) -> None:
    assert open_engine(machine.bundle, "onnxruntime-tensorrt", "cuda:1") == "OnnxRuntimeGpuEngine"
    assert machine.opened.pop() == ("OnnxRuntimeGpuEngine", 1, {"tensorrt": True})
    with pytest.raises(CdiffError, match=r"^tensorrt does not run on cpu here: it needs a GPU"):
        open_engine(machine.bundle, "tensorrt", "cpu")
    with pytest.raises(CdiffError, match="tensorrt-rtx cannot run here: tensorrt-rtx is not installed"):
        open_engine(machine.bundle, "tensorrt-rtx", "cuda")
    machine.has(tensorrt=None)  # whose provider ONNX Runtime lists all the same
    with pytest.raises(CdiffError, match="onnxruntime-tensorrt cannot run here: tensorrt is not installed"):
        open_engine(machine.bundle, "onnxruntime-tensorrt", "cuda")
    machine.has(missing=("pycuda",))
    with pytest.raises(CdiffError, match="onnxruntime-tensorrt cannot run here: pycuda is not installed"):
        open_engine(machine.bundle, "onnxruntime-tensorrt", "cuda")
    machine.has(tensorrt="11.4.0.106")
    with pytest.raises(
        CdiffError, match=r"links to TensorRT 10, and TensorRT 11.4.0.106 is installed: use --engine tensorrt"
    ):
        open_engine(machine.bundle, "onnxruntime-tensorrt", "cuda")
    assert machine.opened == []


def test_without_the_device_layer(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """ONNX Runtime still runs on the GPU, through the host, and says so; TensorRT has no other way."""
    machine.has(missing=("pycuda", "cuda-bindings"))
    machine.patch.setattr(registry, "visible_gpus", lambda: ["a GPU"])
    assert open_engine(machine.bundle, "auto", "cuda:0") == "OnnxRuntimeEngine"
    with caplog.at_level(logging.WARNING):
        assert open_engine(machine.bundle, "onnxruntime", "cuda:0") == "OnnxRuntimeEngine"
    assert "every step goes through the host, which is slow: pycuda and cuda-bindings are not installed" in caplog.text
    with pytest.raises(
        CdiffError, match="tensorrt cannot run here: pycuda and cuda-bindings are not installed: pip install"
    ):
        open_engine(machine.bundle, "tensorrt", "cuda:0")


def test_a_gpu_that_is_not_there_is_told_before_its_libraries_are_looked_for(machine: Machine) -> None:
    machine.has(missing=("pycuda", "cuda-bindings"))
    for gpus, words in (([], "no GPU at all"), (["one"], "only cuda:0"), (["one", "two"], "only cuda:0 to cuda:1")):
        machine.patch.setattr(registry, "visible_gpus", lambda gpus=gpus: gpus)
        with pytest.raises(CdiffError, match=f"^cuda:2 is not there: the driver shows {words}$"):
            open_engine(machine.bundle, "auto", "cuda:2")
    assert machine.opened == []


def test_doctor_says_what_each_engine_lacks(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdiff.runtime.doctor.visible_gpus", lambda: ["a GPU"])
    machine.has(missing=("pycuda",))
    lines = {check.name: check for check in diagnose().sections["Engines"]}
    assert list(lines) == [*NAMES, "torch"]
    assert (lines["onnxruntime"].ok, lines["onnxruntime"].found) == (True, "1.31.1 on cpu, cuda")
    assert "goes through the host: pycuda is not installed" in lines["onnxruntime"].remedy
    assert (lines["tensorrt"].ok, lines["tensorrt"].remedy[:23]) == (False, "pycuda is not installed")
    assert lines["tensorrt-rtx"].ok is False
    machine.has()
    assert [state.devices for state in available_engines()] == [("cpu", "cuda"), ("cuda",), (), ("cuda",)]


@pytest.mark.parametrize("broken", [OSError("libcublas.so.13"), RuntimeError("compiled against another NumPy")])
def test_a_library_that_breaks_as_it_is_loaded_costs_its_own_engines(machine: Machine, broken: Exception) -> None:
    """In whatever way: the list of engines is for every command, and for machines where something is wrong."""

    def load(name: str) -> Any:
        raise broken

    machine.patch.setattr(registry, "importlib", SimpleNamespace(util=importlib.util, import_module=load))
    states = {state.name: state for state in available_engines()}
    assert states["tensorrt"].devices == ("cuda",)
    assert states["onnxruntime"].devices == ()
    assert f"onnxruntime is installed but broken ({broken})" in states["onnxruntime"].missing
