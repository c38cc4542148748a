"""Distance between two outlines: the 95 % Hausdorff distance, by SciPy's exact Euclidean distance transform."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt

Mask = NDArray[np.bool_]


def hd95(a: Mask, b: Mask, spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    """The 95 % Hausdorff distance of two masks [H, W], in the unit of `spacing` (that of a pixel along each axis).

    The outline of a mask is those of its pixels that have a neighbour outside it (4 neighbours; beyond the picture is
    outside). From every outline pixel of one mask the distance to the nearest outline pixel of the other is taken; of each of
    the two sets of distances the 95th percentile (linear interpolation), of those two the larger: MONAI's convention. NaN when
    a mask is empty: there is no outline to measure from. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of one shape are compared, not {a.shape} with {b.shape}")
    if not a.any() or not b.any():
        return float("nan")
    box = bounding_box(a | b)
    first, second = outline(a[box]), outline(b[box])
    return max(_percentile(first, second, spacing), _percentile(second, first, spacing))


def hd95_px_and_mm(a: Mask, b: Mask, spacing: tuple[float, float] | None) -> tuple[float, float]:
    """`hd95` in pixels and in millimetres; the latter NaN when the spacing (mm a pixel) is not known."""
    pixels = hd95(a, b)
    if spacing is None:
        return pixels, float("nan")
    # With square pixels one transform serves both.
    return pixels, pixels * spacing[0] if spacing[0] == spacing[1] else hd95(a, b, spacing)


def bounding_box(mask: Mask, margin: int = 0) -> tuple[slice, slice]:
    """The smallest box that holds a mask [H, W] that is not empty, `margin` pixels larger on each side where there is room."""
    rows, columns = (np.flatnonzero(mask.any(axis=1 - axis)) for axis in (0, 1))
    return (
        slice(max(int(rows[0]) - margin, 0), int(rows[-1]) + 1 + margin),
        slice(max(int(columns[0]) - margin, 0), int(columns[-1]) + 1 + margin),
    )


def outline(mask: Mask) -> Mask:
    """The pixels of a mask [H, W] with at least one of their 4 neighbours outside it."""
    return np.asarray(mask & ~binary_erosion(mask))


def near(masks: Mask) -> Mask:
    """Where it counts: the pixels in or near what any annotator marked. bool [n, H, W] -> bool [H, W].

    Near: no farther from the union of the masks than the radius of a disc of the union's area, and at least 2 pixels. For
    a disc that is a region of four times its area, whatever the resolution. It follows from the annotators alone, so every
    model is scored on the same pixels. Empty when nobody marked anything.
    """
    union = np.asarray(masks.any(axis=0))
    region = np.zeros_like(union)
    if union.any():
        radius = max(2.0, float(np.sqrt(np.count_nonzero(union) / np.pi)))
        box = bounding_box(union, int(np.ceil(radius)))
        region[box] = distance_transform_edt(~union[box]) <= radius
    return region


def _percentile(start: Mask, end: Mask, spacing: tuple[float, float]) -> float:
    distances = distance_transform_edt(~end, sampling=spacing)[start]
    return float(np.percentile(distances, 95))
