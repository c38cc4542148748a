"""Fits slices of any size to a model of one size, by resampling, overlapping tiles or the centre alone, and puts maps back on their grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError

Float32 = NDArray[np.float32]
FramingMode = Literal["resize", "tile", "centre"]
SEEN = 0.5 - 1e-5
"""Where a window was resampled, a pixel counts as seen if at least this share of its neighbours lies in it: one half, less room for rounding."""


class Slices(Protocol):
    """Slices [S,ch,h,w]: an array, or an object that computes each slice when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, part: Any, /) -> Any: ...


Box = tuple[slice, slice]
"""Rows and columns of a part of a slice."""


def resize(array: Float32, size: tuple[int, int]) -> Float32:
    """Resample the last two axes of [..., h, w] to `size` (H, W), float32.

    Linear, with the outer corners of the two grids aligned (a pixel's value belongs to its centre). Where the array shrinks, the
    kernel is widened to prevent aliasing; at the edges it is cut and renormalised. Equal sizes return the array itself.
    """
    (h, w), (H, W) = array.shape[-2:], size
    if (h, w) == (H, W):
        return array
    return np.asarray(_weights(h, H) @ array @ _weights(w, W).T, dtype=np.float32)


@lru_cache(maxsize=16)
def _weights(n: int, N: int) -> Float32:
    """The matrix [N,n] of linear interpolation from n pixels to N; every row sums to 1."""
    scale = n / N
    width = max(scale, 1.0)
    distance = np.abs((np.arange(N) + 0.5)[:, None] * scale - (np.arange(n) + 0.5)) / width
    weights = np.maximum(0, 1 - distance)
    return np.asarray(weights / weights.sum(1, keepdims=True), dtype=np.float32)


