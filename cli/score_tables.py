"""How `cdiff evaluate` prints a report: scores, scores by threshold and by level, and the paper's tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cdiff.cli.console import number
from cdiff.runtime.words import several

if TYPE_CHECKING:
    from cdiff.runtime.scoring.paper import PaperRow

MODEL_SCORES = (
    ("soft Dice, five thresholds", "soft_dice_5"),
    ("soft Dice, nine thresholds", "soft_dice_9"),
    ("  each case as a whole, five thresholds", "case_soft_dice_5"),
    ("  each case as a whole, nine thresholds", "case_soft_dice_9"),
    ("energy distance (GED), {}", "ged"),
    ("  without the diagonal", "ged_no_diagonal"),
    ("  its floor for nested maps, with it", "ged_floor"),
    ("Brier score near the structure", "brier_near"),
    ("  its floor: annotators differ", "brier_floor_near"),
    ("CRPS near the structure", "crps_near"),
    ("calibration error (ECE) near the structure", "ece_near"),
    ("AUROC for disagreement near it: entropy", "auroc_entropy_near"),
    ("AUROC for disagreement near it: run std", "auroc_run_std_near"),
    ("annotators: soft Dice, one against the others", "soft_dice_5_annotators"),
    ("  each case as a whole", "case_soft_dice_5_annotators"),
    ("annotators: pairwise Dice", "pairwise_dice_annotators"),
    ("Dice with one annotator: of the soft map at 1/2", "dice_each"),
    ("  of the other annotators' majority", "dice_each_annotators"),
    ("  difference", "dice_each_difference"),
    ("  that the soft map itself expects", "expected_dice"),
    ("    less what was found", "expected_dice_difference"),
    ("    rank correlation of the two over slices", "expected_dice_rank"),
    ("  each case as a whole: of the soft map", "case_dice_each"),
    ("  of the majority", "case_dice_each_annotators"),
    ("  difference", "case_dice_each_difference"),
    ("unmarked slices in which the model marks", "false_positive_slices"),
)


def score_tables(report: Mapping[str, Any]) -> RenderableType:
    """The whole report but for what only a file can hold."""
    return Group(_scores(report), "", _thresholds(report), "", _levels(report))


def paper_tables(report: Mapping[str, Any], beside: Iterable[PaperRow]) -> RenderableType:
    """Tables 1 to 3 of Amit et al. 2023 for the data at hand beside other numbers, and what to know of them."""
    from cdiff.runtime.scoring.paper import TITLES, paper_notes, paper_rows

    rows = paper_rows(report, beside)
    sources = list(dict.fromkeys(row.source for row in rows))
    parts: list[RenderableType] = []
    for which, title in TITLES.items():
        table = Table(title=f"Amit et al. 2023, {title}", title_justify="left")
        for name in ("whose", "on which data", "%", "95 % interval", "from"):
            table.add_column(name, justify="left" if name in ("whose", "on which data") else "right", overflow="fold")
        for row in rows:
            if row.table == which:
                span = "-" if row.low is None or row.high is None else f"{row.low:.1f} to {row.high:.1f}"
                value = "-" if row.percent is None else f"{row.percent:.2f}"
                table.add_row(Text(row.whose), Text(row.data), value, span, f"({sources.index(row.source) + 1})")
        parts += [table, ""]
    notes = [f"({place}) {source}" for place, source in enumerate(sources, start=1)] + paper_notes(rows)
    return Group(*parts, *(Text(note) for note in notes))


def _scores(report: Mapping[str, Any]) -> Table:
    unmarked = report["false_positive_slices"]["n_slices"]
    slices, cases = report["n_slices"], report["n_cases"]
    title = f"{several(slices, 'slice')} of {several(cases, 'case')}"
    title += f", {several(unmarked, 'slice')} unmarked" if unmarked else ""
    table = Table(title=title, title_justify="left")
    for name in ("score", "mean", "95 % interval"):
        table.add_column(name, justify="left" if name == "score" else "right")
    # A case of one slice has the same scores as a whole: nothing to show twice.
    volumes = any(len(case["slices"]) > 1 for case in report["cases"])
    for label, key in MODEL_SCORES:
        if (key.startswith("case_") and not volumes) or (key == "false_positive_slices" and not unmarked):
            continue
        value = report[key]
        label = label.format(several(report["ged_samples"]["model"], "sample"))
        span = "-" if value["low"] is None else f"{number(value['low'])} to {number(value['high'])}"
        table.add_row(label, number(value["mean"]), span)
    return table


def _thresholds(report: Mapping[str, Any]) -> Table:
    table = Table(title="Dice of the soft map by threshold", title_justify="left")
    for entry in report["dice_per_threshold"]:
        table.add_column(f"{entry['threshold']:g}", justify="right")
    table.add_row(*(number(entry["mean"]) for entry in report["dice_per_threshold"]))
    return table


def _levels(report: Mapping[str, Any]) -> Table:
    """In millimetres and millilitres where the headers say how large a voxel is, else in pixels and voxels."""
    measured = any(entry["n_slices"] for entry in report["hd95_mm_per_level"])
    in_ml = any(entry["signed"]["n_cases"] for entry in report["volume_error_ml_per_level"])
    distance = report["hd95_mm_per_level" if measured else "hd95_px_per_level"]
    volume = report["volume_error_ml_per_level" if in_ml else "volume_error_voxels_per_level"]
    unit = "ml" if in_ml else "voxels"
    table = Table(title="By level: at least so many annotators", title_justify="left")
    for name in ("level", "Dice", "IoU", f"HD95, {'mm' if measured else 'pixels'}", "one empty", f"volume - true, {unit}", f"without sign, {unit}"):  # fmt: skip
        table.add_column(name, justify="right")
    for c, (found, error) in enumerate(zip(distance, volume, strict=True)):
        table.add_row(
            str(c + 1),
            number(report["dice_per_level"][c]["mean"]),
            number(report["iou_per_level"][c]["mean"]),
            number(found["mean"], 2),
            f"{found['n_model_empty'] + found['n_annotators_empty']}",
            number(error["signed"]["mean"], 3 if in_ml else 1),
            number(error["absolute"]["mean"], 3 if in_ml else 1),
        )
    return table
