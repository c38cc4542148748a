"""How a slice of any size meets a model of one size: resampled to it, or cut in overlapping tiles; and back again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def resize(array: Float32, size: tuple[int, int]) -> Float32:
    """Resample the last two axes of [..., h, w] to `size`: linear, antialiased where it shrinks, centres of pixels aligned."""
    raise NotImplementedError


@dataclass(frozen=True)
class Framing:
    """`resize`: the whole slice is resampled to the model's size (H, W). `tile`: windows of that size at the slice's own
    resolution, neighbours overlapping by the fraction `overlap` of a window at least; a smaller slice is padded by reflection.
    """

    mode: Literal["resize", "tile"]
    size: tuple[int, int]
    overlap: float = 0.25

    def frame(self, slices: Float32) -> Windows:
        """The windows of slices [S,ch,h,w]. They are made one at a time on request, so a long scan costs no memory here."""
        raise NotImplementedError


@dataclass(frozen=True)
class Windows:
    """The windows of S slices, `per_slice` of them each: window i belongs to slice i // per_slice, tile i % per_slice."""

    slices: Float32
    framing: Framing
    canvas: tuple[int, int]
    origins: tuple[tuple[int, int], ...]

    @property
    def per_slice(self) -> int:
        """Windows a slice: 1 when resized."""
        return len(self.origins)

    def __len__(self) -> int:
        return len(self.slices) * self.per_slice

    def image(self, index: int) -> Float32:
        """Window `index` [ch,H,W]."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Float32]:
        return (self.image(index) for index in range(len(self)))

    def unframe_slice(self, maps: Float32) -> Float32:
        """The maps of one slice's windows [per_slice,...,H,W] put together on its own grid [...,h,w]; tiles are blended."""
        raise NotImplementedError

    def unframe(self, maps: Float32) -> Float32:
        """The same for all slices: [S*per_slice,...,H,W] -> [S,...,h,w]. With equal sizes the values come back unchanged."""
        raise NotImplementedError
