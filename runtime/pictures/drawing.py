"""The parts of which every picture is made: a slice, the soft map over it, outlines, keys, a scale bar."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    from cdiff.runtime.sampling.framing import Box
    from cdiff.runtime.scans.grid import View

Float32 = NDArray[np.float32]

PAGE, INK, FAINT = "#0e1116", "#e6e8eb", "#8b949e"
SOFT_LABEL = "fraction of experts who would include the pixel"
ENTROPY_LABEL = "uncertainty: entropy in bits"
RUNS_LABEL = "mean over runs"
SOFT_MAP = "plasma"
ENTROPY_SHADES = ("#06283d", "#136f8a", "#2fd0a5", "#e8fb6a")
MARGIN = 0.6
BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))
LATEX = threading.RLock()
READER_COLOURS = ("#4cc9f0", "#f9c74f", "#f94178", "#80ed99", "#c77dff", "#ff9f1c", "#ffffff")


def must_draw() -> None:
    """Raise CdiffError where matplotlib cannot be imported because it finds no folder for its cache: worth knowing before long work."""
    try:
        import matplotlib as _  # noqa: F401
    except OSError:
        raise CdiffError(
            "no picture can be drawn: matplotlib needs a folder for its cache, and neither the home nor one for temporary files can be "
            "written to; set TMPDIR to a folder that can, or ask for no picture"
        ) from None


@contextmanager
def without_latex() -> Iterator[None]:
    """Let matplotlib draw texts itself, even where the user's settings (`text.usetex`) ask for LaTeX, which fails on underscores in file names,
    or may not be installed. Raises CdiffError as `must_draw` does.
    """
    must_draw()
    import matplotlib

    # The settings are global, and other threads may draw too, so they are changed only where necessary, and under a lock.
    with LATEX, matplotlib.rc_context({"text.usetex": False}) if matplotlib.rcParams["text.usetex"] else nullcontext():
        yield


def new_figure(width: float, height: float) -> Figure:
    """A dark page of this size in inches, on the Agg canvas, without a display or pyplot's global state. Raises CdiffError as `must_draw` does."""
    must_draw()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAGE)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG with the figure's own background, whatever the user's matplotlib style says."""
    figure.savefig(
        path, dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": "cdiff"}, format="png",
        pil_kwargs={"compress_level": 3},  # the default, 6, gives files a tenth smaller and takes nearly three times as long
    )  # fmt: skip


def outline_colours(count: int, *, readers: bool = False) -> list[Any]:
    """A colour for each of `count` levels, from the soft map's colours without their dark end; for readers, which have no order, colours
    that tell them apart."""
    if readers:
        return [READER_COLOURS[i % len(READER_COLOURS)] for i in range(count)]
    from matplotlib import colormaps

    shades = np.linspace(0.35, 1.0, count) if count > 1 else [0.8]
    return [colormaps[SOFT_MAP](shade) for shade in shades]


def panel(figure: Figure, place: tuple[float, float, float, float], title: str = "") -> Axes:
    """Axes at (left, bottom, width, height) in inches, without ticks, with a small title above."""
    width, height = figure.get_size_inches()
    left, bottom, across, up = place
    axes = figure.add_axes((left / width, bottom / height, across / width, up / height))
    axes.set_facecolor(PAGE)
    axes.set_axis_off()
    # Without y, matplotlib would lay out all ticks, which are not drawn, to see whether they collide with the title.
    axes.set_title(title, color=INK, fontsize=10.5, pad=7, loc="left", y=1)
    return axes


def show_image(
    axes: Axes, image: Float32, box: Box, view: View, window: tuple[float, float], light: float = 1.0
) -> None:
    """Show the part `box` of a picture [rows, columns] or [rows, columns, 3], grey between the two values of `window`.

    light: below 1, dims the picture, so that a map drawn over it stands out.
    """
    scaled = light * grey(image[box], window)
    axes.imshow(scaled, cmap="gray", vmin=0, vmax=1, interpolation="bicubic", aspect=_aspect(view))


def grey(image: Float32, window: tuple[float, float]) -> Float32:
    """The picture's values scaled so that the two of `window` become 0 and 1, and clipped to these."""
    low, high = window
    scaled: Float32 = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    return scaled


def window_of(image: Float32) -> tuple[float, float]:
    """The grey window: percentiles 0.5 and 99.8 of the slice."""
    low, high = np.percentile(image, (0.5, 99.8))
    return float(low), float(high)


def show_soft(axes: Axes, soft: Float32, box: Box, view: View) -> Any:
    """Draw the soft map over the image, transparent at 0 so that the anatomy stays readable. Returns the mappable for its colour key."""
    return _overlay(axes, soft, box, view, SOFT_MAP, 0.55)


def show_entropy(axes: Axes, uncertainty: Float32, box: Box, view: View) -> Any:
    """Draw the uncertainty over the image, in its own colour scale. Returns the mappable for its colour key."""
    return _overlay(axes, uncertainty, box, view, entropy_shades(), 0.9)


