"""The slices of a split in memory, and a U-Net peer's batches: functions of (seed, step) alone, so that a resumed run sees the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cdiff.runtime.data.cases import find_cases, read_case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.intensity import Intensity

INTENSITY = Intensity("slice", 0.5, 99.5)
"""That of the diffusion presets."""


@dataclass(frozen=True)
class Slices:
    """Slices of one split: images float32 [N, 1, H, W] in [-1, 1], and masks uint8 [N, C, H, W]."""

    images: NDArray[np.float32]
    masks: NDArray[np.uint8]

    @property
    def label(self) -> NDArray[np.float32]:
        """The fraction of annotators who drew each pixel, float32 [N, H, W]."""
        return np.asarray(self.masks.mean(1, dtype=np.float32))


@dataclass(frozen=True)
class Batch:
    """image [B, 1, n, n]; masks float32 [B, C, n, n], 0 or 1; reader int64 [B], the annotator drawn for each image."""

    image: Tensor
    masks: Tensor
    reader: Tensor

    @property
    def fraction(self) -> Tensor:
        """[B, 1, n, n]: the fraction of annotators."""
        return self.masks.mean(1, keepdim=True)

    @property
    def majority(self) -> Tensor:
        """[B, 1, n, n]: 1 where at least half of the annotators drew, as the variant `implicit-ensemble` has it: 2 of 4 are enough."""
        return (2 * self.masks.sum(1, keepdim=True) >= self.masks.shape[1]).float()

    @property
    def drawn(self) -> Tensor:
        """[B, 1, n, n]: the mask of the annotator `reader`."""
        return self.masks[torch.arange(len(self.masks)), self.reader][:, None]


@lru_cache(maxsize=2)
def read_slices(data: Path, split: str) -> Slices:
    """Every slice of a split ("train", "val", "test"); the two read last stay in memory for the next peer.

    Raises CdiffError when the split or a file is missing, or the slices differ in size or number of annotators.
    """
    found = find_cases(data)
    if split not in found:
        raise CdiffError(f"{data} has no split {split!r}, only {', '.join(found)}")
    images, masks = [], []
    for one in found[split]:
        image, mask = read_case(one)
        images.append(INTENSITY.apply(image))
        masks.append(mask.astype(np.uint8))
        if images[-1].shape[1:] != images[0].shape[1:] or masks[-1].shape[1:] != masks[0].shape[1:]:
            raise CdiffError(
                f"{one.image.parent}: its size or number of annotators is not the first case's; the U-Net peers need both alike"
            )
    return Slices(np.concatenate(images), np.concatenate(masks))


def augmented_batch(slices: Slices, step: int, batch: int, size: int, jitter: int, seed: int) -> Batch:
    """Batch number `step` of windows of `size` pixels, a function of (seed, step) alone.

    Scale 0.9-1.1, rotation up to 15 degrees, translation up to 0.1 and both flips (Amit et al. 2023, section 4), the same affine for
    image (linear) and masks (nearest). A crop is cut around the slice's centre, up to `jitter` pixels off. Every epoch visits each
    slice once; annotators are drawn evenly, anew each time.
    """
    rng = np.random.default_rng((seed, step))
    n = len(slices.images)
    epochs = range(step * batch // n, ((step + 1) * batch - 1) // n + 1)
    order = np.concatenate([np.random.default_rng((seed, e, 1)).permutation(n) for e in epochs])
    rows = order[step * batch - epochs[0] * n :][:batch]
    image = torch.from_numpy(slices.images[rows])
    masks = torch.from_numpy(slices.masks[rows]).float()
    H = image.shape[-1]
    angle = np.deg2rad(rng.uniform(-15, 15, batch))
    scale = rng.uniform(0.9, 1.1, batch)
    flip = rng.choice([-1.0, 1.0], (2, batch))
    shift = rng.uniform(-0.1, 0.1, (2, batch)) * size / H  # of the crop, expressed as a fraction of the slice
    if size < H:
        shift += rng.uniform(-jitter, jitter, (2, batch)) / H
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    theta = np.stack(
        [np.stack([cos * flip[0], -sin * flip[1], shift[0] * 2], -1),
         np.stack([sin * flip[0], cos * flip[1], shift[1] * 2], -1)], 1
    )  # fmt: skip
    # The crop is the centre of the slice: the output grid covers only size / H of it.
    theta[:, :, :2] *= size / H
    grid = F.affine_grid(torch.from_numpy(theta).float(), [batch, 1, size, size], align_corners=False)
    image = F.grid_sample(image, grid, "bilinear", "reflection", align_corners=False)
    masks = F.grid_sample(masks, grid, "nearest", "zeros", align_corners=False)
    # From a generator of its own, so that drawing an annotator does not change the windows: all peers see the same ones.
    reader = np.random.default_rng((seed, step, 2)).integers(masks.shape[1], size=batch)
    return Batch(image.contiguous(memory_format=torch.channels_last), masks, torch.from_numpy(reader))
