"""`cdiff benchmark`: what the exported engine costs on this machine beside PyTorch and the machine's floor."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from cdiff.cli import options
from cdiff.cli.console import Meter, out, warn, written
from cdiff.cli.extras import needs
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.host import MOST_THREADS


def benchmark(
    model: options.ModelOption = None,
    run: Annotated[
        Path | None,
        options.model_option(
            "--run RUN", "A folder that `cdiff train` wrote, in place of a bundle: it is exported for this measurement."
        ),
    ] = None,
    engine: options.EngineOption = "auto",
    device: Annotated[str, options.model_option("--device DEVICE", "cpu, or one GPU, such as cuda:0.")] = "cpu",
    scan: Annotated[
        Path | None,
        options.option(
            "--scan SCAN", "What to segment end to end: a scan, or a case's folder.", default="the demo scan"
        ),
    ] = None,
    slices: Annotated[
        str | None, options.option("--slices A:B", "Which of the scan's slices.", default="its middle one")
    ] = None,
    batch: Annotated[str, options.option("--batch B,B,...", "Batch sizes to time one denoiser call at.")] = "1,8,32",
    runs: Annotated[int, options.option("--runs R", "Chains per slice and level.", min=1)] = 4,
    steps: Annotated[int | None, options.option("--steps N", "Steps per chain.", default="all T", min=1)] = None,
    repeats: Annotated[int, options.option("--repeats K", "Rounds of measurement; medians are shown.", min=1)] = 3,
    threads: Annotated[
        int | None,
        options.option(
            "--threads N",
            "Processor threads for each contender.",
            default="the physical cores",
            min=1,
            max=MOST_THREADS,
        ),
    ] = None,
    compiled: Annotated[
        bool, options.option("--compile", "Time torch.compile as well; compiling takes minutes.")
    ] = False,
    json_: Annotated[Path | None, options.output_option("--json OUT", "Write everything here.")] = None,
    quiet: options.QuietOption = False,
) -> None:
    """Time the exported engine and PyTorch with the same weights, and the machine's floor, in one run.

    Milliseconds per denoiser call at each batch size; slices per minute end to
    end at equal steps, runs and precision; peak memory; and the time that the
    same FLOPs need at the matrix-product rate measured here. Run it on a machine
    that does nothing else meanwhile.

    Example:

    cdiff benchmark --json benchmark.json
    """
    if model and run:
        raise CdiffError("--model and --run both name what to measure; give one of them")
    with needs("the comparison with PyTorch"):
        import torch  # noqa: F401 - the contenders import it in processes of their own: say now if it is not here

        from cdiff.benchmarks.benchmark import benchmark as measure
        from cdiff.benchmarks.benchmark import summary
        from cdiff.export.exporter import export_run
    from cdiff.runtime.bundle import shipped_bundle
    from cdiff.runtime.data.structures import files_of_image
    from cdiff.runtime.files import must_not_be_read, must_take, write_json

    if json_:
        must_take(json_)
        must_not_be_read([json_], files_of_image(scan) if scan else [])
    sizes = options.whole_numbers("--batch", batch, "1,8,32")
    with TemporaryDirectory() as folder, Meter("benchmark", quiet) as meter:
        report = measure(
            export_run(run, Path(folder) / "bundle").path if run else model or shipped_bundle(),
            scan=scan,
            engine=engine,
            device=device,
            batches=sizes,
            slices=slices,
            runs=runs,
            steps=steps,
            repeats=repeats,
            compiled=compiled,
            threads=threads,
            progress=meter,
            notice=warn,
        )
    try:  # neither waits for the other: a reader of the tables may end early (`| head`), and a disk be full
        if json_:
            write_json(json_, report)
    finally:
        out.print(summary(report))
    if json_:
        written(json_)
