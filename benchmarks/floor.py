"""The floor under any engine: the network's FLOPs over the rate at which this machine multiplies matrices."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from cdiff.train.network import ConsensusNet

SIZES = (512, 1024, 2048)
SECONDS = 0.5
"""Spent on each size. The smallest product takes milliseconds, so that one falls between two interruptions even on a busy machine."""


@dataclass(frozen=True)
class Floor:
    """FLOPs (a multiply-add is two) of one slice's encoding and of one row's denoising, and the measured rate in FLOP/s."""

    encoder_flop: int
    denoiser_flop: int
    rate: float


def measure_floor(network: ConsensusNet) -> Floor:
    """Count the FLOPs of a one-row call and measure the machine's rate, with PyTorch's current number of threads."""
    encoder, denoiser = count_flop(network)
    return Floor(encoder, denoiser, matmul_rate(next(network.parameters()).device))


@torch.inference_mode()
def count_flop(network: ConsensusNet) -> tuple[int, int]:
    """FLOPs of encoding one slice and of denoising one row: convolutions and matrix products, as PyTorch's counter has them."""
    config, device = network.config, next(network.parameters()).device
    image = torch.zeros(1, config.image_channels, config.image_size, config.image_size, device=device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter:
        features = network.encoder(image)
    encoder = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        network.denoiser(image[:, :1], features, one, one)
    return encoder, counter.get_total_flops()


@torch.inference_mode()
def matmul_rate(device: torch.device) -> float:
    """FLOP/s of the fastest of many float32 products of square matrices: the floor is what the machine can do."""
    best = 0.0
    for n in SIZES:
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        out = torch.empty_like(a)
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best
