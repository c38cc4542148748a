"""All peers on one scale: every score is that of `cdiff evaluate`, by the same functions (docs/metrics.md)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cdiff import __version__
from cdiff.benchmarks.peers import diffusion
from cdiff.benchmarks.peers.drawn import Drawn
from cdiff.benchmarks.peers.draws import Float32, draw_runs, mixed
from cdiff.benchmarks.peers.slices import INTENSITY
from cdiff.benchmarks.peers.training import SAY_EVERY, SUMMARY, WEIGHTS, read_state
from cdiff.benchmarks.peers.unets import UNETS, UNetPeer
from cdiff.runtime.data.cases import Case, find_cases, read_masks
from cdiff.runtime.engines.registry import open_engine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256, write_json
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scoring.choice import choose_split
from cdiff.runtime.scoring.evaluate import FORMAT, Protocol, case_sha256, evaluate
from cdiff.runtime.scoring.journal import Journal, fingerprint, sealed
from cdiff.runtime.scoring.scores import CaseTally
from cdiff.runtime.scoring.summary import ROW_KEYS, Row, summarise
from cdiff.runtime.segmenter import Segmenter
from cdiff.runtime.stack import Stack
from cdiff.runtime.variants import VARIANTS, Variant
from cdiff.runtime.words import several
from cdiff.train.checkpoint import load_weights, read_json, read_tensors
from cdiff.train.machine import describe_machine

KEPT = (
    "n_slices", "n_cases", "soft_dice_5", "soft_dice_9", "dice_per_level", "ged", "ged_no_diagonal", "ged_floor",
    "ged_samples", "ece", "ece_near", "brier", "brier_near", "brier_floor_near", "crps_near", "soft_dice_5_annotators",
    "soft_dice_9_annotators", "protocol", "left_out",
)  # fmt: skip
"""What the table of all peers keeps of a peer's report; the whole one stays in its run."""
TIMED = 4
"""Most slices over which the time per slice is measured."""


@dataclass(frozen=True)
class Scoring:
    """How peers are scored.

    split: "val" or "test". all_raters, slices_per_case: as for `cdiff evaluate`. runs: of a U-Net peer that samples; a diffusion peer has
    those of `--fast`, and the number of steps that did best on Validation. mirror: whether the peers see the slice mirrored too. limit:
    only the first so many cases. zooms: the sizes, as multiples of the slice's own, at which the peers see it in turn.
    """

    split: str = "test"
    all_raters: bool = False
    runs: int = 16
    mirror: bool = True
    seed: int = 0
    limit: int | None = None
    threads: int = 1
    slices_per_case: int | None = None
    zooms: tuple[float, ...] = (1.0,)

    @property
    def file(self) -> str:
        """The name of the file in a run that holds its whole report."""
        sample = "" if self.slices_per_case is None else f"_{self.slices_per_case}_a_case"
        zooms = "" if self.zooms == (1.0,) else f"_zooms_{'_'.join(f'{zoom:g}' for zoom in self.zooms)}"
        return f"scores_{self.split}{'_all_raters' if self.all_raters else ''}{sample}{zooms}.json"


def score_all(
    names: list[str], runs: Path, data: Path, scoring: Scoring, *, unfinished: bool = False, say: Callable[[str], None]
) -> dict[str, Any]:
    """The scores of every peer of `names` that has finished in `runs`, or with `unfinished` of every one that has a checkpoint.

    One that cannot be scored does not stop the others: `not_scored` has the reason. Raises CdiffError when the data cannot be used.
    """
    split, cases = choose_split(find_cases(data), scoring.split)
    cases = cases[: scoring.limit]
    scored: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            used = share(name, runs / name)
            if used < 1 and not (unfinished and used > 0):
                reasons[name] = "nothing to score yet" if not used else f"{used:.0%} of its budget used, not finished"
                continue
            score = score_unet if name in UNETS else score_diffusion
            scored[name] = score(name, runs / name, data, cases, scoring, say) | {"share_of_budget": round(used, 4)}
        except CdiffError as error:
            reasons[name] = str(error)
            continue
        mean = scored[name]["soft_dice_5"]["mean"]
        say(f"{name}: soft Dice {mean:.3f}, {scored[name]['n_slices']} slices")
    return {
        "split": split,
        "all_raters": scoring.all_raters,
        "data": data.resolve().name,
        "scoring": asdict(scoring),
        "machine": describe_machine(torch.device("cpu")),
        "cdiff": __version__,
        "peers": scored,
        "not_scored": reasons,
    }


