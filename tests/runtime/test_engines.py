"""Engines: ONNX Runtime computes the graph, refuses what it cannot do in one line, and never moves to another device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.device.gpu import parse_device
from cdiff.runtime.engines.onnxruntime import OnnxRuntimeEngine, cuda_options, failure
from cdiff.runtime.engines.registry import available_engines, open_engine
from cdiff.runtime.errors import CdiffError
from tests.runtime.graphs import L, write_pair

CUDA_HERE = any("cuda" in state.devices for state in available_engines())


def batch(B: int, S: int, size: int = 16) -> dict[str, Any]:
    rng = np.random.default_rng(B)
    return {
        "x": rng.normal(size=(B, 1, size, size)).astype(np.float32),
        "features": rng.normal(size=(S, L, size, size)).astype(np.float32),
        "row_slice": rng.integers(0, S, B),
        "t": rng.integers(1, 21, B),
        "level": rng.integers(1, 4, B),
    }


def as_bundle(pair: tuple[Path, Path], variance: str = "fixed") -> Bundle:
    """What the registry needs of a bundle: where its graphs and its engines lie, and which outputs they have."""
    folder, manifest = pair[0].parent, SimpleNamespace(variance=variance)
    return cast(
        Bundle,
        SimpleNamespace(path=folder, encoder=pair[0], denoiser=pair[1], engines=folder / "engines", manifest=manifest),
    )


@pytest.mark.parametrize("learned", [False, True])
def test_it_computes_the_graph_for_any_batch(tmp_path: Path, learned: bool) -> None:
    encoder, denoiser = write_pair(tmp_path, learned=learned)
    engine = OnnxRuntimeEngine(encoder, denoiser, threads=1)
    image = np.random.default_rng(1).normal(size=(2, 1, 16, 16)).astype(np.float32)
    (want,) = ReferenceEvaluator(onnx.load(encoder)).run(None, {"image": image})
    np.testing.assert_allclose(engine.encode(image), want, rtol=0, atol=1e-6)
    for B, S in ((1, 1), (5, 2)):
        feed = batch(B, S)
        x0, mix = engine.denoise(**feed)
        wants = ReferenceEvaluator(onnx.load(denoiser)).run(None, feed)
        np.testing.assert_allclose(x0, wants[0], rtol=0, atol=1e-5)
        assert (mix is not None) == learned
        if mix is not None:
            np.testing.assert_allclose(mix, wants[1], rtol=0, atol=1e-5)


def test_a_binding_keeps_features_in_their_places(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine(*write_pair(tmp_path), threads=1)
    images = np.random.default_rng(2).normal(size=(3, 1, 16, 16)).astype(np.float32)
    binding = engine.bind(rows=4, slots=2)
    binding.encode(0, images[0])
    binding.encode(1, images[1])
    binding.encode(0, images[2])  # takes the first one's place
    feed = batch(4, 2)
    slot = np.array([0, 1, 1, 0])
    got, _ = binding.run(feed["x"], slot, feed["t"], feed["level"])
    want, _ = engine.denoise(feed["x"], engine.encode(images[[2, 1]]), slot, feed["t"], feed["level"])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_features_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    binding = OnnxRuntimeEngine(*write_pair(tmp_path), threads=1).bind(1, 1)
    with pytest.raises(CdiffError, match="encoder returned a value that is not finite"):
        binding.encode(0, np.full((1, 16, 16), np.nan, np.float32))


def test_auto_picks_onnx_runtime_and_says_where(tmp_path: Path) -> None:
    engine = open_engine(as_bundle(write_pair(tmp_path)))
    assert (engine.name, engine.device) == ("onnxruntime", "cpu")
    assert engine.version == next(state.version for state in available_engines() if state.name == engine.name)


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        (
            "torch",
            "cpu",
            r"the engine torch is not for this.*cdiff\.load.*use one of auto, onnxruntime, [^ ]+, [^ ]+, [^ ]+$",
        ),
        ("openvino", "cpu", "engine 'openvino' is not known; use one of auto, onnxruntime.*torch"),
        ("auto", "tpu", "use cpu, cuda"),
        ("tensorrt", "cpu", "tensorrt"),
    ],
)
def test_unknown_engines_and_devices_are_refused(tmp_path: Path, name: str, device: str, message: str) -> None:
    with pytest.raises(CdiffError, match=message):
        open_engine(as_bundle(write_pair(tmp_path)), name, device)


@pytest.mark.skipif(CUDA_HERE, reason="an engine for GPUs is installed")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "auto",
            r"no engine can run on cuda:0 here: tensorrt: .*pip install '.\[gpu\]' in cdiff's clone.*; onnxruntime: for cuda: pip uninstall onnxruntime, then",
        ),
        (
            "onnxruntime",
            "onnxruntime does not run on cuda:0 here: for cuda: pip uninstall onnxruntime, then pip install",
        ),
        ("tensorrt", r"tensorrt cannot run here: tensorrt is not installed: .*'\.\[gpu\]"),
        ("tensorrt-rtx", r"tensorrt-rtx cannot run here: .*pip install ('\.\[rtx\]|pycuda )"),
        ("onnxruntime-tensorrt", "onnxruntime-tensorrt cannot run here: it needs onnxruntime-gpu"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error_and_not_the_cpu(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(CdiffError, match=said):
        open_engine(as_bundle(write_pair(tmp_path)), name, "cuda:0")


@pytest.mark.skipif(CUDA_HERE, reason="this ONNX Runtime is built for CUDA")
def test_onnx_runtime_without_cuda_does_not_take_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(CdiffError, match="CUDA build"):
        OnnxRuntimeEngine(*write_pair(tmp_path), device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA_HERE, reason="this ONNX Runtime has no CUDA provider")
def test_the_cuda_provider_agrees_with_the_cpu(tmp_path: Path) -> None:
    pair, feed = write_pair(tmp_path), batch(5, 2)
    engine = OnnxRuntimeEngine(*pair, device="cuda:0")
    assert engine.device == "cuda:0"
    np.testing.assert_allclose(
        engine.denoise(**feed)[0], OnnxRuntimeEngine(*pair).denoise(**feed)[0], rtol=0, atol=1e-4
    )


def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CdiffError):
        OnnxRuntimeEngine(*write_pair(tmp_path), device="cuda:99")


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("fixed", "says variance fixed, but the denoiser gives a variance of its own"),
        ("learned", "says variance learned, but the denoiser gives no variance"),
    ],
)
def test_a_denoiser_whose_variance_is_not_the_manifests_is_refused(tmp_path: Path, listed: str, said: str) -> None:
    """Its maps would be another model's: with noise of its own size where it was trained for a fixed one, or the reverse."""
    pair = write_pair(tmp_path, learned=listed == "fixed")
    with pytest.raises(CdiffError, match=said):
        open_engine(as_bundle(pair, listed))


