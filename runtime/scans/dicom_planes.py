"""Where DICOM's headers put each image, and whether a converted volume puts it there too: dcm2niix looks only at the first two slices' distance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.itk import LPS_TO_RAS
from cdiff.runtime.switches import without_warnings
from cdiff.runtime.words import one_line

Float64 = NDArray[np.float64]
TAGS = (
    "ImageType", "ImageOrientationPatient", "ImagePositionPatient", "NumberOfFrames", "PerFrameFunctionalGroupsSequence", "PixelSpacing",
    "Rows", "Columns", "SharedFunctionalGroupsSequence",
)  # fmt: skip
"""The tags that say where an image lies."""
MOSAIC = "MOSAIC"
"""In the ImageType of images (Siemens) that hold a volume's slices side by side: their position is that of none of the slices."""
IN_PLANE = 0.5
"""By how many voxels the corners of an image may lie off the volume's grid."""
BETWEEN = 0.25
"""How far an image may lie from its place among the others, as a share of the distance between slices: a header's rounding."""
UNEVEN = 0.3
"""How far the distance of two neighbours may be from the mean distance, as a share of that: a missing slice doubles one."""
ROUNDING = 0.02
"""Above this share of the slices' distance the grid is laid anew, and a note says so where images lie as far from the new one."""
SAME_PLACE = 1e-3
"""Millimetres below which two frames count as lying at one place."""
UPRIGHT = 0.01
"""By how much the squared lengths of an image's two directions may differ from 1, and their dot product from 0."""


@dataclass(frozen=True)
class Plane:
    """Where one image lies in the patient (PS3.3, C.7.6.2.1.1), in DICOM's space (left, back, up).

    corner: the middle of its first pixel, mm [3]. across, down: from a pixel to the next column and to the next row, mm [3].
    """

    corner: Float64
    across: Float64
    down: Float64
    rows: int
    columns: int


@dataclass(frozen=True)
class Planes:
    """The planes of a series' images, a multi-frame file's frames among them, in the order of the files.

    known: one for each image that says where it lies. count: how many images there are. checked: whether the volume can be compared
    with them, which those of a mosaic, or of several frames without functional groups, cannot. mixed: whether frames are numbered in
    another order than that in which they lie. unspaced: whether a header's PixelSpacing cannot be read.
    """

    known: tuple[Plane, ...]
    count: int
    checked: bool = True
    mixed: bool = False
    unspaced: bool = False


@contextmanager
def values_asked() -> Iterator[None]:
    """Within the block, raises CdiffError for an invalid value deep in a header: pydicom decodes those when they are asked for."""
    try:
        # pydicom warns of values that the standard does not allow, but that can be used.
        with without_warnings():
            yield
    except CdiffError:
        raise
    except Exception as error:  # the library raises types of its own too
        raise CdiffError(f"a DICOM header is damaged ({one_line(error)[:200]}); copy the files again") from None


@values_asked()
def planes_of(headers: Sequence[Any]) -> Planes:
    """The planes of pydicom data sets that hold `TAGS`. Raises CdiffError as `values_asked` does."""
    known: list[Plane] = []
    count, checked, mixed, unspaced = 0, True, False, False
    for header in headers:
        frames = frames_of(header)
        count += frames
        groups = header.get("PerFrameFunctionalGroupsSequence") or []
        if MOSAIC in (header.get("ImageType") or []) or (frames > 1 and len(groups) != frames):
            checked = False
            continue
        planes = _planes_of_frames(header) if groups else [_plane(header)]
        unspaced = unspaced or not (groups or _spacing(header))
        here = [plane for plane in planes if plane]
        mixed = mixed or (frames == len(here) > 1 and _mixed(here, groups))
        known += here
    return Planes(tuple(known), count, checked, mixed, unspaced)


