"""The report of an evaluation as tables for a spreadsheet or a statistics package: CSV with one header line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cdiff.runtime.scoring.metrics import NINE
from cdiff.runtime.scoring.scores import (
    PER_CASE,
    PER_CASE_LEVEL,
    PER_CASE_THRESHOLD,
    PER_LEVEL,
    PER_SLICE,
    PER_THRESHOLD,
    REGIONS,
)
from cdiff.runtime.scoring.summary import volume_errors

Table = list[dict[str, Any]]
"""Rows that all have the same columns; None is an empty cell."""
ENDS = ("mean", "low", "high")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""The characters with which a spreadsheet's formula may begin."""


def csv_text(table: Table) -> str:
    """The table as CSV, with floats to 9 significant digits; the columns are those of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in table)
    return text.getvalue()


def scores_table(report: Mapping[str, Any]) -> Table:
    """One row per score: its key, its level or threshold, mean, 95 % interval, and number of slices (of cases for PER_CASE and the like)."""
    rows = [
        _score_row(name, "", report[name]) for name in (*PER_SLICE, "expected_dice_rank", "ece", "ece_near", *PER_CASE)
    ]
    for name in (PER_THRESHOLD, PER_CASE_THRESHOLD):
        rows += [_score_row(name, f"threshold {e['threshold']:g}", e) for e in report[name]]
    rows += [_score_row(name, f"level {e['level']}", e) for name in (*PER_LEVEL, *PER_CASE_LEVEL) for e in report[name]]
    for unit in ("voxels", "ml"):
        key = f"volume_error_{unit}_per_level"
        rows += [
            _score_row(key, f"level {e['level']}, {kind}", e[kind])
            for kind in ("signed", "absolute")
            for e in report[key]
        ]
    return rows


def slices_table(report: Mapping[str, Any]) -> Table:
    """One row per scored slice."""
    return [
        {**_case_columns(case), "slice": scores["slice"], **_score_columns(scores, PER_SLICE, PER_LEVEL, PER_THRESHOLD)}
        | _numbered("empty_level", scores["empty_per_level"])
        for case in report["cases"]
        for scores in case["slices"]
    ]


def cases_table(report: Mapping[str, Any]) -> Table:
    """One row per case: means over its slices, its scores as a whole, its volumes at each level and their errors."""
    levels = report["model"]["levels"]
    rows = []
    for case in report["cases"]:
        volumes, errors = case["volumes"], volume_errors(case["volumes"])
        ml = volumes["voxel_ml"]
        rows.append(
            {
                **_case_columns(case),
                "slices": len(case["slices"]),
                "seconds": case["seconds"],
                **_score_columns(case["means"], PER_SLICE, PER_LEVEL, PER_THRESHOLD),
                **_score_columns(case["case_scores"], PER_CASE, PER_CASE_LEVEL, PER_CASE_THRESHOLD),
                **_numbered("predicted_voxels_level", volumes["predicted_voxels"]),
                **_numbered("true_voxels_level", volumes["true_voxels"]),
                "voxel_ml": ml,
                **_numbered("predicted_ml_level", _times(volumes["predicted_voxels"], ml)),
                **_numbered("true_ml_level", _times(volumes["true_voxels"], ml)),
                **_numbered("volume_error_ml_level", errors["ml"] or [None] * levels),
            }
        )
    return rows


def reliability_table(report: Mapping[str, Any]) -> Table:
    """One row per region and bin of the reliability diagram."""
    return [{"region": region, **row} for region in REGIONS for row in report["reliability"][region]]


def runs_table(report: Mapping[str, Any]) -> Table:
    """One row per number of runs: soft Dice of the maps that the first runs, of that number, give."""
    return [{"runs": row["runs"], **_intervals(row, ("soft_dice_5", "soft_dice_9"))} for row in report["by_runs"]]


def steps_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """One row per evaluation of the same cases, each with another number of steps."""
    return [
        {
            "steps": report["protocol"]["steps"],
            "sampler": report["protocol"]["sampler"],
            "runs": report["protocol"]["runs"],
            **_intervals(report, ("soft_dice_5", "soft_dice_9", "ged", "ece_near")),
            "seconds_per_slice": sum(case["seconds"] for case in report["cases"]) / report["n_slices"],
        }
        for report in reports
    ]


def _score_row(name: str, at: str, value: Mapping[str, Any]) -> dict[str, Any]:
    n = value["n_slices"] if "n_slices" in value else value["n_cases"]
    return {"score": name, "at": at, **{end: value[end] for end in ENDS}, "n": n}


def _intervals(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name if end == "mean" else f"{name}_{end}": row[name][end] for name in names for end in ENDS}


def _case_columns(case: Mapping[str, Any]) -> dict[str, Any]:
    group = {"group": case["group"]} if "group" in case else {}
    return {"case": case["case"], **group, "annotators": case["annotators"]}


def _score_columns(
    scores: Mapping[str, Any], single: Sequence[str], by_level: Sequence[str], by_threshold: str
) -> dict[str, Any]:
    """The scores so named as columns, one per number."""
    return {
        **{name: scores[name] for name in single},
        **{
            key: value
            for name in by_level
            for key, value in _numbered(name.replace("_per_level", "_level"), scores[name]).items()
        },
        **{
            f"{by_threshold.replace('_per_threshold', '_threshold')}_{h:g}": value
            for h, value in zip(NINE, scores[by_threshold], strict=True)
        },
    }


def _numbered(name: str, values: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}_{c}": value for c, value in enumerate(values, start=1)}


def _times(voxels: Sequence[int], ml: float | None) -> list[float | None]:
    return [None if ml is None else count * ml for count in voxels]


def _cell(value: Any) -> Any:
    """A value as it is written. Text that a spreadsheet would compute, such as a case name that begins with =, gets a ' in front."""
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"
    return f"{value:.9g}" if isinstance(value, float) else "" if value is None else value
