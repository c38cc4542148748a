"""DICOM as an annotator's mask: a segmentation, read by highdicom, or the contours of a structure set; or one structure of either."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.contours import lay, read_contours
from cdiff.runtime.data.structures import number_of, one_must_be_named, parted
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.dicom_planes import frames_of
from cdiff.runtime.scans.grid import NIFTI1_LONGEST, Grid
from cdiff.runtime.scans.sources import any_bytes, optional
from cdiff.runtime.switches import quiet, without_warnings
from cdiff.runtime.words import by, one_line, several

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage and Label Map Segmentation Storage (PS3.4, B.5)."""
CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"
"""RT Structure Set Storage."""
KIND = "a DICOM segmentation"
FRACTIONAL = "FRACTIONAL"
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM's axes point to the patient's left and back, NIfTI's to the right and front."""
MOST_SLICES = 1000
"""Most slices for each frame of a file; a file may leave out frames that nobody marked."""
SMALL = 2**27
"""A volume of at most this many voxels may have more slices."""
Opened = dict[Path, Any]
"""Files that were read for one of their structures, as pydicom data sets, kept for the next one of the same case: more would take much memory."""
DicomMask = tuple[NDArray[Any], nib.Nifti1Header, tuple[str, ...]]
"""Values, a header that says where they lie, and what a user of the mask should know."""


class NoImage(CdiffError):
    """Contours were asked for without the image that they are laid on."""


def read_dicom_mask(path: Path, grid: Grid | None, opened: Opened) -> DicomMask:
    """A segmentation's values [slices, rows, columns]; or the voxels of `grid`, bool [*grid.spatial], that contours enclose.

    path: a file, or FILE#NAME, one structure of it, whose values are bool. Without a name the values are the segments' numbers, 0 outside
    all of them; of a segment that is stored as fractions they are bool, named or not: above one half. Frames that the file leaves out,
    as it may those without a marked pixel, are 0. grid: of the mask's image, where that could be read. opened: the files with named
    structures that were read before; this one is added.
    Raises CdiffError where pydicom or highdicom is missing; for a file that cannot be read, is neither of these or no even volume;
    where it is not clear which structure is meant; where `grid` is of another frame of reference; and for contours as `lay` does, or
    NoImage without a `grid`.
    """
    file, name = parted(path)
    if file in opened:
        data = opened[file]
    else:
        data = _opened(file)
        if name:
            opened[file] = data
    if data.SOPClassUID == CONTOURS:
        with _reading(file, "an RTSTRUCT"):
            contours = read_contours(data, path, name)
        if grid is None:
            raise NoImage(f"{path} holds contours, which cannot be laid without their image")
        told = _of_its_image(contours.frame, contours.series, grid, path)
        try:
            laid, notes = lay(contours, grid)
        except CdiffError as error:
            raise CdiffError(f"{path} cannot be laid on its image: {error}") from None
        assert grid.header is not None  # or nothing could be laid
        return laid, grid.header, (*told, *notes)
    with _reading(file, KIND):
        values, affine = _segment(data, path, file, name)
        frame = str(data.get("FrameOfReferenceUID") or "")
        series = frozenset(str(drawn.SeriesInstanceUID) for drawn in data.get("ReferencedSeriesSequence") or [])
    image = nib.Nifti1Image(np.zeros(values.shape, np.uint8), TO_RAS @ affine)
    image.header.set_xyzt_units("mm")
    return values, image.header, () if grid is None else _of_its_image(frame, series, grid, path)


def _of_its_image(frame: str, series: frozenset[str], grid: Grid, path: Path) -> tuple[str, ...]:
    """What a user of a mask should know about the image that it was drawn on, by the identifiers (`frame`, `series`) in the mask's file.

    An image that was not read from DICOM has none to compare with. Raises CdiffError where the frames of reference differ: coordinates
    of one mean nothing in the other.
    """
    if grid.frame and frame and grid.frame != frame:
        raise CdiffError(
            f"{path} cannot be laid on its image: its frame of reference is not its image's, so it was drawn on another scan; name "
            "the series that it was drawn on (or, if only the identifiers differ, give the image as NIfTI)"
        )
    if grid.series and series and grid.series not in series:
        return ("was drawn on another series than its image, though in the same frame of reference",)
    return ()


