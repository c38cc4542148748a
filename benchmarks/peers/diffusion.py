"""The diffusion peers: the variants of both papers through cdiff's own trainer, exporter and runtime, from scratch, in the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cdiff.benchmarks.peers.training import Budget
from cdiff.export.exporter import export_run
from cdiff.runtime.bundle import Bundle, open_bundle
from cdiff.runtime.data.cases import Case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import NAME as MANIFEST
from cdiff.runtime.scoring.evaluate import Protocol, evaluate
from cdiff.runtime.segmenter import Segmenter
from cdiff.runtime.variants import VARIANTS
from cdiff.train import pace
from cdiff.train.checkpoint import checkpoint_folder, read_config, read_json
from cdiff.train.config import Config
from cdiff.train.data import fit_to_data
from cdiff.train.presets import preset as named
from cdiff.train.trainer import train

DIFFUSION = tuple(VARIANTS)
"""Names of the peers, those of the variants: consensus is the method itself."""
ENDLESS = 1_000_000
"""Steps that no budget of minutes reaches."""
STEPS = (1, 5)
"""Numbers of DDIM steps that a peer may be scored with: Validation decides which."""
CHOOSING = 6
"""How many Validation cases decide that."""
BUNDLE, UNFINISHED = "bundle", "bundle-unfinished"
"""Folders in the run: of the checkpoint that was chosen, and of the best so far of a run that is looked at before its end."""


def configuration(
    name: str, data: Path, budget: Budget, preset: str, threads: int, settings: Sequence[str] = ()
) -> Config:
    """The preset's network and training for the variant `name`, changed by `settings` (KEY=VALUE, as `cdiff train --set`), with the
    peers' budget and the data's number of annotators. Raises CdiffError for an unknown setting."""
    chosen = (
        named(preset)
        .with_settings(list(settings))
        .with_values(
            {
                "variant": name,
                "minutes": 0.0 if budget.steps else budget.minutes,
                "clock": budget.clock,
                "steps": budget.steps or ENDLESS,
                "seed": budget.seed,
                "threads": threads,
            }
        )
    )
    return fit_to_data(chosen, data, [])


def train_diffusion(
    name: str,
    data: Path,
    out: Path,
    budget: Budget,
    *,
    preset: str = "lidc",
    threads: int = 1,
    settings: Sequence[str] = (),
) -> bool:
    """Train in the folder `out`, or go on there, until the budget is spent, and export the checkpoint that Validation chose.

    Returns False when interrupted; all is saved then. Raises CdiffError as training and export do.
    """
    config = configuration(name, data, budget, preset, threads, settings)
    if spent(out) < 1:
        # Lines, not a bar: its end would be ENDLESS.
        console = Console(stderr=True, force_terminal=False)
        resume = (out / "config.json").exists()
        if train(config, data, out, resume=resume, device="cpu", console=console).interrupted:
            return False
    if not is_finished(out):
        export_run(out, out / BUNDLE, replace=True)
    return True


def is_finished(out: Path) -> bool:
    """Whether the run was trained and exported."""
    return (out / BUNDLE / MANIFEST).is_file()


def bundle_of(out: Path) -> Bundle:
    """The run's bundle; of a run that is not finished, its best checkpoint so far, exported now. Raises CdiffError without one."""
    if is_finished(out):
        return open_bundle(out / BUNDLE)
    return export_run(out, out / UNFINISHED, replace=True)


def steps_on_validation(
    out: Path, segmenter: Segmenter, cases: list[Case], protocol: Protocol, say: Callable[[str], None]
) -> dict[int, float]:
    """Soft Dice (five thresholds) by number of steps, for STEPS capped at the model's T, on the first CHOOSING of the Validation `cases`.

    OUT/steps_N.json are the reports; what they hold is not drawn again. Raises CdiffError when none of the cases can be scored.
    """
    scores = {}
    for steps in sorted({min(n, segmenter.manifest.T) for n in STEPS}):
        asked = replace(protocol, fast=True, steps=steps, all_raters=False, slices_per_case=None)
        report = evaluate(segmenter, cases[:CHOOSING], asked, out=out / f"steps_{steps}.json", notice=say)
        scores[steps] = float(report["soft_dice_5"]["mean"])
    return scores


def best_steps(scores: dict[int, float]) -> int:
    """The number of steps with the best score; of several, the smallest."""
    return min(scores, key=lambda steps: (-scores[steps], steps))


def spent(out: Path) -> float:
    """The share of the budget that the run in `out` has used, 0..1; 0 without a checkpoint."""
    folder = checkpoint_folder(out, "last") if (out / "config.json").is_file() else None
    if folder is None:
        return 0.0
    info = read_json(folder / "checkpoint.json")
    return min(1.0, pace.progress(read_config(out), int(info["step"]), float(info["seconds"])))


def summary(out: Path) -> dict[str, Any]:
    """Of this run, what `run.json` holds for a U-Net peer, with seconds of the budget's clock alone: the other's were not counted.

    Raises CdiffError for a run without a checkpoint.
    """
    config, folder, best = read_config(out), checkpoint_folder(out, "last"), checkpoint_folder(out, "best")
    if folder is None:
        raise CdiffError(f"{out} holds no checkpoint; train it first")
    info = read_json(folder / "checkpoint.json")
    chosen = read_json((best or folder) / "checkpoint.json")
    training = config.training
    return {
        "peer": config.network.variant,
        "budget": {
            "minutes": training.minutes,
            "clock": training.clock,
            "steps": 0 if training.minutes else training.steps,
            "batch": training.batch,
            "rows_per_image": training.rows_per_image,
        },
        "steps": info["step"],
        f"{training.clock}_seconds": info["seconds"],
        "best_val_soft_dice_5": chosen["val_soft_dice_5"],
        "parameters": info["parameters"],
        "machine": info["machine"],
        "train_slices": info["data"]["train"]["slices"],
        "val_slices": info["val_protocol"]["slices"],
        "image_size": config.network.image_size,
    }
