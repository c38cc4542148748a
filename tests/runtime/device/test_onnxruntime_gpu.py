"""ONNX Runtime on device pointers: every tensor bound to its address, nothing falls back, the maps are the CPU engine's."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import pytest

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.engines import onnxruntime as plain
from cdiff.runtime.engines import onnxruntime_gpu
from cdiff.runtime.engines.onnxruntime import OnnxRuntimeEngine, open_session
from cdiff.runtime.engines.onnxruntime_gpu import OnnxRuntimeGpuEngine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256
from cdiff.runtime.sampling.sampler import sampler_table
from tests.runtime.device.fake_cuda import World, install
from tests.runtime.device.fake_tensorrt import view
from tests.runtime.graphs import write_pair
from tests.runtime.sampling.test_batching import SCHEDULE, SIZE, C, framed, run, scan


class Bound:
    def __init__(self, number: int) -> None:
        self.number = number
        self.tensors: dict[str, tuple[str, tuple[int, tuple[int, ...], Any]]] = {}

    def bind_input(self, name: str, kind: str, device: int, dtype: Any, shape: list[int], address: int) -> None:
        assert (kind, device) == ("cuda", self.number)
        self.tensors[name] = "in", (address, tuple(shape), dtype)

    def bind_output(self, name: str, kind: str, device: int, dtype: Any, shape: list[int], address: int) -> None:
        assert (kind, device) == ("cuda", self.number)
        self.tensors[name] = "out", (address, tuple(shape), dtype)


class Session:
    """A session on the CPU that reads and writes at the addresses bound, when its stream comes to it."""

    def __init__(self, path: Path, world: World, provider: Any) -> None:
        self.cpu, self.world = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]), world
        self.stream = world.streams[int(provider[1]["user_compute_stream"])]
        self.number = int(provider[1]["device_id"])
        self.get_inputs, self.get_outputs = self.cpu.get_inputs, self.cpu.get_outputs
        self.failure: Exception | None = None
        self.failure_in_capture: Exception | None = None

    def io_binding(self) -> Bound:
        return Bound(self.number)

    def run_with_iobinding(self, bound: Bound, options: Any) -> None:
        self.world.current()
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        if self.failure is not None:
            raise self.failure
        if self.failure_in_capture is not None and self.world.capturing is not None:
            self.world.capturing.spoiled = True
            raise self.failure_in_capture

        def compute() -> None:
            feed = {name: view(*place).copy() for name, (way, place) in bound.tensors.items() if way == "in"}
            names = [name for name, (way, _) in bound.tensors.items() if way == "out"]
            for name, value in zip(names, self.cpu.run(names, feed), strict=True):
                view(*bound.tensors[name][1])[:] = value

        self.stream.put(compute)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def build(
        *,
        learned: bool = False,
        tensorrt: bool = False,
        precision: str = "float32",
        variance: str = "",
        number: int = 0,
    ) -> Any:
        world = install(monkeypatch, devices=number + 1)
        opened: list[Any] = []

        def open_(path: Path, names: Any, provider: Any) -> Session:
            opened.append((path.name, provider))
            return Session(path, world, provider)

        monkeypatch.setattr(onnxruntime_gpu, "open_session", open_)
        monkeypatch.setattr(onnxruntime_gpu, "load_trt", lambda flavour: opened.append(flavour))
        encoder, denoiser = write_pair(tmp_path, size=SIZE, T=20, levels=C, learned=learned)
        files = {path.name: {"sha256": sha256(path)} for path in (encoder, denoiser)}
        listed = variance or ("learned" if learned else "fixed")
        manifest = SimpleNamespace(precision=precision, files=files, variance=listed)
        bundle = SimpleNamespace(
            encoder=encoder, denoiser=denoiser, manifest=manifest, path=tmp_path, engines=tmp_path / "engines"
        )
        engine = OnnxRuntimeGpuEngine(cast(Bundle, bundle), number, tensorrt=tensorrt)
        return SimpleNamespace(engine=engine, world=world, opened=opened, pair=(encoder, denoiser))

    return build


def test_a_session_is_closed_before_the_stream_that_it_was_opened_on(make: Any) -> None:
    """ONNX Runtime's handles refer to the stream to the last."""
    setup, gone = make(), list[str]()
    run(setup.engine, framed(scan((1, SIZE, SIZE))), sampler_table("ddpm", SCHEDULE, 2), batch=7)
    for session in setup.engine._sessions.values():
        weakref.finalize(session, gone.append, "session")
        session.stream = None  # what the double itself holds on to
    for stream in setup.world.streams.values():
        weakref.finalize(stream, gone.append, "stream")
    setup.world.streams.clear()
    del session, stream, setup.engine
    gc.collect()
    assert gone == ["session", "session", "stream", "stream"]


