"""Structure sets (RTSTRUCT) written by pydicom from the standard's definitions, as a planning system might."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from tests.runtime.dicom_files import decimals

CLOSED = "CLOSED_PLANAR"
Loop = tuple[int, Sequence[tuple[float, float]]]
"""A slice's number and points (column, row) in it, in voxels of the series."""


def rectangle(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def write_rtstruct(
    path: Path,
    images: Path | None,
    lps: Any,
    structures: Sequence[tuple[str, Sequence[Loop]]] | Mapping[str, Sequence[Loop]],
    *,
    kinds: Sequence[str] = (),
    frame: str = "",
    series: str = "",
    between: float = 0,
) -> Path:
    """One structure set of closed contours, each structure's number one more than the last's.

    lps: of the series, as `orthogonal` gives it. images: the series that it is drawn on. kinds: of the contours of every structure, in
    turn, instead of CLOSED. frame, series: UIDs, those of the images unless given. between: slices by which all contours are moved.
    """
    image = dcmread(next(images.iterdir()), stop_before_pixels=True) if images else Dataset()
    frame = frame or str(image.get("FrameOfReferenceUID", ""))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTStructureSetStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID
    file.Modality, file.PatientID, file.StructureSetLabel = "RTSTRUCT", "7", "readers"
    one, study, of = Dataset(), Dataset(), Dataset()
    of.SeriesInstanceUID = series or image.get("SeriesInstanceUID", "")
    study.RTReferencedSeriesSequence, one.FrameOfReferenceUID = [of], frame
    one.RTReferencedStudySequence = [study]
    file.ReferencedFrameOfReferenceSequence = [one]
    file.StructureSetROISequence, file.ROIContourSequence = [], []
    pairs = structures.items() if isinstance(structures, Mapping) else structures
    for number, (name, loops) in enumerate(pairs, start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, frame
        file.StructureSetROISequence.append(roi)
        drawn.ReferencedROINumber = number
        if loops:
            drawn.ContourSequence = []
        for n, (k, points) in enumerate(loops):
            contour = Dataset()
            contour.ContourGeometricType = kinds[n % len(kinds)] if kinds else CLOSED
            contour.NumberOfContourPoints = len(points)
            voxels = np.array([(*point, k + between, 1) for point in points], dtype=float)
            contour.ContourData = decimals(*(voxels @ lps.T).ravel())
            drawn.ContourSequence.append(contour)
        file.ROIContourSequence.append(drawn)
    file.save_as(path, enforce_file_format=True)
    return path
