"""Small NIfTI files, and headers changed past every check that a writer would make."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from cdiff.runtime.scans.grid import Grid

AFFINE = np.array([[-0.7, 0, 0, 10], [0, 0.8, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])
PIXDIM, DIM, SROW_X, QUATERN_B, DATATYPE, VOX_OFFSET, SCL_SLOPE, XYZT_UNITS = 76, 40, 280, 256, 70, 108, 112, 123
QFORM_CODE, SFORM_CODE, MAGIC, SROW_X_OF_TWO = 252, 254, 344, 400
"""Where the fields of a NIfTI-1 header begin, from the format's own definition; of two: of a NIfTI-2 header."""


def voxels(*shape: int) -> Any:
    return np.random.default_rng(1).integers(0, 200, shape).astype(np.int16)


def nifti(path: Path, array: Any, affine: Any = AFFINE, units: str | None = "mm") -> Path:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units(units)
    nib.save(image, path)
    return path


def patched(path: Path, offset: int, fmt: str, *values: float) -> Path:
    """Overwrite part of the header, past every check that a writer would make."""
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    struct.pack_into(fmt, raw, offset, *values)
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


def restored(grid: Grid, slices: Any) -> Any:
    """[S, K, H, W] -> [*spatial, K]: the inverse of `Grid.cut`."""
    whole = np.empty((*grid.spatial, slices.shape[1]), slices.dtype)
    grid.planes(whole)[:] = slices
    return whole
