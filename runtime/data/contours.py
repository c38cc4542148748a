"""Contours of a DICOM structure set (RTSTRUCT, PS3.3, C.8.8.6) as a mask: the voxels of an image whose centres they enclose.

Own code on pydicom, because existing readers move outlines by half a pixel or more, or put contours into slices that they do not belong
to: rt-utils and DicomRTTool round corners to whole pixels for OpenCV, which fills every pixel that an outline touches, and rt-utils takes
the spacing of rows for that of columns; platipy truncates corners to whole pixels, and dcmrtstruct2nii takes the nearest slice, however
far; the latter two need pydicom before 3.
Polygons are filled here because asking matplotlib about each pixel, as the tests do, takes many seconds for a lung.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.structures import Structures, number_of, one_must_be_named
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.itk import LPS_TO_RAS
from cdiff.runtime.words import several

Float64 = NDArray[np.float64]
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
"""The types of contour that enclose something."""
BESIDE = 0.3
"""How far a contour may lie from its slice, as a share of the slices' spacing: a series' own images may be off by nearly as much."""
ROUNDING = 0.05
"""Above this share a note says so."""
ON_LINE = 0.01
"""A centre within this many pixels of an outline counts as on it: rounding to hundredths of a millimetre must not decide what is inside."""
FARTHEST = 1e5
"""Millimetres from the origin that no coordinate may reach."""
SHIFTS = tuple(product((-ON_LINE, ON_LINE), repeat=2))


@dataclass(frozen=True)
class Contours:
    """One structure of a structure set.

    loops: closed contours, each [n, 3] in mm in NIfTI's space. frame: the frame of reference's UID. series: the UIDs of the images that
    it was drawn on. Both are empty where the file does not say. notes: what a user of the mask should know.
    """

    loops: tuple[Float64, ...]
    frame: str
    series: frozenset[str]
    notes: tuple[str, ...] = ()


def read_contours(data: Any, path: Path, name: str) -> Contours:
    """The structure `name` of a pydicom data set; "" stands for the only one that has closed contours.

    path: as the table has it, for messages. Raises CdiffError where it is not clear which structure is meant, and where it has only
    contours that are not closed; for a damaged file ValueError, or whatever pydicom raises.
    """
    rois = _by_number(data.get("StructureSetROISequence"), "ROINumber")
    contours = {
        number: drawn.get("ContourSequence") or []
        for number, drawn in _by_number(data.get("ROIContourSequence"), "ReferencedROINumber").items()
    }
    there = [(number, str(roi.get("ROIName") or "").strip()) for number, roi in rois.items()]
    number = number_of(name, path, there) if name else _only(path, there, contours)
    if number not in contours and (lost := sorted(contours.keys() - rois.keys())):  # they may be its own
        raise ValueError(f"it has contours of a structure {lost[0]}, which it does not list")
    kept, others = [], []
    for contour in contours.get(number, []):
        kind = str(contour.get("ContourGeometricType"))
        points = _points(contour)
        if kind in CLOSED and len(points) > 2:
            kept.append(points * np.diag(LPS_TO_RAS)[:3])
        else:
            others.append("POINT" if kind in CLOSED else kind)
    if others and not kept:
        raise CdiffError(f"{path} has no closed contour, only {', '.join(sorted(set(others)))}; name another structure")
    notes = []
    if others:
        kinds = ", ".join(sorted(set(others)))
        notes.append(
            f"has {several(len(others), 'contour')} that {'enclose' if len(others) > 1 else 'encloses'} nothing ({kinds}): left out"
        )
    if not kept:
        notes.append(
            "has no contours, so its annotator counts as having marked nothing; if this annotator never looked, leave the cell empty"
        )
    frame = str(rois[number].get("ReferencedFrameOfReferenceUID") or "")
    return Contours(tuple(kept), frame, _series(data), tuple(notes))


def _by_number(items: Any, keyword: str) -> dict[int, Any]:
    """Items of a sequence by their number. Raises ValueError where two have the same."""
    numbered = [(int(item[keyword].value), item) for item in items or []]
    found = dict(numbered)
    if len(found) < len(numbered):
        raise ValueError(f"two of its structures have the same {keyword}")
    return found


def _only(path: Path, there: Structures, contours: dict[int, Any]) -> int:
    drawn = [
        (number, called)
        for number, called in there
        if any(contour.get("ContourGeometricType") in CLOSED for contour in contours.get(number, []))
    ]
    if not drawn:
        raise CdiffError(f"{path} holds no closed contours; name another file")
    if len(drawn) > 1:
        raise one_must_be_named(path, drawn, "holds contours of several structures")
    return drawn[0][0]


def _points(contour: Any) -> Float64:
    """A contour's points in mm [n, 3], in DICOM's space."""
    # The text as stored: pydicom makes an object of each number, which takes minutes for a million.
    stored = contour.get_item("ContourData").value
    values = np.array(stored.split(b"\\") if isinstance(stored, bytes) else stored, dtype=np.float64)
    if not (np.abs(values) < FARTHEST).all():  # NaN is caught too
        raise ValueError("a contour's coordinates are too large to lie in a patient")
    points = values.reshape(-1, 3)
    if (promised := contour.get("NumberOfContourPoints")) is not None and int(promised) != len(points):
        raise ValueError(f"a contour has {len(points)} points, but its header promises {promised}")
    return points


def _series(data: Any) -> frozenset[str]:
    return frozenset(
        str(series.SeriesInstanceUID)
        for frame in data.get("ReferencedFrameOfReferenceSequence") or []
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
    )


def lay(contours: Contours, grid: Grid) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """The voxels whose centres the contours enclose, [*grid.spatial], and what a user of the mask should know.

    A contour marks only the slice that it lies in, along whichever axis of the array. Contours in one slice are combined by the
    even-odd rule, so that one inside another is a hole.
    Raises CdiffError where the image's header does not say where its voxels lie, and for contours that lie between its slices, across
    them, only in every second or third of them, or wholly outside.
    """
    if not grid.has_orientation:
        raise CdiffError("contours are given in millimetres, and its image does not say where its voxels lie")
    notes = list(contours.notes)
    laid = np.zeros((*grid.spatial, 1)[:3], bool)
    if contours.loops:
        axis, planes, beside = _planes(contours.loops, grid)
        if beside > ROUNDING:
            notes.append(
                f"has contours that lie up to {beside:.2f} of the slice spacing away from the slices that they count for"
            )
        notes += _fill(np.moveaxis(laid, axis, 0), planes)
    return laid.reshape(grid.spatial), tuple(notes)


def _planes(loops: tuple[Float64, ...], grid: Grid) -> tuple[int, dict[int, list[Float64]], float]:
    """The array axis across the contours' planes; for each slice along it the loops [n, 2] in it, in voxels along the other axes; and the
    largest distance of a contour from its slice, as a share of the slices' spacing. A contour that is there twice counts once."""
    to_voxels = np.linalg.inv(grid.affine)
    placed = [loop @ to_voxels[:3, :3].T + to_voxels[:3, 3] for loop in loops]
    axis = int(np.argmin(np.max([np.ptp(loop, axis=0) for loop in placed], axis=0)))
    slices = range((*grid.spatial, 1)[axis])
    planes: dict[int, list[Float64]] = {}
    beside = 0.0
    known: set[tuple[int, bytes]] = set()
    for loop in placed:
        plane = round(float(loop[:, axis].mean()))
        if plane in slices:  # not beyond them: nothing says where a 2-D image's neighbours would lie
            beside = max(beside, float(np.abs(loop[:, axis] - plane).max()))
        flat = np.delete(loop, axis, axis=1)
        there = planes.setdefault(plane, [])
        if (same := (plane, flat.tobytes())) not in known:
            known.add(same)
            there.append(flat)
    if beside > BESIDE:
        raise CdiffError(
            f"its contours lie up to {beside:.2g} of the slice spacing away from its image's slices; name the series that they were drawn on"
        )
    within = sorted(plane for plane in planes if plane in slices)
    steps = set(np.diff(within).tolist())
    if len(within) > 2 and len(steps) == 1 and steps != {1}:
        raise CdiffError(
            f"its contours lie in only one of every {min(steps)} slices of its image; name the series that they were drawn on, or interpolate them"
        )
    return axis, planes, beside


