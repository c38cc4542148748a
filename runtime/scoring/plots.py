"""The plots of an evaluation, for print: reliability diagram, expected Dice, and soft Dice against the number of runs or steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdiff.runtime.pictures.drawing import new_figure, save, without_latex
from cdiff.runtime.scoring.expectation import pairs_of
from cdiff.runtime.scoring.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID, PALE = "#1b1f24", "#57606a", "#d8dee4", "#a6cde6"
COLOURS = ("#0072b2", "#d55e00")
"""Blue and vermilion of Okabe and Ito's palette, distinguishable with every kind of colour vision, and in grey."""
DPI = 200
REGION_LABELS = {"whole": "whole slice", "near": "near the structure"}


@without_latex()
def write_reliability(report: Mapping[str, Any], path: Path) -> None:
    """Plot the share of annotators against the map's value, one panel per region, with the bins' numbers of pixels below."""
    figure = _page(7.6, 4.3)
    grid = figure.add_gridspec(2, 2, height_ratios=(3.2, 1), left=0.1, right=0.985, top=0.9, bottom=0.125, hspace=0.12)
    for column, (region, label) in enumerate(REGION_LABELS.items()):
        bins = [row for row in report["reliability"][region] if row["pixels"]]
        error = report["ece" if region == "whole" else "ece_near"]["mean"]
        top, below = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        top.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=(0, (4, 3)))
        _draw_bins(top, bins, "predicted", "observed")
        top.set_title(
            f"{label}: ECE {'-' if error is None else format(error, '.4f')}", loc="left", fontsize=10, color=INK
        )
        top.set_ylim(-0.03, 1.03)
        top.set_xticklabels([])
        below.bar(
            [row["from"] for row in bins],
            [row["pixels"] for row in bins],
            [row["to"] - row["from"] for row in bins],
            align="edge", color=PALE, edgecolor="white", lw=0.6,
        )  # fmt: skip
        below.set_yscale("log")
        below.set_ylim(0.5, None)
        below.set_xlabel("soft map", fontsize=9, color=INK)
        for axes in (top, below):
            _tidy(axes)
            axes.set_xlim(-0.03, 1.03)
        if column == 0:
            top.set_ylabel("share of annotators\nwho include the pixel", fontsize=9, color=INK)
            below.set_ylabel("pixels", fontsize=9, color=INK)
            figure.align_ylabels([top, below])
    save(figure, path, DPI)


@without_latex()
def write_expected(report: Mapping[str, Any], path: Path) -> None:
    """Plot the Dice of the mask with an annotator against the Dice that the soft map expected: a point per slice, and the bins' means."""
    figure = _page(4.4, 4.5)
    axes = figure.add_axes((0.14, 0.12, 0.83, 0.8))
    pairs = np.concatenate([pairs_of(case) for case in report["cases"]])
    bins = [row for row in report["expected_bins"] if row["slices"]]
    axes.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=(0, (4, 3)))
    axes.plot(pairs[:, 0], pairs[:, 1], "o", color=PALE, ms=3, mew=0, label="a slice")
    _draw_bins(axes, bins, "expected", "found", label="mean of a tenth")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("Dice that the soft map expects", fontsize=9, color=INK)
    axes.set_ylabel("Dice with one annotator, mean over annotators", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 0.99), ncols=2, labelcolor=INK)
    _tidy(axes)
    save(figure, path, DPI)


@without_latex()
def write_curve(table: Table, x: str, label: str, path: Path) -> None:
    """Plot soft Dice at five and nine thresholds, with 95 % intervals, against the column `x` of a table. label: of the x axis."""
    figure = _page(5.2, 3.6)
    axes = figure.add_axes((0.13, 0.15, 0.845, 0.75))
    at = [row[x] for row in table]
    for name, colour, marker, words in (
        ("soft_dice_5", COLOURS[0], "o", "five thresholds"),
        ("soft_dice_9", COLOURS[1], "s", "nine thresholds"),
    ):
        axes.plot(at, _column(table, name), f"{marker}-", color=colour, lw=1.6, ms=4, label=words)
        axes.fill_between(
            at, _column(table, f"{name}_low"), _column(table, f"{name}_high"), color=colour, alpha=0.13, lw=0
        )
    if at[-1] > 12 * at[0] and x == "steps":
        axes.set_xscale("log")
    axes.set_xticks(_ticks(at), [str(n) for n in _ticks(at)])
    axes.minorticks_off()
    axes.set_xlabel(label, fontsize=9, color=INK)
    axes.set_ylabel("soft Dice, 95 % interval", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 0.99), ncols=2, labelcolor=INK)
    _tidy(axes)
    save(figure, path, DPI)


def _draw_bins(axes: Axes, bins: Table, x: str, y: str, **more: Any) -> None:
    """Draw the means of bins as a line through points."""
    axes.plot(_column(bins, x), _column(bins, y), "o-", color=COLOURS[0], lw=1.6, ms=4.5, **more)


def _ticks(at: Sequence[int]) -> list[int]:
    """The values themselves where they are few; else the first one and the multiples of a round number."""
    if len(at) <= 8:
        return list(at)
    step = next(k * 10**n for n in range(9) for k in (1, 2, 5) if at[-1] <= 6 * k * 10**n)
    return [at[0], *range(step, at[-1] + 1, step)]


def _column(table: Table, name: str) -> list[float]:
    return [float("nan") if row[name] is None else row[name] for row in table]


def _page(width: float, height: float) -> Figure:
    figure = new_figure(width, height)
    figure.set_facecolor("white")
    return figure


def _tidy(axes: Axes) -> None:
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=INK, length=3, color=FAINT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
