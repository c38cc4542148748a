"""The tables that `cdiff evaluate` prints hold the report's own numbers, each in its own row and unit."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console, RenderableType

from cdiff.cli.score_tables import MODEL_SCORES, paper_tables, score_tables
from cdiff.runtime.scoring.paper import PaperRow


def printed(what: RenderableType) -> list[str]:
    """The lines of a table, with no more than one space between its cells and no lines drawn."""
    file = io.StringIO()
    Console(file=file, width=200).print(what)
    return [" ".join(re.sub("[│┃|]", " ", line).split()) for line in file.getvalue().splitlines()]


def some_report(**changes: Any) -> dict[str, Any]:
    """A report of a volume, in which no two numbers are the same."""
    report: dict[str, Any] = {
        key: {"mean": at / 100, "low": (at - 0.4) / 100, "high": (at + 0.3) / 100, "n_slices": 0}
        for at, (_, key) in enumerate(MODEL_SCORES, start=10)
    }
    report |= {
        "n_slices": 7,
        "n_cases": 2,
        "ged_samples": {"model": 32},
        "cases": [{"slices": [1]}, {"slices": [1, 2]}],
    }
    report["dice_per_threshold"] = [{"threshold": 0.1, "mean": 0.91}, {"threshold": 0.5, "mean": None}]
    levels = range(1, 3)
    for name, size in (("dice", 0.6), ("iou", 0.5)):
        report[f"{name}_per_level"] = [{"mean": size + c / 100} for c in levels]
    for unit, size in (("mm", 2), ("px", 4)):
        report[f"hd95_{unit}_per_level"] = [
            {"mean": size + c / 10, "n_slices": 1, "n_model_empty": c, "n_annotators_empty": 3} for c in levels
        ]
    for unit, size in (("ml", 0.25), ("voxels", 250)):
        report[f"volume_error_{unit}_per_level"] = [
            {"signed": {"mean": -size * c, "n_cases": 1}, "absolute": {"mean": 2 * size * c}} for c in levels
        ]
    return report | changes


def test_each_score_stands_in_its_own_row_with_its_interval() -> None:
    lines = printed(score_tables(some_report()))
    assert lines[0] == "7 slices of 2 cases"
    assert "soft Dice, five thresholds 0.100 0.096 to 0.103" in lines
    assert "energy distance (GED), 32 samples 0.140 0.136 to 0.143" in lines
    shown = [line for line in lines if " to 0." in line]
    assert len(shown) == len(MODEL_SCORES) - 1, "all but that of unmarked slices, of which there are none"
    assert len({line.partition(" to ")[0].split()[-1] for line in shown}) == len(shown), "no score is shown twice"
    for word, part in (
        *(("Brier", "brier"), ("floor", "floor"), ("CRPS", "crps"), ("ECE", "ece"), ("entropy", "entropy"), ("run std", "run_std")),
        *(("expects", "expected_dice"), ("majority", "each_annotators"), ("rank", "rank"), ("pairwise", "pairwise")),
        *(("five", "soft_dice_5"), ("nine", "soft_dice_9"), ("without the diagonal", "no_diagonal")),
    ):  # fmt: skip
        assert part in next(key for label, key in MODEL_SCORES if word in label)
    at = lines.index("0.1 0.5")
    assert "0.910 -" in lines[at : at + 3]


def test_unmarked_slices_and_whole_volumes_are_shown_where_there_are_some() -> None:
    for slices, said in ((3, "3 slices"), (1, "1 slice")):
        unmarked = {"mean": 0.5, "low": None, "high": None, "n_slices": slices}
        lines = printed(score_tables(some_report(false_positive_slices=unmarked)))
        assert lines[0] == f"7 slices of 2 cases, {said} unmarked"
    assert "unmarked slices in which the model marks 0.500 -" in lines
    lines = printed(score_tables(some_report(cases=[{"slices": [1]}])))
    assert not [line for line in lines if line.startswith("each case as a whole")]


def test_levels_are_in_millimetres_and_millilitres_where_the_headers_say_them() -> None:
    report = some_report()
    lines = printed(score_tables(report))
    assert "level Dice IoU HD95, mm one empty volume - true, ml without sign, ml" in lines
    assert "1 0.610 0.510 2.10 4 -0.250 0.500" in lines
    assert "2 0.620 0.520 2.20 5 -0.500 1.000" in lines
    for entry in report["hd95_mm_per_level"]:
        entry["n_slices"] = 0
    for entry in report["volume_error_ml_per_level"]:
        entry["signed"]["n_cases"] = 0
    lines = printed(score_tables(report))
    assert "level Dice IoU HD95, pixels one empty volume - true, voxels without sign, voxels" in lines
    assert "2 0.620 0.520 4.20 5 -500.0 1000.0" in lines
    # Some slices or cases may have nothing to measure: the others are still in their unit.
    report["hd95_mm_per_level"][1]["n_slices"] = 1
    report["volume_error_ml_per_level"][1]["signed"]["n_cases"] = 1
    assert "2 0.620 0.520 2.20 5 -0.500 1.000" in printed(score_tables(report))


def test_numbers_beside_the_paper_s_stand_in_their_table_with_their_source() -> None:
    at_hand: dict[str, Any] = {"data": {"folder": "mine"}, "protocol": {}, "model": {"name": "ours"}}
    beside = [PaperRow(2, "theirs", "kidney", 87.654, 80.04, 90.06, "Table 2 of theirs")]
    beside += [PaperRow(3, "others", "kidney", None, 1.0, None, "nowhere")]
    lines = printed(paper_tables(some_report(**at_hand), beside))
    (source,) = [line.split()[0] for line in lines if line.endswith(" Table 2 of theirs")]
    assert f"theirs kidney 87.65 80.0 to 90.1 {source}" in lines
    assert any(line.startswith("others kidney - - (") for line in lines)
    titles = [place for place, line in enumerate(lines) if line.startswith("Amit et al. 2023, Table ")]
    where = [place for place, line in enumerate(lines) if line.startswith(("theirs", "others"))]
    assert titles[1] < where[0] < titles[2] < where[1]
    assert any("Rows of different data cannot be compared." in line for line in lines)
