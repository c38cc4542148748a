"""Notices what is odd in masks while they are read: training and evaluation then say what a check of the data would, in a line per kind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.case import Case, listed
from cdiff.runtime.data.masks import Mask, counted, inside, own_grid
from cdiff.runtime.data.placing import outside_share
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.lie import Lie, lie_of, otherwise, usual
from cdiff.runtime.scans.scale import out_of_scale, pixel_mm
from cdiff.runtime.words import by, several

if TYPE_CHECKING:
    from cdiff.runtime.manifest import Manifest

PLACE = "masks whose headers put them elsewhere than their image"
OUTSIDE = "masks that lie partly outside their image"
KIND = "masks in another kind of file than their image"
VALUES = "masks that hold more than 0 and one other value"
NEGATIVE = "masks of values below 0"
LABELS = "masks of a value above all labels that count as inside"
CONTOURS = "contours that are not all used as they are"
BACKGROUND = "masks that mark the background"
COLOURS = "masks that seem to hold a picture's colours for slices"
AXIS = "volumes that are cut into strips"
MIXED = "images whose slices are oriented differently from most"
SCALE = "images whose pixels are of another size than in training"
TURNED = "images whose slices are oriented differently from those in training"


class Oddities:
    """Collected case by case: for each kind the cases, and the first one's oddity in words. `told` gives the lines."""

    def __init__(self, model: Manifest | None = None, resampled: tuple[int, int] | None = None) -> None:
        """model: images are compared with those of its training, without it with one another. resampled: as in a manifest."""
        self._model = model
        self._resampled = resampled if model is None else model.resampled
        self.names: list[str] = []
        self.lies: list[Lie | None] = []
        self.pixels: list[float | None] = []
        self._cases: dict[str, list[str]] = {}
        self._first: dict[str, str] = {}

    def see_grid(self, case: Case, grid: Grid) -> None:
        """Note a volume whose slices seem to lie along another axis; how slices lie in the patient, and how large their pixels are."""
        self.names.append(case.name)
        self.lies.append(lie_of(grid))
        self.pixels.append(pixel_mm(grid, self._resampled))
        if (axis := better_axis(grid.spatial, grid.slice_axis)) is not None:
            self._add(AXIS, case, f"{by(grid.spatial)}, whose slices seem to lie along axis {axis}")

    def see_mask(self, case: Case, path: Path, mask: Mask, drawn: NDArray[np.bool_], grid: Grid) -> None:
        """Note what is odd in where a mask lies, in the kind of its file, in its values, and whether it is black drawn on white.

        drawn: its slices [S, H, W].
        """
        if mask.is_laid(case):
            if share := outside(mask, case, path, grid):
                self._add(OUTSIDE, case, f"{share} of what {path.name} marks, by their headers")
        elif reason := misplaced(mask, grid):
            self._add(
                PLACE, case, f"{path.name} and its image {reason} (--masks-by header lays it where its header says)"
            )
        for note in mask.notes:
            self._add(CONTOURS, case, f"{path.name} {note}")
        if (mask.header is None) != (grid.header is None):
            self._add(
                KIND,
                case,
                f"{path.name} and {case.image.name} are of kinds that usually store a slice in different orientations",
            )
        if is_negative(mask.values):
            self._add(NEGATIVE, case, f"{path.name} holds nothing above 0, so no pixel counts as inside")
        elif not case.labels and not is_plain(mask.values):
            self._add(VALUES, case, f"in {path.name}, values above half of the largest count as inside")
        if is_above(mask.values, case.labels):
            self._add(LABELS, case, f"{path.name} holds 0 and {mask.values.max():g}, so no pixel counts as inside")
        if marks_the_background(drawn):
            self._add(BACKGROUND, case, f"{path.name} marks the corners of every slice and most of it")
        if holds_a_picture(drawn):
            self._add(
                COLOURS, case, f"{path.name} marks all of its fourth slice of four, as a picture's transparency would"
            )

    def told(self) -> list[str]:
        """A line for each kind, with the cases and where to look."""
        self._tell_as_trained(self._model) if self._model else self._tell_among_themselves()
        return [
            f"{kind}, in {several(len(names), 'case')} ({listed(names)}): {self._first[kind]}. They are used as "
            "they are; look at them with cdiff data check"
            for kind, names in self._cases.items()
        ]

    def _tell_as_trained(self, model: Manifest) -> None:
        for name, lie, mm in zip(self.names, self.lies, self.pixels, strict=True):
            if text := otherwise(lie, model.lie, "those in training"):
                self._tell(TURNED, name, f"its {text}")
            if text := out_of_scale(mm, model.pixel_mm):
                self._tell(SCALE, name, f"its {text}")

    def _tell_among_themselves(self) -> None:
        most = usual(self.lies)
        for name, lie in zip(self.names, self.lies, strict=True):
            if text := otherwise(lie, most, "those of most images"):
                self._tell(MIXED, name, f"its {text}")

    def _add(self, kind: str, case: Case, text: str) -> None:
        self._tell(kind, case.name, text)

    def _tell(self, kind: str, name: str, text: str) -> None:
        names = self._cases.setdefault(kind, [])
        if name not in names:
            names.append(name)
        self._first.setdefault(kind, f"{name}: {text}")


