"""A mask that is stored on another grid than its image, laid where its header puts it: turned, cropped, or of other voxels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid

SLACK = 1e-3
"""Of a voxel: what headers in float32 may miss by."""


def place(marked: NDArray[np.bool_], own: Grid, image: Grid) -> NDArray[np.bool_]:
    """What a mask marks, on its image's voxels: each takes the value of the mask's voxel that its centre lies in.

    marked: [*own.spatial]; returns [*image.spatial], False where the mask does not reach. Grids of one shape and place are returned as
    they are. Raises CdiffError, to be told with the files' names, where a header does not say where its voxels lie, and where all
    that is marked lies outside the image.
    """
    if _are_one(own, image):
        return marked
    to_mask = _between(image, own)
    # "grid-constant": by "constant" a centre that rounding puts 1e-7 of a voxel before the first is outside.
    laid = affine_transform(
        _solid(marked).astype(np.uint8),
        to_mask[:3, :3],
        to_mask[:3, 3],
        output_shape=(*image.spatial, 1)[:3],
        order=0,
        mode="grid-constant",
    )
    if not laid.any() and outside_share(marked, own, image) == 1:
        raise CdiffError("by their headers all that is marked lies outside the image")
    return np.asarray(laid.reshape(image.spatial), dtype=np.bool_)


def outside_share(marked: NDArray[np.bool_], own: Grid, image: Grid) -> float:
    """The share of a mask's marked voxels whose centres lie outside the image.

    marked: [*own.spatial]. 0 for grids of one shape and place, and where nothing is marked. Raises CdiffError as `place` does.
    """
    if _are_one(own, image) or not marked.any():
        return 0.0
    to_image = _between(own, image)
    centres = np.argwhere(_solid(marked)) @ to_image[:3, :3].T + to_image[:3, 3]
    within = (centres > -0.5 - SLACK) & (centres < np.array((*image.spatial, 1)[:3]) - 0.5 + SLACK)
    return float(1 - within.all(axis=1).mean())


def _solid(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With three axes."""
    return marked.reshape((*marked.shape, 1)[:3])


def _are_one(own: Grid, image: Grid) -> bool:
    """Whether two grids have one shape and nothing in their headers puts them apart."""
    if own.spatial != image.spatial or own.header is None or image.header is None:
        return False
    return np.allclose(own.affine, image.affine, rtol=0, atol=SLACK * min(image.spacing or (1.0,)))


def _between(start: Grid, end: Grid) -> NDArray[np.float64]:
    """[4, 4]: voxel indices of one grid to those of the other."""
    for grid in (start, end):
        if not grid.has_orientation:
            raise CdiffError("one of their headers does not say where its voxels lie")
    return np.asarray(np.linalg.inv(end.affine) @ start.affine)
