"""`cdiff train`: a folder of case folders to a run folder with checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdiff.cli import options
from cdiff.cli.console import INTERRUPTED, USER_ERROR, err, fail, say, written
from cdiff.cli.extras import needs


def train(
    data: Annotated[
        Path,
        options.option(
            "--data DIR",
            "Case folders with image.nii.gz and task01_seg01.nii.gz, task01_seg02.nii.gz ...; with or without "
            "the folders Training and Validation above them; or a table (.csv) of files.",
        ),
    ],
    output: Annotated[Path, options.option("--out -o RUN", "The run folder: checkpoints and logs.")],
    task: options.TaskOption = None,
    layout: options.LayoutOption = "auto",
    labels: options.LabelsOption = None,
    masks_by: options.MasksByOption = None,
    preset: Annotated[
        str | None,
        options.option(
            "--preset NAME",
            "small (modest machines), lidc (the shipped model: crops centred on the structure), paper or implicit-ensemble "
            "(as published, a large GPU), or tiny (to try the whole way through in a few minutes).",
            default="small; with --resume what RUN has",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        options.option(
            "--variant NAME",
            "What the network learns to draw: consensus (levels of agreement), annotator (each annotator's mask), no-annotator "
            "(a random one's), soft-label (the fraction) or implicit-ensemble. The same as --set variant=NAME.",
            default="the preset's, mostly consensus",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        options.option(
            "--set KEY=VALUE",
            "Change one value of the preset, such as batch=8. May be repeated; a wrong KEY lists all settings.",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        options.option(
            "--max-steps N",
            "Stop after step N of the whole run, as if interrupted there.",
            default="the setting steps",
            min=1,
        ),
    ] = None,
    resume: Annotated[
        bool, options.option("--resume", "Go on where the run in RUN stopped; exact, also after a kill.")
    ] = False,
    init: Annotated[
        Path | None, options.option("--init RUN", "Start a new run from the weights of another run or of a bundle.")
    ] = None,
    dry_run: Annotated[
        bool,
        options.option(
            "--dry-run",
            "Read the data, take two steps (two more of the late phase, where windows grow), say what was found and how long the run would "
            "take, and write nothing.",
        ),
    ] = False,
    device: Annotated[
        str, options.option("--device DEVICE", "auto (a GPU if PyTorch sees one), cpu, cuda, cuda:1 ...")
    ] = "auto",
    quiet: Annotated[bool, options.option("--quiet -q", "Print results, notes and errors only.")] = False,
) -> None:
    """Train a model on several annotators' masks.

    Examples:

    cdiff train --data my_data --out runs/mine --preset small --set batch=8
    cdiff train --data my_data --out runs/mine --resume
    torchrun --nproc-per-node 4 --no-python cdiff train ...
    """
    with needs("training"):
        from cdiff.runtime.scans.sources import is_there
        from cdiff.train.checkpoint import read_config
        from cdiff.train.config import Config
        from cdiff.train.data import fit_to_data
        from cdiff.train.fabric import FailedElsewhere
        from cdiff.train.presets import preset as named
        from cdiff.train.trainer import no_run
        from cdiff.train.trainer import train as run

    def configure() -> Config:
        changes = [
            *(settings or []),
            *_data_settings(task, layout, labels, masks_by),
            *([f"variant={variant}"] if variant else []),
        ]
        if resume and preset is None:
            if not is_there(output / "config.json"):
                raise no_run(output)
            return read_config(output).with_settings(changes)
        return fit_to_data(named(preset or "small"), data, changes)

    try:
        result = run(
            configure,
            data,
            output,
            resume=resume,
            max_steps=max_steps,
            dry_run=dry_run,
            init=init,
            device=device,
            quiet=quiet,
            console=err,
        )
    except FailedElsewhere:
        raise typer.Exit(USER_ERROR) from None
    if not result.first:
        if result.interrupted:
            raise typer.Exit(INTERRUPTED)
        return
    if dry_run:
        say(f"dry run: the first step's loss is {result.loss:.4f}; nothing is written", quiet)
        return
    best = "not validated yet" if result.best is None else f"best validation soft Dice {result.best:.3f}"
    say(f"step {result.step}, {result.seconds / 60:.1f} minutes of training, {best}", quiet)
    if result.interrupted:
        fail(f"interrupted; the work so far is saved, and --resume goes on from step {result.step}")
        raise typer.Exit(INTERRUPTED)
    if not result.finished:
        say("stopped before the run's end, as --max-steps says; --resume goes on from here", quiet)
    written(result.out)


def _data_settings(task: str | None, layout: str, labels: str | None, masks_by: str | None) -> list[str]:
    """The options that other commands share, as the settings that the run keeps."""
    settings = [f"task={task}"] if task else []
    if layout != "auto":
        settings.append(f"layout={layout}")
    if inside := options.parse_labels(labels):
        settings.append(f"labels={list(inside)}")
    if masks_by:
        settings.append(f"masks_by={masks_by}")
    return settings
