"""DICOM series written by pydicom from the standard's definitions, as a scanner or a PACS might."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat

from cdiff.runtime.scans.dicom import _program

OBLIQUE = np.array([[0.68, 0.1, 0.3, -90.0], [-0.12, 0.69, 0.2, -120.0], [-0.08, -0.08, 2.46, 40.0]])
"""Millimetres in DICOM's space (left, back, up) of column i, row j and slice k; made orthogonal below."""


def orthogonal(spacing: Sequence[float] = (0.7, 0.8, 2.5), origin: Sequence[float] = (-90.0, -120.0, 40.0)) -> Any:
    """[3, 4]: a rotation of a few degrees about every axis, the spacing, and where the first voxel lies."""
    axes, _ = np.linalg.qr(OBLIQUE[:, :3])
    axes = axes * np.sign(np.diag(axes))
    axes[:, 2] = np.cross(axes[:, 0], axes[:, 1])
    return np.column_stack([axes * np.asarray(spacing), origin])


def decimals(*values: float) -> list[DSfloat]:
    """Numbers as DICOM writes them: decimal strings (DS) of at most 16 characters."""
    return [DSfloat(float(value), auto_format=True) for value in values]


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
        file.PixelSpacing = decimals(np.linalg.norm(lps[:, 1]), np.linalg.norm(lps[:, 0]))  # between rows first
        file.SliceThickness = decimals(np.linalg.norm(lps[:, 2]))[0]
        file.ImageOrientationPatient = decimals(*across, *down)
        file.ImagePositionPatient = decimals(*(lps[:, 3] + k * lps[:, 2]))
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
    file.ImagePositionPatient = decimals(*np.add(file.ImagePositionPatient, lps, dtype=float))


def upright(file: FileDataset) -> None:
    """Make it a slice of a 3-D series of the head, whose sagittal slices dcm2niix turns into axial ones."""
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = MRImageStorage
    file.Modality, file.Manufacturer, file.MRAcquisitionType, file.ScanningSequence = "MR", "SIEMENS", "3D", "GR"
    file.EchoTime, file.RepetitionTime = 3, 2000


def write_multiframe(
    folder: Path,
    voxels: Any,
    lps: Any,
    *,
    order: Sequence[int] | None = None,
    change: Callable[[int, Dataset], None] | None = None,
) -> Path:
    """`write_series`' volume as one enhanced CT (PS3.3, A.38) with a frame for each slice of `order`, all unless given.

    change: called with each frame's number, from 1, and its content.
    """
    order = range(voxels.shape[2]) if order is None else order
    write_series(folder, voxels, lps, keep=(0,))
    single = dcmread(folder / "IM0000")
    file = FileDataset("", {}, file_meta=single.file_meta, preamble=b"\0" * 128)
    file.update({tag: single[tag] for tag in list(single._dict) if tag.group not in (0x0018, 0x7FE0)})
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleIntercept",
        "RescaleSlope",
    ):
        file.pop(keyword)
    measures, turned, values = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = single.PixelSpacing, single.SliceThickness
    turned.ImageOrientationPatient = single.ImageOrientationPatient
    values.RescaleIntercept, values.RescaleSlope, values.RescaleType = -1000, 1, "HU"
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [turned]
    shared.PixelValueTransformationSequence = [values]
    frames = []
    for number, k in enumerate(order, start=1):
        content, place, frame = Dataset(), Dataset(), Dataset()
        content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", k + 1, [1, k + 1]
        place.ImagePositionPatient = decimals(*(lps[:, 3] + k * lps[:, 2]))
        if change is not None:
            change(number, content)
        frame.FrameContentSequence, frame.PlanePositionSequence = [content], [place]
        frames.append(frame)
    file.SharedFunctionalGroupsSequence, file.PerFrameFunctionalGroupsSequence = [shared], frames
    file.NumberOfFrames = len(frames)
    file.PixelData = b"".join((voxels[:, :, k].T.astype(np.int32) + 1000).astype(np.int16).tobytes() for k in order)
    file.save_as(folder / "IM0000", enforce_file_format=True)
    return folder


def converter(folder: Path, then: str, patch: pytest.MonkeyPatch) -> None:
    """Have in place of dcm2niix a program in `folder` that runs it and `then` a line of shell."""
    (program := folder / "bin" / "dcm2niix").parent.mkdir()
    program.write_text(f'#!/bin/sh\n"{_program(folder)}" "$@"\n{then}\n')
    program.chmod(0o755)
    patch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
