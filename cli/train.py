"""`cdiff train`: a folder of case folders to a run folder with checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdiff.cli import options
from cdiff.cli.console import INTERRUPTED, USER_ERROR, err, fail, out, say
from cdiff.cli.extras import needs


def train(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Case folders with image.nii.gz and task01_seg01.nii.gz, task01_seg02.nii.gz ...; with or without "
            "the folders Training and Validation above them; or a table (.csv) of files.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="RUN", help="The run folder: checkpoints and logs.", show_default=False),
    ],
    task: options.TaskOption = None,
    layout: options.LayoutOption = "auto",
    labels: options.LabelsOption = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="small (modest machines), lidc (the shipped model: crops centred on the structure), paper or implicit-ensemble "
            "(as published, a large GPU), or tiny (a look, a minute).",
            show_default="small; with --resume what RUN has",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant",
            metavar="NAME",
            help="What the network learns to draw: consensus (levels of agreement), annotator (each annotator's mask), no-annotator "
            "(a random one's), soft-label (the fraction) or implicit-ensemble. The same as --set variant=NAME.",
            show_default="the preset's, mostly consensus",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value of the preset, such as batch=8. May be repeated; a wrong KEY lists them all.",
            show_default=False,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option("--max-steps", metavar="N", min=1, help="Stop after N steps in all.", show_default="the preset's"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where the run in RUN stopped; exact, also after a kill."),
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="RUN",
            help="Start a new run from the weights of another or of a bundle.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Read the data, take one step, say what was found, write nothing."),
    ] = False,
    device: Annotated[
        str,
        typer.Option("--device", metavar="DEVICE", help="auto (a GPU if PyTorch sees one), cpu, cuda, cuda:1 ..."),
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
) -> None:
    """Train a model on several annotators' masks.

    Example:

    cdiff train --data my_data --out runs/mine --preset small --set batch=8
    cdiff train --data my_data --out runs/mine --resume
    torchrun --nproc-per-node 4 --no-python cdiff train ...
    """
    with needs("training"):
        from cdiff.train.checkpoint import read_config
        from cdiff.train.config import Config
        from cdiff.train.data import fit_to_data
        from cdiff.train.fabric import FailedElsewhere
        from cdiff.train.presets import preset as named
        from cdiff.train.trainer import train as run

    changes = [
        *(settings or []),
        *_data_settings(task, layout, labels),
        *([f"variant={variant}"] if variant else []),
    ]

    def configure() -> Config:
        if resume and preset is None:
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
        say(f"dry run: one step taken, loss {result.loss:.4f}; nothing is written", quiet)
        return
    best = "not validated yet" if result.best is None else f"best validation soft Dice {result.best:.3f}"
    say(f"step {result.step}, {result.seconds / 60:.1f} minutes of training, {best}", quiet)
    if result.interrupted:
        fail(f"interrupted; what was done is saved, and --resume goes on from step {result.step}")
        raise typer.Exit(INTERRUPTED)
    out.print(str(result.out), soft_wrap=True)


def _data_settings(task: str | None, layout: str, labels: str | None) -> list[str]:
    """The options that other commands share, as the settings that the run keeps."""
    settings = [f"task={task}"] if task else []
    if layout != "auto":
        settings.append(f"layout={layout}")
    if inside := options.parse_labels(labels):
        settings.append(f"labels={list(inside)}")
    return settings
