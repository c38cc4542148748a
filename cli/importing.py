"""`cdiff import`: a checkpoint of the published code to a run folder. (`import` is no name for a Python module.)"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cdiff.cli.console import say, warn, written
from cdiff.cli.extras import needs
from cdiff.cli.options import option
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import several


def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A .pt file of the published code; take one of averaged weights, ema*.pt, if there is one.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, option("--out -o RUN", "The run folder, written whole or not at all.")],
    args: Annotated[
        Path | None,
        option("--args FILE", "The args.json of the checkpoint's training.", default="args.json beside CHECKPOINT"),
    ] = None,
    source: Annotated[
        Literal["consensus", "implicit-ensemble"] | None,
        option(
            "--from CODE",
            "Which code CHECKPOINT must be from: consensus (Amit et al. 2023) or implicit-ensemble (Wolleb et al. 2022).",
            default="told by the tensors",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        option(
            "--option NAME=VALUE",
            "One of the published code's own options, in place of what args.json has, such as num_heads=1. May be repeated.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        option(
            "--images DIR",
            "The folder of the checkpoint's training cases, whose mean and standard deviation normalise images, as in the published code.",
        ),
    ] = None,
    mean: Annotated[
        str | None, option("--mean M,...", "The means as numbers, one per channel, in place of --images.")
    ] = None,
    std: Annotated[str | None, option("--std S,...", "The standard deviations that go with --mean.")] = None,
    image_size: Annotated[
        int | None,
        option(
            "--image-size N",
            "Pixels per side of the images that exported graphs will take.",
            default="the published code's",
            min=1,
        ),
    ] = None,
    quiet: Annotated[bool, option("--quiet -q", "Print results, notes and errors only.")] = False,
) -> None:
    """Turn a checkpoint of the published code into a run that `cdiff export` takes.

    Nothing but tensors is unpickled; a tensor that is missing, extra or misshapen is named.

    Examples:

    cdiff import logs/ema.pt --out runs/kidney --images data/kidney/train
    cdiff export runs/kidney --out bundles/kidney
    """
    with needs("importing"):
        from cdiff.train.imported.importer import import_checkpoint

    done = import_checkpoint(
        checkpoint,
        output,
        source=source,
        args=args,
        settings=settings,
        image_size=image_size,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        images=images,
    )
    network, size = done.config.network, done.config.network.image_size
    say(
        f"{done.options.source} code, {done.options.variant}: {done.parameters / 1e6:.2f} M parameters, {size}x{size}, "
        f"{several(network.image_channels, 'channel')}, {several(network.levels, 'level')}, T = {network.T}, step {done.step}",
        quiet,
    )
    for note in done.notes:
        warn(note)
    written(done.path)


def _numbers(name: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise CdiffError(f"{name} {text}: give numbers with commas between them, one per channel") from None
