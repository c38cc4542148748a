"""Writes a folder with everything that an evaluation found (JSON, CSV and plots), and scores against the number of steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdiff.runtime.data.cases import Case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import dump_json, staged
from cdiff.runtime.scoring.evaluate import Notice, Progress, Protocol, evaluate
from cdiff.runtime.scoring.tables import (
    cases_table,
    csv_text,
    reliability_table,
    runs_table,
    scores_table,
    slices_table,
    steps_table,
)

if TYPE_CHECKING:
    from cdiff.runtime.segmenter import Segmenter

SCORES = "scores.json"
WORST = "worst.png"
OF_OTHERS = (WORST, "steps.csv", "steps.png")
"""Files made after a report, from its scores; those of another report must not remain beside it."""
OF_A_REPORT = (
    *(SCORES, "scores.csv", "cases.csv", "slices.csv", "reliability.csv", "reliability.png", "expected.csv", "expected.png"),
    *("runs.csv", "runs.png", *OF_OTHERS),
)  # fmt: skip
"""Every file that a report's folder may hold, and that another report there replaces or removes."""


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write `path` (scores.json) and, beside it, its tables and plots; all of them, `path` last, or none.

    These are scores.csv, cases.csv, slices.csv, reliability.csv and .png, expected.csv and .png, runs.csv and, for more than one run,
    runs.png. OF_OTHERS are removed if the report there is of another evaluation. Raises CdiffError when the folder cannot be written.
    """
    from cdiff.runtime.scoring.plots import write_curve, write_expected, write_reliability

    tables = {
        "scores": scores_table(report),
        "cases": cases_table(report),
        "slices": slices_table(report),
        "reliability": reliability_table(report),
        "expected": report["expected_bins"],
        "runs": runs_table(report),
    }
    with staged(path.parent) as stage:
        for name, table in tables.items():
            if table:
                stage(f"{name}.csv").write_text(csv_text(table), encoding="utf-8")
            else:  # maps in files have no runs
                stage.replaces(f"{name}.csv")
        write_reliability(report, stage("reliability.png"))
        write_expected(report, stage("expected.png"))
        if len(tables["runs"]) > 1:
            write_curve(tables["runs"], "runs", "runs, the first so many of each slice", stage("runs.png"))
        else:
            stage.replaces("runs.png")
        if _scored(path) != _of(report):
            for name in OF_OTHERS:
                stage.replaces(name)
        stage(path.name).write_text(dump_json(report), encoding="utf-8")


def _of(report: Mapping[str, Any]) -> Any:
    """What identifies a report's numbers: how they were made, from which cases, and over which groups the intervals are."""
    return report["made_with"], [(case["case"], case["inputs"]) for case in report["cases"]], report["intervals"]


def _scored(path: Path) -> Any:
    """`_of` the report at `path`; None where there is none."""
    try:
        return _of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def check_steps(segmenter: Segmenter, protocol: Protocol, steps: Sequence[int]) -> list[int]:
    """The numbers of steps in ascending order, each once. Raises CdiffError for none, and for one that the model's sampler cannot take."""
    for number in steps:
        segmenter.sampling(steps=number, sampler=protocol.sampler, fast=protocol.fast)
    if not steps:
        raise CdiffError("no number of steps is given; write --steps-curve 1,2,5,10,25")
    return sorted(set(steps))


def sweep_steps(
    segmenter: Segmenter,
    cases: list[Case],
    protocol: Protocol,
    steps: Sequence[int],
    folder: Path,
    *,
    data: Mapping[str, Any] | None = None,
    group: str | None = None,
    known: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> list[dict[str, Any]]:
    """Evaluate the cases once for each number of steps, with everything else as in `protocol`; returns the reports in that order.

    Each report is written to folder/steps/NNNN.json, so that an interrupted sweep resumes; folder/steps.csv and .png show them all.
    known: an existing report of the same evaluation, which is used for its own number of steps. The other arguments are `evaluate`'s.
    """
    from cdiff.runtime.scoring.plots import write_curve

    numbers = check_steps(segmenter, protocol, steps)
    reports = []
    for place, number in enumerate(numbers):
        if known and known["protocol"]["steps"] == number:
            reports.append(dict(known))
            continue
        # Every step takes about the same time, so progress counts steps over all the evaluations.
        within = _share(progress, sum(numbers[:place]), number, sum(numbers))
        out = folder / "steps" / f"{number:04d}.json"
        chain = replace(protocol, steps=number)
        reports.append(
            evaluate(segmenter, cases, chain, data=data, group=group, out=out, progress=within, notice=notice)
        )
    table = steps_table(reports)
    with staged(folder) as stage:
        stage("steps.csv").write_text(csv_text(table), encoding="utf-8")
        if len(table) > 1:
            write_curve(table, "steps", f"steps of {table[0]['sampler']}", stage("steps.png"))
        else:
            stage.replaces("steps.png")
    return reports


def _share(progress: Progress | None, before: int, part: int, whole: int) -> Callable[[int, int], None] | None:
    """Turn the progress of one part (`part` of `whole` steps, after `before`) into that of the whole, in thousandths of a step."""
    if progress is None:
        return None
    return lambda done, total: progress(1000 * before + 1000 * part * done // max(total, 1), 1000 * whole)
