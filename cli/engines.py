"""What the commands do about TensorRT engines: build them, ahead of time or when a GPU first needs them, and show it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdiff.cli.console import Meter, say, warn, written
from cdiff.runtime.errors import CdiffError

if TYPE_CHECKING:
    from cdiff.export.tensorrt import BuildOptions
    from cdiff.runtime.bundle import Bundle
    from cdiff.runtime.engines.trt import BuildEngines, Flavour, Profile


def builder(quiet: bool) -> BuildEngines:
    """What `cdiff.load` calls for a GPU that the bundle has no engines for: builds them with a bar on the terminal."""
    return partial(_build, options=None, quiet=quiet)


def check(
    flavour: Flavour | None, options: BuildOptions, runs: int | None, rows: int | None, capabilities: list[str]
) -> None:
    """Raise CdiffError for options of another engine or that it cannot have here, or a TensorRT that is needed now and not installed.

    flavour: None for ONNX graphs alone, which have none of these options.
    """
    from cdiff.export.tensorrt import must_be_buildable
    from cdiff.runtime.engines.trt import load_trt
    from cdiff.runtime.gpus import visible_gpus

    if flavour is None:
        if runs or rows or capabilities or options.words("tensorrt"):
            raise CdiffError(
                "--runs, --rows, --capability and the other options of engines need --engine tensorrt or tensorrt-rtx"
            )
        return
    options.words(flavour)
    if flavour == "tensorrt" and capabilities:
        raise CdiffError("--capability is for --engine tensorrt-rtx; TensorRT builds for the GPU that it runs on")
    if flavour == "tensorrt-rtx":
        must_be_buildable(load_trt(flavour), options, tuple(capabilities))
    elif visible_gpus():
        load_trt(flavour)


def build_ahead(
    bundle: Bundle,
    flavour: Flavour,
    *,
    runs: int | None,
    rows: int | None,
    capabilities: list[str],
    options: BuildOptions,
    quiet: bool,
) -> None:
    """Build a bundle's engines before any run: TensorRT for RTX on any machine, TensorRT where its GPU is, else say when."""
    from cdiff.runtime.engines.trt import RTX_CAPABILITIES, profile_for
    from cdiff.runtime.gpus import visible_gpus
    from cdiff.runtime.segmenter import RUNS

    gpus = visible_gpus()
    where: Any = gpus[0] if gpus else None
    if flavour == "tensorrt-rtx":
        where = tuple(capabilities) or RTX_CAPABILITIES[bundle.manifest.precision]
    if where is None:
        say(
            f"no GPU here: {bundle.path} gets its TensorRT engines at the first run on one, or from this command there",
            quiet,
        )
        return
    free = gpus[0].free_bytes if gpus else None
    profile = profile_for(bundle.manifest, RUNS if runs is None else runs, free, max_rows=rows)
    for path in _build(bundle, flavour, where, profile, options, quiet):
        written(path)


def _build(
    bundle: Bundle, flavour: Flavour, gpu: Any, profile: Profile, options: BuildOptions | None, quiet: bool
) -> tuple[Path, Path]:
    from cdiff.export.tensorrt import build_engines

    target = f"compute capability {', '.join(gpu)}" if isinstance(gpu, tuple) else gpu.name
    say(f"{flavour} engines for {target}, up to {profile.max_rows} rows (Ctrl-C stops the builder)", quiet)
    with Meter(f"build {flavour} engines", quiet) as meter:
        return build_engines(bundle, flavour, gpu, profile, options=options, progress=meter, say=warn)
