"""`cdiff benchmark`: what the exported engine costs on this machine beside PyTorch and the machine's floor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdiff.cli import options
from cdiff.cli.console import Meter, out, say
from cdiff.cli.extras import needs
from cdiff.runtime.errors import CdiffError


def benchmark(
    model: options.ModelOption = None,
    engine: options.EngineOption = "auto",
    device: options.DeviceOption = "cpu",
    batches: Annotated[
        str, typer.Option("--batches", metavar="B,B,...", help="Batch sizes to time one denoiser call at.")
    ] = "1,4,16,64",
    slices: Annotated[int, typer.Option("--slices", metavar="N", min=1, help="Slices segmented end to end.")] = 2,
    runs: Annotated[int, typer.Option("--runs", metavar="R", min=1, help="Chains a slice and level.")] = 5,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps a chain.")] = 10,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time torch.compile as well; compiling takes minutes.")
    ] = False,
    json_: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="OUT",
            help="Write everything here.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    quiet: options.QuietOption = False,
) -> None:
    """Time the exported engine and PyTorch with the same weights, and the machine's floor, in one run.

    Milliseconds a denoiser call at each batch size; slices a minute end to
    end at equal steps, runs and precision; peak memory; and the time that the
    same FLOPs need at the matrix-product rate measured here. Wants a machine
    that does nothing else meanwhile.

    Example:

    cdiff benchmark --json benchmark.json
    """
    with needs("train", "the comparison with PyTorch"):
        from cdiff.benchmarks.benchmark import benchmark as measure
        from cdiff.benchmarks.benchmark import summary
    from cdiff.runtime.bundle import shipped_bundle
    from cdiff.runtime.files import write_json

    with Meter("benchmark", quiet) as meter:
        report = measure(
            model or shipped_bundle(),
            engine=engine,
            device=device,
            batches=_sizes(batches),
            slices=slices,
            runs=runs,
            steps=steps,
            compiled=compiled,
            progress=meter,
            notice=lambda line: say(line, quiet),
        )
    out.print(summary(report))
    if json_:
        write_json(json_, report)
        out.print(str(json_), soft_wrap=True)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise CdiffError(f"--batches {text} is not a list of whole numbers from 1 on, such as 1,4,16,64")
    return sizes
