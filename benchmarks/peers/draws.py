"""What a U-Net peer draws of one slice: K maps, R runs of each, over the same mirrored views as the diffusion peers' runs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cdiff.benchmarks.peers.unets import UNetPeer
from cdiff.runtime.sampling.mirror import VIEWS, view_of

Float32 = NDArray[np.float32]


def mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@torch.inference_mode()
def draw_runs(peer: UNetPeer, network: nn.Module, image: Float32, *, runs: int, mirror: bool, seed: int) -> Float32:
    """Probabilities [K, R, H, W] of one slice [1, H, W]; the same seed draws the same.

    A peer that samples draws R = runs; run r sees view r % VIEWS of the slice when `mirror`, as a diffusion model's does. The others
    have R = 1: the mean over the views, or the slice as it is.
    """
    network.eval()
    views = min(VIEWS, runs if peer.samples else VIEWS) if mirror else 1
    found: list[Float32] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for view in range(views):
            seen = torch.from_numpy(np.ascontiguousarray(view_of(image, view)))[None]
            maps = peer.draw(network, seen, len(range(view, runs, views)) if peer.samples else 1)
            found.append(view_of(maps.numpy(), view))
    if not peer.samples:
        return np.asarray(np.mean(found, axis=0).swapaxes(0, 1), np.float32)
    turns = np.empty((runs, *found[0].shape[1:]), np.float32)
    for view, maps_of_view in enumerate(found):
        turns[view::views] = maps_of_view
    return turns.swapaxes(0, 1)
