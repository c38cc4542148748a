"""Checkpoints in the published codes' own naming, made from names and shapes alone; tests/data/imported has what their code makes of them.

tests/data/imported/record.py wrote each NAME.npz by running the published code:
args (JSON): its options. shapes (JSON): its state_dict's names and shapes. t, level: rows of inputs, ours (t in 1..T). output
[rows, 1 or 2, H, W]: the network's. chain [levels, H, W], in some: the mean over `chain_runs` reverse chains of clip((x + 1)/2, 0, 1),
from `runtime.sampling.noise.normal` with the seed CHAIN_SEED.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

FOLDER = Path(__file__).resolve().parents[1] / "data" / "imported"
CHAIN_SEED = 11

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Recorded:
    """What one NAME.npz holds."""

    name: str
    args: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    arrays: dict[str, NDArray[Any]]

    @property
    def source(self) -> str:
        return "consensus" if self.name.startswith("consensus") else "implicit-ensemble"

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(weight(name, shape)) for name, shape in self.shapes.items()}

    def save(self, folder: Path, file: str = "ema_val_0.7512345_0.9999_002500.pt") -> Path:
        """The checkpoint and its args.json in `folder`, as the published training leaves them. Returns the checkpoint's path."""
        folder.mkdir(exist_ok=True)
        (folder / "args.json").write_text(json.dumps(self.args, indent=4))
        torch.save(self.tensors(), folder / file)
        return folder / file


def recorded(name: str) -> Recorded:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    shapes = {key: tuple(shape) for key, shape in json.loads(str(arrays.pop("shapes"))).items()}
    return Recorded(name, json.loads(str(arrays.pop("args"))), shapes, arrays)


def uniform(key: str, shape: tuple[int, ...]) -> Float32:
    """Numbers in [-1, 1) that depend on the key alone: Philox's raw words, whose stream NumPy does not change between versions."""
    seed = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], "<u8")
    words = np.random.Philox(key=seed).random_raw(math.prod(shape))
    return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> Float32:
    """A tensor that matters (fresh networks have layers of zeros) and is as well conditioned as a trained one's.

    Residual branches are half as strong as what they are added to: with equal strengths float32 alone, theirs as ours, is 3e-5
    from float64, and nothing could be compared to 1e-5.
    """
    numbers = uniform(name, shape)
    if name.endswith("bias"):
        return np.float32(0.1) * numbers
    if len(shape) == 1:  # a normalisation's scale
        return 1 + np.float32(0.2) * numbers
    fan_in = 1 if name.startswith("label_emb") else math.prod(shape[1:])
    branch = any(part in name for part in ("out_layers.3", "proj_out", "in_layers.2"))
    gain = 0.5 if branch else 1.0
    return np.float32(gain * math.sqrt(3 / fan_in)) * numbers


def inputs(name: str, rows: int, channels: int, size: int) -> tuple[Float32, Float32]:
    """x [rows, 1, H, W], about a standard deviation of 1, and image [rows, channels, H, W]."""
    x = np.float32(math.sqrt(3)) * uniform(f"{name} x", (rows, 1, size, size))
    return x, uniform(f"{name} image", (rows, channels, size, size))
