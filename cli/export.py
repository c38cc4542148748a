"""`cdiff export`: a run folder to a verified bundle, and a bundle's graphs to TensorRT engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cdiff.cli.console import Meter, out
from cdiff.cli.engines import build_ahead, check
from cdiff.cli.extras import needs
from cdiff.cli.options import parse_zooms
from cdiff.runtime.errors import CdiffError

ENGINES = "Engines for a GPU"


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="The folder that `cdiff train` wrote; or a bundle, to add engines to it.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="BUNDLE",
            help="The bundle's folder, written whole or not at all.",
            show_default=False,
        ),
    ] = None,
    fp16: Annotated[
        bool,
        typer.Option("--fp16", help="Half-precision graphs, or an error; sums and normalisation stay float32."),
    ] = False,
    fast_steps: Annotated[
        int | None,
        typer.Option(
            "--fast-steps",
            metavar="N",
            min=1,
            help="Steps that --fast means for this bundle; `cdiff evaluate --fast --steps-curve` on Validation shows how many are best.",
            show_default="those that the run was validated with",
        ),
    ] = None,
    zooms: Annotated[
        str | None,
        typer.Option(
            "--zooms",
            metavar="Z,Z",
            help="At which multiples of its size runs see the slice, in turn, such as 1,1.25; for models of the framing centre. `cdiff "
            "evaluate --zooms` on Validation shows whether it helps.",
            show_default="1",
        ),
    ] = None,
    engine: Annotated[
        Literal["onnx", "tensorrt", "tensorrt-rtx"],
        typer.Option(
            "--engine",
            metavar="NAME",
            help="onnx (any machine), tensorrt (built on the GPU that it is for) or tensorrt-rtx (built anywhere, for GeForce RTX and RTX PRO).",
            rich_help_panel=ENGINES,
        ),
    ] = "onnx",
    runs: Annotated[
        int,
        typer.Option("--runs", metavar="R", min=1, help="Runs that a batch is made for.", rich_help_panel=ENGINES),
    ] = 25,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            metavar="N",
            min=1,
            help="Most rows (levels x runs) in a batch.",
            show_default="what the memory holds",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option(
            "--capability",
            metavar="X.Y",
            help="tensorrt-rtx: a compute capability to build for; may be given several times.",
            show_default="all it knows",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    workspace: Annotated[
        float | None,
        typer.Option(
            "--workspace",
            metavar="GIB",
            min=0.001,
            help="Most scratch memory a layer may use, in GiB.",
            show_default="no limit",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Weights can be replaced in the engine.", rich_help_panel=ENGINES)
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="tensorrt: later versions of the same major one load the engine.",
            rich_help_panel=ENGINES,
        ),
    ] = False,
    hardware_compatible: Annotated[
        Literal["ampere+", "same-capability"] | None,
        typer.Option(
            "--hardware-compatible",
            metavar="HOW",
            help="tensorrt: ampere+ runs on compute capability 8.0 and newer, same-capability on other GPUs of this one's; slower.",
            show_default="this GPU only",
            rich_help_panel=ENGINES,
        ),
    ] = None,
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

    With --engine, engines for NVIDIA GPUs are built into the bundle's cache; an existing bundle gets them in place.

    Examples:

    cdiff export runs/mine --out my_bundle
    cdiff export runs/mine --out my_bundle --fp16 --engine tensorrt-rtx
    cdiff export my_bundle --engine tensorrt
    """
    from cdiff.export.tensorrt import BuildOptions
    from cdiff.runtime.bundle import open_bundle
    from cdiff.runtime.files import must_take_files
    from cdiff.runtime.manifest import NAME

    options = BuildOptions(
        workspace_bytes=None if workspace is None else int(workspace * 2**30),
        refit=refit,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    flavour = None if engine == "onnx" else engine
    check(flavour, options, rows, capability or [])  # before the graphs, which take longer
    if triton is not None:
        must_take_files(triton)
    if (source / NAME).is_file():
        if (flavour is None and triton is None) or output is not None or fp16 or fast_steps or zooms:
            raise CdiffError(
                f"{source} is a bundle already: --engine tensorrt or tensorrt-rtx adds engines to it, in place and in its own "
                "precision, and --triton serves it; give a run folder to export anew"
            )
        bundle = open_bundle(source)
    else:
        if output is None:
            if not source.is_dir():
                raise CdiffError(f"{source} is not a folder; give the one that `cdiff train` wrote, or a bundle")
            raise CdiffError(f"no bundle is named to write to; try: cdiff export {source} --out BUNDLE")
        with needs("export"):
            from cdiff.export.exporter import export_run

        with Meter(f"export {source.name}", quiet) as meter:
            sizes = None if zooms is None else parse_zooms(zooms)
            bundle = export_run(source, output, fp16=fp16, fast_steps=fast_steps, zooms=sizes, progress=meter)
        out.print(str(bundle.path), soft_wrap=True)
    if flavour is not None:
        build_ahead(bundle, flavour, runs=runs, rows=rows, capabilities=capability or [], options=options, quiet=quiet)
    if triton is not None:
        from cdiff.export.triton import write_repository

        out.print(str(write_repository(bundle, triton)), soft_wrap=True)
