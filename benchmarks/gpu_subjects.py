"""What the GPU suite measures with: the shipped model, the paper's network with random weights, and their bundles.

Imports nothing but NumPy, PyTorch and cdiff; onnx and onnxscript only where a graph is written with them.
"""

from __future__ import annotations

import gzip
import importlib.resources
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cdiff.runtime.bundle import Bundle, open_bundle, shipped_bundle, write_bundle
from cdiff.runtime.engines.base import Float32
from cdiff.runtime.manifest import DENOISER, ENCODER, WEIGHTS, Manifest
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.scans.intensity import Intensity
from cdiff.train.config import Config
from cdiff.train.presets import preset

SHIPPED, PAPER = "shipped", "paper"
SEED = 20230609
NUMBERS = {"F32": "float32", "F16": "float16"}
TYPES = {2: "u1", 4: "<i2", 8: "<i4", 16: "<f4", 512: "<u2"}


@dataclass(frozen=True)
class Subject:
    """One model to measure: its configuration, whether its weights were trained, and the runs of its whole protocol.

    most: the most rows of a batch that is measured, where a larger one has broken the check before; else None.
    """

    name: str
    config: Config
    trained: bool
    runs: int
    most: int | None = None

    @property
    def schedule(self) -> NoiseSchedule:
        return self.config.schedule

    @property
    def rows(self) -> int:
        """Rows of one slice."""
        return self.config.network.levels * self.runs

    def network(self) -> Any:
        """The `ConsensusNet` in float32 on the CPU: the shipped weights, or random ones of a fixed seed."""
        if self.trained:
            return shipped_network()
        return random_network(self.config)

    def images(self) -> dict[str, Float32]:
        """[1,channels,H,W] each: uniform noise in [-1, 1], and the demo scan's middle slice as the model would see it."""
        network = self.config.network
        size = (network.image_size, network.image_size)
        random = np.random.default_rng(SEED).uniform(-1, 1, (1, network.image_channels, *size)).astype(np.float32)
        slices = demo_slices()
        middle = Intensity().apply(slices[len(slices) // 2][None])
        framed = Framing("centre" if self.trained else "resize", size).frame(middle)
        return {"random": random, "real": framed.image(0)[None]}


def subject(name: str, small: bool) -> Subject:
    """`shipped` or `paper` (C = 7, 25 runs); with `small` both are a tiny network with random weights, for a test of the suite itself."""
    if small:
        tiny = preset("tiny")
        return Subject(name, replace(tiny, network=replace(tiny.network, image_size=16, base_channels=4)), False, 2)
    if name == SHIPPED:
        return Subject(name, shipped_config(), True, 25)
    return Subject(name, replace(preset("paper"), network=replace(preset("paper").network, levels=7)), False, 25)


def shipped_config() -> Config:
    """The configuration that the shipped weights carry, read from the head of model.safetensors: its length, then JSON."""
    return Config.from_json(json.loads(shipped_weights()[0]["__metadata__"]["config"]))


def shipped_weights() -> tuple[dict[str, Any], bytearray]:
    """The head of the shipped model.safetensors, and the bytes that follow it, in which the head tells where each tensor lies."""
    data = open_bundle(shipped_bundle()).file(WEIGHTS).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])


def shipped_network() -> Any:
    """The shipped network in evaluation mode, as from `export.reference.load_network`, but read without the package safetensors."""
    import torch

    from cdiff.train.network import ConsensusNet

    head, numbers = shipped_weights()
    network = ConsensusNet(shipped_config().network)
    state = {}
    for name, about in head.items():
        if name != "__metadata__":
            first, end = about["data_offsets"]
            flat = torch.frombuffer(numbers[first:end], dtype=getattr(torch, NUMBERS[about["dtype"]]))
            state[name] = flat.reshape(about["shape"])
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def random_network(config: Config) -> Any:
    """A network with random weights, none of its parameters all zero, in evaluation mode; the same for the same configuration."""
    import torch

    from cdiff.train.network import ConsensusNet

    torch.manual_seed(SEED)
    network = ConsensusNet(config.network)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network.eval().requires_grad_(False)


def write_random_bundle(folder: Path, model: Subject, half: bool) -> Bundle:
    """A bundle of the subject's graphs in `folder`, without weights, card or comparison: for measurements alone.

    Raises CdiffError when PyTorch cannot export it, ModuleNotFoundError without onnx or onnxscript.
    """
    import torch

    from cdiff.export.graphs import OPSETS, DenoiserGraph, EncoderGraph, write_denoiser, write_encoder
    from cdiff.export.half import check_half, half_network

    config, network = model.config.network, model.network()
    dtype = torch.float16 if half else torch.float32
    if half:
        network = half_network(network)

    def build(stage: Path) -> Manifest:
        graphs = [
            write_encoder(EncoderGraph(network.encoder, dtype), config, stage),
            write_denoiser(DenoiserGraph(network.denoiser, config, model.schedule), config, stage, dtype),
        ]
        shares = {path.stem: check_half(path) for path in graphs} if half else {}
        size = (config.image_size, config.image_size)
        return Manifest(
            name=f"{model.name}-measured", task="none: for measurements", citation=[], variant=config.variant, levels=config.levels, T=config.T,
            schedule=model.schedule.to_json(), target=config.target, variance=config.variance, image_size=size,
            image_channels=config.image_channels, framing="resize", tile_overlap=0.25, intensity=Intensity().to_json(),
            slice_axis=2, mirror=False, precision="float16" if half else "float32", opset=OPSETS[dtype],
            features_channels=config.base_channels, fast={}, verification={"half_share": shares},
            files={name: {"sha256": "", "bytes": 0} for name in (ENCODER, DENOISER)},
        )  # fmt: skip

    return write_bundle(folder, build, replace=True)


def bundle_of(model: Subject, half: bool, work: Path) -> Bundle:
    """The subject's bundle: the shipped one, or one that is written into `work` the first time it is asked for."""
    if model.trained and not half:
        return open_bundle(shipped_bundle())
    folder = work / f"{model.name}-{'float16' if half else 'float32'}"
    return open_bundle(folder) if folder.is_dir() else write_random_bundle(folder, model, half)


def demo_slices() -> Float32:
    """The demo scan that comes with cdiff, [S,1,h,w], read without nibabel, by a few lines that suit only files of its kind."""
    path = Path(str(importlib.resources.files("cdiff") / "demo" / "image.nii.gz"))
    data = gzip.decompress(path.read_bytes())
    count, *dims = struct.unpack_from("<8h", data, 40)
    (kind,) = struct.unpack_from("<h", data, 70)
    offset, slope, intercept = struct.unpack_from("<3f", data, 108)
    shape = tuple(dims[: min(count, 3)])
    voxels = np.frombuffer(data, TYPES[kind], int(np.prod(shape)), int(offset)).reshape(shape, order="F")
    values = voxels.astype(np.float32) * np.float32(slope or 1) + np.float32(intercept if slope else 0)
    return np.ascontiguousarray(np.moveaxis(values, 2, 0)[:, None])
