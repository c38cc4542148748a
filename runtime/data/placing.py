"""A mask that is stored on another grid than its image, laid where its header puts it: turned, cropped, or of other voxels."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid

SLACK = 1e-3
"""Share of a voxel by which headers in float32 may be off."""


def place(marked: NDArray[np.bool_], own: Grid, image: Grid) -> NDArray[np.bool_]:
    """What a mask marks, on its image's voxels: each takes the value of the mask's voxel in which its centre lies.

    marked: [*own.spatial]; returns [*image.spatial], False where the mask does not reach; unchanged where both grids have the same shape
    and place. Raises CdiffError, to which the caller adds the files' names, where a header does not say where its voxels lie, and
    where all that is marked lies outside the image.
    """
    if _are_one(own, image):
        return marked.reshape(image.spatial)
    to_mask, to_image = _between(image, own), _between(own, image)
    laid = np.zeros((*image.spatial, 1)[:3], bool)
    if marked.any():
        from scipy.ndimage import affine_transform  # half a second, which segmenting a scan need not wait for

        # Only the part of the image that the marked voxels reach, which is small in a large image.
        low, high = _bounds(marked)
        reached = _corners(low - 0.5, high + 0.5) @ to_image[:3, :3].T + to_image[:3, 3]
        start = np.clip(np.floor(reached.min(axis=0)), 0, laid.shape).astype(int)
        end = np.clip(np.ceil(reached.max(axis=0)) + 1, start, laid.shape).astype(int)
        part = tuple(slice(first, stop) for first, stop in zip(start, end, strict=True))
        held = tuple(slice(first, last + 1) for first, last in zip(low, high, strict=True))
        # "grid-constant": with "constant" a centre that rounding puts 1e-7 of a voxel before the first would be outside.
        laid[part] = affine_transform(
            _solid(marked)[held].astype(np.uint8),
            to_mask[:3, :3],
            to_mask[:3, :3] @ start + to_mask[:3, 3] - low,
            output_shape=tuple(end - start),
            order=0,
            mode="grid-constant",
        )
        if not laid.any() and outside_share(marked, own, image) == 1:
            raise CdiffError("by their headers all that is marked lies outside the image")
    return laid.reshape(image.spatial)


def outside_share(marked: NDArray[np.bool_], own: Grid, image: Grid) -> float:
    """The share of a mask's marked voxels whose centres lie outside the image.

    marked: [*own.spatial]. 0 for grids of one shape and place, and where nothing is marked. Raises CdiffError as `place` does.
    """
    if _are_one(own, image) or not marked.any():
        return 0.0
    to_image, sides = _between(own, image), np.array((*image.spatial, 1)[:3])

    def within(voxels: NDArray[Any]) -> NDArray[np.bool_]:
        centres = voxels @ to_image[:3, :3].T + to_image[:3, 3]
        return np.asarray(((centres > -0.5 - SLACK) & (centres < sides - 0.5 + SLACK)).all(axis=1))

    if within(_corners(*_bounds(marked))).all():
        return 0.0
    # Plane by plane: the places of all voxels take fifty times the mask's memory.
    inside = sum(
        int(within(np.column_stack([np.full(len(there), number), there])).sum())
        for number, plane in enumerate(_solid(marked))
        if len(there := np.argwhere(plane))
    )
    return 1 - inside / int(np.count_nonzero(marked))


def _bounds(marked: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first and the last index along each of three axes at which anything is marked."""
    solid = _solid(marked)
    lines = (np.flatnonzero(solid.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    ends = np.array([(line[0], line[-1]) for line in lines])
    return ends[:, 0], ends[:, 1]


def _corners(low: NDArray[Any], high: NDArray[Any]) -> NDArray[Any]:
    """[8, 3]: the corners of a box."""
    return np.array(list(product(*zip(low, high, strict=True))))


def _solid(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The same with three axes."""
    return marked.reshape((*marked.shape, 1)[:3])


def _are_one(own: Grid, image: Grid) -> bool:
    """Whether two grids have one shape and their headers put them at one place. A third axis of length one does not count."""
    shape, there = ((*grid.spatial, 1)[:3] for grid in (own, image))
    if shape != there or own.header is None or image.header is None:
        return False
    columns = [0, 1, 2, 3] if shape[2] > 1 else [0, 1, 3]
    slack = SLACK * min(image.spacing or (1.0,))
    return np.allclose(own.affine[:, columns], image.affine[:, columns], rtol=0, atol=slack)


def _between(start: Grid, end: Grid) -> NDArray[np.float64]:
    """[4, 4]: voxel indices of one grid to those of the other. Raises CdiffError where a header does not say where voxels lie."""
    for grid in (start, end):
        if not grid.has_orientation:
            raise CdiffError("one of their headers does not say where its voxels lie")
    return np.asarray(np.linalg.inv(end.affine) @ start.affine)
