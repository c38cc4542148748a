"""What a model drew of a case, beside what its annotators drew: for scores of more than one kind of model (needs no PyTorch)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.stack import Stack


@dataclass(frozen=True)
class Drawn:
    """masks: bool [S, n, H, W], the annotators'. chosen: the numbers of the scored slices among S, one at least. stack: what was drawn of
    the slices from the first of these to the last; slices between that are not scored may be empty."""

    grid: Grid
    masks: NDArray[np.bool_]
    chosen: NDArray[np.intp]
    stack: Stack

    @property
    def first(self) -> int:
        """The number of the slice with which the stack begins."""
        return int(self.chosen[0])