def laid(image: nib.Nifti1Image, planes: Planes, where: str) -> tuple[nib.Nifti1Image, tuple[str, ...]]:
    """`image` as the headers place it, and notes for a user of the result.

    Where the first distance between slices differs from the others by rounding, the affine takes the mean of all. Where no image says
    where it lies, neither does the result.
    Raises CdiffError where an image does not lie on the volume's grid, or has no slice of its own in it.
    """
    shape = (*image.shape, 1)[:3]
    if not planes.checked:
        return image, ()
    if planes.mixed:  # dcm2niix goes by the numbers, and would put slices into each other's places
        raise CdiffError(
            f"{where} its frames are not numbered in the order in which they lie; save them as single images (dcm4che's emf2sf does)"
        )
    if not planes.known:
        if np.prod(image.shape[2:], dtype=int) != planes.count:
            raise CdiffError(
                f"{where} dcm2niix makes {shape[2]} slices of {planes.count} images; look for damaged files"
            )
        image.set_sform(image.affine, code="unknown")
        image.set_qform(None, code="unknown")
        if planes.unspaced:
            image.header["pixdim"][1:3] = 1  # as dcm2niix has it without the tag: from an empty one it makes any number
        guessed = "their order and distance, and " if planes.count > 1 else ""
        return image, (
            f"the DICOM headers do not say where the images lie: {guessed}lengths may be guesses, and nothing says how the patient lies",
        )
    if len(planes.known) < planes.count:
        lost = planes.count - len(planes.known)
        raise CdiffError(f"{where} {lost} of {planes.count} images do not say where they lie; leave them out")
    affine = lps_of(image.header)
    axis, at = _places(affine, shape, planes.known, where)
    if len(planes.known) != shape[axis]:
        raise CdiffError(
            f"{where} dcm2niix makes {shape[axis]} slices of {planes.count} images; some lie at the same place, or are damaged"
        )
    order, wanted = np.argsort(at, kind="stable"), np.arange(shape[axis])
    off = np.abs(at[order] - wanted).max()
    if off <= ROUNDING:
        return image, ()
    # The least-squares line: one step for all images, and where the first lies.
    step, first = np.polyfit(wanted, at[order], 1) if len(at) > 1 else (1.0, at[0])
    apart = np.abs(at[order] - (first + step * wanted)).max()
    gaps = np.diff(at[order])
    if apart > BETWEEN * step or (gaps.size and np.abs(gaps - step).max() > UNEVEN * step):
        raise CdiffError(
            f"{where} the distance between slices varies: one may be missing; copy the files again, or resample the volume to even slices"
        )
    affine[:3, 3] += first * affine[:3, axis]
    affine[:3, axis] *= step
    length = float(np.linalg.norm(affine[:3, axis]))
    told = (
        f"the positions in the DICOM headers are not quite even: slices are taken to be {length:.4g} mm apart (the mean); each lies "
        f"within {apart / step * length:.2g} mm of where its header says"
    )
    return _moved(image, affine), (told,) if apart > ROUNDING * step else ()