def _fill(laid: NDArray[np.bool_], planes: dict[int, list[Float64]]) -> list[str]:
    """Mark in `laid` [slices, rows, columns] what the loops enclose; returns notes. Raises CdiffError where all lie outside."""
    sides = np.array(laid.shape[1:])
    outside = wholly = crossing = 0
    for plane, loops in planes.items():
        within = 0 <= plane < len(laid)
        for loop in loops:
            low, high = loop.min(axis=0), loop.max(axis=0)
            outside += not within or bool((low < -0.5 - ON_LINE).any() or (high > sides - 0.5 + ON_LINE).any())
            wholly += not within or bool((high < -0.5).any() or (low > sides - 0.5).any())
        if within:
            laid[plane] = enclosed(loops, laid.shape[1:])
            crossing += _cross(loops, laid.shape[1:])
    count = sum(map(len, planes.values()))
    if wholly == count:
        raise CdiffError("its contours lie outside its image; name the series that they were drawn on")
    notes = []
    if outside:
        notes.append(f"has {outside} of {several(count, 'contour')} wholly or partly outside its image")
    if crossing:
        notes.append(
            f"has contours that cross each other, in {several(crossing, 'slice')}: an area that two of them enclose counts as outside"
        )
    return notes


def _cross(loops: list[Float64], shape: tuple[int, ...]) -> bool:
    """Whether any two loops overlap, in pixels, without either lying within the other."""
    # Only loops whose boxes overlap are compared, within their boxes: of hundreds of islands in a slice few are near each other.
    low = np.array([np.clip(np.floor(loop.min(axis=0)), 0, shape) for loop in loops], dtype=int)
    high = np.array([np.clip(np.ceil(loop.max(axis=0)) + 1, 0, shape) for loop in loops], dtype=int)
    near = ((low[:, None] < high) & (low < high[:, None])).all(axis=2)
    pairs = np.argwhere(np.triu(near, 1)).tolist()
    marked = {
        one: _odd([loops[one] - low[one]], tuple(high[one] - low[one])) for one in {n for pair in pairs for n in pair}
    }

    def shared(one: int, other: int) -> int:
        first, stop = np.maximum(low[one], low[other]), np.minimum(high[one], high[other])
        here, there = (
            marked[n][tuple(slice(a, b) for a, b in zip(first - low[n], stop - low[n], strict=True))]
            for n in (one, other)
        )
        return int(np.count_nonzero(here & there))

    pixels = {n: int(np.count_nonzero(pixels)) for n, pixels in marked.items()}
    return any(0 < shared(one, other) < min(pixels[one], pixels[other]) for one, other in pairs)


