"""Where a scan's voxels lie: putting maps back on the input's grid, NIfTI geometry, volumes, how to look at a slice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.words import by

GEOMETRY_FIELDS = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
NIFTI1_LONGEST = 2**15 - 1
"""Most voxels along an axis of a NIfTI-1 file."""
MM = {1: 1000.0, 2: 1.0, 3: 0.001}
"""Millimetres per unit of length, by the code of NIfTI's xyzt_units (metre, millimetre, micron)."""
UPRIGHT = 0.9999
"""A voxel larger than this share of its edges' product counts as a box: what is missing is the rounding of a header."""


@dataclass(frozen=True)
class View:
    """How a slice [H, W] as stored becomes a picture: transposed first, then flipped.

    edges: letters for left, right, top and bottom of the picture, empty where the header does not say.
    spacing: (down, across) in mm for the picture's axes, None when unknown or a placeholder. note: the convention, in words.
    """

    transpose: bool = False
    flip_down: bool = False
    flip_across: bool = False
    edges: tuple[str, str, str, str] = ("", "", "", "")
    spacing: tuple[float, float] | None = None
    note: str = "array as stored: first axis down, second across"

    def __call__(self, maps: NDArray[Any]) -> NDArray[Any]:
        """[..., H, W] as stored -> [..., rows, columns] of the picture."""
        turned = np.swapaxes(maps, -1, -2) if self.transpose else maps
        return turned[..., :: -1 if self.flip_down else 1, :: -1 if self.flip_across else 1]


