"""The ONNX graphs, run by ONNX Runtime, give what the PyTorch network and the training's own formulas give."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from cdiff.export.graphs import DenoiserGraph, EncoderGraph, write_denoiser, write_encoder, x0_coefficients
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.diffusion import Diffusion
from cdiff.train.network import ConsensusNet
from cdiff.train.sections import NetworkConfig
from tests.export.networks import BASE, random_network

KINDS: dict[str, dict[str, Any]] = {
    "x0": {},
    "eps-learned": {
        **{"target": "eps", "variance": "learned", "rrdbs": 0},
        **{"channel_mult": (1,), "attention_depths": ()},
    },
    "v-two-blocks-rgb": {
        **{"target": "v", "rrdbs": 0, "image_channels": 3},
        **{"channel_mult": (1,), "attention_depths": (), "residual_blocks": 2},
    },
    "scale-shift-block-heads-three-depths": {
        **{"embedding": "scale-shift", "resample": "block", "head_channels": 4},
        **{"channel_mult": (1, 2, 3), "attention_depths": (2,)},
        **{"target": "eps", "variance": "learned", "rrdbs": 0, "levels": 1},
    },
}


def config_of(kind: str) -> NetworkConfig:
    return replace(BASE, **KINDS[kind])


def schedule_of(config: NetworkConfig) -> NoiseSchedule:
    return NoiseSchedule(config.T)


def write(network: ConsensusNet, folder: Path) -> None:
    encode(network, folder)
    denoise(network, folder)


def encode(network: ConsensusNet, folder: Path) -> None:
    write_encoder(EncoderGraph(network.encoder), network.config, folder)


def denoise(network: ConsensusNet, folder: Path) -> None:
    graph = DenoiserGraph(network.denoiser, network.config, schedule_of(network.config))
    write_denoiser(graph, network.config, folder, torch.float32)


def inputs(config: NetworkConfig, rows: int, slices: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(rows * 10 + slices)
    size = config.image_size
    return {
        "image": rng.uniform(-1, 1, (slices, config.image_channels, size, size)).astype(np.float32),
        "x": rng.normal(size=(rows, 1, size, size)).astype(np.float32),
        "row_slice": rng.integers(0, slices, rows),
        "t": np.linspace(1, config.T, rows).round().astype(np.int64),
        "level": np.arange(rows) % config.levels + 1,
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of a kind, the folder of its two graphs, which are exported once."""

    @functools.cache
    def folder(kind: str) -> Path:
        made = tmp_path_factory.mktemp(kind)
        write(random_network(config_of(kind)), made)
        return made

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_agree_with_the_network_for_any_number_of_rows_and_slices(
    kind: str, written: Callable[[str], Path]
) -> None:
    config, folder = config_of(kind), written(kind)
    network = random_network(config)
    encoder = ort.InferenceSession(folder / "encoder.onnx")
    denoiser = ort.InferenceSession(folder / "denoiser.onnx")
    diffusion = Diffusion(schedule_of(config), config.target)
    for rows, slices in ((1, 1), (7, 3), (2, 5)):
        given = inputs(config, rows, slices)
        image = given.pop("image")
        features = encoder.run(None, {"image": image})[0]
        tensors = {name: torch.from_numpy(value) for name, value in given.items()}
        wanted = network.encoder(torch.from_numpy(image))
        assert np.abs(features - wanted.numpy()).max() < 1e-5

        found = denoiser.run(None, {**given, "features": features})
        output = network.denoiser(tensors["x"], wanted[tensors["row_slice"]], tensors["t"], tensors["level"])
        x0 = diffusion.to_x0(output, tensors["x"], tensors["t"]).numpy()
        # Where x0 = (x - sigma eps) / alpha, an error of the network's grows by sigma / alpha.
        abar = schedule_of(config).abar[given["t"]]
        growth = np.maximum(1, np.sqrt((1 - abar) / abar)) if config.target == "eps" else np.ones(rows)
        assert (np.abs(found[0] - x0).max(axis=(1, 2, 3)) < 2e-5 * growth).all()
        assert found[0].std() > 0.01
        assert len(found) == (2 if config.variance == "learned" else 1)
        if config.variance == "learned":
            mix = ((output[:, 1:] + 1) / 2).numpy()
            assert np.abs(found[1] - mix).max() < 2e-5
            assert mix.std() > 0.01


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_x0_from_the_exact_target_is_the_mask(target: str) -> None:
    schedule = NoiseSchedule(100)
    rng = np.random.default_rng(0)
    mask, noise = rng.choice([-1.0, 1.0], 100), rng.normal(size=100)
    t = np.arange(1, 101)
    signal, sigma = np.sqrt(schedule.abar[t]), np.sqrt(1 - schedule.abar[t])
    x = signal * mask + sigma * noise
    output = {"eps": noise, "x0": mask, "v": signal * noise - sigma * mask}[target]
    of_x, of_output = x0_coefficients(target, schedule)
    assert np.allclose(of_x[t] * x + of_output[t] * output, mask, atol=1e-12)


@pytest.mark.slow
def test_files_are_whole_quiet_repeatable_and_say_nothing_of_the_machine(
    written: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = {"encoder.onnx": "x0", "denoiser.onnx": "eps-learned"}  # one with an RRDB; the smallest
    encoder, denoiser = (random_network(config_of(kind)) for kind in again.values())
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(encoder, tmp_path)
        denoise(denoiser, tmp_path)
    assert "".join(capfd.readouterr()) == ""
    for name, kind in again.items():
        assert (tmp_path / name).read_bytes() == (written(kind) / name).read_bytes()
    for kind in again.values():
        modules = random_network(config_of(kind)).denoiser.modules()
        norms = sum(isinstance(module, torch.nn.GroupNorm) for module in modules)
        for name in ("encoder.onnx", "denoiser.onnx"):
            assert b".py" not in (written(kind) / name).read_bytes()
            model = onnx.load(written(kind) / name)
            assert not model.graph.value_info
            assert next(o.version for o in model.opset_import if not o.domain) == 20
            operators = [node.op_type for node in model.graph.node]
            assert operators.count("InstanceNormalization") == (norms if name == "denoiser.onnx" else 0)
        assert sorted(p.name for p in written(kind).iterdir()) == ["denoiser.onnx", "encoder.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_is_not_clipped_into_a_plausible_one(
    bad: float, written: Callable[[str], Path]
) -> None:
    """The last convolution's bias is set in the graph itself."""
    base = written("x0")
    model = onnx.load(base / "denoiser.onnx")
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("denoiser.last.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(bias.dims, bad, np.float32), bias.name))
    feed = inputs(BASE, 4, 2)
    features = ort.InferenceSession(base / "encoder.onnx").run(None, {"image": feed.pop("image")})[0]
    x0 = ort.InferenceSession(model.SerializeToString()).run(None, {**feed, "features": features})[0]
    assert np.isnan(x0).all()