@pytest.mark.parametrize("learned", [False, True])
def test_the_maps_are_the_cpu_engine_s(make: Any, learned: bool) -> None:
    setup = make(learned=learned)
    windows, table = framed(scan((2, SIZE, SIZE))), sampler_table("ddpm", SCHEDULE, 5)
    want = run(OnnxRuntimeEngine(*setup.pair, threads=1), windows, table, batch=7, mirror=True)
    for a, b in zip(run(setup.engine, windows, table, batch=7, mirror=True), want, strict=True):
        np.testing.assert_allclose(a.level_means, b.level_means, rtol=0, atol=2e-6)
        np.testing.assert_allclose(a.run_std, b.run_std, rtol=0, atol=2e-6)
    assert (setup.engine.name, setup.engine.device, setup.engine.version) == ("onnxruntime", "cuda:0", ort.__version__)


@pytest.mark.parametrize("tensorrt", [False, True])
def test_a_session_is_on_the_gpu_whose_addresses_it_gets(make: Any, tensorrt: bool) -> None:
    setup = make(number=2, tensorrt=tensorrt, precision="float16")
    assert [one[1][1]["device_id"] for one in setup.opened if one != "tensorrt"] == ["2", "2"]
    run(
        setup.engine, framed(scan((1, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 2), batch=7
    )  # what is bound is, too
    with setup.engine.gpu.current():
        assert setup.world.contexts == [2]
    assert setup.engine.device == "cuda:2"


@pytest.mark.parametrize(("learned", "listed"), [(True, "fixed"), (False, "learned")])
def test_graphs_whose_variance_is_not_the_manifests_are_refused(make: Any, learned: bool, listed: str) -> None:
    with pytest.raises(CdiffError, match=f"the manifest says variance {listed}, but the denoiser gives"):
        make(learned=learned, variance=listed)


def test_each_session_has_its_stream_and_no_tf32(make: Any) -> None:
    setup = make()
    (encoder, first), (denoiser, second) = setup.opened
    assert (encoder, denoiser) == ("encoder.onnx", "denoiser.onnx")
    assert first[0] == second[0] == "CUDAExecutionProvider"
    assert first[1]["use_tf32"] == "0"
    assert first[1]["user_compute_stream"] != second[1]["user_compute_stream"]


def test_the_tensorrt_provider_keeps_types_and_caches(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make(tensorrt=True, precision="float16")
    assert setup.opened[0] == "tensorrt", "its libraries are loaded before the provider looks for them"
    provider, options = setup.opened[1][1]
    assert provider == "TensorrtExecutionProvider"
    assert "trt_fp16_enable" not in options, "that would build a weakly typed network"
    caches = {Path(one[1][1]["trt_engine_cache_path"]) for one in setup.opened[1:]}
    assert all(folder.is_dir() for folder in caches)
    other = make(tensorrt=True, precision="float16", learned=True)
    caches |= {Path(one[1][1]["trt_engine_cache_path"]) for one in other.opened[1:]}
    assert len(caches) == 3, "two denoisers, whose engines the provider may give the same name, and one encoder"
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(CdiffError, match=r"TF32.*set NVIDIA_TF32_OVERRIDE=0"):
        make(tensorrt=True)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert make(tensorrt=True).engine.name == "onnxruntime-tensorrt"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9",
            OutOfMemory,
        ),
        ("CUDNN_STATUS_EXECUTION_FAILED\nand a trace", CdiffError),
    ],
)
def test_its_failures_are_one_line(make: Any, text: str, kind: type[CdiffError]) -> None:
    setup = make()
    binding = setup.engine.bind(4, 1)
    setup.engine._sessions["encoder"].failure = RuntimeError(text)
    with pytest.raises(CdiffError, match="failed on cuda:0 in the encoder") as error:
        binding.encode(0, np.zeros((1, SIZE, SIZE), np.float32))
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    assert setup.world.contexts == []


