"""A volume's file, of whichever format, as a NIfTI image in memory."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib

from cdiff.runtime.itk import itk_shape, parse_itk
from cdiff.runtime.nifti import parse_nifti
from cdiff.runtime.sources import ITK_SUFFIXES


def parse_volume(data: bytes, path: Path, channels: int) -> nib.Nifti1Image:
    """The image in a file's bytes: NIfTI, or NRRD or MetaImage by the suffix of `path`. Raises CdiffError when it cannot be one."""
    if path.name.lower().endswith(ITK_SUFFIXES):
        return parse_itk(data, path, channels)
    return parse_nifti(data, path, channels)


def volume_shape(path: Path) -> tuple[int, ...]:
    """The shape in a file's header; for NIfTI nibabel's errors where there is none."""
    if path.name.lower().endswith(ITK_SUFFIXES):
        return itk_shape(path)
    return tuple(nib.load(path).shape)  # type: ignore[attr-defined]
