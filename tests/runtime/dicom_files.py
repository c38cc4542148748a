"""DICOM series written by pydicom from the standard's definitions, as a scanner or a PACS might."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

OBLIQUE = np.array([[0.68, 0.1, 0.3, -90.0], [-0.12, 0.69, 0.2, -120.0], [-0.08, -0.08, 2.46, 40.0]])
"""Millimetres in DICOM's space (left, back, up) of column i, row j and slice k; made orthogonal below."""


def orthogonal(spacing: Sequence[float] = (0.7, 0.8, 2.5), origin: Sequence[float] = (-90.0, -120.0, 40.0)) -> Any:
    """[3, 4]: a rotation of a few degrees about every axis, the spacing, and where the first voxel lies."""
    axes, _ = np.linalg.qr(OBLIQUE[:, :3])
    axes = axes * np.sign(np.diag(axes))
    axes[:, 2] = np.cross(axes[:, 0], axes[:, 1])
    return np.column_stack([axes * np.asarray(spacing), origin])


def write_series(
    folder: Path,
    voxels: Any,
    lps: Any,
    *,
    number: int = 3,
    description: str = "chest",
    change: Callable[[int, FileDataset], None] | None = None,
    keep: Sequence[int] | None = None,
) -> Path:
    """One file a slice of `voxels` [columns, rows, slices] int16 (PS3.3, C.7.6.2: image plane), in an order that is not the slices'.

    lps: as `orthogonal` gives it. change: called with the slice's number and its data set before it is written. keep: which slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    across, down = (lps[:, axis] / np.linalg.norm(lps[:, axis]) for axis in (0, 1))
    for k in range(voxels.shape[2]) if keep is None else keep:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        file.StudyInstanceUID, file.SeriesInstanceUID, file.FrameOfReferenceUID = study, series, frame
        file.PatientName, file.PatientID, file.StudyDate, file.StudyTime = "Doe^Jane", "7", "20200102", "101010"
        file.Modality, file.SeriesNumber, file.SeriesDescription, file.InstanceNumber = "CT", number, description, k + 1
        file.Rows, file.Columns = voxels.shape[1], voxels.shape[0]
        file.PixelSpacing = [float(np.linalg.norm(lps[:, 1])), float(np.linalg.norm(lps[:, 0]))]  # between rows first
        file.SliceThickness = float(np.linalg.norm(lps[:, 2]))
        file.ImageOrientationPatient = [float(v) for v in (*across, *down)]
        file.ImagePositionPatient = [float(v) for v in lps[:, 3] + k * lps[:, 2]]
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 1
        file.RescaleIntercept, file.RescaleSlope = -1000, 1
        file.PixelData = (voxels[:, :, k].T.astype(np.int32) + 1000).astype(np.int16).tobytes()
        if change is not None:
            change(k, file)
        file.save_as(folder / f"IM{(k * 7) % 101:04d}", enforce_file_format=True)
    return folder


def moved(file: FileDataset, lps: Sequence[float]) -> None:
    """Move a slice by so many millimetres."""
    file.ImagePositionPatient = [float(a) + float(b) for a, b in zip(file.ImagePositionPatient, lps, strict=True)]
