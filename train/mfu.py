"""Model FLOPs utilisation: the operations that a step's learning needs over what the device could do in that time (Chowdhery et al. 2022,
PaLM, appendix B). What activation checkpointing computes a second time is not counted."""

from __future__ import annotations

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from cdiff.train.config import Config
from cdiff.train.network import ConsensusNet
from cdiff.train.pace import batch_size
from cdiff.train.sections import NetworkConfig

# Dense tensor-core TFLOP/s (half of what a sheet gives "with sparsity"): half precision accumulated in float32, and float32 with PyTorch's
# default of TF32 convolutions (plain float32 on V100 and T4, which have no TF32). The first row whose words are all in the name counts.
# NVIDIA's sheet of each, and where its figures were read:
#   H200      HPC data sheet SC23-H200, SXM: cited in lightning_fabric/utilities/throughput.py; itkb.uw.cz/2026/06 for the dense 989
#   H100      H100 data sheet, SXM 1,979 and 989, PCIe 1,513 and 756 with sparsity: archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html
#   A100      A100 data sheet 1758950 r4, SXM as PCIe: glennklockwood.com/garden/processors/A100
#   L40S      L40S data sheet, 362.05 and 183: www.mullet.se, product 355414
#   L4        Ada GPU architecture whitepaper 2.1: cited in throughput.py
#   A10       A10 data sheet: github.com/winston-zhang-orz/gpu-specs; throughput.py
#   RTX 4090  waredb.com/processor/nvidia-geforce-rtx-4090 (165.15 and 82.58); throughput.py has the rate without tensor cores
#   V100      V100 data sheet 1165301 r5: cited in throughput.py; developer.nvidia.com/programming-tensor-cores-cuda-9-0 for the 125
#   T4        T4 data sheet 951643: cited in throughput.py
# Not here, because no sheet could be read or sheets disagree: the RTX 3090 and the NVL boards.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H200", 989.0, 494.0),
    ("H100 PCIe", 756.0, 378.0),
    ("H100", 989.0, 494.0),
    ("A100", 312.0, 156.0),
    ("L40S", 362.0, 183.0),
    ("L4", 121.0, 60.0),
    ("A10", 125.0, 62.5),
    ("4090", 165.2, 82.6),
    ("V100 PCIE", 112.0, 14.0),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
)
OTHERS = {"MIG", "Laptop", "NVL", "D"}
"""Words in a name that mark another GPU than the one in `PEAKS`: a part of it, or a faster or slower board."""


def peak_flops(config: Config, device: torch.device, half: bool) -> float | None:
    """FLOP/s that the device can do at best: `peak_tflops` if set, else the data sheet's; None for a CPU and an unknown GPU."""
    if config.training.peak_tflops:
        return config.training.peak_tflops * 1e12
    return sheet_flops(torch.cuda.get_device_name(device), half) if device.type == "cuda" else None


def sheet_flops(name: str, half: bool) -> float | None:
    """FLOP/s from `PEAKS` of the GPU that CUDA calls `name`, such as "NVIDIA A100-SXM4-80GB"; None for one that is not in it."""
    words = set(re.split(r"[\s-]+", name))
    if words & OTHERS:
        return None
    for wanted, at_half, at_single in PEAKS:
        if set(wanted.split()) <= words:
            return (at_half if half else at_single) * 1e12
    return None


def image_flop(config: NetworkConfig, window: int, rows: int) -> int:
    """FLOPs (a multiply-add is two) of learning from one image of `window` pixels with `rows` rows: encoder once, denoiser per row, and back.

    PyTorch's counter counts convolutions and matrix products, here on tensors without content.
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
        self._flop: dict[int, int] = {}  # per image, by window
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
