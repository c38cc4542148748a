"""The U-Net peers: what each learns from, by which loss, and what it draws. They differ in nothing else.

A peer's maps are read as those of the diffusion variant that draws the same (runtime.variants): K maps of a slice, R runs of each.
The soft map is their mean. Levels: level c of C is where the soft map reaches (c - 1/2) / C; with one map per annotator, where at
least c of them reach one half. Samples for the energy distance: every map of every run at one half, so a network that always gives
the same single map has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdiff.benchmarks.peers.networks import LATENT, ProbabilisticUNet, unet
from cdiff.benchmarks.peers.slices import Batch
from cdiff.runtime.variants import ANNOTATOR, IMPLICIT_ENSEMBLE, NO_ANNOTATOR, Variant

DROPOUT = 0.1
"""The rate of MC dropout, after every convolution; it was not searched for."""
Pixels = Callable[[Tensor, Tensor], Tensor]
"""A loss: logits and a target of their shape -> a scalar."""
BETA = 1.0
"""The weight of the KL term, as in Kohl et al.'s published code, whose configuration is for Cityscapes."""


@dataclass(frozen=True)
class UNetPeer:
    """One U-Net peer.

    build: C -> network. loss: of a batch, a scalar; random numbers come from torch's generator. draw: image [B, 1, H, W] and n ->
    probabilities [B, K, H, W], or for a peer that samples, of a single image, n draws [n, K, H, W]. variant: what its maps mean.
    """

    name: str
    build: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    draw: Callable[[nn.Module, Tensor, int], Tensor]
    variant: Variant
    samples: bool = False


def cross_entropy_and_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy plus a soft Dice loss over the batch (target 0..1, of the logits' shape).

    With the squares in the denominator both terms are least where p = target, also for a target that is a fraction.
    """
    p = torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target)
    dice = (2 * (p * target).sum() + 1) / ((p * p).sum() + (target * target).sum() + 1)
    return cross_entropy + 1 - dice


def majority_loss(network: nn.Module, batch: Batch) -> Tensor:
    """What at least half of the annotators drew, as one truth: the usual way to train on several masks."""
    return cross_entropy_and_dice(network(batch.image), batch.majority)


def soft_loss(network: nn.Module, batch: Batch) -> Tensor:
    """The fraction of annotators, regressed."""
    return cross_entropy_and_dice(network(batch.image), batch.fraction)


def random_loss(network: nn.Module, batch: Batch, pixels: Pixels = F.binary_cross_entropy_with_logits) -> Tensor:
    """One annotator's mask, drawn anew each time (Jensen et al. 2019, MICCAI, for labels of pictures).

    The expectation of cross-entropy is least at the fraction of annotators. That of a Dice term is not: for masks that are drawn at random
    its best map lies above the fraction. But it teaches small structures in fewer steps.
    """
    return pixels(network(batch.image), batch.drawn)


def heads_loss(network: nn.Module, batch: Batch, pixels: Pixels = F.binary_cross_entropy_with_logits) -> Tensor:
    """Output i learns mask i of every case (Guan et al. 2018, arXiv:1703.08774).

    It needs mask i to be one person's. LIDC's readers are not identified across cases: there the heads learn an average under C names,
    and what `random_loss` says of the two losses holds.
    """
    return pixels(network(batch.image), batch.masks)


def probabilistic_loss(network: nn.Module, batch: Batch, pixels: Pixels = F.binary_cross_entropy_with_logits) -> Tensor:
    """Kohl et al. 2018, equation 4, on one annotator's mask drawn anew each time: -log P(Y | S(X, z)) + beta D_KL(Q || P), z ~ Q.

    In the paper the first term is a sum over a picture's pixels. Here both terms are divided by the number of pixels: their balance stays,
    and gradients are as large as the other peers', for the same optimiser. A Dice term is added to that.
    """
    assert isinstance(network, ProbabilisticUNet)
    prior, posterior = network.prior(batch.image), network.posterior_of(batch.image, batch.drawn)
    z = posterior.sample(torch.randn(len(batch.image), LATENT))
    reconstruction = pixels(network.logits(network.unet(batch.image), z), batch.drawn)
    return reconstruction + BETA * posterior.kl_to(prior).mean() / batch.image[0].numel()


def plain_draw(network: nn.Module, image: Tensor, n: int) -> Tensor:
    """The network's maps, once whatever n is, since every draw would be the same."""
    return torch.sigmoid(network(image))


def dropout_draw(network: nn.Module, image: Tensor, n: int) -> Tensor:
    """n passes with dropout left on (Gal & Ghahramani 2016, arXiv:1506.02142)."""
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.train()
    return torch.sigmoid(network(image.expand(n, -1, -1, -1).contiguous(memory_format=torch.channels_last)))


def probabilistic_draw(network: nn.Module, image: Tensor, n: int) -> Tensor:
    """n draws of z from the prior."""
    assert isinstance(network, ProbabilisticUNet)
    return network.draw(image, torch.randn(n, LATENT))


def _one_output(C: int) -> nn.Module:
    return unet()


def _with_dice(peer: UNetPeer) -> UNetPeer:
    """The same peer with the Dice term that the other U-Nets and the diffusion peers learn by too."""
    loss: Callable[..., Tensor] = peer.loss
    return replace(peer, name=f"{peer.name}-dice", loss=partial(loss, pixels=cross_entropy_and_dice))


_BY_CROSS_ENTROPY = (
    UNetPeer("unet-random", _one_output, random_loss, plain_draw, NO_ANNOTATOR),
    UNetPeer("unet-heads", lambda C: unet(C), heads_loss, plain_draw, ANNOTATOR),
    # Trained as `unet-random` is, as Kohl et al. trained their dropout U-Net: a draw is then an annotator's possible mask.
    UNetPeer("unet-dropout", lambda C: unet(dropout=DROPOUT), random_loss, dropout_draw, NO_ANNOTATOR, samples=True),
    UNetPeer(
        "unet-probabilistic",
        lambda C: ProbabilisticUNet(),
        probabilistic_loss,
        probabilistic_draw,
        NO_ANNOTATOR,
        samples=True,
    ),
)
"""As in their papers."""

UNETS: dict[str, UNetPeer] = {
    peer.name: peer
    for peer in (
        UNetPeer("unet-majority", _one_output, majority_loss, plain_draw, IMPLICIT_ENSEMBLE),
        UNetPeer("unet-soft", _one_output, soft_loss, plain_draw, NO_ANNOTATOR),
        *_BY_CROSS_ENTROPY,
        *map(_with_dice, _BY_CROSS_ENTROPY),
    )
}
"""By name, in the order of training."""
