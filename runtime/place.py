"""A place in a scan that the user names: its slice, the window of a model that looks at the structure alone, and the field around."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.framing import Box, box_around
from cdiff.runtime.grid import Grid
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.shapes import by

At = str | Sequence[int]
"""A voxel: "I,J,K", or its indices (two for a 2-D image), counted from 0 along the axes of the array as stored."""
ORDINALS = ("first", "second", "third")


@dataclass(frozen=True)
class Place:
    """Where a structure lies, for a model of the framing `centre`.

    at: the voxel, one index for each axis of the array as stored. number: of the slice that holds it. point: the other two
    indices, along the slice's axes as stored.
    window: the part of every slice that the model sees. moved: whether the window had to be moved to lie inside the slice.
    field: the part of every slice that stands for a slice of the training, of which percentiles are taken: as large as those
    were, or the whole slice where the bundle does not say.
    """

    at: tuple[int, ...]
    number: int
    point: tuple[int, int]
    window: Box
    moved: bool
    field: Box

    def __str__(self) -> str:
        return ",".join(map(str, self.at))

    def to_json(self) -> dict[str, Any]:
        """For the report: the voxel, and both parts as first pixel and size along the slice's axes as stored."""
        return {
            "at": list(self.at),
            "window": _box_json(self.window),
            "field": _box_json(self.field),
        }


def must_take_a_place(manifest: Manifest) -> None:
    """Raise CdiffError when the model looks at whole slices, so that a place in them would change nothing."""
    if manifest.framing != "centre":
        how = "in tiles" if manifest.framing == "tile" else "resampled"
        raise CdiffError(
            f"a model of the framing {manifest.framing!r} looks at the whole of each slice, {how}, and finds the structure "
            "wherever it lies; leave out --at (in Python, at)"
        )


def find_place(at: At, grid: Grid, manifest: Manifest) -> Place:
    """The place in a scan of `grid`. Raises CdiffError when it cannot be read, or is not in the scan."""
    voxel, shape = parse_at(at), grid.spatial
    told = ",".join(map(str, voxel))
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
    window = box_around(plane, manifest.image_size, point)
    middle = [part.start + N // 2 for part, N in zip(window, manifest.image_size, strict=True)]
    field = box_around(plane, manifest.slice_size or plane, point)
    return Place(voxel, number, point, window, middle != list(point), field)


def parse_at(at: At) -> tuple[int, ...]:
    """The indices. Raises CdiffError when they are not whole numbers."""
    try:
        words = at.split(",") if isinstance(at, str) else at
        return tuple(int(word) if isinstance(word, str) else operator.index(word) for word in words)
    except (TypeError, ValueError):
        raise CdiffError(f"at {at!r} cannot be read; give whole numbers, such as 212,180,45") from None


def _box_json(box: Box) -> dict[str, list[int]]:
    return {"first": [part.start for part in box], "size": [part.stop - part.start for part in box]}
