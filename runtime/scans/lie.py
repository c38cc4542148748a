"""How a scan's slices lie in the patient, by its header: a network that learned from axial slices knows nothing of sagittal ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # bundles are opened also where no library for scans is installed
    from cdiff.runtime.scans.grid import Grid

ACROSS, ALONG, UP = "left-right", "front-back", "up-down"
DIRECTIONS = (ACROSS, ALONG, UP)
"""The body's directions, in the order of NIfTI's x, y and z. Which end comes first does not count: training flips slices."""
PLANES = {UP: "axial", ALONG: "coronal", ACROSS: "sagittal"}
CLEAR = 0.87
"""From this cosine on (30 degrees) an axis runs along a direction; one that leans more lies between two."""
UNTURNED = ((1, 1, 1), (-1, -1, 1))
"""The signs, in NIfTI's space, of NIfTI's axes and of ITK's."""
NEARLY_ALL = 0.9
"""Share of the training volumes that must lie alike before a model counts as trained on such slices."""


@dataclass(frozen=True)
class Lie:
    """The body's directions along which a slice's first and second array axes run, and that from slice to slice."""

    first: str
    second: str
    through: str

    @property
    def plane(self) -> str:
        return PLANES[self.through]


def directions(grid: Grid) -> tuple[str, ...] | None:
    """The direction along which each array axis of a volume runs; None where its header does not say, or one lies between two.

    A header with the first voxel at the origin and axes that are not turned, in NIfTI's space or in ITK's (whose first two point the
    other way), does not say either: programs that know only the spacing write such headers.
    """
    if grid.header is None or len(grid.spatial) < 3 or not grid.has_orientation:
        return None
    affine = grid.affine
    edges = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if not affine[:3, 3].any() and any(np.array_equal(edges, np.diag(own)) for own in UNTURNED):
        return None
    if np.abs(edges).max(axis=0).min() < CLEAR:
        return None
    found = tuple(DIRECTIONS[int(axis)] for axis in np.abs(edges).argmax(axis=0))
    return found if len(set(found)) == len(found) else None


def lie_of(grid: Grid) -> Lie | None:
    """How the slices of a volume lie; None where its header does not say."""
    axes = directions(grid)
    if axes is None or grid.slice_axis is None:
        return None
    first, second = (axis for number, axis in enumerate(axes) if number != grid.slice_axis)
    return Lie(first, second, axes[grid.slice_axis])


def usual(lies: Iterable[Lie | None], share: float = 0.0) -> Lie | None:
    """How most volumes lie: more than half, and at least `share`, of those whose headers say it; None where no lie is so common."""
    known = [lie for lie in lies if lie is not None]
    if not known:
        return None
    best = max(set(known), key=known.count)
    count = known.count(best)
    return best if 2 * count > len(known) and count >= share * len(known) else None


def otherwise(lie: Lie | None, wanted: Lie | None, whose: str) -> str | None:
    """In words how a volume's slices lie otherwise than `wanted`; whose: of whom that is, such as "those of most images". None where they do not, or
    where one of both is not known."""
    if lie is None or wanted is None or lie == wanted:
        return None
    if lie.plane != wanted.plane:
        return f"slices are {lie.plane}, but {whose} are {wanted.plane}"
    return f"slices have the {lie.first} axis first, but {whose} have the {wanted.first} axis first"