@pytest.mark.parametrize(("version", "captured"), [("1.24.4", False), ("1.31.0", True), ("2.0.0", True)])
def test_an_older_onnx_runtime_is_not_captured(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, captured: bool
) -> None:
    monkeypatch.setattr(OnnxRuntimeGpuEngine, "version", version)
    setup = make()
    setup.engine.capture = True
    run(setup.engine, framed(scan((1, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 2), batch=7)
    assert bool(setup.world.named("begin capture")) is captured
    assert any(f"onnxruntime {version} cannot be captured" in one.message for one in caplog.records) is not captured


def test_an_allocation_within_a_capture_is_no_want_of_memory(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The arena cannot grow there, and says the same as on a full GPU; fewer rows would not help."""
    monkeypatch.setattr(
        OnnxRuntimeGpuEngine, "version", "1.31.0"
    )  # an older one, with which the tests may run, is not captured
    setup = make()
    setup.engine._sessions["denoiser"].failure_in_capture = RuntimeError(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"
    )
    windows, table = framed(scan((2, SIZE, SIZE))), sampler_table("ddpm", SCHEDULE, 5)
    want = run(OnnxRuntimeEngine(*setup.pair, threads=1), windows, table, batch=7)
    for a, b in zip(run(setup.engine, windows, table, batch=7), want, strict=True):
        np.testing.assert_allclose(a.level_means, b.level_means, rtol=0, atol=2e-6)
    assert setup.engine.bind(7, 2).captured is False
    (said,) = [record.message for record in caplog.records if "captured" in record.message]
    assert said.endswith(
        "in the denoiser: RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"
    )


def without_cudnn(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def test_a_provider_that_did_not_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ONNX Runtime goes on with the CPU where a provider's libraries are missing, and tells only its log and the output."""
    encoder, _ = write_pair(tmp_path)
    monkeypatch.setattr(plain.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    missing = "Failed to load libcublas.so.13: cannot open shared object file"
    monkeypatch.setattr(plain.ort, "preload_dlls", lambda: print(missing))
    monkeypatch.setattr(plain.ctypes, "CDLL", without_cudnn)
    plain.look_for_cudnn.cache_clear()
    real = ort.InferenceSession

    def without_cuda(path: str, options: Any, providers: Any, **rest: Any) -> Any:
        assert rest == {"enable_fallback": 0}
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(plain.ort, "InferenceSession", without_cuda)
    for _ in range(2):
        with pytest.raises(
            CdiffError,
            match=rf"could not start its CUDAExecutionProvider on cuda:3 and fell back to the CPU \({missing}\): check",
        ):
            open_session(encoder, plain.ENCODER, ("CUDAExecutionProvider", plain.cuda_options(3)))
    assert capsys.readouterr().out == ""
    (said,) = [record.message for record in caplog.records if "cuDNN 9 was not found" in record.message]
    assert "pip install nvidia-cudnn-cu13" in said
    plain.look_for_cudnn.cache_clear()


@pytest.mark.skipif(
    "AzureExecutionProvider" not in ort.get_available_providers()
    or not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"),
    reason="this build has no such provider, or is too old to tell who computes what",
)
def test_a_provider_that_leaves_the_network_to_the_cpu_is_refused(tmp_path: Path) -> None:
    """As Azure's does with every operator that is not its own, though it starts and is listed as the session's first."""
    encoder, _ = write_pair(tmp_path)
    with pytest.raises(
        CdiffError, match=r"encoder.*AzureExecutionProvider leaves part of the network \(Conv\) to the CPU"
    ):
        open_session(encoder, plain.ENCODER, ("AzureExecutionProvider", {"device_id": "0"}))


def test_a_graphs_shapes_may_be_computed_on_the_cpu() -> None:
    def part(provider: str, *operators: str) -> Any:
        return SimpleNamespace(
            ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=kind) for kind in operators]
        )

    parts = [part("CUDAExecutionProvider", "Conv", "Add"), part("CPUExecutionProvider", "Shape", "Gather")]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    assert plain.left_to_the_cpu(cast(Any, session)) == set()
    parts.append(part("CPUExecutionProvider", "Gemm", "Conv"))
    assert plain.left_to_the_cpu(cast(Any, session)) == {"Conv", "Gemm"}
    assert plain.left_to_the_cpu(cast(Any, object())) == set(), "an ONNX Runtime that cannot tell"
