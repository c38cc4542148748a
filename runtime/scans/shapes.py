"""Which arrays can be a scan: number of axes, channels, size and type of the values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import by

MAX_VOXELS = 2**31


def spatial_axes(shape: tuple[int, ...], channels: int, where: str) -> tuple[int, ...]:
    """The lengths of the two or three spatial axes of `shape`, without its channels (its last axis) and axes of length 1 after the third.

    Raises CdiffError where the shape has other axes, or other channels; `where` names the array in the message.
    """
    axes = without_ones(shape)
    if channels > 1:
        if len(axes) < 3 or axes[-1] != channels:
            raise CdiffError(
                f"{where} has shape {by(shape)}; {channels} channels on the last axis are needed, or one file for each, named together by a "
                "case's folder or a table"
            )
        axes = without_ones(axes[:-1])
    if len(axes) not in (2, 3):
        wanted = "2-D or 3-D" if channels == 1 else f"2-D or 3-D with {channels} channels on the last axis"
        raise CdiffError(f"{where} is {len(shape)}-D ({by(shape)}) where {wanted} is meant; give one volume of it")
    return axes


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the axes of length 1 that end it after the third."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def check_size(shape: tuple[int, ...], where: str) -> None:
    """Raise CdiffError for a shape without a voxel, or of more than MAX_VOXELS."""
    if min(shape, default=0) < 1:
        raise CdiffError(f"{where} has shape {by(shape)}, so it holds no voxel; export the scan again")
    if math.prod(shape) > MAX_VOXELS:
        raise CdiffError(
            f"{where} claims {by(shape)} voxels, more than 2^31; the header is damaged, or crop the scan first"
        )


def check_kind(dtype: np.dtype[Any], where: str) -> None:
    """Raise CdiffError for values that are not real numbers."""
    if dtype.kind not in "biuf":
        raise CdiffError(
            f"{where} holds values of type {dtype}; real numbers are needed: convert it to int16 or float32"
        )
