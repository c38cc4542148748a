"""`cdiff export`: a run folder to a verified bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdiff.cli.console import Meter, out
from cdiff.cli.extras import needs


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder that `cdiff train` wrote.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="BUNDLE",
            help="The bundle's folder, written whole or not at all.",
            show_default=False,
        ),
    ],
    fp16: Annotated[
        bool,
        typer.Option("--fp16", help="Half-precision graphs, or an error; sums and normalisation stay float32."),
    ] = False,
    triton: Annotated[
        Path | None,
        typer.Option(
            "--triton",
            metavar="DIR",
            help="Also write a Triton Inference Server model repository that serves the whole loop.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
) -> None:
    """Write a trained model as a bundle of ONNX graphs, checked against PyTorch.

    Example:

    cdiff export runs/mine --out my_bundle
    """
    with needs("train", "export"):
        from cdiff.export.exporter import export_run

    with Meter(f"export {run.name}", quiet) as meter:
        bundle = export_run(run, output, fp16=fp16, progress=meter)
    out.print(str(bundle.path), soft_wrap=True)
    if triton is not None:
        from cdiff.export.triton import write_repository

        out.print(str(write_repository(bundle, triton)), soft_wrap=True)
