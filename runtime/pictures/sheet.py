"""The contact sheet of a data set: for some cases the image, every annotator's outline, and the soft label that follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.case import natural
from cdiff.runtime.data.cases import read_masks
from cdiff.runtime.files import atomic_path
from cdiff.runtime.pictures import drawing
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.words import several

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cdiff.runtime.data.case import Case
    from cdiff.runtime.data.look import Look
    from cdiff.runtime.sampling.framing import Box
    from cdiff.runtime.scans.grid import View

CASES = 12
"""The most cases on a sheet."""
LONGEST_NAME = 34
"""How many characters of a case's name are shown."""
DPI = 110
SIDE, GAP, EDGE, BETWEEN = 1.75, 0.08, 0.35, 0.4
BLOCK = 3 * SIDE + 2 * GAP
HEAD, ROW, FOOT = 0.85, 0.34, 0.95
SOFT_KEY, NAME, LETTER = 2.1, 0.75, 0.125
"""Widths in inches: of the soft label's key; in the annotators' key, the least width of a stroke with its name, and the width per letter of a
long name."""
Place = tuple[float, float, float, float]


def chosen(looks: Sequence[Look]) -> list[Look]:
    """Up to CASES readable cases, spread evenly over those that anybody marked (over all of them if nobody marked any)."""
    readable = [look for look in looks if look.readable]
    marked = [look for look in readable if look.row["marked_slices"]] or readable
    if len(marked) <= CASES:
        return marked
    return [marked[i] for i in np.linspace(0, len(marked) - 1, CASES).round().astype(int)]


@drawing.without_latex()
def write_sheet(path: Path, looks: Sequence[Look], channels: int, slice_axis: int, title: str, note: str) -> None:
    """Draw the fullest slice of some cases and write a PNG. title and note: a line above and one below it.

    Raises CdiffError when it cannot be written.
    """
    figure = sheet_figure(chosen(looks), channels, slice_axis, title, note)
    with atomic_path(path) as part:
        drawing.save(figure, part, DPI)


def sheet_figure(looks: Sequence[Look], channels: int, slice_axis: int, title: str, note: str) -> Figure:
    """The sheet as a matplotlib figure: a block of three panels for each case, two blocks per row."""
    figure, blocks = new_page(len(looks), ("image", "every annotator's outline", "soft label"), title, note)
    raters = sorted({name for look in looks for name in look.case.raters}, key=natural)
    colours = dict(zip(raters, drawing.outline_colours(len(raters), readers=True), strict=True))
    drawn = None
    for look, places in zip(looks, blocks, strict=True):
        drawn = _block(figure, places, look, colours, channels, slice_axis)
    if drawn is not None:
        width = figure.get_figwidth()
        beside = width - 2 * EDGE - SOFT_KEY - 0.25
        each = max(NAME, LETTER * max(map(len, colours)))
        fits = each * len(colours) <= min(BLOCK, beside)
        across = min(BLOCK, beside, (each if fits else NAME) * len(colours) + 0.6)
        key = drawing.panel(figure, (EDGE, 0.35, across, 0.44))
        names = [(name if fits else str(i), colour) for i, (name, colour) in enumerate(colours.items(), start=1)]
        drawing.line_key(key, names[:14], "annotator")
        soft_key(figure, drawn, "soft label: fraction of annotators")
    return figure


def new_page(count: int, heads: Sequence[str], title: str, note: str) -> tuple[Figure, list[list[Place]]]:
    """An empty page for `count` blocks of three panels, two blocks per row; and the places of each block's panels.

    heads: what each of the three panels shows, written above the first row. title and note: a line above and one below.
    """
    columns = min(2, max(1, count))
    rows = math.ceil(count / columns)
    width = 2 * EDGE + columns * BLOCK + (columns - 1) * BETWEEN
    height = HEAD + rows * (SIDE + ROW) + FOOT
    figure = drawing.new_figure(width, height)
    figure.text(
        EDGE / width, 1 - 0.3 / height, title, color=drawing.INK, fontsize=13, fontweight="bold", va="center",
        parse_math=False,
    )  # fmt: skip
    figure.text(EDGE / width, 0.15 / height, note, color=drawing.FAINT, fontsize=8.5, va="center", parse_math=False)
    blocks = []
    for number in range(count):
        row, column = divmod(number, columns)
        left = EDGE + column * (BLOCK + BETWEEN)
        bottom = height - HEAD - (row + 1) * (SIDE + ROW) + ROW / 2
        blocks.append([(left + i * (SIDE + GAP), bottom, SIDE, SIDE) for i in range(3)])
    for places in blocks[:columns]:
        for place, words in zip(places, heads, strict=True):
            x, y = place[0] / width, 1 - 0.6 / height
            figure.text(x, y, words, color=drawing.FAINT, fontsize=8.5, va="center")
    return figure, blocks