def share(name: str, run: Path) -> float:
    """How much of its budget a peer's run has used, 0..1: 1 when it is finished, 0 when there is nothing to score."""
    if name not in UNETS:
        used = diffusion.spent(run)
        return used if used < 1 or diffusion.is_finished(run) else 0.999
    if (run / SUMMARY).is_file() and (run / WEIGHTS).is_file():
        return 1.0
    if not (run / "last.pt").is_file() or not (run / WEIGHTS).is_file():
        return 0.0
    state = read_state(run / "last.pt")
    budget = state["budget"]
    used = state["step"] / budget["steps"] if budget["steps"] else state[budget["clock"]] / (60 * budget["minutes"])
    return float(min(max(used, 0.001), 0.999))


def load_unet(peer: UNetPeer, run: Path, annotators: int) -> nn.Module:
    """The network of the U-Net peer in `run`. Raises CdiffError for weights that are not there, or not this peer's."""
    network = peer.build(annotators)
    load_weights(network, read_tensors(run / WEIGHTS), run / WEIGHTS)
    return network


def score_unet(
    name: str, run: Path, data: Path, cases: list[Case], scoring: Scoring, say: Callable[[str], None]
) -> dict[str, Any]:
    """The scores of the U-Net peer in `run`; its whole report is RUN/scores_*.json. After an interruption, scored cases are not drawn again.

    Raises CdiffError for a case that is unlike the others and for weights that are not this peer's.
    """
    peer, weights = UNETS[name], run / WEIGHTS
    annotators = len(cases[0].masks)
    network = load_unet(peer, run, annotators)
    chain = {"runs": scoring.runs if peer.samples else 1, "mirror": scoring.mirror, "zooms": list(scoring.zooms)}
    header = {
        "protocol": {
            "seed": scoring.seed,
            "all_raters": scoring.all_raters,
            "slices_per_case": scoring.slices_per_case,
            **chain,
        },
        "model": {
            "name": name,
            "variant": peer.variant.name,
            "levels": annotators,
            "weights_sha256": sha256(weights),
        },
        "engine": {"name": "pytorch", "version": torch.__version__, "device": "cpu"},
        "data": {"folder": data.resolve().name, "split": scoring.split},
        "cdiff": __version__,
        "format": FORMAT,
    }
    out, made_with = run / scoring.file, fingerprint(header)
    rows: list[Row] = []
    empty: list[str] = []
    tick = Ticker(f"scoring {name}", len(cases), say)
    with Journal(out, header, ROW_KEYS, [case_sha256(case) for case in cases], say) as journal:
        for number, case in enumerate(cases):
            inputs = case_sha256(case)
            row = journal.rows.get(inputs) or score_case(peer, network, case, number, annotators, scoring)
            if row is None:
                empty.append(case.name)
                continue
            if inputs not in journal.rows:
                row = sealed(row | {"inputs": inputs, "chain": chain}, made_with)
                journal.add(row)
            rows.append(row | {"case": case.name})
            tick(number + 1)
        if not rows:
            raise CdiffError(f"no slice of the split {scoring.split} is marked as asked; there is nothing to score")
        report = summarise(rows, header | {"made_with": made_with}, {"no_marked_slice": empty})
        write_json(out, report)
        journal.remove()

    def draw(case: Case, chosen: range) -> None:
        images = INTENSITY.apply(read_scan(case.scan).slices)
        for i in chosen:
            draw_runs(peer, network, images[i], runs=scoring.runs, mirror=scoring.mirror, seed=0, zooms=scoring.zooms)

    summary = read_json(run / SUMMARY) if (run / SUMMARY).is_file() else {}
    parameters = sum(p.numel() for p in network.parameters())
    return _entry(report, peer.variant, {"parameters": parameters, **summary}, cpu_seconds_a_slice(cases[0], draw))


def draw_case(
    peer: UNetPeer, network: nn.Module, case: Case, number: int, annotators: int, scoring: Scoring
) -> Drawn | None:
    """What a U-Net peer draws of a case; None when no slice is marked as asked. `number`, the case's in the split, seeds its draws.

    Raises CdiffError for a case with another number of annotators.
    """
    scan = read_scan(case.scan)
    masks = read_masks(case, scan.grid)
    if masks.shape[1] != annotators:
        raise CdiffError(
            f"{case.name} has {masks.shape[1]} annotators and the first case {annotators}; the peers need the same"
        )
    chosen = Protocol(all_raters=scoring.all_raters, slices_per_case=scoring.slices_per_case).slices(masks)
    if not chosen.size:
        return None
    images = INTENSITY.apply(scan.slices)
    first = int(chosen[0])
    drawn: dict[int, Float32] = {
        int(i): draw_runs(
            peer,
            network,
            images[i],
            runs=scoring.runs,
            mirror=scoring.mirror,
            seed=mixed(scoring.seed, number, int(i)),
            zooms=scoring.zooms,
        )
        for i in chosen
    }
    runs = np.zeros((int(chosen[-1]) - first + 1, *drawn[first].shape), np.float32)
    for i, maps in drawn.items():
        runs[i - first] = maps
    return Drawn(scan.grid, masks, chosen, stack_of(runs, peer.variant, annotators))


