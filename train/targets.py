"""What the network learns to draw: the target of each variant from the annotators' masks (Amit et al. 2023, section 4; docs/variants.md).

A target takes masks bool [B, C, H, W], raters int64 [B] (how many of the masks somebody drew, the first ones), condition int64 [B]
in 1..K, which the network is told, and u float32 [B] in [0, 1), for what it is not told. It returns x0 float32 [B, 1, H, W] in
[-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cdiff.runtime import variants

Target = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def consensus(masks: Tensor, raters: Tensor, condition: Tensor, u: Tensor) -> Tensor:
    """M^c, what at least c annotators drew (equation 1); a level above the number of raters is empty."""
    return _signed(masks.sum(1, keepdim=True) >= _column(condition))


def annotator(masks: Tensor, raters: Tensor, condition: Tensor, u: Tensor) -> Tensor:
    """A^i, the mask of the annotator whose number the network is told."""
    return _signed(_mask(masks, condition - 1))


def no_annotator(masks: Tensor, raters: Tensor, condition: Tensor, u: Tensor) -> Tensor:
    """A^i of an annotator drawn at random among those who drew."""
    # Below the number of raters: not even the largest u, 1 - 2^-24, times it is rounded up to it.
    return _signed(_mask(masks, (u * raters).long()))


def soft_label(masks: Tensor, raters: Tensor, condition: Tensor, u: Tensor) -> Tensor:
    """The fraction of the annotators, 2 f - 1."""
    return 2 * masks.sum(1, keepdim=True) / _column(raters) - 1


def majority(masks: Tensor, raters: Tensor, condition: Tensor, u: Tensor) -> Tensor:
    """What at least half of the annotators drew; with a single annotator, the mask (Wolleb et al. 2022 have one)."""
    return _signed(2 * masks.sum(1, keepdim=True) >= _column(raters))


TARGETS: dict[str, Target] = {
    variants.CONSENSUS.name: consensus,
    variants.ANNOTATOR.name: annotator,
    variants.NO_ANNOTATOR.name: no_annotator,
    variants.SOFT_LABEL.name: soft_label,
    variants.IMPLICIT_ENSEMBLE.name: majority,
}


def _mask(masks: Tensor, index: Tensor) -> Tensor:
    return masks[torch.arange(len(masks), device=masks.device), index][:, None]


def _signed(inside: Tensor) -> Tensor:
    return inside.float() * 2 - 1


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
