"""Model FLOPs utilisation: the operations that a step's learning needs over what the device could do in that time (Chowdhery et al. 2022,
PaLM, appendix B). What activation checkpointing computes a second time is not counted."""

from __future__ import annotations

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from cdiff.train.config import Config, NetworkConfig
from cdiff.train.network import ConsensusNet
from cdiff.train.pace import batch_size

# Dense tensor-core TFLOP/s from NVIDIA's data sheets (GeForce: the Ampere GA102 and Ada whitepapers, with float32 accumulation): half
# precision, and float32 with PyTorch's default of TF32 convolutions (none on V100 and T4). The first row whose words are all in the name counts.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H200", 989.0, 494.0),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.0, 417.0),
    ("H100", 989.0, 494.0),
    ("A100", 312.0, 156.0),
    ("L40S", 362.0, 183.0),
    ("L4", 121.0, 60.0),
    ("A10", 125.0, 62.5),
    ("4090", 165.2, 82.6),
    ("3090", 71.0, 35.6),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
)


def peak_flops(config: Config, device: torch.device, half: bool) -> float | None:
    """FLOP/s that the device can do at best: `peak_tflops` if set, else the data sheet's; None for a CPU and an unknown GPU."""
    if config.training.peak_tflops:
        return config.training.peak_tflops * 1e12
    return sheet_flops(torch.cuda.get_device_name(device), half) if device.type == "cuda" else None


def sheet_flops(name: str, half: bool) -> float | None:
    """PEAKS's FLOP/s for a GPU called `name` by CUDA, such as "NVIDIA A100-SXM4-80GB"; None for one that is not there."""
    words = set(re.split(r"[\s-]+", name))
    if words & {"MIG", "Laptop"}:  # a part of the GPU, or a slower one of the same name
        return None
    for wanted, at_half, at_single in PEAKS:
        if set(wanted.split()) <= words:
            return (at_half if half else at_single) * 1e12
    return None


def image_flop(config: NetworkConfig, window: int, rows: int) -> int:
    """FLOPs (a multiply-add is two) of learning from one image of `window` pixels with `rows` rows: encoder once, denoiser a row, and back.

    Convolutions and matrix products as PyTorch's counter has them, on tensors without content.
    """
    with torch.device("meta"):
        network = ConsensusNet(config)
        x, image = torch.zeros(rows, 1, window, window), torch.zeros(1, config.image_channels, window, window)
        index = torch.ones(rows, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            network(x, image, index, index).sum().backward()
    return int(counter.get_total_flops())


class Utilisation:
    """Sums the steps between two rows of the log. `peak` is one device's FLOP/s, None where it is not known."""

    def __init__(self, config: Config, peak: float | None, devices: int) -> None:
        self.config, self.rate = config, peak and peak * devices
        self._flop: dict[int, int] = {}  # an image, by window
        self._done, self._seconds = 0, 0.0

    def add(self, window: int, seconds: float) -> None:
        """A step of windows of `window` pixels that took `seconds`, its waiting for data included."""
        if not self.rate:
            return
        if window not in self._flop:
            self._flop[window] = image_flop(self.config.network, window, self.config.training.rows_per_image)
        self._done += batch_size(self.config, window) * self._flop[window]
        self._seconds += seconds

    def take(self) -> dict[str, float]:
        """{"mfu": share in 0..1} of the steps since the last call; empty where the peak is not known."""
        if not self.rate or not self._seconds:
            return {}
        share = self._done / (self._seconds * self.rate)
        self._done, self._seconds = 0, 0.0
        return {"mfu": share}
