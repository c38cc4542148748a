"""Two models' reports on the same slices, slice by slice: `python -m cdiff.benchmarks.paired A.json B.json`.

The slices are the same, so their difficulty cancels in the difference, whose interval is narrower than either score's own. Also by the
structure's size, in thirds of the cases. A and B are whole reports, with every case and slice: what `cdiff evaluate --json` writes, and
`scores_*.json` in a peer's run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from cdiff.benchmarks.script import parser_of, script
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.scoring.metrics import bootstrap_over_cases
from cdiff.runtime.scoring.summary import group_names, joined_twins
from cdiff.runtime.words import one_line

Row = dict[str, Any]
Take = Callable[[Row], float | None]
SCORES = ("soft_dice_5", "soft_dice_9", "ged", "ged_no_diagonal", "brier_near")
"""What is compared besides every level's Dice."""
BY_SIZE = ("smallest third", "middle third", "largest third")


def compare(a: Row, b: Row, group: str | None = None) -> Row:
    """Differences B - A of two reports: the mean over slices with a 95 % interval by bootstrap over cases, in all and by size.

    group: a regular expression, as in `summary.group_names`; cases of one group, such as a patient's, are then drawn together. The
    size of a case is the mean volume of the annotators' levels, in voxels per scored slice. Raises CdiffError when the reports are not
    of the same slices of the same files, and for a group that cannot be found.
    """
    for which, report in (("first", a), ("second", b)):
        if not report.get("cases"):
            raise CdiffError(f"the {which} report has no cases; give what cdiff evaluate --json wrote")
    slices = [[[(c["inputs"], row["slice"]) for row in c["slices"]] for c in report["cases"]] for report in (a, b)]
    if slices[0] != slices[1]:
        raise CdiffError(
            "the reports are not of the same slices; evaluate both with the same data, --all-raters and --all-slices"
        )
    pairs = list(zip(a["cases"], b["cases"], strict=True))
    levels = len(pairs[0][0]["slices"][0]["dice_per_level"])
    takes: dict[str, Take] = {name: methodcaller("get", name) for name in SCORES}
    takes |= {f"dice_level_{c}": _level(c) for c in range(1, levels + 1)}
    sizes = [float(np.mean(case["volumes"]["true_voxels"])) / len(case["slices"]) for case, _ in pairs]
    thirds = np.array_split(np.argsort(sizes, kind="stable"), len(BY_SIZE))
    groups = group_names([case["case"] for case, _ in pairs], group) if group else None

    def part(places: Sequence[int]) -> Row:
        return _differences([pairs[i] for i in places], takes, [groups[i] for i in places] if groups else None)

    return {
        "a": a.get("model", {}),
        "b": b.get("model", {}),
        "difference": "b - a",
        **({"group": group} if group else {}),
        "all": part(range(len(pairs))),
        "by_size": {
            name: {
                "voxels_a_slice": [round(min(sizes[i] for i in third), 1), round(max(sizes[i] for i in third), 1)],
                **part(third.tolist()),
            }
            for name, third in zip(BY_SIZE, thirds, strict=True)
            if len(third)
        },
    }


def _level(c: int) -> Take:
    return lambda row: row["dice_per_level"][c - 1]


def _differences(pairs: Sequence[tuple[Row, Row]], takes: dict[str, Take], groups: Sequence[str] | None) -> Row:
    """For each score: A's and B's means over the slices where both have it, and the difference with its interval and number of slices."""
    found: Row = {"n_cases": len(pairs), "n_slices": sum(len(first["slices"]) for first, _ in pairs)}
    found |= {"n_groups": len(set(groups))} if groups else {}
    for name, take in takes.items():
        both = [
            [(_number(take(x)), _number(take(y))) for x, y in zip(first["slices"], second["slices"], strict=True)]
            for first, second in pairs
        ]
        apart = bootstrap_over_cases([[y - x for x, y in case] for case in both], groups=groups)
        # Both means over the same slices, so that they differ by the difference that stands beside them.
        scored = [pair for case in both for pair in case if not any(map(math.isnan, pair))]
        mean_a, mean_b = np.mean(scored, axis=0).tolist() if scored else (None, None)
        found[name] = {"a": mean_a, "b": mean_b} | apart.to_json()
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value


@script
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = parser_of("paired", __doc__)
    parser.add_argument("a", type=Path, help="a whole report")
    parser.add_argument("b", type=Path, help="another, of the same slices")
    parser.add_argument(
        "--group", metavar="REGEX", help="draw groups of cases, named as cdiff evaluate --group names them, not cases"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write the differences")
    options = parser.parse_args(argv)
    first = _read(options.a)
    try:
        report = compare(first, _read(options.b), options.group)
        doubt = joined_twins([case["case"] for case in first["cases"]], options.group)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CdiffError(
            f"{options.a} or {options.b} does not hold what cdiff evaluate --json writes ({type(error).__name__}: {one_line(error)}); "
            "evaluate again"
        ) from None
    if doubt:
        print(f"note: {doubt}", file=sys.stderr)
    for part, found in {"all": report["all"], **report["by_size"]}.items():
        print(f"{part}: {found['n_cases']} cases, {found['n_slices']} slices")
        for name, score in found.items():
            if isinstance(score, dict) and score["n_slices"]:
                interval = "" if score["low"] is None else f" ({score['low']:+.3f} to {score['high']:+.3f})"
                print(f"  {name:14} {score['a']:.3f} {score['b']:.3f}  {score['mean']:+.3f}{interval}")
    if options.json:
        write_json(options.json, report)


def _read(path: Path) -> Row:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, allow_nan=False)  # a report has null for a missing score, never NaN
    except (OSError, ValueError, RecursionError) as error:
        raise CdiffError(
            f"{path} cannot be read as a report ({error}); give what cdiff evaluate --json wrote"
        ) from None
    if not isinstance(found, dict):
        raise CdiffError(f"{path} is not a report; give what cdiff evaluate --json wrote")
    return found


if __name__ == "__main__":
    sys.exit(main())
