"""A place in a scan that the user names: its slice, the window around it for a model that sees only the structure, and the field around that."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.sampling.framing import Box, Shrunk, box_around
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.words import by

At = str | Sequence[int]
"""A voxel: "I,J,K", or its indices (two for a 2-D image), counted from 0 along the axes of the array as stored; or a point: "L30,P20,S50"."""
POINT = re.compile(r"([RLAPSI])\s*([-+]?\d+(?:\.\d*)?)\s*(?:mm)?", re.IGNORECASE)
"""A direction in the patient and millimetres along it, as viewers show the cursor's place."""
RAS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
"""Each direction's axis in NIfTI's space, and its sign."""
ORDINALS = ("first", "second", "third")


@dataclass(frozen=True)
class Place:
    """Where a structure lies, for a model of the framing `centre`.

    at: the voxel, one index for each axis of the array as stored. number: of the slice that holds it. point: the other two
    indices, along the slice's axes as stored.
    window: the part of every slice that the model sees. moved: whether the window had to be moved to lie inside the slice.
    field: the part of every slice that stands for a training slice, over which percentiles are taken: as large as training
    slices were, or the whole slice where the bundle does not say.
    shrunk: the part that is shrunk before the model sees it, where the user asks for that; window and field are then larger by
    the same factor. inner: the point and the field within that part, in shrunk pixels.
    """

    at: tuple[int, ...]
    number: int
    point: tuple[int, int]
    window: Box
    moved: bool
    field: Box
    shrunk: Shrunk | None = None
    inner: tuple[tuple[int, int], Box] | None = None

    def __str__(self) -> str:
        return ",".join(map(str, self.at))

    def to_json(self) -> dict[str, Any]:
        """For the report: the voxel, and both parts as first pixel and size along the slice's axes as stored."""
        return {
            "at": list(self.at),
            "window": _box_json(self.window),
            "field": _box_json(self.field),
            **({"shrink": self.shrunk.factor} if self.shrunk else {}),
        }


def must_take_a_place(manifest: Manifest) -> None:
    """Raise CdiffError when the model looks at whole slices, where a place would change nothing."""
    if manifest.framing != "centre":
        how = "in tiles" if manifest.framing == "tile" else "resampled"
        raise CdiffError(
            f"a model with framing {manifest.framing!r} looks at the whole of each slice, {how}, and finds the structure "
            "wherever it lies; leave out --at (in Python, at)"
        )


