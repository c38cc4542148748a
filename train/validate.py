"""Validation by sampling: the soft map of a few slices by a short DDIM chain, scored by soft Dice as the paper does."""

from __future__ import annotations

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.scoring.metrics import FIVE, soft_dice
from cdiff.runtime.variants import CONSENSUS
from cdiff.train.data import Batch
from cdiff.train.diffusion import Diffusion
from cdiff.train.fabric import summed
from cdiff.train.network import ConsensusNet

ROWS = 64  # most rows per network call; bounds the memory


@torch.inference_mode()
def sample_soft_maps(
    network: ConsensusNet,
    diffusion: Diffusion,
    image: Tensor,
    *,
    steps: int,
    runs: int,
    seed: int,
    fabric: Fabric | None = None,
) -> Tensor:
    """image [B, channels, H, W] -> soft maps [B, H, W] in 0..1, on the CPU: the mean over levels and runs, by DDIM in `steps` steps.

    The processes of `fabric` take turns at the network's calls; each draws all the noise, so the maps are those of one process.
    """
    K = network.config.conditions
    table = sampler_table("ddim", diffusion.schedule, min(steps, diffusion.schedule.T))
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(image), *image.shape[-2:])
    per_slice = K * runs
    chunk = max(1, ROWS // per_slice)
    for call, start in enumerate(range(0, len(image), chunk)):
        part = image[start : start + chunk]
        noise = torch.randn(len(part) * per_slice, 1, *image.shape[-2:], generator=generator)
        if fabric is not None and call % fabric.world_size != fabric.global_rank:
            continue
        features = network.encoder(part)
        row = torch.arange(len(noise), device=image.device)
        drawn = []
        for first in range(0, len(noise), ROWS):
            here = row[first : first + ROWS]
            level = here % K + 1
            x, shared = noise[first : first + ROWS].to(image.device), features[here // per_slice]
            for t, a, b in zip(table.t, table.a, table.b, strict=True):
                when = torch.full_like(level, int(t))
                x0 = diffusion.to_x0(network.denoiser(x, shared, when, level), x, when)
                x = float(a) * x + float(b) * x0
            drawn.append(x)
        # Runs are averaged before clipping, as in the runtime: with masks of 0 and 1 a single run may fall below 0.
        runs_of_maps = torch.cat(drawn).reshape(len(part), runs, K, *image.shape[-2:])
        total[start : start + len(part)] = diffusion.fraction(runs_of_maps.mean(dim=1)).mean(dim=1).cpu()
    return total if fabric is None else summed(fabric, total).cpu()


def score(
    network: ConsensusNet,
    diffusion: Diffusion,
    batch: Batch,
    *,
    steps: int,
    runs: int,
    seed: int,
    fabric: Fabric | None = None,
) -> float:
    """Mean over the batch's slices of soft Dice at five thresholds; NaN when the network's output is not finite."""
    soft = sample_soft_maps(network, diffusion, batch.image, steps=steps, runs=runs, seed=seed, fabric=fabric)
    if not torch.isfinite(soft).all():
        return float("nan")
    # A consensus model counts all C annotators, of whom a missing one agrees to nothing; other variants learn shares of those present.
    counted = network.config.levels if network.config.variant == CONSENSUS.name else batch.raters.cpu()[:, None, None]
    truth = batch.votes[:, 0].cpu().float() / counted
    return float(np.mean([soft_dice(s, m, FIVE) for s, m in zip(soft.numpy(), truth.numpy(), strict=True)]))