def score_case(
    peer: UNetPeer, network: nn.Module, case: Case, number: int, annotators: int, scoring: Scoring
) -> Row | None:
    """The report's row for what `draw_case` draws; None when no slice is marked as asked. Raises CdiffError as `draw_case` does."""
    started = time.monotonic()
    drawn = draw_case(peer, network, case, number, annotators, scoring)
    if drawn is None:
        return None
    tally = CaseTally(drawn.masks, drawn.chosen, "mean")
    tally.add(drawn.stack, drawn.first, drawn.grid)
    return {
        "case": case.name,
        "annotators": annotators,
        "seconds": round(time.monotonic() - started, 2),
        **tally.row(),
    }


def stack_of(runs: NDArray[np.float32], variant: Variant, annotators: int) -> Stack:
    """Runs of probabilities [n, K, R, H, W] as a `Stack`, which the runtime makes of a diffusion model's runs."""
    kept = np.rint(runs * 255).astype(np.uint8)
    return Stack(runs.mean(2), runs.mean(1).std(1), kept, variant, annotators)


def score_diffusion(
    name: str, run: Path, data: Path, cases: list[Case], scoring: Scoring, say: Callable[[str], None]
) -> dict[str, Any]:
    """The scores of the diffusion peer in `run`, by `cdiff evaluate --fast` with the number of steps that is best on Validation. Its report
    is RUN/scores_*.json, which is continued if it was cut short."""
    bundle = diffusion.bundle_of(run)
    segmenter = Segmenter(bundle, open_engine(bundle, "auto", "cpu", threads=scoring.threads))
    protocol = Protocol(
        fast=True,
        mirror=scoring.mirror,
        zooms=scoring.zooms,
        seed=scoring.seed,
        all_raters=scoring.all_raters,
        slices_per_case=scoring.slices_per_case,
    )
    tried = diffusion.steps_on_validation(run, segmenter, choose_split(find_cases(data), "val")[1], protocol, say)
    steps = diffusion.best_steps(tried)
    say(
        f"{name}: {several(steps, 'step')}, chosen from {', '.join(f'{n}: {score:.3f}' for n, score in tried.items())} on Validation"
    )
    protocol = replace(protocol, steps=steps)
    tick = Ticker(f"scoring {name}", 1, say)
    report = evaluate(
        segmenter,
        cases,
        protocol,
        data={"folder": data.resolve().name, "split": scoring.split},
        out=run / scoring.file,
        progress=lambda done, total: tick(done / max(total, 1)),
        notice=say,
    )

    def draw(case: Case, chosen: range) -> None:
        segmenter.segment(
            case.scan, fast=True, steps=steps, mirror=scoring.mirror, zooms=scoring.zooms, slices=chosen, keep_runs=True
        )

    summary = diffusion.summary(run) | {"steps_on_validation": {str(n): score for n, score in tried.items()}}
    return _entry(report, VARIANTS[name], summary, cpu_seconds_a_slice(cases[0], draw))


def cpu_seconds_a_slice(case: Case, draw: Callable[[Case, range], None]) -> float:
    """This process's processor seconds for all runs of one slice, reading included: the mean over a few slices, after one to warm up."""
    count = len(read_scan(case.scan).slices)
    middle = max(0, (count - TIMED) // 2)
    chosen = range(middle, min(count, middle + TIMED))
    draw(case, chosen[:1])
    started = time.process_time()
    draw(case, chosen)
    return (time.process_time() - started) / len(chosen)


def _entry(report: dict[str, Any], variant: Variant, training: dict[str, Any], seconds: float) -> dict[str, Any]:
    maps = {"soft": variant.soft, "levels": variant.levels}
    return {key: report[key] for key in KEPT} | {
        "maps": maps,
        "training": training,
        "cpu_seconds_a_slice": round(seconds, 4),
    }


class Ticker:
    """Says how far a long work is, at most every SAY_EVERY seconds: `ticker(done)` of `total`."""

    def __init__(self, label: str, total: float, say: Callable[[str], None]) -> None:
        self.label, self.total, self.say = label, total, say
        self.started = self.said = time.monotonic()

    def __call__(self, done: float) -> None:
        now = time.monotonic()
        if now - self.said >= SAY_EVERY:
            self.said = now
            left = (now - self.started) * (self.total - done) / max(done, 1e-9)
            self.say(f"{self.label}: {done / self.total:.0%}, about {left:.0f} s left")