def find_place(at: At, grid: Grid, manifest: Manifest, shrink: int = 1) -> Place:
    """The place `at` in a scan of `grid`. shrink: how many pixels along either axis of a slice become one.

    Raises CdiffError when `at` cannot be read or is not in the scan, or when slices are too small to be shrunk so much.
    """
    mm, shape = parse_point(at), grid.spatial
    voxel = parse_at(at) if mm is None else _voxel_at(mm, grid)
    told = ",".join(map(str, voxel)) if mm is None else f"{at} (voxel {','.join(map(str, voxel))})"
    if len(voxel) != len(shape):
        kind, letters = ("an image", "I,J") if len(shape) == 2 else ("a volume", "I,J,K")
        raise CdiffError(
            f"at {told} does not fit {kind} of {by(shape)}; give {letters}, an index for each axis as stored, counted from 0"
        )
    for word, index, n in zip(ORDINALS, voxel, shape, strict=False):
        if not 0 <= index < n:
            raise CdiffError(
                f"at {told} is not in this scan of {by(shape)}; the {word} index must be 0 to {n - 1}, counted along the axis as stored"
            )
    number = 0 if grid.slice_axis is None else voxel[grid.slice_axis]
    axes = [axis for axis in range(len(shape)) if axis != grid.slice_axis]
    plane, point = (shape[axes[0]], shape[axes[1]]), (voxel[axes[0]], voxel[axes[1]])
    if shrink != 1:
        return _shrunk(voxel, number, plane, point, manifest, shrink)
    window = box_around(plane, manifest.image_size, point)
    middle = [part.start + N // 2 for part, N in zip(window, manifest.image_size, strict=True)]
    field = box_around(plane, manifest.slice_size or plane, point)
    return Place(voxel, number, point, window, middle != list(point), field)


def _shrunk(
    voxel: tuple[int, ...],
    number: int,
    plane: tuple[int, int],
    point: tuple[int, int],
    manifest: Manifest,
    factor: int,
) -> Place:
    """A place in slices that are shrunk: its parts there (`inner`), and where those lie in the slices, of size `plane`."""
    H, W = manifest.image_size
    most = min(plane[0] // H, plane[1] // W)
    if not 1 <= factor <= most:
        more = f"1 to {most} fit" if most else "which are smaller than the model's window"
        raise CdiffError(
            f"shrink {factor} does not fit slices of {by(plane)} and a window of {by((H, W))} pixels; {more}"
        )
    kept = manifest.slice_size or plane
    rows, columns = (
        min(factor * max(n, N), length) // factor * factor
        for n, N, length in zip(kept, manifest.image_size, plane, strict=True)
    )
    shrunk = Shrunk(factor, plane, box_around(plane, (rows, columns), point))
    inside = ((point[0] - shrunk.part[0].start) // factor, (point[1] - shrunk.part[1].start) // factor)
    # A side that is no multiple of the factor loses its last pixels, among which the point may be.
    inside = (min(inside[0], shrunk.size[0] - 1), min(inside[1], shrunk.size[1] - 1))
    window = box_around(shrunk.size, manifest.image_size, inside)
    field = box_around(shrunk.size, manifest.slice_size or shrunk.size, inside)
    middle = (window[0].start + H // 2, window[1].start + W // 2)
    return Place(
        voxel, number, point, shrunk.there(window), middle != inside, shrunk.there(field), shrunk, (inside, field)
    )


def parse_at(at: At) -> tuple[int, ...]:
    """The indices of a voxel. Raises CdiffError when they are not whole numbers."""
    try:
        words = at.split(",") if isinstance(at, str) else at
        return tuple(int(word) if isinstance(word, str) else operator.index(word) for word in words)
    except (TypeError, ValueError):
        raise CdiffError(
            f"at {at!r} cannot be read; give a voxel in whole numbers, such as 212,180,45, or a point in mm, such as L30,P20,S50"
        ) from None


def parse_point(at: At) -> NDArray[np.float64] | None:
    """The point [3] in NIfTI's space (right, front, up), in mm; None where `at` names no direction.

    Raises CdiffError when it names some, but not one number for each of right or left, front (A) or back (P), up (S) or down (I).
    """
    found = [POINT.fullmatch(word.strip()) for word in at.split(",")] if isinstance(at, str) else []
    if not any(found):
        return None
    point = np.full(3, np.nan)
    for match in found:
        if match:
            axis, sign = RAS[match[1].upper()]
            point[axis] = sign * float(match[2])
    if len(found) != 3 or np.isnan(point).any():
        raise CdiffError(
            f"at {at!r} cannot be read; a point is millimetres to the right (R) or left (L), front (A) or back (P), and up (S) or down "
            "(I), such as L30,P20,S50"
        )
    return point


def _voxel_at(point: NDArray[np.float64], grid: Grid) -> tuple[int, ...]:
    """The voxel whose middle is nearest. Raises CdiffError where the header does not say how the patient lies."""
    if not grid.has_orientation or len(grid.spatial) < 3:
        raise CdiffError("the scan's header does not say how the patient lies; give a voxel, such as 212,180,45")
    affine = grid.affine
    indices = np.linalg.solve(affine[:3, :3], point - affine[:3, 3])
    return tuple(int(index) for index in np.rint(indices))


def _box_json(box: Box) -> dict[str, list[int]]:
    return {"first": [part.start for part in box], "size": [part.stop - part.start for part in box]}
