"""How exactly a structure must be pointed at: `python -m cdiff.benchmarks.off_centre --data DATA`.

The shipped model learned from windows around nodules, and `--at` says where one is. Here each case is pointed at some pixels beside its
middle, where LIDC's crops have their nodule, in another direction from case to case, and its maps are scored as ever: `--fast`, on the slices that
all annotators marked.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cdiff
from cdiff.benchmarks.script import parser_of, script
from cdiff.runtime.data.cases import Case, find_cases, read_masks
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.expected import expected_counts, expected_dice
from cdiff.runtime.files import write_json
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scoring.choice import choose_split
from cdiff.runtime.scoring.evaluate import Protocol
from cdiff.runtime.scoring.metrics import at_least, bootstrap_over_cases, dice_of, overlap_with_each, soft_dice
from cdiff.runtime.segmenter import Segmenter

PIXELS = (0, 2, 4, 8, 12, 16)
"""Distances from the middle, in pixels, at which cases are pointed at, unless --pixels gives others."""
DIRECTIONS = 8
Row = dict[str, Any]


def beside(middle: tuple[int, int], pixels: int, number: int) -> tuple[int, int]:
    """The pixel (row, column) that lies `pixels` from `middle` in the direction of case `number`: three eighths of a turn further each case."""
    angle = 2 * math.pi * (3 * number % DIRECTIONS) / DIRECTIONS
    return middle[0] + round(pixels * math.sin(angle)), middle[1] + round(pixels * math.cos(angle))


def measure(
    model: Segmenter, case: Case, number: int, distances: Sequence[int], slices_per_case: int | None
) -> list[Row]:
    """A row for each distance and each slice that all annotators of a case marked: soft Dice; the mask's mean Dice with the annotators', and
    the one that the map itself expects (None for an empty mask); and whether the mask misses everything that most annotators marked.

    number: the case's, for its direction. distances: in pixels, from the middle of the case's slices. Raises CdiffError for a case that is
    no volume cut along its last axis.
    """
    scan = read_scan(case.scan)
    if scan.grid.slice_axis != 2:
        raise CdiffError(f"{case.name} is not a volume; the data must be crops around a structure, such as LIDC's")
    masks = read_masks(case, scan.grid)
    chosen = Protocol(all_raters=True, slices_per_case=slices_per_case).slices(masks).tolist()
    rows: list[Row] = []
    for pixels in distances if chosen else ():
        row, column = beside((masks.shape[2] // 2, masks.shape[3] // 2), pixels, number)
        whole = slice(chosen[0], chosen[-1] + 1)
        stack = model.segment(scan, at=(row, column, chosen[0]), slices=whole, fast=True, seed=0).stack
        for k in chosen:
            soft, most = stack.soft[k - chosen[0]], 2 * masks[k].sum(axis=0) > len(masks[k])
            mask = at_least(soft, 0.5)
            expected = float(expected_dice(expected_counts(soft, mask)))
            rows.append(
                {
                    "pixels": pixels,
                    "slice": k,
                    "soft_dice_5": soft_dice(soft, masks[k].mean(axis=0)),
                    "dice_each": float(dice_of(overlap_with_each(mask, masks[k])).mean()),
                    "expected_dice": None if math.isnan(expected) else expected,
                    "missed": bool(most.any() and not (mask & most).any()),
                }
            )
    return rows


def summary(cases: list[list[Row]], distances: Sequence[int]) -> list[Row]:
    """For each distance: the mean soft Dice and its difference from that at the first distance, both with an interval over cases; the
    shares of slices that are missed and that have an empty mask; and over the slices with a mask, the Dice expected and the Dice found."""
    found = []
    for pixels in distances:
        here = [[row for row in rows if row["pixels"] == pixels] for rows in cases]
        middle = [[row for row in rows if row["pixels"] == distances[0]] for rows in cases]
        scores = [[row["soft_dice_5"] for row in rows] for rows in here]
        apart = [
            [a["soft_dice_5"] - b["soft_dice_5"] for a, b in zip(*pair, strict=True)]
            for pair in zip(here, middle, strict=True)
        ]
        found.append(
            {
                "pixels": pixels,
                "soft_dice_5": bootstrap_over_cases(scores).to_json(),
                "difference": bootstrap_over_cases(apart).to_json(),
                "missed": float(np.mean([row["missed"] for rows in here for row in rows])),
                "empty": float(np.mean([row["expected_dice"] is None for rows in here for row in rows])),
                **{
                    # Both over the same slices, so that they can be compared.
                    name: bootstrap_over_cases(
                        [[row[name] for row in rows if row["expected_dice"] is not None] for rows in here]
                    ).to_json()
                    for name in ("expected_dice", "dice_each")
                },
            }
        )
    return found


def distances_in(text: str) -> tuple[int, ...]:
    """The distances in a text that has commas between them."""
    return tuple(int(part) for part in text.split(","))


def show(interval: Row) -> str:
    """The mean as text, - where there is none."""
    return "-" if interval["mean"] is None else f"{interval['mean']:.3f}"


@script
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = parser_of("off_centre", __doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="crops with a structure in the middle of each, such as LIDC's"
    )
    parser.add_argument("--split", default="val", choices=("train", "val", "test", "all"), help="which cases (val)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N cases only")
    parser.add_argument(
        "--slices-per-case", type=int, metavar="N", help="only so many slices of a case, evenly; 1 is the middle one"
    )
    parser.add_argument(
        "--pixels",
        type=distances_in,
        metavar="N,N",
        default=PIXELS,
        help="how far beside the middle, the first being compared with",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write the numbers")
    options = parser.parse_args(argv)
    split, cases = choose_split(find_cases(options.data), options.split)
    model, cases = cdiff.load(), cases[: options.limit]
    rows = []
    for number, case in enumerate(cases):
        rows.append(measure(model, case, number, options.pixels, options.slices_per_case))
        print(f"{number + 1} of {len(cases)} cases", file=sys.stderr)
    rows = [one for one in rows if one]
    if not rows:
        raise CdiffError(
            f"no slice of the split {split} was marked by all of its annotators; there is nothing to measure"
        )
    found = summary(rows, options.pixels)
    for one in found:
        score, apart = one["soft_dice_5"], one["difference"]
        interval = "" if apart["low"] is None else f" ({apart['low']:+.3f} to {apart['high']:+.3f})"
        print(
            f"{one['pixels']:3} pixels beside: soft Dice {score['mean']:.3f}, {apart['mean']:+.3f}{interval}, missed {one['missed']:.1%}, "
            f"expected Dice {show(one['expected_dice'])}, found {show(one['dice_each'])}"
        )
    if options.json:
        about = {
            "model": model.manifest.name,
            "bundle_sha256": model.manifest_sha256,
            "data": options.data.resolve().name,
            "split": split,
        }
        write_json(
            options.json, {**about, "cases": len(rows), "slices": found[0]["soft_dice_5"]["n_slices"], "found": found}
        )


if __name__ == "__main__":
    sys.exit(main())
