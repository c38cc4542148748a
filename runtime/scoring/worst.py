"""Draws the slices on which a model does worst beside what the annotators drew, to show where its maps cannot be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdiff.runtime.data.cases import Case, read_masks
from cdiff.runtime.files import atomic_path
from cdiff.runtime.pictures import drawing
from cdiff.runtime.pictures.sheet import DPI, EDGE, Place, begin_block, new_page, short, soft_key
from cdiff.runtime.scoring.evaluate import Progress, Protocol, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS = ("image", "fraction of annotators", "the model's soft map")


@dataclass(frozen=True)
class Worst:
    """A case's worst slice: its number, its soft Dice at five thresholds, and the annotators' own soft Dice there, None if not defined."""

    case: Case
    slice: int
    soft_dice: float
    annotators: float | None


def worst_slices(report: Mapping[str, Any], cases: Sequence[Case], most: int) -> list[Worst]:
    """Each scored case's slice with the lowest soft Dice; of these the `most` lowest, the lowest first.

    cases: must include those of the report, and have unique names, as those that `choose_split` returns do.
    """
    by_name, found = {case.name: case for case in cases}, []
    for row in report["cases"]:
        scored = [one for one in row["slices"] if one["soft_dice_5"] is not None]
        if scored:
            found.append((row, min(scored, key=lambda one: float(one["soft_dice_5"]))))
    found.sort(key=lambda pair: float(pair[1]["soft_dice_5"]))
    return [
        Worst(by_name[row["case"]], one["slice"], one["soft_dice_5"], one["soft_dice_5_annotators"])
        for row, one in found[:most]
    ]


@drawing.without_latex()
def write_worst(
    path: Path, source: Source, worst: Sequence[Worst], protocol: Protocol, progress: Progress | None = None
) -> None:
    """Draw the slices into a PNG, with maps made again as `protocol` says, which gives those that were scored.

    progress: called as progress(done, total) in thousandths of a slice. Raises CdiffError when the file cannot be written.
    """
    figure = worst_figure(source, worst, protocol, progress)
    with atomic_path(path) as part:
        drawing.save(figure, part, DPI)


def worst_figure(
    source: Source, worst: Sequence[Worst], protocol: Protocol, progress: Progress | None = None
) -> Figure:
    """The sheet as a matplotlib figure: a block of three panels for each slice."""
    title = f"The {len(worst)} worst slices, one per case" if len(worst) > 1 else "The worst slice"
    note = f"{source.name} · soft Dice at five thresholds; annotators: one against the others, mean"
    figure, blocks = new_page(len(worst), HEADS, title, note)
    drawn = None
    for number, (one, places) in enumerate(zip(worst, blocks, strict=True)):

        def within(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(1000 * before + 1000 * done // max(total, 1), 1000 * len(worst))

        drawn = _block(figure, places, source, one, protocol, within)
    if drawn is not None:
        key = drawing.panel(figure, (EDGE, 0.35, 2.2, 0.44))
        drawing.line_key(key, [("at least half of the annotators", drawing.INK)], "")
        soft_key(figure, drawn, "fraction of annotators")
    return figure


def _block(
    figure: Figure,
    places: list[Place],
    source: Source,
    one: Worst,
    protocol: Protocol,
    progress: Progress,
) -> Any:
    """Draw one slice: the image, what the annotators drew, and the model's map. Returns the mappable for the colour key."""
    case = one.case
    scan, drawn_map = source.soft(case, one.slice, protocol, progress)
    view = scan.grid.view
    image, soft = view(scan.slices[one.slice]), view(drawn_map)
    fraction = view(read_masks(case, scan.grid)[one.slice]).mean(axis=0, dtype=np.float32)
    near = drawing.close_up(np.stack([fraction, soft]), view)
    number = f" · slice {one.slice}" if len(scan.slices) > 1 else ""
    readers = "" if one.annotators is None else f", annotators {one.annotators:.2f}"
    title = f"{short(case.name)}{number} · soft Dice {one.soft_dice:.2f}{readers}"
    in_colour = len(image) == 3 and not case.modalities
    picture, panels = begin_block(figure, places, title, image if len(image) > 1 else image[0], near, view, in_colour)
    window = drawing.window_of(picture[near])
    for axes, values in zip(panels, (fraction, soft), strict=True):
        drawing.show_image(axes, picture, near, view, window, light=0.6)
        drawn = drawing.show_soft(axes, values, near, view)
        drawing.outline(axes, fraction, near, drawing.INK, width=0.9)
    drawing.scale_bar(panels[0], near, view)
    return drawn
