"""A volume's file, of whichever format, as a NIfTI image in memory."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib

from cdiff.runtime.scans.itk import itk_shape, parse_itk
from cdiff.runtime.scans.nifti import nifti_shape, parse_nifti
from cdiff.runtime.scans.sources import ITK_SUFFIXES, read_bytes


def parse_volume(data: bytes, path: Path, channels: int) -> nib.Nifti1Image:
    """The image in a file's bytes: NIfTI, or NRRD or MetaImage by the suffix of `path`. Raises CdiffError when it cannot be one."""
    if path.name.lower().endswith(ITK_SUFFIXES):
        return parse_itk(data, path, channels)
    return parse_nifti(data, path, channels)


def volume_shape(path: Path) -> tuple[int, ...]:
    """The shape in a file's header. Raises CdiffError when there is no such header."""
    data = read_bytes(path)
    return (itk_shape if path.name.lower().endswith(ITK_SUFFIXES) else nifti_shape)(data, path)
