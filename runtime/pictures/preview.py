"""The preview PNG of a result, and a picture of a case with its readers' outlines; matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.files import atomic_path
from cdiff.runtime.pictures import drawing
from cdiff.runtime.report import NOTICE
from cdiff.runtime.scans.grid import View
from cdiff.runtime.stack import Lazily, Stack, entropy
from cdiff.runtime.words import several, three_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cdiff.runtime.results import Result
    from cdiff.runtime.sampling.framing import Box
    from cdiff.runtime.stack import Float32

DPI = 130
SIDE, GAP, EDGE = 3.1, 0.28, 0.35
KEY = 0.62
STRIP = 8
SEEN = 0.1
"""A slice shows some agreement if its soft map reaches this share."""
LEAST_OF_WINDOW = 0.5
"""The smallest side of the close-up as a share of the window that a model saw; larger than usual, because a window is small already."""


@drawing.without_latex()
def write_preview(result: Result, path: Path, name: str) -> None:
    """Draw the slice with the largest soft area (the whole slice, the levels' outlines, soft map, uncertainty) and a strip of
    slices through the volume. path: a PNG file. Raises OSError when it cannot be written."""
    drawing.save(preview_figure(result, name), path, DPI)


def preview_figure(result: Result, name: str) -> Figure:
    """The preview as a matplotlib figure."""
    view = result.grid.view
    soft = Turned(result.stack, "soft", view)
    held = agreement(soft)
    best = held.fullest
    number = result.slices[best]
    variant = result.stack.variant
    outlines = Turned(result.stack, variant.outlines, view)[best]
    image = displayable(result, number)
    shown = _strip(held.most, best)
    box = close_up_of(result, [soft[index] for index in shown])
    whole = (slice(0, image.shape[0]), slice(0, image.shape[1]))
    window = drawing.window_of(image[box])

    strip = 1.72 if len(shown) > 1 else 0.0
    width = 2 * EDGE + 4 * SIDE + 3 * GAP
    height = 0.86 + 0.3 + SIDE + KEY + strip + 0.5
    figure = drawing.new_figure(width, height)
    _heading(figure, result, name)
    bottom = 0.42 + strip + KEY
    places = [(EDGE + column * (SIDE + GAP), bottom, SIDE, SIDE) for column in range(4)]

    where = f"Slice {number} (of 0 to {len(result.image) - 1})" if len(result.image) > 1 else "Image"
    axes = drawing.panel(figure, places[0], where)
    drawing.show_image(axes, image, whole, view, drawing.window_of(image))
    drawing.edge_letters(axes, view)
    drawing.scale_bar(axes, whole, view)
    if box != whole:
        drawing.frame_box(axes, box)

    axes = drawing.panel(figure, places[1], variant.outline_title)
    drawing.show_image(axes, image, box, view, window)
    colours = drawing.outline_colours(len(outlines), readers=variant.told == "annotator")
    for inside, colour in zip(outlines, colours, strict=True):
        drawing.outline(axes, inside, box, colour)
    drawing.scale_bar(axes, box, view)
    key = drawing.panel(figure, _key(places[1], 0.44))
    names = [str(k) for k in range(1, len(outlines) + 1)] if variant.of_annotators else ["mask"]
    drawing.line_key(key, list(zip(names, colours, strict=True)), variant.outline_key)

    axes = drawing.panel(figure, places[2], "Agreement" if variant.of_annotators else "Mean over runs")
    drawing.show_image(axes, image, box, view, window)
    drawn = drawing.show_soft(axes, soft[best], box, view)
    label = drawing.SOFT_LABEL if variant.of_annotators else drawing.RUNS_LABEL
    drawing.colour_key(figure, _key(places[2], 0.11), drawn, label)

    axes = drawing.panel(figure, places[3], "Uncertainty")
    drawing.show_image(axes, image, box, view, window, light=0.5)
    drawn = drawing.show_entropy(axes, entropy(soft[best]), box, view)
    drawing.outline(axes, soft[best], box, drawing.INK, width=1.0)
    drawing.colour_key(figure, _key(places[3], 0.11), drawn, f"{drawing.ENTROPY_LABEL} (line: one half)")

    if strip:
        _draw_strip(figure, result, soft, shown, best, box, view, width)
    _footing(figure, view, width)
    return figure


@drawing.without_latex()
def reader_figure(
    path: Path,
    image: Float32,
    readers: NDArray[np.bool_],
    soft: Float32,
    uncertainty: Float32,
    *,
    view: View | None = None,
    note: str = "",
) -> None:
    """Draw one slice as a PNG: the image, its readers' outlines, the soft map, and its uncertainty.

    image [H,W], readers [n,H,W], soft [H,W] in 0..1, uncertainty [H,W] in bits, all as stored; view turns them as in the
    preview. note: a line below the picture, such as a credit. Raises CdiffError when the file cannot be written.
    """
    view = view or View()
    picture, readers, soft, uncertainty = (view(a) for a in (image, readers, soft, uncertainty))
    box = drawing.close_up(np.concatenate([readers.astype(np.float32), soft[None]]), view)
    window = drawing.window_of(picture[box])
    width, bottom = 2 * EDGE + 4 * SIDE + 3 * GAP, KEY + (0.42 if note else 0.14)
    figure = drawing.new_figure(width, bottom + SIDE + 0.4)
    places = [(EDGE + column * (SIDE + GAP), bottom, SIDE, SIDE) for column in range(4)]

    axes = drawing.panel(figure, places[0], "Image")
    drawing.show_image(axes, picture, box, view, window)
    drawing.edge_letters(axes, view)
    drawing.scale_bar(axes, box, view)

    axes = drawing.panel(figure, places[1], f"What {len(readers)} readers drew")
    drawing.show_image(axes, picture, box, view, window)
    colours = drawing.outline_colours(len(readers), readers=True)
    for reader, colour in zip(readers, colours, strict=True):
        drawing.outline(axes, reader, box, colour)
    key = drawing.panel(figure, _key(places[1], 0.44))
    drawing.line_key(key, [(str(i), colour) for i, colour in enumerate(colours, start=1)], "reader")

    axes = drawing.panel(figure, places[2], "Predicted agreement")
    drawing.show_image(axes, picture, box, view, window)
    drawn = drawing.show_soft(axes, soft, box, view)
    drawing.colour_key(figure, _key(places[2], 0.11), drawn, drawing.SOFT_LABEL)

    axes = drawing.panel(figure, places[3], "Uncertainty")
    drawing.show_image(axes, picture, box, view, window, light=0.5)
    drawn = drawing.show_entropy(axes, uncertainty, box, view)
    drawing.outline(axes, soft, box, drawing.INK, width=1.0)
    drawing.colour_key(figure, _key(places[3], 0.11), drawn, f"{drawing.ENTROPY_LABEL} (line: one half)")
    if note:
        figure.text(EDGE / width, 0.16 / figure.get_figheight(), note, color=drawing.FAINT, fontsize=8.5, va="center")
    with atomic_path(path) as part:
        drawing.save(figure, part, DPI)


def close_up_of(result: Result, soft: Iterable[Float32]) -> Box:
    """The part of the picture around what the turned maps [rows, columns] mark; where the user named a place, the model's window sets its size."""
    view = result.grid.view
    if result.window is None:
        return drawing.close_up(soft, view)
    seen = _turned(result.window, result.image.shape[-2:], view)
    return drawing.close_up(soft, view, least=LEAST_OF_WINDOW, within=seen)


def displayable(result: Result, number: int) -> Float32:
    """A slice as the picture's [rows, columns], or [rows, columns, 3] where its three channels are colours.

    In a medical image (one with a header) channels are never colours: of several modalities the first is shown.
    """
    turned = result.grid.view(result.image[number])
    return np.moveaxis(turned, 0, -1) if len(turned) == 3 and result.grid.header is None else turned[0]


def _turned(box: Box, shape: tuple[int, ...], view: View) -> Box:
    """The part of the picture that corresponds to a part of the slice [H, W] as stored."""
    inside = np.zeros(shape, bool)
    inside[box] = True
    rows, columns = (np.flatnonzero(view(inside).any(axis=axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


class Turned:
    """A map of a stack, its slices turned as they are shown. Each is made when it is asked for: all of them would be as large as the scan."""

    def __init__(self, stack: Stack, attribute: str, view: View) -> None:
        self._maps, self._view = Lazily(stack, attribute), view

    def __len__(self) -> int:
        return len(self._maps)

    def __getitem__(self, index: int) -> Float32:
        """[..., rows, columns]: slice `index`."""
        return self._view(self._maps[index : index + 1][0])

    def __iter__(self) -> Iterator[Float32]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Agreement:
    """most [n]: the largest value of each slice's soft map. fullest: the index of the slice with the largest soft area, or the middle slice
    if none shows any agreement."""

    most: Float32
    fullest: int


def agreement(soft: Turned) -> Agreement:
    """What pictures need to know about every slice, from their soft maps."""
    most, areas = zip(*((one.max(), one.sum(dtype=np.float64)) for one in soft), strict=True)
    return Agreement(np.array(most), int(np.argmax(areas)) if max(most) >= SEEN else len(soft) // 2)


def _strip(most: Float32, best: int) -> list[int]:
    """Up to STRIP slices, spread evenly over those with some agreement and one more on each side; `best` is always among them."""
    held = np.flatnonzero(most >= SEEN)
    first, last = (max(held[0] - 1, 0), min(held[-1] + 1, len(most) - 1)) if held.size else (0, len(most) - 1)
    while last - first + 1 < min(STRIP, len(most)):
        first, last = max(first - 1, 0), min(last + 1, len(most) - 1)
    if last - first + 1 <= STRIP:
        return list(range(first, last + 1))
    chosen = np.unique(np.linspace(first, last, STRIP).round().astype(int))
    chosen[np.argmin(abs(chosen - best))] = best
    return [int(index) for index in chosen]


def _draw_strip(
    figure: Figure,
    result: Result,
    soft: Turned,
    shown: list[int],
    best: int,
    box: Box,
    view: View,
    width: float,
) -> None:
    gap = 0.12
    side = (width - 2 * EDGE - (STRIP - 1) * gap) / STRIP
    left = (width - len(shown) * side - (len(shown) - 1) * gap) / 2
    for column, index in enumerate(shown):
        axes = drawing.panel(figure, (left + column * (side + gap), 0.36, side, side))
        picture = displayable(result, result.slices[index])
        drawing.show_image(axes, picture, box, view, drawing.window_of(picture[box]))
        drawing.show_soft(axes, soft[index], box, view)
        colour = drawing.INK if index == best else drawing.FAINT
        axes.set_title(str(result.slices[index]), color=colour, fontsize=9, pad=3, y=1)


def _heading(figure: Figure, result: Result, name: str) -> None:
    width, height = figure.get_size_inches()
    report = result.report
    figure.text(
        EDGE / width, 1 - 0.3 / height, _short(name, 60), color=drawing.INK, fontsize=15, fontweight="bold", va="center",
        parse_math=False,
    )  # fmt: skip
    figure.text(
        EDGE / width, 1 - 0.6 / height, how(report), color=drawing.FAINT, fontsize=9.5, va="center", parse_math=False
    )
    count = "pixels" if result.grid.slice_axis is None else "voxels"
    lines = _sizes(report.get("volumes", {}), count, result.stack.variant.of_annotators)
    expected = report.get("expected_dice", {}).get("mask")
    if lines and expected is not None:
        beside = f"{lines[1][0]}  ·  " if len(lines) > 1 else ""
        lines[1:] = [(f"{beside}expected Dice {expected:.2f}", drawing.FAINT)]
    for line, (text, colour) in enumerate(lines):
        figure.text(
            1 - EDGE / width, 1 - (0.3 + 0.3 * line) / height, text, color=colour,
            fontsize=11 if line == 0 else 9.5, va="center", ha="right",
        )  # fmt: skip


def how(report: dict[str, Any]) -> str:
    """How the maps were made, in one line."""
    if "bundle" not in report:
        return ""
    return (
        f"model {_short(report['bundle'], 30)}  ·  {report['sampler']}, {several(report['steps'], 'step')} × {several(report['runs'], 'run')}, "
        f"seed {report['seed']}  ·  {report['engine']} on {report['device']}"
    )


def _sizes(volumes: dict[str, Any], count: str, of_annotators: bool) -> list[tuple[str, str]]:
    """Lines with the size on which at least half agree, and the sizes on which all and any agree; for an ensemble, its mask's size."""
    if not volumes:
        return []
    sizes = () if "unreliable" in volumes else (("ml", "ml"), ("mm2", "mm²"))
    unit, word = next(((unit, text) for unit, text in sizes if unit in volumes["mask"]), ("voxels", count))
    every, one, half = (part[unit] for part in (volumes["levels"][-1], volumes["levels"][0], volumes["mask"]))
    if word == "ml" and one < 1:
        every, one, half, word = 1000 * every, 1000 * one, 1000 * half, "mm³"
    if not of_annotators:
        return [
            (
                f"the ensemble's mask: {three_digits(half)} {word}" if half else "the ensemble's mask is empty",
                drawing.INK,
            )
        ]
    if not half:
        return [
            ("at least half agree nowhere", drawing.INK),
            (f"at least one on {three_digits(one)} {word}", drawing.FAINT),
        ]
    return [
        (f"at least half agree on {three_digits(half)} {word}", drawing.INK),
        (f"all on {three_digits(every)}, at least one on {three_digits(one)} {word}", drawing.FAINT),
    ]


def _short(text: str, most: int) -> str:
    """`text`, with its middle left out if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"


def _footing(figure: Figure, view: View, width: float) -> None:
    height = figure.get_figheight()
    for x, side, text in ((EDGE / width, "left", f"Shown: {view.note}."), (1 - EDGE / width, "right", NOTICE)):
        figure.text(x, 0.16 / height, text, color=drawing.FAINT, fontsize=8.5, va="center", ha=side)


def _key(place: tuple[float, float, float, float], height: float) -> tuple[float, float, float, float]:
    """The place of a panel's key, below the panel."""
    left, bottom, across, _ = place
    return left, bottom - 0.1 - height, across, height
