"""A DICOM segmentation as an annotator's mask, read by highdicom."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.dicom_seg import quiet
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.sources import any_bytes, optional
from cdiff.runtime.words import one_line

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage and Label Map Segmentation Storage (PS3.4, B.5)."""
FRACTIONAL = "FRACTIONAL"
CONTOURS = "RTSTRUCT"
ALONE = "; save each segment as a file of its own"
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM's axes point to the patient's left and back, NIfTI's to the right and front."""


def read_dicom_mask(path: Path) -> tuple[NDArray[Any], nib.Nifti1Header]:
    """A segmentation's values [slices, rows, columns], and a header that says where these lie.

    The values are the segments' numbers, 0 outside all of them, or one segment's fractions. Frames that the file leaves out, as it may
    those without a pixel, are 0.
    Raises CdiffError where highdicom is missing, and for a file that cannot be read, is no segmentation or no even volume, whose
    segments overlap, or that holds the fractions of several.
    """
    highdicom, pydicom = (optional(name, name, path, "a DICOM segmentation") for name in ("highdicom", "pydicom"))
    file = io.BytesIO(any_bytes(path))
    try:
        with warnings.catch_warnings(), quiet("highdicom"), quiet("pydicom"):
            warnings.simplefilter("ignore")  # what they mend in a file, a line each
            data = pydicom.dcmread(file)
            if data.get("SOPClassUID") not in SEGMENTATIONS:
                _refuse(path, str(data.get("Modality", "")))
            _say_spacing(data)
            found = highdicom.seg.Segmentation.from_dataset(data, copy=False)
            fractions = found.segmentation_type.value == FRACTIONAL
            volume = found.get_volume(combine_segments=not fractions)
    except (
        pydicom.errors.InvalidDicomError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        EOFError,
    ) as error:
        why = one_line(error)[:200]
        hint = ALONE if "overlap" in why.lower() else ""
        raise CdiffError(f"{path} cannot be read as a DICOM segmentation ({why}){hint}") from None
    values = np.asarray(volume.array)
    if fractions:
        if values.shape[-1] > 1:
            raise CdiffError(f"{path} holds the fractions of {values.shape[-1]} segments{ALONE}")
        values = values[..., 0]
    image = nib.Nifti1Image(np.zeros(values.shape, np.uint8), TO_RAS @ volume.affine)
    image.header.set_xyzt_units("mm")
    return values, image.header


def _say_spacing(data: Any) -> None:
    """Where a file does not say how far apart its slices are, take them for as far apart as they are thick.

    Without a word of it highdicom goes by the frames that are there, and a file need not have those without a pixel: two at both ends
    would become a volume of two thick slices.
    """
    shared = data.SharedFunctionalGroupsSequence[0].get("PixelMeasuresSequence")
    each = (frame.get("PixelMeasuresSequence") for frame in data.PerFrameFunctionalGroupsSequence)
    for measures in filter(None, (shared, *each)):
        if "SpacingBetweenSlices" not in measures[0] and "SliceThickness" in measures[0]:
            measures[0].SpacingBetweenSlices = measures[0].SliceThickness


def _refuse(path: Path, modality: str) -> None:
    if modality == CONTOURS:
        raise CdiffError(
            f"{path} holds contours (RTSTRUCT), which are not read here; convert each annotator's to a NIfTI mask and lay it by its "
            "header (--masks-by header)"
        )
    raise CdiffError(f"{path} is DICOM ({modality or 'of no modality'}) and no segmentation; name the mask's file")
