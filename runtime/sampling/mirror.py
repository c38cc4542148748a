"""The mirrored views of a window that the runs take in turn, for models trained on mirrored images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

VIEWS = 4
"""The window itself, mirrored left to right, top to bottom, and both. Run r sees view r % VIEWS, so a single run sees the window itself."""


def view_of(array: Float32, view: int) -> Float32:
    """View `view` (0..3) of an array [..., H, W], without a copy. Each view is its own inverse."""
    if view & 1:
        array = array[..., ::-1]
    if view & 2:
        array = array[..., ::-1, :]
    return array


def origin_in(
    view: NDArray[np.int64], origin: NDArray[np.int64], canvas: tuple[int, int], size: tuple[int, int]
) -> NDArray[np.int64]:
    """Origins [B,2], in the mirrored canvas (height, width), of windows of `size` (H, W) at `origin` [B,2] of the canvas itself.

    view: [B], each row's view. The noise is drawn at these origins, so that overlapping tiles share it within each view.
    """
    far = np.asarray(canvas) - np.asarray(size) - origin
    mirrored = np.stack([view & 2, view & 1], axis=-1) > 0
    return np.where(mirrored, far, origin)
