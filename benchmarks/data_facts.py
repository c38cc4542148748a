"""What the pages say of a data set that no model is needed for: `python -m cdiff.benchmarks.data_facts --data DATA`.

How many cases, patients and slices each split has, how long the cases are, how much of a slice is marked, and what lies beside the middle.
"""

from __future__ import annotations

import sys
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
"""Pixels of the side of the part in the middle: what the shipped model sees."""
SHORT = 15
"""Slices of a case that counts as short."""
PERCENTILES = (5, 50, 95)


def facts(cases: list[Case], group: str | None) -> dict[str, Any]:
    """Of the cases of one split: their numbers, the slices of the shortest and the longest, how many have at most SHORT; of the slices how many
    any annotator marked and all did, on how many nothing is drawn outside the MIDDLE; the pixels of those that were marked at PERCENTILES."""
    lengths, pixels = [], []
    by_all = within = 0
    for number, case in enumerate(cases):
        masks = read_masks(case, read_scan(case.scan).grid)
        drawn, readers = np.asarray(masks.any(axis=1)), np.asarray(masks.any(axis=(2, 3)))
        lengths.append(len(masks))
        pixels += [count for count in drawn.sum(axis=(1, 2)).tolist() if count]
        by_all += int((readers.sum(axis=1) == readers.shape[1]).sum())
        within += sum(not _beside(one) for one in drawn)
        print(f"{number + 1} of {several(len(cases), 'case')}", file=sys.stderr, end="\r")
    patients = group_names([case.name for case in cases], group)
    return {
        "cases": len(cases),
        **({"patients": len(set(patients))} if patients else {}),
        "slices": sum(lengths),
        "slices_a_case": [min(lengths), max(lengths)],
        "short_cases": sum(length <= SHORT for length in lengths),
        "marked_by_any": len(pixels),
        "marked_by_all": by_all,
        "nothing_beside_the_middle": within,
        "pixels_marked": dict(zip(map(str, PERCENTILES), np.percentile(pixels, PERCENTILES).tolist(), strict=True)),
    }


def _beside(drawn: NDArray[np.bool_]) -> bool:
    """Whether anything of a slice [H,W] lies outside the middle, as a model of the framing `centre` sees it."""
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
    splits = {split: facts(cases, options.group) for split, cases in found.items() if cases}
    splits["together"] = facts([case for cases in found.values() for case in cases], options.group)
    for split, one in splits.items():
        print(f"{split}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in one.items()))
    if options.json:
        about = {"data": options.data.resolve().name, "middle": MIDDLE, "short": SHORT}
        write_json(options.json, about | {"splits": splits})


if __name__ == "__main__":
    sys.exit(main())