def enclosed(loops: list[Float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The pixels [rows, columns] whose centres lie inside an odd number of loops, or on one. loops: [n, 2], row and column in pixels."""
    marked = np.zeros(shape, bool)
    for shift in SHIFTS:  # a centre on an outline is inside with at least one of the four
        marked |= _odd([loop + shift for loop in loops], shape)
    return marked


def _odd(loops: list[Float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The pixels inside an odd number of loops: along a row's line of centres, each edge that crosses it begins or ends an inside."""
    rows, columns = shape
    start, end = np.concatenate(loops), np.concatenate([np.roll(loop, -1, axis=0) for loop in loops])
    first, stop = (np.clip(np.ceil(of(start[:, 0], end[:, 0])), 0, rows).astype(int) for of in (np.minimum, np.maximum))
    edge = np.repeat(np.arange(len(start)), stop - first)
    row = np.arange(len(edge)) - (np.cumsum(stop - first) - stop)[edge]
    (y, x), (down, across) = start[edge].T, (end - start)[edge].T
    column = np.ceil(x + (row - y) / down * across)
    crossed = np.zeros((rows, columns + 1), np.uint8)  # which may overflow: 256 is even
    np.add.at(crossed, (row, np.clip(column, 0, columns).astype(int)), 1)
    return np.asarray(np.cumsum(crossed[:, :columns], axis=1, dtype=np.uint8) % 2 == 1)