@dataclass(frozen=True)
class Grid:
    """The input's grid.

    shape: the input's shape without its channels; two or three axes, and trailing ones where the file has them.
    slice_axis: the array axis that was cut along; None for a 2-D image.
    header: NIfTI header whose geometry the maps take over; None for a picture or a bare array.
    frame, series: the UIDs of the frame of reference and the series of a scan that was read from DICOM; else empty.
    """

    shape: tuple[int, ...]
    slice_axis: int | None
    header: nib.Nifti1Header | None = None
    frame: str = ""
    series: str = ""

    @property
    def spatial(self) -> tuple[int, ...]:
        """The lengths of the two or three spatial axes, without axes of length 1 after them."""
        return self.shape[: 2 if self.slice_axis is None else 3]

    def cut(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """[*spatial, channels] -> [S, channels, H, W], contiguous, with the in-plane axes in their stored order."""
        return np.ascontiguousarray(self.planes(voxels))

    def planes(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """`cut` as a view of the same memory, to write into."""
        stack = voxels[None] if self.slice_axis is None else np.moveaxis(voxels, self.slice_axis, 0)
        return np.moveaxis(stack, -1, 1)

    @property
    def unit(self) -> int:
        """NIfTI's code of the header's unit of length; 0 without a header, and for a code that `MM` does not have."""
        code = 0 if self.header is None else int(self.header["xyzt_units"]) & 7
        return code if code in MM else 0

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Millimetres per voxel along each spatial axis, from the header's zooms and unit; None without a header."""
        if self.header is None:
            return None
        scale = MM.get(self.unit, 1.0)
        return tuple(float(zoom) * scale for zoom in self.header["pixdim"][1 : 1 + len(self.spatial)])

    @property
    def affine(self) -> NDArray[np.float64]:
        """[4, 4]: voxel indices to millimetres in the patient's space, as the header has it; only for a grid with a header.

        A 2-D image's third axis is perpendicular to it, 1 mm long.
        """
        assert self.header is not None
        out = np.array(self.header.get_best_affine(), dtype=np.float64)
        out[:3] *= MM.get(self.unit, 1.0)
        if len(self.spatial) == 2:
            normal = np.cross(out[:3, 0], out[:3, 1])
            out[:3, 2] = normal / np.linalg.norm(normal)
        return out

    @property
    def is_placeholder(self) -> bool:
        """Whether the header's spacing is 1 along every axis, as in files that have lost theirs: volumes in ml then mean nothing."""
        return self.header is not None and all(zoom == 1 for zoom in self.header["pixdim"][1 : 1 + len(self.spatial)])

    def differs_from(self, other: Grid, *, ones_count: bool = False) -> str | None:
        """In words, how another file's grid differs from this one (in shape; where both have headers, in spacing or place), or None.

        A placeholder's spacing contradicts nothing. ones_count: spacings of 1 are taken as meant where both are 1 and neither header
        puts the first voxel at the origin.
        """
        if self.spatial != other.spatial:
            return f"have different shapes ({by(self.spatial)} and {by(other.spatial)})"
        mine, theirs = self.spacing, other.spacing
        if self.header is None or other.header is None or mine is None or theirs is None:
            return None
        here, there = self.affine, other.affine
        meant = ones_count and self.is_placeholder and other.is_placeholder and here[:3, 3].any() and there[:3, 3].any()
        if (self.is_placeholder or other.is_placeholder) and not meant:
            return None
        if not np.allclose(mine, theirs, rtol=1e-3):
            return f"have different spacings ({_mm(mine)} and {_mm(theirs)} mm)"
        placed = self.has_orientation and other.has_orientation
        if placed and not np.allclose(here, there, rtol=1e-3, atol=0.01 * min(mine)):
            return "have different affines (they do not lie in the same place)"
        return None

    @property
    def spacing_notes(self) -> list[str]:
        """Reasons not to trust the spacing, one line each; empty where nothing speaks against it."""
        spacing = self.spacing
        if self.header is None or spacing is None:
            return ["the input has no spacing: volumes are counted in voxels only"]
        if self.is_placeholder:
            return ["the header's spacing is 1 for every axis, which is often a placeholder: check it before using ml"]
        notes = []
        if not self.unit:
            notes.append("the header names no unit of length: millimetres are assumed")
        edges = self._sform_edges
        if edges is not None and not self._sform_agrees:
            listed = " x ".join(f"{length:.3g}" for length in np.linalg.norm(edges, axis=0))
            notes.append(f"the header's spacing and its sform ({listed} mm) disagree: volumes use the spacing")
        if self.leaning < 1:
            notes.append(
                "the sform's axes are not at right angles, as of a CT with a tilted gantry: volumes use the sform's "
                f"voxel, {1 - self.leaning:.1%} smaller than its edges multiplied; lengths are taken along the array's axes"
            )
        return notes

    @property
    def _sform_edges(self) -> NDArray[np.float64] | None:
        """A voxel's edges in space, in mm [3, axes]: the sform's columns of the spatial axes. None without an sform."""
        if self.header is None or int(self.header["sform_code"]) <= 0:
            return None
        columns = self.header.get_sform()[:3, : len(self.spatial)]
        return np.asarray(columns * MM.get(self.unit, 1.0), dtype=np.float64)

    @property
    def _sform_agrees(self) -> bool:
        """Whether there is an sform, and the voxel's edges in it are as long as the header's spacing says."""
        edges, spacing = self._sform_edges, self.spacing
        if edges is None or spacing is None:
            return False
        return bool(np.allclose(np.linalg.norm(edges, axis=0), spacing, rtol=0.01))

    @property
    def leaning(self) -> float:
        """A voxel's size as a share of its edges' product: 1, unless the sform's axes are not at right angles.

        An sform that the spacing contradicts is ignored.
        """
        edges = self._sform_edges
        if edges is None or not self._sform_agrees:
            return 1.0
        unit = edges / np.linalg.norm(edges, axis=0)
        share = math.sqrt(max(0.0, np.linalg.det(unit.T @ unit)))
        return 1.0 if share > UPRIGHT else share

    @property
    def voxel_mm(self) -> float | None:
        """Size of a voxel in mm3, of a 2-D image's pixel in mm2; None without spacing."""
        return None if self.spacing is None else math.prod(self.spacing) * self.leaning

    @property
    def voxel_ml(self) -> float | None:
        """Volume of a voxel in millilitres; None for a 2-D image or without spacing."""
        return None if self.voxel_mm is None or len(self.spatial) < 3 else self.voxel_mm / 1000

    @property
    def measured_spacing(self) -> tuple[float, ...] | None:
        """`spacing`, or None where it is 1 along every axis: a placeholder, in which nothing can be measured."""
        return None if self.is_placeholder else self.spacing

    @property
    def plane_mm(self) -> tuple[float, float] | None:
        """Millimetres per pixel along the two axes of a slice as stored, from `measured_spacing`."""
        spacing = self.measured_spacing
        if spacing is None:
            return None
        first, second = (mm for axis, mm in enumerate(spacing) if axis != self.slice_axis)
        return first, second

    @property
    def has_orientation(self) -> bool:
        """Whether the header says how the patient lies. An identity affine is a placeholder, not an orientation."""
        if self.header is None or (int(self.header["sform_code"]) <= 0 and int(self.header["qform_code"]) <= 0):
            return False
        return not np.array_equal(self.header.get_best_affine(), np.eye(4))

    def image(self, maps: NDArray[Any], intent: str) -> nib.Nifti1Image:
        """A NIfTI image of `maps` ([*shape] or [*spatial, K]) that lies where the input lies.

        Only geometry is taken over (affine, codes, zooms, units): nothing else of the input's header, such as a name
        or a date in a free-text field or an extension. K maps go on a fourth axis, also for a 2-D input. The format is
        the input's; NIfTI-2 for a picture that is too long for NIfTI-1.
        """
        if maps.ndim > len(self.spatial) and maps.shape != self.shape:
            maps = maps.reshape(*(*self.spatial, 1)[:3], maps.shape[-1])
        source = self.header
        two = isinstance(source, nib.Nifti2Header) or max(maps.shape) > NIFTI1_LONGEST
        header = nib.Nifti2Header() if two else nib.Nifti1Header()
        header.set_data_dtype(maps.dtype)
        header.set_data_shape(maps.shape)
        if source is None:
            header.set_sform(np.eye(4), code="aligned")
        else:
            for field in GEOMETRY_FIELDS:
                header[field] = source[field]
            header["pixdim"][:4] = source["pixdim"][:4]
            header["pixdim"][1:4][~(header["pixdim"][1:4] > 0)] = 1  # a 2-D file need not fill the third
            header["xyzt_units"] = self.unit
        header["cal_min"], header["cal_max"] = 0, 1
        header["descrip"] = f"cdiff {intent}"
        if isinstance(header, nib.Nifti2Header):
            return nib.Nifti2Image(maps, None, header)
        return nib.Nifti1Image(maps, None, header)

    @property
    def view(self) -> View:
        """The picture of a slice: radiological convention where the header gives an orientation, else the array as stored.

        Radiological: the patient's right (or front) on the left, front (or head) at the top.
        """
        axes = [axis for axis in range(len(self.spatial)) if axis != self.slice_axis]
        spacing = self.measured_spacing
        if not self.has_orientation or self.header is None:
            known = None if spacing is None else (spacing[axes[0]], spacing[axes[1]])
            return View(spacing=known)
        codes = nib.aff2axcodes(self.header.get_best_affine())
        towards = [codes[axis] for axis in axes]  # where each in-plane axis points
        # Across the picture runs left-right if the plane has it, else front-back; down runs the other one.
        transpose = _rank(towards[0]) < _rank(towards[1])
        down, across = (1, 0) if transpose else (0, 1)
        flip_down = towards[down] in "AS"
        flip_across = towards[across] in "RA"
        bottom = OPPOSITE[towards[down]] if flip_down else towards[down]
        right = OPPOSITE[towards[across]] if flip_across else towards[across]
        plane = {"S": "axial", "A": "coronal", "R": "sagittal"}[
            next(axis for axis in "RAS" if axis not in _both(towards[0]) + _both(towards[1]))
        ]
        return View(
            transpose, flip_down, flip_across,
            (OPPOSITE[right], right, OPPOSITE[bottom], bottom),
            None if spacing is None else (spacing[axes[down]], spacing[axes[across]]),
            f"{plane}, radiological convention",
        )  # fmt: skip


OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}


def _mm(lengths: tuple[float, ...]) -> str:
    """In words, without what the header's float32 adds: 0.7 is stored as 0.699999988."""
    return " x ".join(f"{length:.5g}" for length in lengths)


def _rank(letter: str) -> int:
    return next(rank for rank, pair in enumerate(("RL", "AP", "SI")) if letter in pair)


def _both(letter: str) -> str:
    return letter + OPPOSITE[letter]
