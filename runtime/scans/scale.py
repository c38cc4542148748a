"""How large a pixel that a network sees is in the patient: a network knows structures by their size in pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cdiff.runtime.scans.grid import Grid

FARTHER = 1.5
"""A scan's pixels are reported when so many times larger or smaller than all of the training's: augmentation covers a tenth or two."""


def pixel_mm(grid: Grid, seen: tuple[int, int] | None = None) -> float | None:
    """The edge in mm of a slice's pixel, or of a square of the same area; None where the header does not say.

    seen: (rows, columns) that slices are resampled to; the result is then that of a resampled slice.
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
    """In words how a scan's pixels are of another size than the training's; None where they are not, or a size is not known."""
    if size is None or trained is None or trained[0] / FARTHER <= size <= trained[1] * FARTHER:
        return None
    low, high = trained
    learned = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
    times, how = (size / high, "smaller") if size > high else (low / size, "larger")
    return f"pixels are {size:.3g} mm wide, but those that the model learned from are {learned} mm: structures look {round(times, 1):g} times {how} to it"