def test_broken_and_foreign_graphs_are_named(tmp_path: Path) -> None:
    encoder, denoiser = write_pair(tmp_path)
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(denoiser.read_bytes()[:200])
    with pytest.raises(CdiffError, match=r"torn\.onnx: ONNX Runtime .* cannot open it"):
        OnnxRuntimeEngine(encoder, torn)
    with pytest.raises(CdiffError, match=r"denoiser\.onnx is not a graph of this version"):
        OnnxRuntimeEngine(denoiser, encoder)
    other = onnx.load(encoder)
    other.graph.node.append(onnx.helper.make_node("Identity", [other.graph.output[0].name], ["others"]))
    other.graph.output[0].name = "others"
    onnx.save(other, tmp_path / "others.onnx")
    with pytest.raises(CdiffError, match=r"others\.onnx is not a graph of this version"):
        OnnxRuntimeEngine(tmp_path / "others.onnx", denoiser)


def test_no_product_on_a_gpu_is_rounded_to_tf32() -> None:
    assert (cuda_options(1)["device_id"], cuda_options(1)["use_tf32"]) == ("1", "0")


@pytest.mark.parametrize(
    ("change", "said"), [("pads", r"\[3, 1, 14, 14\] float32"), ("type", r"\[3, 1, 16, 16\] float64")]
)
def test_a_graph_that_does_not_give_what_it_says_is_one_line(tmp_path: Path, change: str, said: str) -> None:
    encoder, denoiser = write_pair(tmp_path)
    model = onnx.load(denoiser)
    (value,) = (one for one in model.graph.output if one.name == "x0")
    if change == "pads":
        (last,) = (node for node in model.graph.node if "out" in node.output)
        del last.attribute[:]
        value.type.tensor_type.ClearField("shape")
    else:
        (clip,) = (node for node in model.graph.node if "x0" in node.output)
        clip.output[0] = "x0_float"
        model.graph.node.append(onnx.helper.make_node("Cast", ["x0_float"], ["x0"], to=onnx.TensorProto.DOUBLE))
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    onnx.save(model, denoiser)
    engine = OnnxRuntimeEngine(encoder, denoiser, threads=1)
    with pytest.raises(CdiffError, match=rf"the denoiser's x0 is {said}, not \[3, 1, 16, 16\] float32: export"):
        engine.denoise(**batch(3, 1))


