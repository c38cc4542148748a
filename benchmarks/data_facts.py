"""What the pages say of a data set that no model is needed for: `python -m cdiff.benchmarks.data_facts --data DATA`.

How many cases, patients and slices each split has, how long the cases are, how much of a slice is marked, and what lies beside the middle.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.benchmarks.script import parser_of, script
from cdiff.runtime.data.cases import Case, find_cases, read_masks
from cdiff.runtime.files import write_json
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scoring.summary import group_names
from cdiff.runtime.words import several

MIDDLE = 64
"""Side in pixels of the middle part of a slice, which is what the shipped model sees."""
SHORT = 15
"""Most slices of a case that counts as short."""
PERCENTILES = (5, 50, 95)


@dataclass(frozen=True)
class Drawn:
    """One case: its name; how many slices it has, how many all annotators marked (`by_all`), and how many have nothing drawn outside the
    MIDDLE (`within`); for each slice that any annotator marked, the number of marked pixels."""

    name: str
    slices: int
    by_all: int
    within: int
    pixels: list[int]


def drawn_on(case: Case) -> Drawn:
    """Read the masks of a case. Raises CdiffError where they cannot be read."""
    masks = read_masks(case, read_scan(case.scan).grid)
    drawn, readers = np.asarray(masks.any(axis=1)), np.asarray(masks.any(axis=(2, 3)))
    by_all = int((readers.sum(axis=1) == readers.shape[1]).sum())
    pixels = [count for count in drawn.sum(axis=(1, 2)).tolist() if count]
    return Drawn(case.name, len(masks), by_all, sum(not _beside(one) for one in drawn), pixels)


def facts(cases: list[Drawn], group: str | None) -> dict[str, Any]:
    """The facts of a split: numbers of cases, patients (if `group`, a regular expression, finds them in the names) and slices; slices of the
    shortest and the longest case, and cases of at most SHORT slices; slices that any annotator marked, that all did, and with nothing drawn
    outside the MIDDLE; PERCENTILES of the pixels marked per slice."""
    lengths, pixels = [case.slices for case in cases], [count for case in cases for count in case.pixels]
    patients = group_names([case.name for case in cases], group)
    return {
        "cases": len(cases),
        **({"patients": len(set(patients))} if patients else {}),
        "slices": sum(lengths),
        "slices_a_case": [min(lengths), max(lengths)],
        "short_cases": sum(length <= SHORT for length in lengths),
        "marked_by_any": len(pixels),
        "marked_by_all": sum(case.by_all for case in cases),
        "nothing_beside_the_middle": sum(case.within for case in cases),
        "pixels_marked": dict(
            zip(map(str, PERCENTILES), np.percentile(pixels or 0, PERCENTILES).tolist(), strict=True)
        ),
    }


def _beside(drawn: NDArray[np.bool_]) -> bool:
    """Whether anything drawn on a slice [H,W] lies outside the middle part that a model of the framing `centre` sees."""
    windows = Framing("centre", (MIDDLE, MIDDLE)).frame(np.empty((1, 1, *drawn.shape), np.float32))
    return bool(drawn.sum() > drawn[windows.reach].sum())


@script
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = parser_of("data_facts", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folders of cases, such as LIDC's")
    parser.add_argument("--group", metavar="REGEX", help="what in a case's name is the patient, as of cdiff evaluate")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write the numbers")
    options = parser.parse_args(argv)
    found = find_cases(options.data)
    read: dict[str, list[Drawn]] = {split: [] for split, cases in found.items() if cases}
    for split, drawn in read.items():
        for case in found[split]:
            drawn.append(drawn_on(case))
            print(f"{split}: {len(drawn)} of {several(len(found[split]), 'case')}", file=sys.stderr, end="\r")
    read["together"] = [case for drawn in read.values() for case in drawn]
    splits = {split: facts(drawn, options.group) for split, drawn in read.items()}
    for split, one in splits.items():
        print(f"{split}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in one.items()))
    if options.json:
        about = {"data": options.data.resolve().name, "middle": MIDDLE, "short": SHORT}
        write_json(options.json, about | {"splits": splits})


if __name__ == "__main__":
    sys.exit(main())
