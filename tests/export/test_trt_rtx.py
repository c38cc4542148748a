"""Real builds by TensorRT for RTX, which needs no GPU for them: the shipped network's graphs and a reduced paper network's."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper
from safetensors import safe_open
from safetensors.torch import load_file

from cdiff.export.graphs import DenoiserGraph, EncoderGraph, write_denoiser, write_encoder
from cdiff.export.half import half_network
from cdiff.export.tensorrt import BuildOptions, build_engines
from cdiff.runtime.bundle import Bundle, open_bundle, shipped_bundle, write_bundle
from cdiff.runtime.engines.trt import LAYERS, RECORD, RTX_CAPABILITIES, Gpu, Profile, open_or_build, profile_for
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.config import Config
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset
from tests.export.engine_bundles import pair_bundle
from tests.export.networks import random_network
from tests.runtime.test_manifest import example

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: pip install '.[rtx]' in cdiff's clone"
)

SMALL = Profile(1, 6, 6, 4)


def shipped(part: Path, precision: str) -> Manifest:
    """The shipped model: its own graphs in float32, half-precision ones made from its weights."""
    folder = shipped_bundle()
    manifest = json.loads((folder / "manifest.json").read_text())
    if precision == "float32":
        for name in ("encoder.onnx", "denoiser.onnx"):
            shutil.copy(folder / name, part)
        keys = ("levels", "T", "schedule", "features_channels")
        return example(**{key: manifest[key] for key in keys}, image_size=tuple(manifest["image_size"]), files={})
    with safe_open(folder / "model.safetensors", "pt") as file:
        config = Config.from_json(json.loads(file.metadata()["config"]))
    network = ConsensusNet(config.network).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return write(part, network, NoiseSchedule.from_json(manifest["schedule"]), precision)


def paper(part: Path, precision: str) -> Manifest:
    """The paper's network, reduced: 32 x 32 pixels and two depths, one block each; attention at 16 x 16 as there."""
    config = dataclasses.replace(
        preset("paper").network,
        image_size=32,
        base_channels=32,
        channel_mult=(1, 2),
        attention_depths=(1,),
        residual_blocks=1,
        rrdbs=1,
        rrdb_channels=16,
        rrdb_growth=8,
    )
    return write(part, random_network(config), NoiseSchedule(config.T), precision)


def write(part: Path, network: ConsensusNet, schedule: NoiseSchedule, precision: str) -> Manifest:
    """A network's graphs; that they compute what PyTorch does has tests of its own."""
    config, dtype = network.config, torch.float16 if precision == "float16" else torch.float32
    used = half_network(network) if precision == "float16" else network
    write_encoder(EncoderGraph(used.encoder, dtype), config, part)
    write_denoiser(DenoiserGraph(used.denoiser, config, schedule), config, part, dtype)
    return example(
        levels=config.levels,
        T=schedule.T,
        schedule=schedule.to_json(),
        image_size=(config.image_size,) * 2,
        features_channels=config.base_channels,
        precision=precision,
        files={},
    )


MODELS = {"shipped": shipped, "paper": paper}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """Each model's bundle in each precision, exported once and copied, so that no test sees another's engines."""
    root, done = tmp_path_factory.mktemp("models"), {}

    def make(model: str, precision: str) -> Bundle:
        folder = root / f"{model}-{precision}"
        if folder not in done:
            done[folder] = write_bundle(folder, lambda part: MODELS[model](part, precision))
        copied = Path(shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "bundle"))
        return open_bundle(copied)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("model", MODELS)
def test_portable_engines_of_both_graphs(made: Callable[[str, str], Bundle], model: str, precision: str) -> None:
    bundle = made(model, precision)
    profile = profile_for(bundle.manifest, 25)
    capabilities = RTX_CAPABILITIES[precision]
    paths = build_engines(bundle, "tensorrt-rtx", capabilities, profile)
    for path in paths:
        record = json.loads((path.parent / RECORD).read_text())
        assert record["key"]["capabilities"] == list(capabilities)
        assert record["bytes"] == path.stat().st_size > 100_000
        layers = json.loads((path.parent / LAYERS).read_text())
        # Read back from the engine's own file: all of the arithmetic is in the precision that was asked for, or none.
        assert layers["read_from"] == "engine file"
        assert layers["half_share"] == (precision == "float16")
        assert len(layers["layers"]) > 10
    for capability in capabilities:
        pair = open_or_build(bundle, "tensorrt-rtx", Gpu("some RTX", capability, 8 << 30), profile)
        assert (pair.encoder, pair.denoiser) == paths