def test_what_fails_while_it_runs_is_told_by_nobody_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime printed lines of its own, in colours, before ours: where the memory was not enough, say."""
    engine = OnnxRuntimeEngine(*write_pair(tmp_path), threads=1)
    with pytest.raises(CdiffError, match="failed on cpu with x"):
        engine.denoise(**batch(2, 1) | {"row_slice": np.array([0, 9])})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("operator", "attributes", "said"),
    [
        ("ReduceSum", {"keepdims": 0}, r"\[\] float32"),
        ("Cast", {"to": onnx.TensorProto.STRING}, r"\[2, \d+, 16, 16\] object"),
        ("AveragePool", {"kernel_shape": [2, 2]}, r"\[2, \d+, 15, 15\] float32"),
    ],
)
def test_an_encoder_that_gives_no_features_is_one_line(
    tmp_path: Path, operator: str, attributes: dict[str, Any], said: str
) -> None:
    """A valid graph in its place, whose file the manifest may even name."""
    encoder, denoiser = write_pair(tmp_path)
    model = onnx.load(encoder)
    (last,) = (node for node in model.graph.node if "features" in node.output)
    last.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node(operator, ["before"], ["features"], **attributes))
    (value,) = model.graph.output
    value.type.tensor_type.ClearField("shape")
    if operator == "Cast":
        value.type.tensor_type.elem_type = onnx.TensorProto.STRING
    onnx.save(model, encoder)
    engine = OnnxRuntimeEngine(encoder, denoiser, threads=1)
    with pytest.raises(CdiffError, match=rf"the encoder's features are {said}, not \[2, channels, 16, 16\] float32"):
        engine.encode(np.zeros((2, 1, 16, 16), np.float32))


def test_wrong_shapes_are_one_line(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine(*write_pair(tmp_path), threads=1)
    with pytest.raises(CdiffError, match=r"failed on cpu with image \[1, 1, 8, 8\] float32") as error:
        engine.encode(np.zeros((1, 1, 8, 8), np.float32))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("device", "number"), [("cpu", None), ("cuda", 0), ("cuda:3", 3)])
def test_devices_are_read(device: str, number: int | None) -> None:
    assert parse_device(device) == number


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:\u0663", f"cuda:{'9' * 5000}"])
def test_devices_that_cannot_be_are_one_line(device: str) -> None:
    with pytest.raises(CdiffError, match=rf"^device '{device}' is not known; use cpu, cuda or cuda:N$"):
        parse_device(device)


@pytest.mark.parametrize(
    ("said", "lacking"),
    [
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : BFCArena: Failed to allocate memory for requested buffer of size 9",
            True,
        ),
        ("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0", True),
        ("[ONNXRuntimeError] : 1 : FAIL : CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED", True),
        ("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc", True),
        ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: x", False),
    ],
)
def test_want_of_memory_is_told_from_other_errors(
    tmp_path: Path, said: str, lacking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With arrays in host memory too: the batch is halved then, which before only the binding on device pointers led to."""
    assert isinstance(failure("it failed", RuntimeError(said)), OutOfMemory) == lacking
    engine = OnnxRuntimeEngine(*write_pair(tmp_path))

    def run(*_: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(engine, "_encoder", SimpleNamespace(run=run))
    with pytest.raises(CdiffError, match="ONNX Runtime failed on cpu with image") as caught:
        engine.encode(np.zeros((1, 1, 16, 16), np.float32))
    assert isinstance(caught.value, OutOfMemory) == lacking