def taken_from(marked: NDArray[Any], affine: Float64, plane: Plane) -> NDArray[Any]:
    """The part of a volume `marked` [i, j, k, ...] that lies on a plane, [rows, columns, ...].

    affine: the volume's voxels to mm in DICOM's space (left, back, up). Raises CdiffError where the plane's pixels are not the volume's
    voxels.
    """
    corner, across, down = _indices(affine, plane)
    one, other = np.rint(across).astype(int), np.rint(down).astype(int)
    first = np.rint(corner).astype(int)
    last = first + one * (plane.columns - 1) + other * (plane.rows - 1)
    if sorted((*np.abs(one), *np.abs(other))) != [0, 0, 0, 0, 1, 1] or one @ other:
        raise CdiffError("its images' rows and columns are not the volume's")
    if (np.minimum(first, last) < 0).any() or (np.maximum(first, last) >= marked.shape[:3]).any():
        raise CdiffError("its images reach beyond the volume")
    along, down_axis = int(np.argmax(np.abs(one))), int(np.argmax(np.abs(other)))
    # Only views, no copies: a large series has as many pixels as the volume.
    low, high = np.minimum(first, last), np.maximum(first, last)
    part = marked[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
    part = np.moveaxis(part, (down_axis, along), (0, 1))[:, :, 0]
    return part[:: other[down_axis], :: one[along]]


def lps_of(header: nib.Nifti1Header) -> Float64:
    """The affine [4, 4] from voxel indices to mm in DICOM's space (left, back, up)."""
    affine = np.array(header.get_best_affine(), dtype=np.float64)
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return affine


def frames_of(header: Any) -> int:
    """How many images a file's header promises; 1 where it gives no possible number."""
    try:
        return max(int(header.get("NumberOfFrames") or 1), 1)
    except (TypeError, ValueError):
        return 1


def functional_groups(header: Any, sequence: str) -> list[Any]:
    """For each frame its own functional group called `sequence`, else the one of all frames; [] where frames have no groups."""
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    return [(group.get(sequence) or shared.get(sequence) or [{}])[0] for group in groups]


def _planes_of_frames(header: Any) -> list[Plane | None]:
    of = [
        functional_groups(header, f"{name}Sequence") for name in ("PlanePosition", "PlaneOrientation", "PixelMeasures")
    ]
    return [
        _plane(
            {
                "ImagePositionPatient": place.get("ImagePositionPatient"),
                "ImageOrientationPatient": turned.get("ImageOrientationPatient"),
                "PixelSpacing": measures.get("PixelSpacing"),
                "Rows": header.get("Rows"),
                "Columns": header.get("Columns"),
            }
        )
        for place, turned, measures in zip(*of, strict=True)
    ]


def _mixed(planes: Sequence[Plane], groups: Sequence[Any]) -> bool:
    """Whether any number that dcm2niix sorts frames by (PS3.3, C.7.6.16.2.2) fails to rise or fall steadily along the frames' positions.

    A number that is the same for all frames does not count; where all dimension indices are, the order in which frames are stored does.
    """
    normal = np.cross(planes[0].across, planes[0].down)
    at = np.array([plane.corner @ normal for plane in planes]) / np.linalg.norm(normal)
    order = np.argsort(at, kind="stable")
    if np.diff(at[order]).min() < SAME_PLACE:
        return False
    contents = [(group.get("FrameContentSequence") or [{}])[0] for group in groups]
    indices = [tuple(content.get("DimensionIndexValues") or ()) for content in contents]
    stack = tuple(content.get("InStackPositionNumber") for content in contents)
    keys = [*zip(*indices, strict=True)] if len({len(one) for one in indices}) == 1 else []
    if keys and all(len(set(key)) == 1 for key in keys):
        keys = [tuple(range(len(planes)))]
    keys += [stack] if None not in stack else []
    steps = [np.sign(np.diff(np.array(key, dtype=np.float64)[order])) for key in keys if len(set(key)) > 1]
    return any(abs(int(step.sum())) < len(step) for step in steps)


def _plane(header: Any) -> Plane | None:
    """A header's plane; None where something in it is missing, no number, or contradicts itself."""
    try:
        corner = np.array([float(value) for value in header.get("ImagePositionPatient") or ()])
        axes = np.array([float(value) for value in header.get("ImageOrientationPatient") or ()])
        rows, columns = int(header.get("Rows")), int(header.get("Columns"))
    except (TypeError, ValueError):
        return None
    spacing = _spacing(header)
    if (len(corner), len(axes)) != (3, 6) or not np.isfinite([*corner, *axes]).all() or spacing is None:
        return None
    across, down = axes.reshape(2, 3)
    square = np.array([across @ across, down @ down, across @ down])
    if not np.allclose(square, [1, 1, 0], atol=UPRIGHT):
        return None
    return Plane(corner, across * spacing[1], down * spacing[0], rows, columns)  # the first is between rows


def _spacing(header: Any) -> tuple[float, float] | None:
    """Millimetres between rows and between columns; None where they are missing, or not two numbers above zero."""
    try:
        down, across = (float(value) for value in header.get("PixelSpacing") or ())
    except (TypeError, ValueError):
        return None
    return (down, across) if 0 < down < math.inf and 0 < across < math.inf else None


def _indices(affine: Float64, plane: Plane) -> tuple[Float64, Float64, Float64]:
    """Corner and both steps of a plane, in voxels."""
    inverse = np.linalg.inv(affine[:3, :3])
    return inverse @ (plane.corner - affine[:3, 3]), inverse @ plane.across, inverse @ plane.down


def _places(affine: Float64, shape: tuple[int, ...], planes: Sequence[Plane], where: str) -> tuple[int, Float64]:
    """The array axis across the images' planes, and where along it each image lies, in voxels."""
    axis, at = 2, []
    for number, plane in enumerate(planes):
        corner, across, down = _indices(affine, plane)
        if number == 0:
            axis = int(np.argmin(np.abs(across) + np.abs(down)))
        rest = [n for n in range(3) if n != axis]
        far = corner + across * (plane.columns - 1) + down * (plane.rows - 1)
        ends = np.sort([corner[rest], far[rest]], axis=0)
        wanted = [[0, 0], [shape[n] - 1 for n in rest]]
        if np.abs(ends - wanted).max() > IN_PLANE or abs(far[axis] - corner[axis]) > IN_PLANE:
            raise CdiffError(
                f"{where} its images do not lie on one grid, as where pixel spacing or field of view changes; give each part a folder"
            )
        at.append(corner[axis])
    return axis, np.array(at)


def _moved(image: nib.Nifti1Image, lps: Float64) -> nib.Nifti1Image:
    """`image` with the affine `lps` (to DICOM's space), and the spacing that goes with it; its codes stay."""
    affine = lps.copy()
    affine[:3] = LPS_TO_RAS @ affine[:3]
    code = int(image.header["sform_code"]) or int(image.header["qform_code"])
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    return image