def entropy_shades() -> LinearSegmentedColormap:
    """The colour scale of the uncertainty."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("entropy", ENTROPY_SHADES)


def _overlay(axes: Axes, values: Float32, box: Box, view: View, colours: Any, opacity: float) -> Any:
    shown = np.nan_to_num(values[box])
    alpha = opacity * np.clip((shown - 0.02) / 0.18, 0, 1)
    return axes.imshow(shown, cmap=colours, vmin=0, vmax=1, alpha=alpha, interpolation="bilinear", aspect=_aspect(view))


def outline(axes: Axes, inside: NDArray[Any], box: Box, colour: Any, width: float = 1.5) -> None:
    """Draw the line around where `inside` (a map 0..1, or a mask) is at least one half; nothing if that is everywhere or nowhere."""
    values = np.nan_to_num(np.asarray(inside[box], dtype=np.float32))
    if min(values.shape) > 1 and values.min() < 0.5 <= values.max():
        # matplotlib takes what equals a line's level for outside, and one half is inside, as it is in the mask.
        axes.contour(values, levels=[BELOW_HALF], colors=[colour], linewidths=width)


def colour_key(figure: Figure, place: tuple[float, float, float, float], mappable: Any, label: str) -> None:
    """Draw a horizontal colour bar with its label below, at (left, bottom, width, height) in inches."""
    from matplotlib.cm import ScalarMappable

    axes = panel(figure, place)
    axes.set_axis_on()
    bar = figure.colorbar(
        ScalarMappable(mappable.norm, mappable.cmap), cax=axes, orientation="horizontal", ticks=[0, 0.25, 0.5, 0.75, 1]
    )
    bar.ax.set_xticklabels(["0", "¼", "½", "¾", "1"])
    bar.ax.tick_params(colors=INK, labelsize=9, length=0, pad=3)
    bar.outline.set_visible(False)
    bar.set_label(label, color=FAINT, fontsize=9, labelpad=3)


def line_key(axes: Axes, entries: Sequence[tuple[str, Any]], label: str) -> None:
    """Fill `axes` with a key to the lines: a row of short strokes with their names, and a label below."""
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    step = 1 / max(len(entries), 1)
    for index, (name, colour) in enumerate(entries):
        left = index * step
        axes.plot([left, left + 0.3 * step], [0.86, 0.86], color=colour, lw=2.4, solid_capstyle="round")
        axes.text(left + 0.38 * step, 0.86, name, color=INK, fontsize=9, va="center_baseline", parse_math=False)
    axes.text(0.5, 0, label, color=FAINT, fontsize=9, ha="center", va="bottom")


def edge_letters(axes: Axes, view: View) -> None:
    """Write the letters of the patient's sides at the picture's edges, where the header gives them."""
    left, right, top, bottom = view.edges
    for text, x, y, across, up in (
        (left, 0.02, 0.5, "left", "center"),
        (right, 0.98, 0.5, "right", "center"),
        (top, 0.5, 0.98, "center", "top"),
        (bottom, 0.5, 0.02, "center", "bottom"),
    ):
        _over(axes, x, y, text, ha=across, va=up)


def scale_bar(axes: Axes, box: Box, view: View) -> None:
    """Draw a bar of a round length, at most a quarter of the width, in the lower left corner; nothing where the spacing is unknown."""
    if view.spacing is None:
        return
    across = (box[1].stop - box[1].start) * view.spacing[1]
    decade = 10.0 ** math.floor(math.log10(across / 4))
    length = max(k * decade for k in (1, 2, 5) if k == 1 or k * decade <= across / 4)
    x, y = 0.045, 0.05
    axes.plot([x, x + length / across], [y, y], color=INK, lw=2.2, solid_capstyle="butt", transform=axes.transAxes)
    _over(axes, x, y + 0.025, f"{length:g} mm" if length >= 0.1 else f"{1000 * length:g} µm", ha="left", va="bottom")


def frame_box(axes: Axes, box: Box) -> None:
    """Draw a thin frame around the part that the close-ups show."""
    from matplotlib.patches import Rectangle

    rows, columns = box
    corner = (columns.start - 0.5, rows.start - 0.5)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=INK, lw=1.0, alpha=0.85))


def close_up(soft: Iterable[Float32], view: View, least: float = 0.28, within: Box | None = None) -> Box:
    """The part of a picture around everything that is at least 0.2 in any of the maps [rows, columns]; the whole picture if that is most of it.

    It is square in mm where the picture allows, with a margin of MARGIN times the object's size on each side. least: its smallest
    side, as a share of the picture's longer one. within: the part that a model saw, if not all; it then replaces the picture for
    `least`, and is returned where no map reaches 0.2.
    """
    inside = reduce(np.logical_or, (np.nan_to_num(one) >= 0.2 for one in soft))
    shape = inside.shape
    whole = (slice(0, shape[0]), slice(0, shape[1]))
    seen = within or whole
    if not inside.any():
        return seen
    spacing = view.spacing or (1.0, 1.0)
    found = [np.flatnonzero(inside.any(axis=1 - axis)) for axis in (0, 1)]
    middle = [(rows[0] + rows[-1] + 1) / 2 for rows in found]
    size = [(rows[-1] + 1 - rows[0]) * mm for rows, mm in zip(found, spacing, strict=True)]
    longer = max((part.stop - part.start) * mm for part, mm in zip(seen, spacing, strict=True))
    side = max(max(size) * (1 + 2 * MARGIN), least * longer)
    box = []
    for axis in (0, 1):
        pixels = min(shape[axis], round(side / spacing[axis]))
        start = int(np.clip(round(middle[axis] - pixels / 2), 0, shape[axis] - pixels))
        box.append(slice(start, start + pixels))
    if all(part.stop - part.start > 0.8 * n for part, n in zip(box, shape, strict=True)):
        return whole
    return box[0], box[1]


def _aspect(view: View) -> float:
    return 1.0 if view.spacing is None else view.spacing[0] / view.spacing[1]


def _over(axes: Axes, x: float, y: float, text: str, **where: Any) -> None:
    """Write small text on an image, with a dark rim so that it can be read on white too."""
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=2.2, foreground=PAGE)]
    axes.text(x, y, text, transform=axes.transAxes, color=INK, fontsize=8.5, path_effects=rim, **where)