def box_around(shape: tuple[int, int], size: tuple[int, int], point: tuple[int, int]) -> Box:
    """The part of `size` (H, W) of a slice of `shape` (h, w) around the pixel `point` (row, column), all counted from 0.

    The point is pixel (H // 2, W // 2) of the part, except that a part that would reach beyond the slice is moved inside. An axis
    shorter than the part is taken whole.
    """
    starts = [min(max(at - N // 2, 0), max(n - N, 0)) for n, N, at in zip(shape, size, point, strict=True)]
    rows, columns = (slice(start, start + min(n, N)) for start, n, N in zip(starts, shape, size, strict=True))
    return rows, columns


def placed(values: NDArray[Any], box: Box, shape: tuple[int, int]) -> NDArray[Any]:
    """Put the values [..., h, w] of `box` into an array [..., *shape] that is 0 elsewhere; returns `values` itself if it has that shape."""
    if values.shape[-2:] == shape:
        return values
    whole = np.zeros((*values.shape[:-2], *shape), values.dtype)
    whole[..., *box] = values
    return whole


@dataclass(frozen=True)
class Shrunk:
    """A part of a slice of `shape` (h, w) in which each `factor` x `factor` block becomes one pixel before the model sees it.

    Both sides of `part` are multiples of the factor.
    """

    factor: int
    shape: tuple[int, int]
    part: Box

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the part once it is shrunk."""
        height, width = ((one.stop - one.start) // self.factor for one in self.part)
        return height, width

    def shrink(self, slices: Float32) -> Float32:
        """The part of slices [...,h,w], resampled to `size`."""
        return resize(slices[..., *self.part], self.size)

    def there(self, box: Box) -> Box:
        """The box of the slice that a box of the shrunk part covers."""
        rows, columns = (
            slice(one.start + self.factor * inner.start, one.start + self.factor * inner.stop)
            for one, inner in zip(self.part, box, strict=True)
        )
        return rows, columns


@dataclass(frozen=True)
class Framing:
    """How slices are brought to the model's `size` (H, W).

    `resize`: the whole slice is resampled to it, each axis independently. `tile`: windows of that size at the slice's own
    resolution, evenly spread, neighbours overlapping by at least the fraction `overlap` (0 <= overlap < 1) of a window; a
    smaller slice is padded with its edge pixels, equally on both sides, as in training. `centre`: a single such window in the
    middle of the slice or around a given point, for models trained on slices centred on the structure; outside it the maps
    are 0. Raises CdiffError for other modes or overlaps.
    """

    mode: FramingMode
    size: tuple[int, int]
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.mode not in get_args(FramingMode):
            raise CdiffError(f"framing {self.mode!r} is not known; use 'resize', 'tile' or 'centre'")
        if not 0 <= self.overlap < 1:
            raise CdiffError(f"the tiles' overlap is {self.overlap}, but must be at least 0 and below 1")

    def frame(
        self, slices: Slices, point: tuple[int, int] | None = None, field: tuple[int, int] | None = None
    ) -> Windows:
        """The windows of slices [S,ch,h,w]. Each is made when it is asked for, so a long scan costs no memory here.

        point: the pixel (row, column) around which `box_around` places the window of `centre` in every slice.
        field: the size (h, w) of a part around the point that is treated as if it were the whole slice, so that the window gets
        the noise that it gets in a crop of that size; by default the slice's. A field smaller than the window is enlarged to it.
        Raises CdiffError for slices of another number of axes or with an empty one, and for a point in another mode.
        """
        if len(slices.shape) != 4 or 0 in slices.shape:
            raise CdiffError(
                f"slices of shape [S, channels, h, w] are needed, none of them 0, not {list(slices.shape)}"
            )
        (H, W), (h, w) = self.size, slices.shape[-2:]
        if point is not None and self.mode != "centre":
            raise CdiffError(f"framing {self.mode!r} covers the whole slice; only 'centre' takes a point")
        if self.mode == "resize":
            return Windows(slices, self, self.size, ((0, 0),))
        if point is not None:
            return self._around(slices, point, field or (h, w))
        canvas = (max(h, H), max(w, W))
        if self.mode == "centre":
            return Windows(slices, self, canvas, (((canvas[0] - H) // 2, (canvas[1] - W) // 2),))
        rows, columns = _starts(h, H, self.overlap), _starts(w, W, self.overlap)
        return Windows(slices, self, canvas, tuple((y, x) for y in rows for x in columns))

    def _around(self, slices: Slices, point: tuple[int, int], field: tuple[int, int]) -> Windows:
        (H, W), (h, w), shape = self.size, field, (slices.shape[-2], slices.shape[-1])
        part, window = box_around(shape, (max(h, H), max(w, W)), point), box_around(shape, self.size, point)
        height, width = (max(one.stop - one.start, n) for one, n in zip(part, self.size, strict=True))
        y, x = (inner.start - outer.start for inner, outer in zip(window, part, strict=True))
        return Windows(slices, self, (height, width), ((y, x),), part)


def _starts(n: int, N: int, overlap: float) -> list[int]:
    """The starts of evenly spread windows of N pixels that cover n pixels: as few as the overlap allows."""
    if n <= N:
        return [0]
    stride = max(1, math.floor(N * (1 - overlap)))
    steps = math.ceil((n - N) / stride)
    return [round(k * (n - N) / steps) for k in range(steps + 1)]


@dataclass(frozen=True)
class Windows:
    """The windows of S slices [S,ch,h,w], `per_slice` of each: window i is tile i % per_slice of slice i // per_slice.

    `origins` are the tiles' corners (y, x) in the `canvas` (height, width). The canvas is the slice, or its `part` where one is
    given, padded where it is smaller than a window; in the mode `resize` it is the one window of the slice.
    shrunk: set where `slices` are a shrunk part of larger ones; the maps then lie on the grid of the larger ones. resized: set where
    the model sees the slice or part at another size (`zoomed`): the size (h, w) after resampling, to which canvas and origins refer.
    """

    slices: Slices
    framing: Framing
    canvas: tuple[int, int]
    origins: tuple[tuple[int, int], ...]
    part: Box | None = None
    shrunk: Shrunk | None = None
    resized: tuple[int, int] | None = None

    def zoomed(self, zoom: float) -> Windows:
        """The window of `centre` around the same point, in slices magnified `zoom` times.

        Raises CdiffError for the other framings unless `zoom` is 1: their windows cover the whole slice.
        """
        if zoom == 1:
            return self
        if self.framing.mode != "centre":
            raise CdiffError(f"framing {self.framing.mode!r} covers the whole slice; only 'centre' takes a zoom")
        ((y, x),), extents = self.origins, self._extent
        size = tuple(max(1, round(n * zoom)) for n in extents)
        canvas = tuple(max(n, N) for n, N in zip(size, self.framing.size, strict=True))
        corner = [
            min(max(round((at - pad + N / 2) * zoom - N / 2), 0), wide - N)
            for at, pad, N, wide in zip((y, x), self._pad, self.framing.size, canvas, strict=True)
        ]
        return replace(
            self, resized=(size[0], size[1]), canvas=(canvas[0], canvas[1]), origins=((corner[0], corner[1]),)
        )

    @cached_property
    def covered(self) -> NDArray[np.bool_]:
        """Bool [h,w]: the pixels of a slice that its windows cover; elsewhere the maps are 0 and mean nothing."""
        return self.unframe_slice(np.ones((self.per_slice, *self.framing.size), np.float32)) > 0.5

    @property
    def per_slice(self) -> int:
        """Windows per slice: 1 unless tiled."""
        return len(self.origins)

    def __len__(self) -> int:
        return len(self.slices) * self.per_slice

    def __iter__(self) -> Iterator[Float32]:
        return (self.image(index) for index in range(len(self)))

    def image(self, index: int) -> Float32:
        """Window `index` [ch,H,W], float32, contiguous."""
        number, tile = divmod(index, self.per_slice)
        image = self.slices[number]
        if self.framing.mode == "resize":
            return np.ascontiguousarray(resize(image, self.framing.size), dtype=np.float32)
        if self.part is not None:
            image = image[:, *self.part]
        if self.resized is not None:
            image = resize(image, self.resized)
        (top, left), (height, width) = self._pad, image.shape[-2:]
        if self.canvas != (height, width):
            below, right = self.canvas[0] - height - top, self.canvas[1] - width - left
            image = np.pad(image, ((0, 0), (top, below), (left, right)), mode="edge")
        return np.ascontiguousarray(image[:, *self._window(tile)], dtype=np.float32)

    def unframe_slice(self, maps: Float32) -> Float32:
        """Put the maps of one slice's windows [per_slice,...,H,W] together on the slice's own grid [...,h,w], float32.

        A resized map is resampled back. Tiles are averaged where they overlap, each with a weight that falls linearly from
        its middle to its edge; pixels that no window covers are 0. Values that need neither resampling nor blending come
        back unchanged.
        """
        return placed(self.unframe_part(maps), self.reach, self.shape)

    def unframe_part(self, maps: Float32) -> Float32:
        """`unframe_slice` within `reach` only: `centre` sees little of a large slice, and the rest need not be processed."""
        if self.framing.mode == "resize":
            return resize(maps[0], self.shape)
        if self.framing.mode == "tile":
            return self._blended(maps)
        found = self._seen_by_one(maps[0])
        if self.shrunk is None:
            return found
        rows, columns = self.reach
        return resize(found, (rows.stop - rows.start, columns.stop - columns.start))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the slices on whose grid the maps lie."""
        return self.shrunk.shape if self.shrunk else (self.slices.shape[-2], self.slices.shape[-1])

    @cached_property
    def reach(self) -> Box:
        """The part of the maps' grid (`shape`) outside which they are 0: all of it unless `centre` sees less."""
        return self.shrunk.there(self.seen) if self.shrunk else self.seen

    @cached_property
    def seen(self) -> Box:
        """The part of each of `slices` that windows cover: all of it unless `centre` sees less."""
        if self.framing.mode != "centre":
            height, width = self.slices.shape[-2:]
            return slice(0, height), slice(0, width)
        rows, columns = (
            slice(start + one.start, start + one.stop)
            for start, one in zip(self._corners[0], self._seen_of_part, strict=True)
        )
        return rows, columns

    @property
    def _seen_of_part(self) -> Box:
        """`seen`, counted from the corner of the slice or of its `part`."""
        if self.resized is None:
            return self._held
        down, across = (np.flatnonzero(self._weight.max(axis=axis) >= SEEN).tolist() for axis in (1, 0))
        return slice(down[0], down[-1] + 1), slice(across[0], across[-1] + 1)

    @property
    def _held(self) -> Box:
        """The box that the first window covers of the (resized) slice or `part`, without padding."""
        rows, columns = (
            slice(max(one.start - pad, 0), min(one.stop - pad, n))
            for one, pad, n in zip(self._window(0), self._pad, self._extent, strict=True)
        )
        return rows, columns

    def _window(self, tile: int) -> Box:
        """The box of a tile in the canvas."""
        (y, x), (H, W) = self.origins[tile], self.framing.size
        return slice(y, y + H), slice(x, x + W)

    def _seen_by_one(self, window: Float32) -> Float32:
        """The maps of the one window of `centre`, [...,H,W], within `seen` of `slices`."""
        held, box = self._held, self._seen_of_part
        rows, columns = (
            slice(one.start + pad - at, one.stop + pad - at)
            for one, pad, at in zip(held, self._pad, self.origins[0], strict=True)
        )
        found = window[..., rows, columns]
        if self.resized is None:
            return found
        # Resample back from the pixels within the window alone, as everything outside it is 0.
        down, across = (
            _weights(n, N)[into, of] for n, N, into, of in zip(self._extent, self._corners[1], box, held, strict=True)
        )
        weight = self._weight[box]
        return np.where(weight >= SEEN, down @ found @ across.T / np.maximum(weight, SEEN), np.float32(0))

    def _blended(self, maps: Float32) -> Float32:
        """The tiles' maps [per_slice,...,H,W] blended into one [...,h,w], padding removed."""
        canvas: Float32 = maps[0]
        if self.canvas != self.framing.size:
            canvas = np.zeros((*maps.shape[1:-2], *self.canvas), np.float32)
            for number, (weights, tile) in enumerate(zip(self._blend, maps, strict=True)):
                canvas[..., *self._window(number)] += weights * tile
        (top, left), (height, width) = self._pad, self._extent
        return canvas[..., top : top + height, left : left + width]

    def unframe(self, maps: Float32) -> Float32:
        """`unframe_slice` for all slices: maps [S*per_slice,...,H,W] -> [S,...,h,w]."""
        groups = maps.reshape(-1, self.per_slice, *maps.shape[1:])
        return np.stack([self.unframe_slice(group) for group in groups])

    @property
    def _corners(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The first row and column of `part` (or of the slice, where there is none), and its height and width."""
        if self.part is None:
            return (0, 0), (self.slices.shape[-2], self.slices.shape[-1])
        rows, columns = self.part
        return (rows.start, columns.start), (rows.stop - rows.start, columns.stop - columns.start)

    @property
    def _extent(self) -> tuple[int, int]:
        """Height and width of the slice or `part` as it is cut into windows, which is after any resizing."""
        return self.resized or self._corners[1]

    @cached_property
    def _weight(self) -> Float32:
        """[h,w] of the slice or `part`: for each pixel, the share of what it is resampled from that lies within the resized slice's window."""
        ((y, x),), (H, W), (top, left), (height, width) = self.origins, self.framing.size, self._pad, self._extent
        window = np.zeros(self.canvas, np.float32)
        window[y : y + H, x : x + W] = 1
        return resize(window[top : top + height, left : left + width], self._corners[1])

    @property
    def _pad(self) -> tuple[int, int]:
        """Pixels added above and to the left of a slice smaller than its canvas."""
        height, width = self._extent
        return (self.canvas[0] - height) // 2, (self.canvas[1] - width) // 2

    @cached_property
    def _blend(self) -> list[Float32]:
        """A weight [H,W] for each tile; at every pixel that a window covers they sum to 1."""
        H, W = self.framing.size
        ramp = [np.minimum(np.arange(n) + 1, n - np.arange(n)) / n for n in (H, W)]
        tent = np.outer(*ramp)
        total = np.zeros(self.canvas)
        for y, x in self.origins:
            total[y : y + H, x : x + W] += tent
        return [np.asarray(tent / total[y : y + H, x : x + W], dtype=np.float32) for y, x in self.origins]
