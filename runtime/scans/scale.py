"""How large a pixel that a network sees is in the patient: the network knows structures by their size in pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cdiff.runtime.scans.grid import Grid

FARTHER = 1.5
"""A scan is reported if its pixels are beyond the training's sizes by more than this factor: augmentation covers a tenth or two."""


def pixel_mm(grid: Grid, seen: tuple[int, int] | None = None) -> float | None:
    """The edge in mm of a slice's pixel, or of a square of its area; None where the header does not say.

    seen: the rows and columns that slices are resampled to before the network sees them; their pixels are then meant.
    """
    if grid.plane_mm is None:
        return None
    height, width = (n for axis, n in enumerate(grid.spatial) if axis != grid.slice_axis)
    rows, columns = seen or (height, width)
    return math.sqrt(math.prod(grid.plane_mm) * height / rows * width / columns)


def span(sizes: Iterable[float | None]) -> tuple[float, float] | None:
    """The smallest and the largest of the sizes that are known; None where there are none."""
    known = [size for size in sizes if size is not None]
    return (min(known), max(known)) if known else None


def out_of_scale(size: float | None, trained: tuple[float, float] | None) -> str | None:
    """In words, how a scan's pixels differ in size from the training's; None where they hardly do, or either size is unknown.

    size, trained: in mm, as `pixel_mm` and `span` give them.
    """
    if size is None or trained is None or trained[0] / FARTHER <= size <= trained[1] * FARTHER:
        return None
    low, high = trained
    learned = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
    times, how = (size / high, "smaller") if size > high else (low / size, "larger")
    return f"pixels are {size:.3g} mm wide, and those that the model learned from {learned} mm: structures look {round(times, 1):g} times {how} to it"
