"""Small networks of every kind, with weights that matter: a fresh network's zero-initialised layers would hide most of a graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from cdiff.runtime.files import write_json
from cdiff.train.config import Config
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset
from cdiff.train.sections import NetworkConfig

BASE = dataclasses.replace(preset("tiny").network, image_size=16, T=50, rrdb_channels=6, rrdb_growth=3)
FLAT = dataclasses.replace(BASE, channel_mult=(1,), attention_depths=(), rrdbs=0)
"""Of one depth and no RRDB: exporting takes as long as a graph has nodes, and this has few. Small, as its middle attends to every pixel."""


def flat_settings(image_size: int = 16) -> tuple[str, ...]:
    """Such a network as settings of `cdiff train --preset tiny`."""
    values = ("channel_mult=[1]", "attention_depths=[]", "rrdbs=0", f"image_size={image_size}")
    return tuple(part for value in values for part in ("--set", value))


def random_network(config: NetworkConfig, seed: int = 0) -> ConsensusNet:
    """A network none of whose layers is zero, in evaluation mode."""
    torch.manual_seed(seed)
    network = ConsensusNet(config)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval().requires_grad_(False)


def random_run(folder: Path, config: Config, seed: int = 0, **info: Any) -> Path:
    """A run folder as the trainer writes it, whose averaged weights are `random_network`'s."""
    from cdiff.train.checkpoint import save_checkpoint  # needs safetensors, which a machine with a GPU may lack

    network = random_network(config.network, seed)
    folder.mkdir()
    write_json(folder / "config.json", config.to_json())
    raw = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    facts = {
        "step": 7,
        "seconds": 90.0,
        "is_best": True,
        "parameters": sum(p.numel() for p in network.parameters()),
        **info,
    }
    save_checkpoint(folder, network=raw, ema=network.state_dict(), optimiser={}, info=facts)
    return folder
