"""What the number of masks alone does to the energy distance: `python -m cdiff.benchmarks.ged_by_masks --data DATA`.

The energy distance takes from the distance to the annotators' masks that of the model's masks to one another, and a single mask has none
to take. Here one model's maps are read in three ways: its soft map as one mask, the same soft map as its levels, and every run's levels.
What lies between the first two is no merit of a network. The shipped model, four runs of one step at one size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cdiff
from cdiff.benchmarks.script import parser_of, script
from cdiff.runtime.data.cases import Case, find_cases, read_masks
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.results import Stack
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scoring.evaluate import Protocol, choose_split
from cdiff.runtime.scoring.metrics import at_least, bootstrap_over_cases, ged
from cdiff.runtime.segmenter import Segmenter
from cdiff.runtime.variants import NO_ANNOTATOR

Masks = NDArray[np.bool_]
PROTOCOL = Protocol(fast=True, runs=4, zooms=(1.0,), all_raters=True)
READINGS = {
    "one_mask": "the soft map at one half",
    "levels_of_the_map": "the soft map where it reaches (c - 1/2) / C, c = 1 ... C",
    "levels_of_every_run": "every run's level maps at one half, as cdiff evaluate has it",
    "annotators_majority": "what at least half of the annotators marked, for comparison: one mask that is right",
}


def readings(stack: Stack, place: int, annotators: Masks) -> dict[str, Masks]:
    """The masks [m,h,w] of each of READINGS in one slice of a stack; annotators [n,h,w]: theirs."""
    if stack.runs is None:
        raise ValueError("the levels of every run are wanted: segment with keep_runs")
    soft, C = stack.soft[place], stack.annotators or stack.maps.shape[1]
    return {
        "one_mask": at_least(soft, 0.5)[None],
        "levels_of_the_map": NO_ANNOTATOR.to_levels(soft[None], C) > 0,
        "levels_of_every_run": stack.variant.to_samples(stack.runs[place], C),
        "annotators_majority": (2 * annotators.sum(axis=0) >= len(annotators))[None],
    }


def measure(model: Segmenter, cases: list[Case]) -> dict[str, Any]:
    """The energy distance by reading: masks a slice, mean over slices, 95 % interval by bootstrap over cases.

    Raises CdiffError when a case cannot be read, or no slice was marked by all of its annotators.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in READINGS}
    counts: dict[str, int] = {}
    for case in cases:
        scan = read_scan(case.scan, channels=model.manifest.image_channels, slice_axis=model.manifest.slice_axis)
        masks = read_masks(case, scan.grid)
        chosen = PROTOCOL.slices(masks)
        for values in found.values():
            values.append([])
        if not chosen.size:
            continue
        first = int(chosen[0])
        part = slice(first, int(chosen[-1]) + 1)
        stack = model.segment(scan, **PROTOCOL.chain, slices=part, keep_runs=True).stack
        for index in chosen:
            for name, read in readings(stack, int(index) - first, masks[index]).items():
                found[name][-1].append(ged(read, masks[index]))
                counts[name] = len(read)
    if not counts:
        raise CdiffError("no slice was marked by all of its annotators; there is nothing to measure")
    both = zip(found["levels_of_the_map"], found["levels_of_every_run"], strict=True)
    return {
        "model": model.manifest.name,
        "protocol": PROTOCOL.chain | {"all_raters": True},
        "ged": {
            name: {"masks": counts[name], "what": what} | bootstrap_over_cases(found[name]).to_json()
            for name, what in READINGS.items()
        },
        "levels_of_every_run_minus_of_the_map": bootstrap_over_cases(
            [[y - x for x, y in zip(one, other, strict=True)] for one, other in both]
        ).to_json(),
    }


@script
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = parser_of("ged_by_masks", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="the data that the shipped model was trained on")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write the numbers")
    options = parser.parse_args(argv)
    report = measure(cdiff.load(), choose_split(find_cases(options.data), "test")[1])
    for name, score in report["ged"].items():
        span = "" if score["low"] is None else f" ({score['low']:.3f} to {score['high']:.3f})"
        print(f"{name:20} {score['masks']:3} masks  {score['mean']:.3f}{span}")
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    sys.exit(main())
