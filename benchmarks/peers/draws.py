"""What a U-Net peer draws of one slice: K maps, R runs of each, over the same mirrored views and zooms as the diffusion peers' runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cdiff.benchmarks.peers.networks import DIVISOR
from cdiff.benchmarks.peers.unets import UNetPeer
from cdiff.runtime.sampling.framing import resize
from cdiff.runtime.sampling.mirror import VIEWS, view_of
from cdiff.runtime.sampling.zoom import shared_out

Float32 = NDArray[np.float32]


def mixed(*numbers: int) -> int:
    """One seed made of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def draw_runs(
    peer: UNetPeer,
    network: nn.Module,
    image: Float32,
    *,
    runs: int,
    mirror: bool,
    seed: int,
    zooms: Sequence[float] = (1.0,),
) -> Float32:
    """Probabilities [K, R, H, W] of one slice [1, H, W]; the same seed draws the same.

    A peer that samples draws R = runs; run r sees the slice at the r % Z-th of Z zooms, and the runs of one zoom see its VIEWS in turn when
    `mirror`, as a diffusion model's do. The others have R = 1, the mean over zooms and, when `mirror`, views. For a zoom other than 1 the
    whole slice is resampled to the nearest size that a U-Net takes, and its maps are resampled back.
    """
    size = image.shape[-2:]
    found: list[Float32] = []
    for zoom, share in shared_out(runs, zooms) if peer.samples else [(zoom, 1) for zoom in zooms]:
        H, W = (n if zoom == 1 else DIVISOR * max(1, round(n * zoom / DIVISOR)) for n in size)
        # With one seed for all, runs of the same number would draw the same at each zoom.
        of_zoom = seed if zoom == 1 else mixed(seed, round(1000 * zoom))
        found.append(resize(_views(peer, network, resize(image, (H, W)), share, mirror, of_zoom), size))
    if not peer.samples:
        return np.asarray(np.mean(found, axis=0), np.float32)
    drawn = np.empty((len(found[0]), runs, *size), np.float32)
    for k, maps in enumerate(found):
        drawn[:, k :: len(found)] = maps
    return drawn


@torch.inference_mode()
def _views(peer: UNetPeer, network: nn.Module, image: Float32, runs: int, mirror: bool, seed: int) -> Float32:
    """`draw_runs` for a slice at one size."""
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
