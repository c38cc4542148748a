"""The levels as a DICOM segmentation, for a viewer or PACS: one segment for "at least c of C annotators", made by highdicom."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdiff import __version__
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.itk import LPS_TO_RAS
from cdiff.runtime.shapes import one_line
from cdiff.runtime.sources import optional

if TYPE_CHECKING:
    from cdiff.runtime.results import Result
    from cdiff.runtime.scan import Scan

SCHEME = "99CDIFF"
"""Of codes that are no standard's; DICOM has private schemes begin with 99 (PS3.16, section 8)."""
SERIES_ABOVE = 1000
"""How much higher a segmentation's series number is than its images'."""
MAY_BE_EMPTY = (
    "AccessionNumber", "PatientBirthDate", "PatientID", "PatientName", "PatientSex", "ReferringPhysicianName",
    "StudyDate", "StudyID", "StudyTime", "PositionReferenceIndicator",
)  # fmt: skip
"""Type 2 of patient, study and frame of reference (PS3.3, C.7): there in every image, but where somebody made it anonymous."""
LONGEST = 64
"""Characters of DICOM's short texts (LO)."""


def must_allow_dicom_seg(scan: Scan) -> None:
    """Raise CdiffError where `write_dicom_seg` would for a result of `scan`: worth knowing before hours of work."""
    if not scan.dicom:
        raise CdiffError(
            f"{scan.source} is not DICOM, and a DICOM segmentation belongs to DICOM images; leave out --dicom-seg"
        )
    images = _headers(scan.dicom[:1])
    shape = (int(images[0].get("NumberOfFrames") or 1), images[0].Rows, images[0].Columns, 1)
    _segmentation(images, np.zeros(shape, np.uint8), {}, scan.source)


def write_dicom_seg(result: Result, path: Path) -> None:
    """Write `result`'s levels, one half and more, as a binary segmentation (PS3.3, A.51) of the images that it was read from.

    Segments overlap: level 2 lies within level 1. Frames without a pixel of a segment are left out, as are slices that were not
    segmented. It names the patient and study as its images do.
    Raises CdiffError where `result` was not read from DICOM, highdicom is missing, or the images lack what a segmentation must take
    over from them.
    """
    if not result.dicom:
        raise CdiffError(f"{result.name} was not read from DICOM, and a DICOM segmentation belongs to DICOM images")
    images = _headers(result.dicom)
    marked = (np.nan_to_num(result.levels) >= 0.5).astype(np.uint8)
    _segmentation(images, _volume(result, marked, images[0]), result.report, result.name).save_as(path)


def _headers(files: Sequence[Path]) -> list[Any]:
    """The images without their pixels, and with every attribute that may be empty."""
    pydicom = optional("pydicom", "pydicom", files[0], "DICOM")
    images = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    for image in images:
        for keyword in MAY_BE_EMPTY:
            if keyword not in image:
                setattr(image, keyword, "")
    return images


def _segmentation(images: list[Any], pixels: Any, report: dict[str, Any], name: str) -> Any:
    """pixels: [frames, rows, columns, C] or such a volume. Raises CdiffError where the images do not allow one."""
    hd = optional("highdicom", "highdicom", Path(name), "DICOM")
    C = pixels.shape[-1]
    try:
        with warnings.catch_warnings():
            # Where no level marks a pixel every frame is kept, and highdicom says so.
            warnings.simplefilter("ignore")
            return hd.seg.Segmentation(
                source_images=images,
                pixel_array=pixels,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[_described(hd, c, C, report) for c in range(1, C + 1)],
                series_instance_uid=hd.UID(),
                series_number=SERIES_ABOVE + int(images[0].get("SeriesNumber") or 0),
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="cdiff",
                manufacturer_model_name=f"cdiff, model {report.get('bundle', '')}"[:LONGEST],
                software_versions=__version__[:LONGEST],
                device_serial_number=str(report.get("manifest_sha256", "none"))[:LONGEST],
                content_label="CONSENSUS_LEVELS",
                content_description="Research use only. Not a medical device.",
                series_description=f"cdiff: levels of agreement of {C} annotators"[:LONGEST],
            )
    except (AttributeError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CdiffError(
            f"{name}: its DICOM images do not allow a DICOM segmentation ({one_line(error)[:200]}); leave out --dicom-seg"
        ) from None


def _volume(result: Result, marked: Any, image: Any) -> Any:
    """`marked` [i, j, k, C] as [k, rows, columns, C]: dcm2niix keeps a row's order, and turns that of the rows round."""
    hd = optional("highdicom", "highdicom", Path(result.name), "DICOM")
    assert result.grid.header is not None, "dcm2niix writes one"
    affine = result.grid.header.get_best_affine()
    affine[:3] = LPS_TO_RAS @ affine[:3]
    shape = (*marked.shape[:-1], 1)[:3]
    volume = hd.Volume(
        marked.reshape(*shape, marked.shape[-1]),
        affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid=str(image.FrameOfReferenceUID),
        channels={"SegmentNumber": list(range(1, marked.shape[-1] + 1))},
    )
    return volume.permute_spatial_axes((2, 1, 0)).flip_spatial(1)


def _described(hd: Any, c: int, C: int, report: dict[str, Any]) -> Any:
    """What segment c is, who made it and how."""
    structure = str(report.get("task") or "structure")[:LONGEST]
    return hd.seg.SegmentDescription(
        segment_number=c,
        segment_label=f"at least {c} of {C} annotators"[:LONGEST],
        segmented_property_category=hd.sr.CodedConcept("309825002", "SCT", "Spatial and Relational Concept"),
        segmented_property_type=hd.sr.CodedConcept("structure", SCHEME, structure),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="cdiff",
            version=__version__,
            family=hd.sr.CodedConcept("123110", "DCM", "Artificial Intelligence"),
            source="cdiff",
            parameters=_parameters(report),
        ),
    )


def _parameters(report: dict[str, Any]) -> dict[str, str]:
    kept: Sequence[str] = ("sampler", "steps", "runs", "combine", "seed")
    return {name: str(report[name]) for name in kept if name in report}