@pytest.mark.slow
def test_float32_products_are_not_to_be_had_on_turing(made: Callable[[str, str], Bundle]) -> None:
    """Why 7.5 is missing from the float32 targets. When this fails, the library has learnt it: add 7.5 to them."""
    bundle = made("shipped", "float32")
    with pytest.raises(CdiffError, match=r"denoiser\.onnx .*SM75.*FP32 GEMM is not supported"):
        build_engines(bundle, "tensorrt-rtx", ("7.5",), SMALL)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return pair_bundle(tmp_path / "bundle")


def test_a_small_pair_builds_for_one_capability(bundle: Bundle) -> None:
    told: list[float] = []
    paths = build_engines(
        bundle, "tensorrt-rtx", ("8.9",), SMALL, progress=lambda done, total: told.append(done / total)
    )
    assert all(path.stat().st_size > 1000 for path in paths)
    assert told == sorted(told)
    assert told[-1] == 1
    assert 0.5 in told


def test_a_float32_graph_in_a_bundle_called_half_is_refused(tmp_path: Path) -> None:
    bundle = pair_bundle(tmp_path / "lying", precision="float16")
    with pytest.raises(CdiffError, match="only 0% of the convolutions"):
        build_engines(bundle, "tensorrt-rtx", ("8.9",), SMALL)
    assert not list(bundle.engines.iterdir())


@pytest.mark.parametrize(
    ("target", "options", "reason"),
    [
        (("9.0",), {}, "does not build for compute capability 9.0; it knows 7.5, 8.0"),
        (("8.9",), {"workspace_bytes": 1}, "larger workspace"),
        (("8.9",), {"refit": True}, "only on a machine with a GPU"),
    ],
)
def test_what_the_library_refuses(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, target: Any, options: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr("cdiff.export.tensorrt.visible_gpus", lambda: [])
    with pytest.raises(CdiffError, match=reason):
        build_engines(bundle, "tensorrt-rtx", target, SMALL, options=BuildOptions(**options))
    assert not bundle.engines.exists() or not list(bundle.engines.iterdir())


def test_turing_wants_half_precision_and_is_told_so(bundle: Bundle) -> None:
    model = onnx.load(bundle.encoder)
    (last,) = [node for node in model.graph.node if "features" in node.output]
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("MatMul", ["before", "before"], ["features"], "product"))
    onnx.save(model, bundle.encoder)
    with pytest.raises(CdiffError, match=r"FP32 GEMM is not supported.*; export with --fp16, or use"):
        build_engines(bundle, "tensorrt-rtx", ("7.5",), SMALL)


def test_a_node_that_tensorrt_does_not_know_is_named(tmp_path: Path) -> None:
    bundle = pair_bundle(tmp_path / "bundle")
    model = onnx.load(bundle.encoder)
    model.graph.node.append(helper.make_node("Det", ["features"], ["spare"], "my_determinant"))
    onnx.save(model, bundle.encoder)
    with pytest.raises(CdiffError, match=r"encoder\.onnx \(Det my_determinant: "):
        build_engines(bundle, "tensorrt-rtx", ("8.9",), SMALL)


@pytest.mark.slow
def test_ctrl_c_ends_a_build_and_leaves_nothing(made: Callable[[str, str], Bundle]) -> None:
    bundle = made("paper", "float32")
    command = [sys.executable, "-c", "from cdiff.cli import main; main()", "export", str(bundle.path)]
    running = subprocess.Popen(
        [*command, "--engine", "tensorrt-rtx"], stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert running.stderr is not None
    assert "tensorrt-rtx engines for compute capability" in running.stderr.readline()
    until = time.monotonic() + 120
    while (
        not list(bundle.engines.glob("encoder_*")) and time.monotonic() < until
    ):  # the denoiser's, much longer, is next
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=180)
    assert running.returncode == 130, said
    assert "interrupted" in said
    assert [path.name.split("_")[0] for path in bundle.engines.iterdir()] == ["encoder"]
