"""The command line: train the peers one after another, or with --score put those that are finished on one scale."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch

from cdiff.benchmarks.peers import diffusion
from cdiff.benchmarks.peers.score import Scoring, score_all, share
from cdiff.benchmarks.peers.slices import read_slices
from cdiff.benchmarks.peers.training import Budget, train_unet
from cdiff.benchmarks.peers.unets import UNETS
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.sampling.zoom import check_zooms, parse_zooms

NAMES = (*UNETS, *diffusion.DIFFUSION)
USER_ERROR, SOME_FAILED, INTERRUPTED = 2, 3, 130
"""Exit codes, as of `cdiff`."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cdiff.benchmarks.peers",
        description="Train the rivals of the consensus model with equal data and time, each in its folder RUNS/NAME; go on after a "
        "kill by the same command. Then --score them.",
        epilog=f"Peers: {', '.join(NAMES)}. docs/benchmarks.md says what each is.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with Training, Validation and Testing")
    parser.add_argument("--out", type=Path, required=True, metavar="RUNS", help="folder of the peers' runs")
    parser.add_argument("--only", metavar="NAME,NAME", help="these peers alone; all unless given")
    parser.add_argument("--threads", type=int, default=1, metavar="K", help="processor threads (1)")
    parser.add_argument("--seed", type=int, default=0, help="of each peer's training and draws (0)")
    training = parser.add_argument_group("training")
    training.add_argument("--minutes", type=float, default=60.0, help="each peer's budget (60)")
    training.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what the minutes are of (wall)")
    training.add_argument("--steps", type=int, default=0, help="a budget of so many steps instead of minutes")
    training.add_argument("--batch", type=int, default=16, help="windows a step of a U-Net peer (16)")
    training.add_argument("--crop", type=int, default=64, help="pixels of a U-Net peer's windows at first (64)")
    training.add_argument("--validations", type=int, default=20, help="how often a U-Net peer validates in all (20)")
    training.add_argument("--preset", default="lidc", help="the diffusion peers' network and training (lidc)")
    training.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value of that preset, as cdiff train does (batch=4)",
    )
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--score", choices=("val", "test"), help="score the finished peers on this split")
    scoring.add_argument("--all-raters", action="store_true", help="only slices that all annotators marked")
    scoring.add_argument(
        "--slices-per-case", type=int, metavar="N", help="only N of a case's slices, spread evenly (1: the middle one)"
    )
    scoring.add_argument("--runs", type=int, default=16, help="samples of a U-Net peer that samples (16)")
    scoring.add_argument("--no-mirror", action="store_true", help="show no peer the mirrored slice")
    scoring.add_argument(
        "--zooms", default="1", metavar="Z,Z", help="multiples of its size at which the peers see a slice in turn (1)"
    )
    scoring.add_argument("--limit", type=int, metavar="N", help="only the first N cases")
    scoring.add_argument("--unfinished", action="store_true", help="score unfinished runs too, as they are")
    scoring.add_argument("--json", type=Path, metavar="OUT", help="where to write the scores")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0 when all was done, 2 for something to mend, 3 when some peers failed, 130 when interrupted."""
    options = parse(argv)
    try:
        names = chosen(options.only)
        for name, least in (("threads", 1), ("runs", 1), ("limit", 1), ("slices_per_case", 1), ("seed", 0)):
            if (value := getattr(options, name)) is not None and value < least:
                raise CdiffError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        torch.set_num_threads(options.threads)
        return (score if options.score else train)(options, names)
    except CdiffError as error:
        say(f"error: {error}")
        return USER_ERROR
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it stopped")
        return INTERRUPTED


def chosen(only: str | None) -> list[str]:
    """The peers of --only, in the order of training. Raises CdiffError for an unknown name."""
    if only is None:
        return list(NAMES)
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    if wrong := [name for name in wanted if name not in NAMES] or ([] if wanted else [only]):
        raise CdiffError(f"--only {', '.join(wrong)}: no such peer; the peers are {', '.join(NAMES)}")
    return [name for name in NAMES if name in wanted]


def train(options: argparse.Namespace, names: list[str]) -> int:
    """Train each peer in turn and return the exit code; one that fails is named at the end, and the others are trained all the same."""
    budget = Budget(
        minutes=options.minutes, clock=options.clock, steps=options.steps, batch=options.batch, crop=options.crop,
        validations=options.validations, seed=options.seed,
    )  # fmt: skip
    failed: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        run = options.out / name
        head = f"[{number}/{len(names)}] {name}"
        try:
            if share(name, run) >= 1:
                say(f"{head}: finished before, skipped")
                continue
            say(f"{head}: {'going on' if any(run.glob('last.*')) else 'starting'} in {run}")
            if name in UNETS:
                done = train_unet(UNETS[name], options.data, run, budget)
            else:
                read_slices.cache_clear()  # no longer needed: cdiff's trainer reads its own
                done = diffusion.train_diffusion(
                    name,
                    options.data,
                    run,
                    budget,
                    preset=options.preset,
                    threads=options.threads,
                    settings=options.settings,
                )
        except CdiffError as error:
            failed[name] = str(error)
        except Exception as error:  # whatever broke in one peer, the others' hours are not to be lost
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            if not done:
                raise KeyboardInterrupt
            say(f"{head}: finished")
        if name in failed:
            say(f"{head}: failed: {failed[name]}")
    if failed:
        say("failed: " + ", ".join(failed) + "; the same command tries them again")
    return SOME_FAILED if failed else 0


def score(options: argparse.Namespace, names: list[str]) -> int:
    """Write the finished peers' scores as a table to stdout and, whole, to --json; return the exit code."""
    scoring = Scoring(
        options.score, options.all_raters, options.runs, not options.no_mirror, options.seed, options.limit, options.threads,
        options.slices_per_case, check_zooms(parse_zooms(options.zooms), "centre"),
    )  # fmt: skip
    report = score_all(names, options.out, options.data, scoring, unfinished=options.unfinished, say=say)
    for name, reason in report["not_scored"].items():
        say(f"{name}: not scored: {reason}")
    if not report["peers"]:
        raise CdiffError(f"none of the peers in {options.out} could be scored; train them first (without --score)")
    for name, found in sorted(report["peers"].items(), key=lambda item: -item[1]["soft_dice_5"]["mean"]):
        dice = found["soft_dice_5"]
        interval = "" if dice["low"] is None else f" ({dice['low']:.3f} - {dice['high']:.3f})"
        part = "" if found["share_of_budget"] >= 1 else f"  ({found['share_of_budget']:.1%} of its budget)"
        print(f"{name:20} soft Dice {dice['mean']:.3f}{interval}  GED {found['ged']['mean']:.3f}{part}")
    if options.json:
        write_json(options.json, report)
        say(f"written: {options.json}")
    return 0


def say(line: str) -> None:
    """One line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
