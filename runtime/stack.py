"""The maps of the slices that were computed: what the network drew, and the soft map, levels and uncertainty derived from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.sampling.framing import Box, placed
from cdiff.runtime.variants import CONSENSUS, Variant

Float32 = NDArray[np.float32]


def entropy(soft: Float32) -> Float32:
    """Binary entropy in bits of each pixel, H(p) = -p log2 p - (1-p) log2 (1-p): 0 where all agree, 1 at p = 1/2, NaN where p is."""
    found, unsure = np.zeros(soft.shape, np.float32), (soft != 0) & (soft != 1)  # few pixels are, in most maps
    p = soft[unsure].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(q > 0, -q * np.log2(q), 0.0) for q in (p, 1 - p)]
    found[unsure] = np.where(np.isnan(p), np.nan, terms[0] + terms[1])
    return found


@dataclass(frozen=True, eq=False)
class Stack:
    """The maps of the n slices that were computed, in-plane axes as stored.

    maps [n,K,h,w] float32: what the network drew, mean over runs; the variant defines K and what the maps are. run_std [n,h,w]
    float32: the standard deviation over runs of a run's soft map. runs [n,K,R,h,w] uint8 (255 = 1), or None if not kept.
    annotators: C; by default K.
    These three are held (held_maps, held_std, held_runs) only on the part `box` of the slices' grid `shape` (h, w), outside which
    every map is 0, because a model of the framing `centre` sees little of a large slice. The properties make them whole. Without
    `box` they are held on the whole grid.
    """

    held_maps: Float32
    held_std: Float32
    held_runs: NDArray[np.uint8] | None = None
    variant: Variant = CONSENSUS
    annotators: int | None = None
    box: Box | None = None
    shape: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.held_maps)

    def __getitem__(self, part: slice) -> Stack:
        """Some of the slices, without their runs."""
        return replace(self, held_maps=self.held_maps[part], held_std=self.held_std[part], held_runs=None)

    @property
    def inside(self) -> Stack:
        """The same maps on `box` alone."""
        return replace(self, box=None, shape=None)

    def _whole(self, held: NDArray[Any]) -> NDArray[Any]:
        return held if self.box is None or self.shape is None else placed(held, self.box, self.shape)

    @property
    def maps(self) -> Float32:
        """[n,K,h,w]: what the network drew."""
        return self._whole(self.held_maps)

    @property
    def run_std(self) -> Float32:
        """[n,h,w]: the standard deviation over runs."""
        return self._whole(self.held_std)

    @property
    def runs(self) -> NDArray[np.uint8] | None:
        """[n,K,R,h,w]: every run's maps; None if they were not kept."""
        return None if self.held_runs is None else self._whole(self.held_runs)

    @property
    def soft(self) -> Float32:
        """[n,h,w]: the mean over the maps, a fraction of annotators (from levels: the sum of P(at least c) over c, divided by C)."""
        held = self.held_maps
        found = np.empty((len(held), *held.shape[2:]), np.float32)
        # Slice by slice, so that a long scan is never held in float64.
        for one, maps in zip(found, held, strict=True):
            one[...] = maps.mean(axis=0, dtype=np.float64)
        return self._whole(found)

    @property
    def levels(self) -> Float32:
        """[n,C,h,w]: at index c-1 the map of "at least c annotators", as the variant derives it."""
        return self._whole(self.variant.to_levels(self.held_maps, self.annotators or self.held_maps.shape[1]))

    @property
    def spread(self) -> Float32:
        """[n,h,w]: how much the runs differ: their standard deviation, or their variance where the variant's paper uses that."""
        return self._whole(self.held_std**2 if self.variant.spread == "variance" else self.held_std)

    @property
    def uncertainty(self) -> Float32:
        """[n,2,h,w]: entropy of the soft map in bits, and `spread`."""
        inside = self.inside
        found = np.empty((len(self), 2, *self.held_maps.shape[2:]), np.float32)
        for one, soft, spread in zip(found, inside.soft, inside.spread, strict=True):
            one[0], one[1] = entropy(soft), spread
        return self._whole(found)

    @property
    def mask(self) -> NDArray[np.uint8]:
        """[n,h,w]: 1 where the soft map is at least one half."""
        return self._whole((self.inside.soft >= 0.5).astype(np.uint8))


class Lazily:
    """One map of a stack, by its attribute's name, as an array whose slices are computed when indexed: all would be as large as the scan."""

    def __init__(self, stack: Stack, attribute: str) -> None:
        self._stack, self._attribute = stack, attribute
        one = self[:1]
        self.shape: tuple[int, ...] = (len(stack), *one.shape[1:])
        self.dtype: np.dtype[Any] = one.dtype

    def __len__(self) -> int:
        return len(self._stack)

    def __getitem__(self, part: slice, /) -> NDArray[Any]:
        found: NDArray[Any] = getattr(self._stack[part], self._attribute)
        return found

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[i : i + 1][0] for i in range(len(self)))
