"""The paper's augmentations: scale 0.9-1.1, rotation 0-15 degrees, translation 0-0.1, both flips at p = 0.5 (section 4); other
ranges, and changes of the intensities, for data that allow more.

Image and masks go through one affine map, which also cuts the training window, so that every pixel is interpolated once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from cdiff.train.ranges import Ranges


@dataclass(frozen=True)
class Window:
    """A square window of `size` pixels of a slice. `matrix` (2x2) and `centre` (row, column; pixels) map window offsets to the slice."""

    size: int
    centre: tuple[float, float]
    matrix: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 0.0), (0.0, 1.0))


def random_window(size: int, centre: tuple[float, float], rng: np.random.Generator, ranges: Ranges | None) -> Window:
    """A window around `centre` with a random affine map and both flips at p = 0.5, or without ranges the plain one."""
    if ranges is None:
        return Window(size, centre)
    scale = 1 + rng.uniform(-ranges.zoom, ranges.zoom)
    angle = math.radians(rng.uniform(-ranges.rotation, ranges.rotation))
    shift = rng.uniform(-ranges.shift, ranges.shift, 2) * size
    flip_rows, flip_columns = np.where(rng.random(2) < 0.5, -1.0, 1.0)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    matrix = ((cos * flip_rows, -sin * flip_columns), (sin * flip_rows, cos * flip_columns))
    return Window(size, (centre[0] + float(shift[0]), centre[1] + float(shift[1])), matrix)


def cut(image: Tensor, masks: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The window of one slice: image float32 [channels, h, w], masks uint8 [C, h, w] -> [channels, n, n] and bool [C, n, n].

    Linear interpolation; masks are thresholded at 1/2 afterwards. Outside the slice the image repeats its edge (a black
    frame would be a structure of its own) and masks are empty.
    """
    n, (h, w) = window.size, image.shape[-2:]
    if window.matrix == ((1.0, 0.0), (0.0, 1.0)):
        # A slice smaller than its window is placed as the runtime pads it: half of what is missing, rounded down, comes before it.
        starts = (c - n / 2 for c in window.centre)
        top, left = (round(start) if start >= 0 else math.ceil(start) for start in starts)
        if top >= 0 and left >= 0 and top + n <= h and left + n <= w:
            area = (..., slice(top, top + n), slice(left, left + n))
            return image[area], masks[area] > 0
        rows, columns = torch.arange(top, top + n), torch.arange(left, left + n)
        held = ((rows >= 0) & (rows < h))[:, None] & (columns >= 0) & (columns < w)
        taken = (..., rows.clamp(0, h - 1)[:, None], columns.clamp(0, w - 1))
        return image[taken], (masks[taken] > 0) & held
    offsets = torch.arange(n, dtype=torch.float32) - (n - 1) / 2
    (rr, rc), (cr, cc) = window.matrix
    # Pixel centres: a slice's row i lies at i + 1/2, and grid_sample's -1 and 1 are the outer edges.
    rows = window.centre[0] + rr * offsets[:, None] + rc * offsets[None, :]
    columns = window.centre[1] + cr * offsets[:, None] + cc * offsets[None, :]
    grid = torch.stack([2 * columns / w - 1, 2 * rows / h - 1], dim=-1)[None]
    picture = nnf.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    drawn = nnf.grid_sample(masks[None].float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
    return picture, drawn >= 0.5


def recoloured(picture: Tensor, rng: np.random.Generator, ranges: Ranges) -> Tensor:
    """The picture [channels, n, n] with its intensities changed: contrast and brightness per channel, noise per pixel."""
    if ranges.contrast or ranges.brightness:
        scale, shift = (rng.uniform(-r, r, (len(picture), 1, 1)) for r in (ranges.contrast, ranges.brightness))
        picture = picture * torch.tensor(1 + scale, dtype=torch.float32) + torch.tensor(shift, dtype=torch.float32)
    if ranges.pixel_noise:
        noise = rng.standard_normal(tuple(picture.shape), np.float32) * np.float32(rng.uniform(0, ranges.pixel_noise))
        picture = picture + torch.from_numpy(noise)
    return picture
