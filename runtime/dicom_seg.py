"""The levels as a DICOM segmentation, for a viewer or PACS: one segment for "at least c of C annotators", made by highdicom."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdiff import __version__
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.report import NOTICE
from cdiff.runtime.scans.dicom_planes import lps_of, planes_of, taken_from
from cdiff.runtime.scans.sources import optional
from cdiff.runtime.switches import quiet, without_warnings
from cdiff.runtime.words import one_line

if TYPE_CHECKING:
    from cdiff.runtime.results import Result
    from cdiff.runtime.scans.grid import Grid
    from cdiff.runtime.scans.scan import Scan

SCHEME = "99CDIFF"
"""The coding scheme of our own codes, which no standard defines; private schemes begin with 99, following HL7 (PS3.3, 8.2)."""
SERIES_ABOVE = 1000
"""How much higher the series number of a segmentation is than that of its images."""
MAY_BE_EMPTY = (
    "AccessionNumber", "PatientBirthDate", "PatientID", "PatientName", "PatientSex", "ReferringPhysicianName",
    "StudyDate", "StudyID", "StudyTime", "PositionReferenceIndicator",
)  # fmt: skip
"""Attributes of patient, study and frame of reference of type 2 (PS3.3, C.7): present in every image, unless anonymisation removed them."""
LONGEST = 64
"""The most characters of a DICOM text of type LO."""
HIGHDICOM = "pip install --no-deps highdicom"
"""Works on every Python: highdicom's dependencies come with pydicom, except pyjpegls, which needs a compiler on some versions and is not
used here."""


def must_allow_dicom_seg(scan: Scan) -> None:
    """Raise CdiffError where `write_dicom_seg` would for a result of `scan`, which is worth knowing before hours of work."""
    if not scan.dicom:
        raise CdiffError(
            f"{scan.source} is not DICOM, and a DICOM segmentation belongs to DICOM images; leave out --dicom-seg"
        )
    images = _headers(scan.dicom)
    blank = np.broadcast_to(np.uint8(0), (*(*scan.grid.spatial, 1)[:3], 1))
    planes = _planes_of(blank, scan.grid, images, scan.source)
    frames = np.zeros((len(planes), *planes[0].shape), np.uint8)
    frames[0, 0, 0, 0] = 1  # highdicom leaves empty frames out, but keeps every frame of an empty segmentation
    _segmentation(images, frames, {}, scan.source)


def write_dicom_seg(result: Result, path: Path) -> None:
    """Write `result`'s levels, thresholded at one half, as a binary segmentation (PS3.3, A.51) of the images that it was read from.

    Segments overlap: level 2 lies within level 1, except where their independent chains disagree. Frames without a pixel of a segment
    are left out (but none, if no level marks anything), as are slices that were not segmented. Patient and study are the images'.
    Raises CdiffError where `result` was not read from DICOM, highdicom is missing, or the images were replaced or lack what a
    segmentation must take over from them.
    """
    if not result.dicom:
        raise CdiffError(f"{result.name} was not read from DICOM, and a DICOM segmentation belongs to DICOM images")
    images = _headers(result.dicom)
    series = {str(image.get("SeriesInstanceUID") or "") for image in images}
    if result.grid.series and series != {result.grid.series}:
        raise CdiffError(
            f"{result.name}: the DICOM files that it was read from have been replaced by another series, and a segmentation would name that "
            "series' patient; segment the scan again"
        )
    _segmentation(images, _marked(result, images), result.report, result.name).save_as(path)


def _marked(result: Result, images: list[Any]) -> Any:
    """[frames, rows, columns, C] uint8: 1 where a level is at least one half, in the frame of each image."""
    marked = result.on_grid("levels", lambda levels: (levels >= 0.5).astype(np.uint8))
    on_planes = marked.reshape(*(*result.grid.spatial, 1)[:3], marked.shape[-1])
    return np.stack(_planes_of(on_planes, result.grid, images, result.name))


def _headers(files: Sequence[Path]) -> list[Any]:
    """The images without their pixels, with every attribute of MAY_BE_EMPTY added where it is missing.

    They were read before: raises CdiffError where one is gone by now, or damaged.
    """
    pydicom = optional("pydicom", "pydicom", files[0], "DICOM")
    images = []
    for file in files:
        try:
            images.append(pydicom.dcmread(file, stop_before_pixels=True))
        except Exception as error:  # pydicom raises exceptions of its own too
            raise CdiffError(
                f"{file} has changed since it was segmented ({one_line(error)[:100]}), and a DICOM segmentation refers to it; put it back"
            ) from None
    for image in images:
        for keyword in MAY_BE_EMPTY:
            if keyword not in image:
                setattr(image, keyword, "")
    return images


def _segmentation(images: list[Any], pixels: Any, report: dict[str, Any], name: str) -> Any:
    """The segmentation of pixels [frames, rows, columns, C], one frame per image. Raises CdiffError where the images do not allow it."""
    hd = _highdicom(name)
    C = pixels.shape[-1]
    try:
        # Where no level marks a pixel, highdicom keeps every frame and warns about it.
        with without_warnings(), quiet("highdicom"):
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
                content_description=NOTICE,
                series_description=f"cdiff: levels of agreement of {C} annotators"[:LONGEST],
            )
    except (AttributeError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CdiffError(
            f"{name}: its DICOM images do not allow a DICOM segmentation ({one_line(error)[:200]}); leave out --dicom-seg"
        ) from None


def _highdicom(name: str) -> Any:
    """The module highdicom. Raises CdiffError where it is missing."""
    try:
        return import_module("highdicom")
    except ModuleNotFoundError as error:
        if error.name != "highdicom":
            raise
        raise CdiffError(
            f"{name}: highdicom, which writes DICOM segmentations, is not installed; try: {HIGHDICOM}, or leave out --dicom-seg"
        ) from None


def _planes_of(marked: Any, grid: Grid, images: list[Any], name: str) -> list[Any]:
    """`marked` [i, j, k, C] as views [rows, columns, C], one per image or frame, each at that image's position and in its orientation.

    So each refers to its own image, whatever axes and order dcm2niix chose (it turns 3-D series of the head upright).
    Raises CdiffError where the images do not say where they lie. Adds the slice thickness to images that lack it.
    """
    planes = planes_of(images)
    if len(planes.known) < planes.count or grid.header is None:
        raise CdiffError(
            f"{name}: its DICOM images do not allow a DICOM segmentation (they do not say where they lie); leave out --dicom-seg"
        )
    affine = lps_of(grid.header)
    for image, plane in zip(images, planes.known, strict=False):
        if not image.get("SliceThickness"):  # missing or empty: use the distance between slices instead
            along = np.linalg.inv(affine[:3, :3]) @ np.cross(plane.across, plane.down)
            image.SliceThickness = float(f"{np.linalg.norm(affine[:3, np.argmax(np.abs(along))]):.6g}")
    try:
        return [taken_from(marked, affine, plane) for plane in planes.known]
    except CdiffError as error:
        raise CdiffError(f"{name}: a DICOM segmentation cannot be made ({error}); leave out --dicom-seg") from None


def _described(hd: Any, c: int, C: int, report: dict[str, Any]) -> Any:
    """The description of segment c: what it is, who made it and how."""
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