def misplaced(mask: Mask, grid: Grid) -> str | None:
    """In words how a mask's header contradicts its image's, or None; axes of length one after the second do not count."""
    if mask.header is None or grid.header is None or counted(mask.values.shape) != counted(grid.spatial):
        return None
    shape = counted(grid.spatial)
    axis = grid.slice_axis if len(shape) == 3 else None
    return Grid(shape, axis, grid.header).differs_from(Grid(shape, axis, mask.header), ones_count=True)


def outside(mask: Mask, case: Case, path: Path, grid: Grid) -> str | None:
    """In words the share of what a mask marks that its header puts outside its image; None where all is inside."""
    own = own_grid(mask, path)
    share = outside_share(inside(mask.values, case.labels).reshape(own.spatial), own, grid)
    return f"{share:.1%}" if share else None


def is_plain(values: NDArray[np.generic]) -> bool:
    """Whether a mask holds nothing but 0 and one other value, so that no rule decides what is inside."""
    largest = values.max(initial=0)
    return bool(((values == 0) | (values == largest)).all())


def is_negative(values: NDArray[np.generic]) -> bool:
    """Whether a mask holds values below 0 and none above (255 in signed 8 bits is -1): hardly the mask of someone who saw nothing."""
    return bool(values.min(initial=0) < 0 and values.max(initial=0) <= 0)


def is_above(values: NDArray[np.generic], labels: tuple[int, ...]) -> bool:
    """Whether a mask holds 0 and one other value, such as 255, that is above all labels: more likely no label map than one without them."""
    return bool(labels) and is_plain(values) and bool(np.rint(values.max(initial=0)) > max(labels))


def marks_the_background(drawn: NDArray[np.bool_]) -> bool:
    """Whether a mask [S, H, W] looks like one whose values are exchanged, as black drawn on white, or marks everything."""
    corners = drawn[:, :: max(drawn.shape[1] - 1, 1), :: max(drawn.shape[2] - 1, 1)]
    return bool(corners.all() and drawn.mean() > 0.5)


def holds_a_picture(drawn: NDArray[np.bool_]) -> bool:
    """Whether the slices [S, H, W] of a mask may be a picture's red, green, blue and opacity, the last being full everywhere."""
    return len(drawn) == 4 and bool(drawn[3].all()) and not drawn[:3].all()


def better_axis(shape: tuple[int, ...], slice_axis: int | None) -> int | None:
    """The axis that a volume's slices seem to lie along where those of `slice_axis` are strips; else None."""
    if len(shape) != 3 or slice_axis is None:
        return None
    thin = int(np.argmin(shape))
    return thin if thin != slice_axis and _is_strip(shape, slice_axis) and not _is_strip(shape, thin) else None


def _is_strip(shape: tuple[int, ...], axis: int) -> bool:
    """Whether the slices along an axis are more than twice as long as wide."""
    sides = shape[:axis] + shape[axis + 1 :]
    return max(sides) > 2 * min(sides)
