"""`cdiff train`: a folder of case folders to a run folder with checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdiff.cli.console import say
from cdiff.cli.extras import needs


def train(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Case folders with image.nii.gz and task01_seg01.nii.gz, task01_seg02.nii.gz ...; with or without "
            "the folders Training and Validation above them.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="RUN", help="The run folder: checkpoints and logs.", show_default=False),
    ],
    preset: Annotated[
        str,
        typer.Option("--preset", metavar="NAME", help="paper, lidc or tiny; the values that --set may change."),
    ] = "lidc",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value of the preset, such as training.batch=8. May be repeated.",
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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check data and configuration, say what would be done, and stop."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
) -> None:
    """Train a model on several annotators' masks.

    Example:

    cdiff train --data my_data --out runs/mine --set training.steps=20000
    """
    with needs("train", "training"):
        from cdiff.train.presets import preset as named
        from cdiff.train.trainer import train as run

    config = named(preset).with_settings(settings or [])
    result = run(config, data, output, resume=resume, max_steps=max_steps, dry_run=dry_run)
    say(f"{result}", quiet)
