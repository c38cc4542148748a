"""What the number of masks alone does to the energy distance: `python -m cdiff.benchmarks.ged_by_masks --data DATA`.

The energy distance takes from the distance to the annotators' masks that of the model's masks to one another, and a single mask has none
to take. Here one model's maps are read in three ways: its soft map as one mask, the same soft map as its levels, and every run's levels.
What lies between the first two is no merit of a network. The shipped model, four runs of one step at one size, or with --unet RUN the peer
`unet-soft` that was trained there (docs/benchmarks.md), whose every run is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cdiff
from cdiff.benchmarks.peers.drawn import Drawn
from cdiff.benchmarks.script import parser_of, script
from cdiff.runtime.data.cases import Case, find_cases, read_masks
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256, write_json
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scoring.choice import choose_split
from cdiff.runtime.scoring.evaluate import Protocol
from cdiff.runtime.scoring.metrics import at_least, bootstrap_over_cases, ged
from cdiff.runtime.stack import Stack
from cdiff.runtime.variants import NO_ANNOTATOR

Masks = NDArray[np.bool_]
Draw = Callable[[int, Case], Drawn | None]
"""(number in the split, case) -> what a model draws of the case; None where no slice was marked by all of its annotators."""
PROTOCOL = Protocol(fast=True, runs=4, zooms=(1.0,), all_raters=True)
EVERY_RUN = "levels_of_every_run"
READINGS = {
    "one_mask": "the soft map at one half",
    "levels_of_the_map": "the soft map where it reaches (c - 1/2) / C, c = 1 ... C",
    EVERY_RUN: "every run's level maps at one half, as cdiff evaluate has it",
    "annotators_majority": "what at least half of the annotators marked, for comparison: one mask that is right",
}


def readings(stack: Stack, place: int, annotators: Masks) -> dict[str, Masks]:
    """The masks [m,h,w] of each of READINGS for the slice at `place` in a stack, which must hold its runs. annotators: their masks [n,h,w]."""
    if stack.runs is None:
        raise ValueError("the levels of every run are wanted: segment with keep_runs")
    soft, C = stack.soft[place], stack.annotators or stack.maps.shape[1]
    found = {
        "one_mask": at_least(soft, 0.5)[None],
        "levels_of_the_map": NO_ANNOTATOR.to_levels(soft[None], C) > 0,
        "annotators_majority": (2 * annotators.sum(axis=0) >= len(annotators))[None],
    }
    every = stack.variant.to_samples(stack.runs[place], C)
    return found | ({EVERY_RUN: every} if len(every) > 1 else {})


def shipped() -> tuple[dict[str, Any], Draw]:
    """The report's header for the shipped model, and the function that draws with it."""
    model = cdiff.load()

    def draw(number: int, case: Case) -> Drawn | None:
        scan = read_scan(case.scan, channels=model.manifest.image_channels, slice_axis=model.manifest.slice_axis)
        masks = read_masks(case, scan.grid)
        chosen = PROTOCOL.slices(masks)
        if not chosen.size:
            return None
        part = slice(int(chosen[0]), int(chosen[-1]) + 1)
        return Drawn(scan.grid, masks, chosen, model.segment(scan, **PROTOCOL.chain, slices=part, keep_runs=True).stack)

    return {"model": model.manifest.name, "protocol": PROTOCOL.chain | {"all_raters": True}}, draw


def unet(run: Path, annotators: int) -> tuple[dict[str, Any], Draw]:
    """The same for the peer `unet-soft` in `run`, which draws the mean over its mirrored views. Raises CdiffError where there is none."""
    from cdiff.benchmarks.peers.score import Scoring, draw_case, load_unet, share
    from cdiff.benchmarks.peers.training import SUMMARY, WEIGHTS
    from cdiff.benchmarks.peers.unets import UNETS
    from cdiff.train.checkpoint import read_json

    peer, scoring = UNETS["unet-soft"], Scoring(all_raters=True)
    if share(peer.name, run) < 1:
        raise CdiffError(f"{run} holds no finished run of the peer {peer.name}; train it with cdiff.benchmarks.peers")
    network = load_unet(peer, run, annotators)
    training = read_json(run / SUMMARY) | {"weights_sha256": sha256(run / WEIGHTS)}
    return {"model": peer.name, "training": training}, lambda number, case: draw_case(
        peer, network, case, number, annotators, scoring
    )


def measure(draw: Draw, cases: list[Case]) -> dict[str, Any]:
    """The energy distance of each of READINGS: masks per slice, mean over slices, 95 % interval by bootstrap over cases.

    Raises CdiffError when a case cannot be read, or no slice was marked by all of its annotators.
    """
    found: dict[str, list[list[float]]] = {}
    counts: dict[str, int] = {}
    for number, case in enumerate(cases):
        if (drawn := draw(number, case)) is None:
            continue
        of_case: dict[str, list[float]] = {}
        for index in drawn.chosen:
            masks = drawn.masks[index]
            for name, read in readings(drawn.stack, int(index) - drawn.first, masks).items():
                of_case.setdefault(name, []).append(ged(read, masks))
                counts[name] = len(read)
        for name, values in of_case.items():
            found.setdefault(name, []).append(values)
    if not found:
        raise CdiffError("no slice was marked by all of its annotators; there is nothing to measure")
    report: dict[str, Any] = {
        "ged": {
            name: {"masks": counts[name], "what": what} | bootstrap_over_cases(found[name]).to_json()
            for name, what in READINGS.items()
            if name in found
        }
    }
    if EVERY_RUN in found:
        both = zip(found["levels_of_the_map"], found[EVERY_RUN], strict=True)
        more = [[y - x for x, y in zip(one, other, strict=True)] for one, other in both]
        report["levels_of_every_run_minus_of_the_map"] = bootstrap_over_cases(more).to_json()
    return report


@script
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = parser_of("ged_by_masks", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="the data that the shipped model was trained on")
    parser.add_argument(
        "--unet", type=Path, metavar="RUN", help="run of the peer unet-soft, in place of the shipped model"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write the numbers")
    options = parser.parse_args(argv)
    cases = choose_split(find_cases(options.data), "test")[1]
    header, draw = unet(options.unet, len(cases[0].masks)) if options.unet else shipped()
    report = header | measure(draw, cases)
    for name, score in report["ged"].items():
        span = "" if score["low"] is None else f" ({score['low']:.3f} to {score['high']:.3f})"
        print(f"{name:20} {score['masks']:3} masks  {score['mean']:.3f}{span}")
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    sys.exit(main())
