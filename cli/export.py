"""`cdiff export`: a run folder to a verified bundle, and a bundle's graphs to TensorRT engines."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Literal

import typer

from cdiff.cli.console import Meter, warn, written
from cdiff.cli.engines import build_ahead, check
from cdiff.cli.extras import needs
from cdiff.cli.options import option
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.sources import is_there

engine_option = functools.partial(option, panel="Engines for a GPU")


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
        Path | None, option("--out -o BUNDLE", "The bundle's folder, written whole or not at all.")
    ] = None,
    fp16: Annotated[
        bool, option("--fp16", "Half-precision graphs, or an error; sums and normalisation stay float32.")
    ] = False,
    fast_steps: Annotated[
        int | None,
        option(
            "--fast-steps N",
            "How many steps --fast takes with this bundle; `cdiff evaluate --fast --steps-curve` on Validation shows how many are best.",
            default="those that the run was validated with; 10 for an imported one",
            min=1,
        ),
    ] = None,
    zooms: Annotated[
        str | None,
        option(
            "--zooms Z,Z",
            "Multiples of the slice's size at which runs see it, in turn, such as 1,1.25; for models of the framing centre. `cdiff "
            "evaluate --zooms` on Validation shows whether it helps.",
            default="1",
        ),
    ] = None,
    engine: Annotated[
        Literal["onnx", "tensorrt", "tensorrt-rtx"],
        engine_option(
            "--engine NAME",
            "onnx (any machine), tensorrt (built on the GPU that it is for) or tensorrt-rtx (built anywhere, for GeForce RTX and RTX PRO).",
        ),
    ] = "onnx",
    runs: Annotated[
        int | None, engine_option("--runs R", "Runs that a batch is made for.", default="25", min=1)
    ] = None,
    rows: Annotated[
        int | None,
        engine_option(
            "--rows N", "Most rows (levels x runs) in a batch.", default="levels x runs if they fit, at most 256", min=1
        ),
    ] = None,
    capability: Annotated[
        list[str] | None,
        engine_option(
            "--capability X.Y",
            "tensorrt-rtx: a compute capability to build for; may be given several times.",
            default="all it knows",
        ),
    ] = None,
    workspace: Annotated[
        float | None,
        engine_option(
            "--workspace GIB", "Most scratch memory a layer may use, in GiB.", default="no limit", min=0.001, max=2**20
        ),
    ] = None,
    refit: Annotated[bool, engine_option("--refit", "Build engines whose weights can be replaced.")] = False,
    version_compatible: Annotated[
        bool,
        engine_option(
            "--version-compatible", "tensorrt: build engines that later releases of the same major version can load."
        ),
    ] = False,
    hardware_compatible: Annotated[
        Literal["ampere+", "same-capability"] | None,
        engine_option(
            "--hardware-compatible HOW",
            "tensorrt: ampere+ runs on compute capability 8.0 and newer, same-capability on all GPUs of this one's; both are slower.",
            default="this GPU only",
        ),
    ] = None,
    triton: Annotated[
        Path | None,
        option("--triton DIR", "Also write a Triton Inference Server model repository that serves the whole loop."),
    ] = None,
    quiet: Annotated[bool, option("--quiet -q", "Print results, notes and errors only.")] = False,
) -> None:
    """Write a trained model as a bundle of ONNX graphs, checked against PyTorch.

    With --engine, engines for NVIDIA GPUs are built into the bundle's cache; an existing bundle gets them in place.

    Examples:

    cdiff export runs/mine --out my_bundle
    cdiff export runs/mine --out my_bundle --fp16 --engine tensorrt-rtx
    cdiff export my_bundle --engine tensorrt
    """
    from cdiff.export.tensorrt import BuildOptions
    from cdiff.export.triton import new_model, write_repository
    from cdiff.runtime.bundle import open_bundle
    from cdiff.runtime.engines.trt import has_engines
    from cdiff.runtime.files import must_take_files
    from cdiff.runtime.manifest import NAME
    from cdiff.runtime.sampling.zoom import parse_zooms

    options = BuildOptions(
        workspace_bytes=None if workspace is None else int(workspace * 2**30),
        refit=refit,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    flavour = None if engine == "onnx" else engine
    check(flavour, options, runs, rows, capability or [])  # before the graphs, which take longer
    if triton is not None:
        must_take_files(triton)
    there = is_there(source)
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
                what = "is not a folder" if there else "does not exist"
                raise CdiffError(f"{source} {what}; give the one that `cdiff train` wrote, or a bundle")
            raise CdiffError(f"no bundle to write to is named; try: cdiff export {source} --out BUNDLE")
        with needs("export"):
            from cdiff.export.exporter import export_run

        with Meter(f"export {source.name}", quiet) as meter:
            sizes = None if zooms is None else parse_zooms(zooms)
            bundle = export_run(source, output, fp16=fp16, fast_steps=fast_steps, zooms=sizes, progress=meter)
        written(bundle.path)
    if triton is not None:
        new_model(bundle, triton)  # before the engines, which take minutes
    if flavour is not None:
        build_ahead(bundle, flavour, runs=runs, rows=rows, capabilities=capability or [], options=options, quiet=quiet)
    if triton is not None:
        if flavour == "tensorrt" and not has_engines(bundle, flavour):
            warn(
                f"the model in {triton} has no TensorRT engines, and its server builds none: there it takes ONNX Runtime"
            )
        written(write_repository(bundle, triton))