def soft_key(figure: Figure, drawn: Any, words: str) -> None:
    """Draw the colour key of a soft map in the page's lower right corner."""
    drawing.colour_key(figure, (figure.get_figwidth() - EDGE - SOFT_KEY, 0.68, SOFT_KEY, 0.11), drawn, words)


def begin_block(
    figure: Figure, places: list[Place], title: str, image: NDArray[np.float32], near: Box, view: View, in_colour: bool
) -> tuple[NDArray[np.float32], tuple[Axes, Axes]]:
    """Draw a block's title and its whole image [h, w] or [channels, h, w], with a frame around `near`. Returns the picture for the
    close-ups, and the other two panels."""
    for place in places:
        drawing.panel(figure, place).set_facecolor("black")
    whole = drawing.panel(figure, places[0])
    figure.text(
        places[0][0] / figure.get_figwidth(), (places[0][1] + SIDE + 0.1) / figure.get_figheight(), title,
        color=drawing.INK, fontsize=8.5, va="center", parse_math=False,
    )  # fmt: skip
    others = drawing.panel(figure, places[1]), drawing.panel(figure, places[2])
    if image.ndim == 3 and not in_colour:
        drawing.show_image(whole, _mosaic(image), (slice(None), slice(None)), view, (0.0, 1.0))
        return image[0], others
    picture = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    box = (slice(0, picture.shape[0]), slice(0, picture.shape[1]))
    drawing.show_image(whole, picture, box, view, drawing.window_of(picture))
    if near != box:
        drawing.frame_box(whole, near)
    return picture, others


def _block(
    figure: Figure, places: list[Place], look: Look, colours: dict[str, str], channels: int, slice_axis: int
) -> Any:
    """Draw one case: image, outlines, soft label. Returns the soft label's mappable for the colour key."""
    image, masks, view = _read(look.case, look.best_slice, channels, slice_axis)
    soft = masks.mean(axis=0, dtype=np.float32)
    near = drawing.close_up(np.concatenate([masks.astype(np.float32), soft[None]]), view)
    slices = f" · slice {look.best_slice} of 0 to {look.row['slices'] - 1}" if look.row["slices"] > 1 else ""
    title = f"{short(look.case.name)} · {look.split}{slices} · {several(len(masks), 'mask')}"
    in_colour = channels == 3 and not look.case.modalities
    picture, (outlined, labelled) = begin_block(figure, places, title, image, near, view, in_colour)
    window = drawing.window_of(picture[near])
    drawing.show_image(outlined, picture, near, view, window)
    for rater, mask in zip(look.case.raters, masks, strict=True):
        drawing.outline(outlined, mask, near, colours[rater], width=1.1)
    drawing.show_image(labelled, picture, near, view, window, light=0.6)
    if not look.row["spacing_is_placeholder"]:
        drawing.scale_bar(outlined, near, view)
    return drawing.show_soft(labelled, soft, near, view)


def _read(
    case: Case, index: int, channels: int, slice_axis: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_], View]:
    """One slice turned as the preview turns it: image [h, w] or [channels, h, w], masks bool [n, h, w]."""
    scan = read_scan(case.scan, channels=channels, slice_axis=slice_axis)
    view = scan.grid.view
    image, masks = view(scan.slices[index]), view(read_masks(case, scan.grid)[index])
    return (image if len(image) > 1 else image[0]), masks, view


def _mosaic(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The channels of [channels, h, w] as one picture of tiles in a square, each in its own grey window, 0 to 1."""
    side = math.ceil(math.sqrt(len(image)))
    tiles = [drawing.grey(channel, drawing.window_of(channel)) for channel in image]
    tiles += [np.zeros_like(tiles[0])] * (side * math.ceil(len(image) / side) - len(tiles))
    return np.block([tiles[start : start + side] for start in range(0, len(tiles), side)])


def short(name: str) -> str:
    """The name, or the end of it if it is long."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
