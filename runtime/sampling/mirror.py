"""The mirrored views of a window that runs take in turn, for models that were trained on mirrored images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

VIEWS = 4
"""As it is, mirrored left to right, top to bottom, and both. Run r sees view r % VIEWS, so one run alone sees the window itself."""


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
    """Where windows of `size` (H, W) at `origin` [B,2] of a canvas (height, width) lie in the canvas's own view, [B,2].

    The noise is drawn there: where tiles overlap, rows of one view then share it as rows of the canvas itself do.
    """
    far = np.asarray(canvas) - np.asarray(size) - origin
    mirrored = np.stack([view & 2, view & 1], axis=-1) > 0
    return np.where(mirrored, far, origin)
