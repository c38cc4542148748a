"""Options that several commands share, so that they read and behave alike everywhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Sampler(StrEnum):
    """The reverse chains that runtime.sampler knows."""

    ddpm = "ddpm"
    ddim = "ddim"
    dpm2m = "dpm++2m"


class Combine(StrEnum):
    """How the runs of a level become its map."""

    mean = "mean"
    vote = "vote"


MODEL = "Model"
CHAIN = "Sampling"
OUTPUT = "Output"

ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="BUNDLE",
        help="A folder that `cdiff export` wrote.",
        show_default="the model that comes with cdiff",
        rich_help_panel=MODEL,
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="auto, or an engine that `cdiff doctor` lists. One that is asked for and cannot run is an error.",
        rich_help_panel=MODEL,
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda:0, or several GPUs: cuda:0,cuda:1", rich_help_panel=MODEL)
]
RunsOption = Annotated[
    int | None,
    typer.Option(
        "--runs",
        metavar="R",
        min=1,
        help="Chains a slice and level, averaged.",
        show_default="25; with --fast the bundle's, 5",
        rich_help_panel=CHAIN,
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        metavar="N",
        min=1,
        help="Steps a chain.",
        show_default="all T; with --fast the bundle's, 10",
        rich_help_panel=CHAIN,
    ),
]
SamplerOption = Annotated[
    Sampler | None,
    typer.Option(
        "--sampler",
        metavar="NAME",
        help="ddpm (the papers'), ddim or dpm++2m (both good in few steps).",
        show_default="ddpm; with --fast the bundle's",
        rich_help_panel=CHAIN,
    ),
]
FastOption = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Few steps and runs, as the bundle states them: many times faster, a little less exact. "
        "--runs, --steps and --sampler still count when given.",
        rich_help_panel=CHAIN,
    ),
]
CombineOption = Annotated[
    Combine,
    typer.Option(
        "--levels",
        metavar="vote|mean",
        help="How runs become a level's map: their mean, or each level rounded at one half as the published code does.",
        rich_help_panel=CHAIN,
    ),
]
MirrorOption = Annotated[
    bool | None,
    typer.Option(
        "--mirror/--no-mirror",
        help="Let the runs see the slice as it is and mirrored, in turn.",
        show_default="yes where the model was trained on mirrored images",
        rich_help_panel=CHAIN,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option("--seed", metavar="K", min=0, help="The same seed gives the same maps.", rich_help_panel=CHAIN),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results and errors only.", rich_help_panel=OUTPUT)
]
