"""Half precision is half precision where it should be, float32 where it must be, and survives what overflows naively."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from cdiff.export.graphs import DenoiserGraph, EncoderGraph, write_denoiser, write_encoder
from cdiff.export.half import HalfAttention, check_half, half_network, half_share
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.network import Attention, ConsensusNet
from cdiff.train.sections import NetworkConfig
from tests.export.networks import BASE, FLAT, random_network
from tests.export.test_graphs import inputs


def write_half(half: ConsensusNet, folder: Path) -> Path:
    """The denoiser's graph of what `half_network` made."""
    config = half.config
    graph = DenoiserGraph(half.denoiser, config, NoiseSchedule(config.T))
    return write_denoiser(graph, config, folder, torch.float16)


def element_types(path: Path) -> dict[str, list[set[int]]]:
    """For each operator, the floating-point types at each of its nodes."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    types = {t.name: t.data_type for t in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    found: dict[str, list[set[int]]] = {}
    for node in model.graph.node:
        found.setdefault(node.op_type, []).append({types[n] for n in (*node.input, *node.output) if n} & floating)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        replace(FLAT, target="v", rrdbs=1),
        replace(BASE, embedding="scale-shift", resample="block", head_channels=4, rrdbs=0, attention_depths=()),
    ],
    ids=["flat", "scale-shift-block-heads"],
)
def test_products_are_half_and_norms_softmax_and_sums_are_not(network: NetworkConfig, tmp_path: Path) -> None:
    half = half_network(random_network(replace(network, variance="learned")))
    encoder = write_encoder(EncoderGraph(half.encoder, torch.float16), half.config, tmp_path)
    denoiser = write_half(half, tmp_path)
    assert half_share(encoder) == half_share(denoiser) == 1.0
    types = element_types(denoiser)
    for operator in ("Conv", "Gemm", "MatMul"):
        assert types[operator]
        assert all(kind == {onnx.TensorProto.FLOAT16} for kind in types[operator])
    for operator in ("GroupNormalization", "Softmax", "Add", "Clip", "Sigmoid"):
        assert types[operator]
        assert all(kind <= {onnx.TensorProto.FLOAT} for kind in types[operator])
    signature = {v.name: v.type.tensor_type.elem_type for v in onnx.load(denoiser).graph.input}
    assert signature["features"] == onnx.TensorProto.FLOAT16
    assert signature["x"] == onnx.TensorProto.FLOAT
    assert {v.type.tensor_type.elem_type for v in onnx.load(denoiser).graph.output} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_in_half_precision_is_the_network_s(heads: int) -> None:
    """On a map that is not square, with logits that tell its positions apart."""
    torch.manual_seed(0)
    attention = Attention(8, heads, replace(BASE, head_channels=0)).eval().requires_grad_(False)
    attention.qkv.weight.mul_(2)
    torch.nn.init.normal_(attention.out.weight, std=0.3)
    x = torch.randn(2, 8, 3, 4)
    wanted, found = attention(x), HalfAttention(copy.deepcopy(attention))(x)
    assert (wanted - x).std() > 0.3
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.005)


@pytest.mark.slow
def test_half_graphs_stay_near_float32_with_activations_that_overflow_a_half_precision_variance(tmp_path: Path) -> None:
    network = random_network(FLAT)
    with torch.no_grad():  # |x| around 1000 in the first GroupNorms, whose squares exceed float16's 65504
        network.denoiser.first.weight.mul_(2000)
    path = write_half(half_network(network), tmp_path)
    given = inputs(FLAT, rows=4, slices=2)
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    features = network.encoder(tensors["image"])
    stream = network.denoiser.first(tensors["x"])
    assert stream.abs().max() > 300
    graph = DenoiserGraph(network.denoiser, FLAT, NoiseSchedule(FLAT.T))
    wanted = graph(tensors["x"], features, tensors["row_slice"], tensors["t"], tensors["level"])
    del given["image"]
    found = ort.InferenceSession(path).run(None, {**given, "features": features.half().numpy()})[0]
    assert np.isfinite(found).all()
    assert np.abs(found - wanted.numpy()).max() < 0.02


@pytest.mark.slow
def test_a_graph_that_is_mostly_float32_is_refused(tmp_path: Path) -> None:
    network = random_network(FLAT)
    write_encoder(EncoderGraph(network.encoder), network.config, tmp_path)
    with pytest.raises(CdiffError, match=r"encoder\.onnx: only 0%"):
        check_half(tmp_path / "encoder.onnx")
    # A single float32 layer among the others is one node's share.
    network = random_network(replace(FLAT, rrdbs=1))
    half = half_network(network)
    half.encoder.last = network.encoder.last
    path = write_encoder(EncoderGraph(half.encoder, torch.float16), half.config, tmp_path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    products = sum(kinds.count(kind) for kind in ("Conv", "Gemm", "MatMul"))
    assert half_share(path) == pytest.approx(1 - 1 / products)


def test_a_weight_beyond_half_precision_is_named() -> None:
    network = random_network(BASE)
    with torch.no_grad():
        network.encoder.last.weight[0, 0, 0, 0] = 1e5
    with pytest.raises(CdiffError, match=r"encoder\.last.*65504"):
        half_network(network)
    assert network.encoder.last.weight.dtype == torch.float32  # the original is left alone
