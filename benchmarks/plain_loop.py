"""The published way to sample, as the yardstick: plain PyTorch, one run after another, the encoder run anew for each row of each run.

Amit et al. 2023, algorithm 2, as their code runs it (`sampling_major_vote_func`): a run's levels are one batch, which holds the image once per
level; G(I) is kept over the run's steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cdiff.runtime.engines.base import Float32
from cdiff.runtime.sampling.chain import Timings
from cdiff.runtime.sampling.framing import Windows
from cdiff.runtime.sampling.sampler import SamplerTable
from cdiff.train.diffusion import Diffusion
from cdiff.train.network import ConsensusNet


@torch.inference_mode()
def plain_loop(
    network: ConsensusNet,
    diffusion: Diffusion,
    windows: Windows,
    table: SamplerTable,
    runs: int,
    timings: Timings,
    *,
    by_row: bool = False,
) -> Float32:
    """Soft maps [S, h, w]: the mean over runs and levels of clip((x + 1)/2, 0, 1), or where masks are 0 outside, of x.

    by_row: a batch holds a single level, so that one chain is sampled after another. The noise is PyTorch's own, in the order of the windows, runs,
    batches and steps.

    The network and `diffusion` must be on one device; results come back to the host once per batch. `timings` is filled; on a GPU its
    parts other than "collect" tell only how long it took to queue the work.
    """
    device = next(network.parameters()).device
    levels, maps = torch.arange(1, network.config.conditions + 1, device=device), []
    for image in windows:
        total = np.zeros(windows.framing.size, np.float32)
        for _ in range(runs):
            for batch in torch.split(levels, 1 if by_row else len(levels)):
                total += _run(network, diffusion, torch.from_numpy(image).to(device), batch, table, timings)
        maps.append(total / np.float32(runs * len(levels)))
    soft = windows.unframe(np.stack(maps))
    return soft if diffusion.outside == -1 else np.maximum(2 * soft - 1, 0)


def _run(
    network: ConsensusNet,
    diffusion: Diffusion,
    image: Tensor,
    levels: Tensor,
    table: SamplerTable,
    timings: Timings,
) -> Float32:
    """A reverse chain for each level: image [ch, H, W], levels int64 [B] -> the sum [H, W] of B maps, each in 0..1."""
    rows = image.expand(len(levels), -1, -1, -1)
    with timings.part("encode"):
        features = network.encoder(rows)
    with timings.part("noise"):
        x = torch.randn_like(rows[:, :1])
    x0_prev = torch.zeros_like(x)
    for step in range(len(table)):
        t = torch.full_like(levels, int(table.t[step]))
        with timings.part("denoise"):
            output = network.denoiser(x, features, t, levels)
        timings.calls += 1
        z: Tensor | float = 0.0
        if table.d[step] > 0:
            with timings.part("noise"):
                z = torch.randn_like(x)
        with timings.part("update"):
            x0 = diffusion.to_x0(output, x, t)
            x = float(table.a[step]) * x + float(table.b[step]) * x0 + float(table.c[step]) * x0_prev
            x = x + _deviation(table, step, output) * z
            x0_prev = x0
    timings.rows += len(levels)
    with timings.part("collect"):
        return np.asarray(((x[:, 0] + 1) / 2).clamp(0, 1).sum(dim=0).cpu().numpy())


def _deviation(table: SamplerTable, step: int, output: Tensor) -> Tensor | float:
    """The factor of the noise: d, or with a learned variance the interpolated deviation (Nichol & Dhariwal 2021, eq. 15)."""
    if output.shape[1] == 1 or table.log_variance_min is None or table.log_variance_max is None:
        return float(table.d[step])
    mix = (output[:, 1:] + 1) / 2
    low, high = float(table.log_variance_min[step]), float(table.log_variance_max[step])
    return torch.exp((low + mix * (high - low)) / 2)
