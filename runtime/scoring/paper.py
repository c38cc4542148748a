"""Tables 1 to 3 of Amit et al. 2023 (arXiv 2306.09004) for the user's data, beside published numbers and other evaluations."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import several

TITLES = {
    1: "Table 1: soft Dice at five thresholds, %",
    2: "Table 2: soft Dice of the training variants, %",
    3: "Table 3: mean pairwise Dice between annotators, %",
}
VARIANTS = {
    "consensus": "one map a level of consensus",
    "annotator": "one map per annotator",
    "no-annotator": "a random annotator's map",
    "soft-label": "the fraction map itself",
}
"""What Table 2 compares, by the paper's names."""
SECOND_HAND = "quoted in a public summary of the paper, not read in it: check before citing"


@dataclass(frozen=True)
class PaperRow:
    """One line of a table: whose number it is, on which data, in percent; its interval, if any (low, high); and where it comes from."""

    table: int
    whose: str
    data: str
    percent: float | None
    low: float | None
    high: float | None
    source: str


ROUNDING = 1e-9
"""By how much a mean of Dice scores may exceed 1."""
PUBLISHED = (PaperRow(1, "Amit et al. 2023, consensus", "QUBIQ kidney", 96.58, None, None, SECOND_HAND),)
"""The published numbers for which a source could be read. Add a number only with its source."""


COLUMNS = ("table", "whose", "data", "percent", "source")
"""The columns that a CSV of published numbers must have; `low` and `high`, the ends of an interval, are optional."""


def paper_rows(report: Mapping[str, Any], beside: Iterable[PaperRow] = ()) -> list[PaperRow]:
    """The rows of the three tables, table by table: those of an evaluation's report, those `beside` it, then PUBLISHED.

    Raises ValueError for a report with a Dice out of range, KeyError for one that lacks a score."""
    return sorted([*_rows_of(report, "computed now"), *beside, *PUBLISHED], key=lambda row: row.table)


def read_beside(path: Path) -> list[PaperRow]:
    """The rows that a file adds to the tables: those of a report of `cdiff evaluate` (.json), or one published number per line (.csv).

    The CSV has the COLUMNS: the number of the paper's table (1, 2 or 3), whose number it is, on which data, the number in
    percent, and where it can be read. Raises CdiffError for a file that is neither, a missing column or cell, a number out of
    range, and one outside its own interval; it names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CdiffError(f"{path} cannot be read ({error}); give a report of cdiff evaluate, or a CSV") from None
    try:
        if path.suffix.lower() == ".csv":
            return _published(text, path)
        return _rows_of(json.loads(text), f"computed before, {path.name}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error):
        raise CdiffError(
            f"{path} is not a report of cdiff evaluate; give its scores.json, or a .csv with the columns {', '.join(COLUMNS)}"
        ) from None


def _published(text: str, path: Path) -> list[PaperRow]:
    lines = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
    if missing:
        raise CdiffError(
            f"{path} lacks the column {', '.join(missing)}; its columns are {', '.join(COLUMNS)}, low, high"
        )
    rows = []
    for line in lines:
        where = f"{path}, line {lines.line_num}"
        if None in line:
            raise CdiffError(f"{where} has more cells than columns; put a cell that holds a comma in quotes")
        empty = [name for name in COLUMNS if not (line[name] or "").strip()]
        if empty:
            raise CdiffError(f"{where}: {', '.join(empty)} is empty; every number needs its data and its source")
        try:
            table = int(line["table"])
            percent, low, high = (float(line[key]) if line.get(key) else None for key in ("percent", "low", "high"))
        except ValueError as error:
            raise CdiffError(f"{where}: {error}; table is 1, 2 or 3, and the others are numbers in percent") from None
        if table not in TITLES or not all(0 <= number <= 100 for number in (percent, low, high) if number is not None):
            raise CdiffError(f"{where} is out of range; table is 1, 2 or 3, and the numbers are percent, from 0 to 100")
        if percent is not None and ((low is not None and low > percent) or (high is not None and high < percent)):
            raise CdiffError(f"{where}: percent {percent:g} lies outside its own interval; look at low and high")
        rows.append(PaperRow(table, line["whose"], line["data"], percent, low, high, line["source"]))
    return rows


def _rows_of(report: Mapping[str, Any], source: str) -> list[PaperRow]:
    data = report["data"]
    at_hand = " ".join(str(data[key]) for key in ("folder", "split", "task") if data.get(key)) or "the data at hand"
    # Counted are only the slices in which these scores are defined, which leaves out those that nobody marked.
    at_hand += f" ({several(report['soft_dice_5']['n_slices'], 'slice')} of {several(report['n_cases'], 'case')})"
    model, variant = str(report["model"]["name"]), report["model"].get("variant", "consensus")
    protocol = report["protocol"]
    chain = "maps read from files"
    if "steps" in protocol:
        chain = f"{several(protocol['runs'], 'run')} x {several(protocol['steps'], 'step')}, {protocol['sampler']}, {protocol['combine']}"
    whose = f"{model}: {variant}, {VARIANTS.get(variant, 'its own')}"
    return [
        _row(1, model, at_hand, report["soft_dice_5"], f"{source}: {chain}"),
        _row(2, whose, at_hand, report["soft_dice_5"], f"{source}: {chain}"),
        _row(
            3, "annotators, in the scored slices", at_hand, report["pairwise_dice_annotators"], f"{source}: the masks"
        ),
    ]


def paper_notes(rows: list[PaperRow]) -> list[str]:
    """What a reader of the tables must know: which data each number is from, and what is missing."""
    known = {row.table for row in rows if not row.source.startswith("computed ")}
    missing = [str(table) for table in TITLES if table not in known]
    notes = [
        "Published rows are of QUBIQ 2021 as its authors split it; the others of the data named beside them. Rows of "
        "different data cannot be compared.",
        "The published score rounds each level's mean over runs before averaging (--levels vote), and its code compares at the "
        "network's size; its Table 3 counts the training images, with smoothing 1e-4.",
    ]
    if missing:
        tables = f"Table{'s' * (len(missing) > 1)} {' and '.join(missing)}"
        notes.append(f"cdiff holds no published numbers for {tables}, nor for data not listed: see the paper.")
    return notes


def _row(table: int, whose: str, data: str, score: Mapping[str, Any], source: str) -> PaperRow:
    shares = [score[key] for key in ("mean", "low", "high")]
    if not all(share is None or (type(share) in (int, float) and 0 <= share <= 1 + ROUNDING) for share in shares):
        raise ValueError(f"a Dice of {shares}")
    percent, low, high = (None if share is None else 100 * share for share in shares)
    return PaperRow(table, whose, data, percent, low, high, source)
