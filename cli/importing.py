"""`cdiff import`: a checkpoint of the published code to a run folder. (`import` is no name for a Python module.)"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cdiff.cli.console import out, say, warn
from cdiff.cli.extras import needs
from cdiff.runtime.errors import CdiffError


def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A .pt file of the published code; best ema*.pt.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="RUN", help="The run folder, written whole or not at all.", show_default=False
        ),
    ],
    args: Annotated[
        Path | None,
        typer.Option(
            "--args",
            metavar="FILE",
            help="The args.json of its training.",
            show_default="args.json beside CHECKPOINT",
        ),
    ] = None,
    source: Annotated[
        Literal["consensus", "implicit-ensemble"] | None,
        typer.Option(
            "--from",
            metavar="CODE",
            help="consensus (Amit et al. 2023) or implicit-ensemble (Wolleb et al. 2022).",
            show_default="told by the tensors",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="One of the published code's own options, over args.json, such as num_heads=1. May be repeated.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Its training cases: their mean and standard deviation normalise, as in the published code.",
            show_default=False,
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option("--mean", metavar="M,...", help="The same by numbers, one a channel.", show_default=False),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option("--std", metavar="S,...", help="The standard deviations to --mean.", show_default=False),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            metavar="N",
            min=1,
            help="Pixels a side that exported graphs will take.",
            show_default="the published code's",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
) -> None:
    """Turn a checkpoint of the published code into a run of ours.

    Nothing but tensors is unpickled; a tensor that is missing, extra or misshapen is named.

    Example:

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
        f"{network.image_channels} channel(s), {network.levels} level(s), T = {network.T}, step {done.step}",
        quiet,
    )
    for note in done.notes:
        warn(note)
    out.print(str(done.path), soft_wrap=True)


def _numbers(name: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise CdiffError(f"{name} {text}: give numbers with commas between them, one a channel") from None