def _opened(file: Path) -> Any:
    """A structure set as pydicom's data set, or a segmentation as highdicom's. Raises CdiffError where the file is neither."""
    pydicom = optional("pydicom", "pydicom", file, KIND)
    stored = io.BytesIO(any_bytes(file))
    with _reading(file, KIND):
        data = pydicom.dcmread(stored)
        kind, modality = data.get("SOPClassUID"), data.get("Modality")  # in this block: only now are they decoded
    if kind == CONTOURS:
        return data
    if kind not in SEGMENTATIONS:
        raise CdiffError(
            f"{file} is DICOM ({str(modality or 'of no modality')[:50]}), but neither a segmentation nor contours; name the mask's file"
        )
    highdicom = optional("highdicom", "highdicom", file, KIND)
    with _reading(file, KIND):
        # highdicom makes tables for the promised frames before it looks whether they are there.
        if (promised := frames_of(data)) != (held := len(data.PerFrameFunctionalGroupsSequence)):
            raise ValueError(f"it describes {several(held, 'frame')}, but its header promises {promised}")
        _say_spacing(data)
        return highdicom.seg.Segmentation.from_dataset(data, copy=False)


def _segment(found: Any, path: Path, file: Path, name: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The values of one segment or of all, and their affine in DICOM's space."""
    fractions = found.segmentation_type.value == FRACTIONAL
    there = [
        (int(number), str(found.get_segment_description(number).segment_label).strip())
        for number in found.segment_numbers
    ]
    chosen = [number_of(name, path, there)] if name else [number for number, _ in there]
    _must_be_no_larger(found, file)
    if fractions and len(chosen) > 1:
        raise one_must_be_named(file, there, "holds the fractions of several segments")
    try:
        volume = found.get_volume(segment_numbers=chosen, combine_segments=not fractions)
    except RuntimeError as error:
        if "overlap" not in str(error):
            raise
        raise one_must_be_named(file, there, "has segments that overlap") from None
    values = np.asarray(volume.array)
    if fractions:  # of one, whatever a file's largest is
        return values[..., 0] > 0.5, volume.affine
    return (values != 0 if name else values), volume.affine


def _must_be_no_larger(found: Any, file: Path) -> None:
    """Raise CdiffError where a segmentation's frames lie so far apart, or its slices so close, that nearly all of its volume would be filled in."""
    if (geometry := found.get_volume_geometry()) is None:  # highdicom says later why it makes no volume
        return
    shape, frames = tuple(map(int, geometry.spatial_shape)), int(found.NumberOfFrames)
    if max(shape) > NIFTI1_LONGEST or (shape[0] > MOST_SLICES * frames and math.prod(shape) > SMALL):
        raise CdiffError(
            f"{file} has {several(frames, 'frame')}, whose positions span a volume of {by(shape)} voxels; it is damaged: copy it again"
        )


@contextmanager
def _reading(file: Path, kind: str) -> Iterator[None]:
    """Within the block, whatever the libraries raise for a file that they cannot read becomes a CdiffError; their warnings are silenced."""
    try:
        with without_warnings(), quiet("highdicom"), quiet("pydicom"):
            yield
    except CdiffError:
        raise
    except Exception as error:  # libraries' own kinds too
        raise CdiffError(f"{file} cannot be read as {kind} ({one_line(error)[:200]})") from None


def _say_spacing(data: Any) -> None:
    """Where a file does not give the spacing of its slices, set it to their thickness.

    Otherwise highdicom infers it from the frames present, and a file may leave out those without a marked pixel: two frames, at both
    ends, would become a volume of two thick slices.
    """
    shared = data.SharedFunctionalGroupsSequence[0].get("PixelMeasuresSequence")
    each = (frame.get("PixelMeasuresSequence") for frame in data.PerFrameFunctionalGroupsSequence)
    for measures in filter(None, (shared, *each)):
        if "SpacingBetweenSlices" not in measures[0] and "SliceThickness" in measures[0]:
            measures[0].SpacingBetweenSlices = measures[0].SliceThickness
