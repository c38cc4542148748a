"""The distance between two outlines (95 % Hausdorff distance), by SciPy's exact Euclidean distance transform."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt

Mask = NDArray[np.bool_]


def hd95(a: Mask, b: Mask, spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    """The 95 % Hausdorff distance of two masks [H, W], in the unit of `spacing`, a pixel's size along each axis.

    A mask's outline consists of its pixels with a neighbour outside it (4 neighbours; beyond the image counts as outside).
    For each mask, take the distances from its outline pixels to the nearest outline pixel of the other, and their 95th percentile
    (linear interpolation); the result is the larger of the two, as in MONAI. NaN when a mask is empty, because there is no
    outline to measure from. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of one shape are compared, not {a.shape} with {b.shape}")
    if not a.any() or not b.any():
        return float("nan")
    box = bounding_box(a | b)
    first, second = outline(a[box]), outline(b[box])
    return max(_percentile(first, second, spacing), _percentile(second, first, spacing))


def hd95_px_and_mm(a: Mask, b: Mask, spacing: tuple[float, float] | None) -> tuple[float, float]:
    """`hd95` in pixels and in mm; the latter is NaN when the spacing (a pixel's size in mm) is not known."""
    pixels = hd95(a, b)
    if spacing is None:
        return pixels, float("nan")
    # With square pixels one distance transform is enough.
    return pixels, pixels * spacing[0] if spacing[0] == spacing[1] else hd95(a, b, spacing)


def bounding_box(mask: Mask, margin: int = 0) -> tuple[slice, slice]:
    """The smallest box that contains a non-empty mask [H, W], `margin` pixels larger on each side where there is room."""
    rows, columns = (np.flatnonzero(mask.any(axis=1 - axis)) for axis in (0, 1))
    return (
        slice(max(int(rows[0]) - margin, 0), int(rows[-1]) + 1 + margin),
        slice(max(int(columns[0]) - margin, 0), int(columns[-1]) + 1 + margin),
    )


def outline(mask: Mask) -> Mask:
    """The pixels of a mask [H, W] with at least one of their 4 neighbours outside it."""
    return np.asarray(mask & ~binary_erosion(mask))


def near(masks: Mask) -> Mask:
    """The pixels in or near what any annotator marked, where scores matter most. bool [n, H, W] -> bool [H, W].

    Near means: no farther from the union of the masks than the radius of a disc of the union's area, or 2 pixels if that is more.
    For a disc this gives a region of four times its area, whatever the resolution. It depends on the annotators alone, so every
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
