"""The weights that a new run starts from, another run's or a bundle's: where they are, and whether they compute the same function here."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdiff.runtime.bundle import open_bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256
from cdiff.runtime.manifest import NAME
from cdiff.runtime.scans.sources import is_there
from cdiff.train.checkpoint import (
    EMA,
    MODEL,
    checkpoint_folder,
    config_of_weights,
    origin,
    read_config,
    read_json,
    read_tensors,
    read_weights,
)
from cdiff.train.config import Config
from cdiff.train.told import must_tell

SHAPES = (
    *("variant", "image_channels", "levels", "T", "base_channels", "channel_mult", "residual_blocks"),
    *("attention_depths", "rrdbs", "rrdb_channels", "rrdb_growth", "embedding", "resample", "variance"),
)
"""Settings that change which tensors there are, or their shapes."""
FUNCTION = ("target", "outside", "groups", "heads", "heads_up", "head_channels")
"""Settings that no tensor's shape shows, but that change what the same tensors compute."""
AIM = ("variant", "schedule", "beta_start", "beta_end", "scaled")
"""Settings that only change what the network is to learn: weights trained with other values are still a start."""


@dataclass(frozen=True)
class Initial:
    """The averaged weights of `source`: the file, its tensors, the configuration of their training, and what a run says of its origin."""

    source: Path
    path: Path
    tensors: dict[str, Tensor]
    config: Config
    origin: dict[str, Any]

    def check_shapes(self, config: Config, network: torch.nn.Module) -> None:
        """Raise CdiffError, naming all settings to change, where these weights are of another network than that of a run with `config`."""
        here = {name: value.shape for name, value in network.state_dict().items()}
        if here != {name: value.shape for name, value in self.tensors.items()}:
            self._refuse((*SHAPES, *FUNCTION), config, "its weights are of another network")

    def check_function(self, config: Config) -> None:
        """Raise CdiffError where these weights would compute something else in a run with `config` than in their training."""
        self._refuse(FUNCTION, config, "here its weights would compute something else")

    def _refuse(self, keys: tuple[str, ...], config: Config, why: str) -> None:
        """Raise CdiffError where any of these settings differs, with what to add so that none does."""
        if other := _other(keys, self.config, config):
            words = ", ".join(f"{key}={_said(there)} ({_said(here)} here)" for key, there, here in other)
            # A shell may take brackets for a pattern.
            remedy = " ".join(f"--set {shlex.quote(f'{key}={_said(there)}')}" for key, there, _ in other)
            raise CdiffError(f"{self.source} was trained with {words}: {why}; add {remedy}, or leave out --init")

    def notes(self, config: Config) -> list[str]:
        """One line on what differs when a run with `config` teaches these weights something else; none where it goes on as they were trained."""
        words = ", ".join(f"{key}={there} ({here} here)" for key, there, here in _other(AIM, self.config, config))
        return [f"{self.source} was trained with {words}: its weights are only a start for that"] if words else []


def read_initial(init: Path) -> Initial:
    """The last checkpoint's weights of the run `init`, or those of the bundle `init`. Raises CdiffError where there are none."""
    folder = checkpoint_folder(init, "last")
    path = init / MODEL if folder is None else folder / EMA
    if not is_there(path):
        raise CdiffError(f"{init} holds no weights to start from; give the folder of a training run or of a bundle")
    if folder is None:
        bundle = open_bundle(init)  # which compares its files with their hashes
        tensors = read_tensors(bundle.file(MODEL))
        config, before, told = config_of_weights(path), bundle.manifest.training, init / NAME
    else:
        tensors = read_weights(folder, EMA)
        told = folder / "checkpoint.json"
        config, before = read_config(init), read_json(told)
    must_tell(before, told)
    began = {"name": init.resolve().name, "sha256": sha256(path)} | origin(before)
    return Initial(init, path, tensors, config, began)


def _said(value: Any) -> Any:
    """A setting's value as --set takes it."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else value


def _other(keys: tuple[str, ...], there: Config, here: Config) -> list[tuple[str, Any, Any]]:
    """(key, value there, value here) of those settings that differ."""
    old, new = there.values(), here.values()
    return [(key, old[key], new[key]) for key in keys if old[key] != new[key]]
