"""Tables 1 to 3 of Amit et al. 2023 (arXiv 2306.09004) for the data at hand, beside those published numbers that are known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TITLES = {
    1: "Table 1: soft Dice at five thresholds, %",
    2: "Table 2: soft Dice of the training variants, %",
    3: "Table 3: mean pairwise Dice between annotators, %",
}
VARIANTS = {
    "consensus": "one map a level of consensus",
    "annotator": "one map an annotator",
    "no-annotator": "a random annotator's map",
    "soft-label": "the fraction map itself",
}
"""What Table 2 compares, by the paper's names."""
SECOND_HAND = "quoted in a public summary of the paper, not read in it: check before citing"


@dataclass(frozen=True)
class PaperRow:
    """One line of a table: whose number, on which data, in percent; its interval where there is one; where it comes from."""

    table: int
    whose: str
    data: str
    percent: float | None
    low: float | None
    high: float | None
    source: str


PUBLISHED = (PaperRow(1, "Amit et al. 2023, consensus", "QUBIQ kidney", 96.58, None, None, SECOND_HAND),)
"""The published numbers for which a source could be read. A number joins with its source, and only then."""


def paper_rows(report: Mapping[str, Any]) -> list[PaperRow]:
    """The rows of the three tables, in order: those of an evaluation's report, then the published ones."""
    data = report["data"]
    at_hand = " ".join(str(data[key]) for key in ("folder", "split", "task") if data.get(key)) or "the data at hand"
    # Not all scored slices: in those that nobody marked these scores are not defined.
    at_hand += f" ({report['soft_dice_5']['n_slices']} slices of {report['n_cases']} cases)"
    model, variant = report["model"]["name"], report["model"].get("variant", "consensus")
    protocol = report["protocol"]
    chain = f"{protocol['runs']} runs x {protocol['steps']} steps, {protocol['sampler']}, {protocol['combine']}"
    own = [
        _row(1, model, at_hand, report["soft_dice_5"], chain),
        _row(2, f"{model}: {variant}, {VARIANTS.get(variant, 'its own')}", at_hand, report["soft_dice_5"], chain),
        _row(3, "annotators, in the scored slices", at_hand, report["pairwise_dice_annotators"], "the masks"),
    ]
    return sorted([*own, *PUBLISHED], key=lambda row: row.table)


def paper_notes(rows: list[PaperRow]) -> list[str]:
    """What a reader of the tables must know: which data each number is of, and what is not there."""
    known = {row.table for row in rows if row.table and row in PUBLISHED}
    missing = [str(table) for table in TITLES if table not in known]
    notes = [
        "Published rows are of QUBIQ 2021 as its authors split it; the others of the data named beside them. Rows of "
        "different data compare nothing.",
        "The published score rounds each level's mean over runs before averaging (--levels vote); its Table 3 counts the "
        "training images, with smoothing 1e-4.",
    ]
    if missing:
        tables = f"Table{'s' * (len(missing) > 1)} {' and '.join(missing)}"
        notes.append(f"No published number is held here for {tables}, nor for data not listed: see the paper.")
    return notes


def _row(table: int, whose: str, data: str, score: Mapping[str, Any], source: str) -> PaperRow:
    percent, low, high = (None if score[key] is None else 100 * score[key] for key in ("mean", "low", "high"))
    return PaperRow(table, whose, data, percent, low, high, f"computed now: {source}")
