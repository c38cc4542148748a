"""From a bundle's graphs to TensorRT engines in its cache: options, keys, reports and records."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cdiff import __version__
from cdiff.export.engine_report import (
    MIN_HALF_SHARE,
    half_share,
    inspected_layers,
    plan_layers,
)
from cdiff.export.trt_build import Built, Request, inspect, must_build_for, serialise
from cdiff.runtime.bundle import Bundle
from cdiff.runtime.engines.hostcode import note_own
from cdiff.runtime.engines.trt import (
    FILES,
    LAYERS,
    RECORD,
    RECORD_FORMAT,
    VERSION_COMPATIBLE,
    EngineKey,
    Flavour,
    Gpu,
    Graph,
    Profile,
    Say,
    cached_engine,
    engine_key,
    load_trt,
    writable_cache,
)
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import atomic_folder, make_folder, sha256, write_bytes, write_json
from cdiff.runtime.gpus import visible_gpus

Progress = Callable[[int, int], None]
PARTS = 1000
"""Units of progress per graph."""
ROW_INPUTS = ("x", "row_slice", "t", "level")
HARDWARE = {"ampere+": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class BuildOptions:
    """What a user may ask of the builder; the defaults give the fastest engine for one GPU.

    workspace_bytes: limit on one layer's scratch memory; by default all of the GPU's. refit: weights can be replaced in the built engine.
    version_compatible: later TensorRT versions with the same major number can load it. hardware_compatible: "ampere+" runs on compute
    capability 8.0 and newer, "same-capability" on every GPU with this one's compute capability.
    """

    workspace_bytes: int | None = None
    refit: bool = False
    version_compatible: bool = False
    hardware_compatible: str | None = None

    def words(self, flavour: Flavour) -> tuple[str, ...]:
        """The options that are set, as an engine's key holds them. Raises CdiffError for one that is wrong or not the flavour's."""
        if flavour == "tensorrt-rtx":
            if self.version_compatible:
                raise CdiffError(
                    "TensorRT for RTX has no version-compatible engines; leave --version-compatible out, or use --engine tensorrt"
                )
            if self.hardware_compatible:
                raise CdiffError(
                    "TensorRT for RTX engines run on every capability that they are built for (--capability); leave "
                    "--hardware-compatible out"
                )
        if self.hardware_compatible and self.hardware_compatible not in HARDWARE:
            raise CdiffError(
                f"{self.hardware_compatible!r} is not known; an engine can be compatible with {', '.join(HARDWARE)}"
            )
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise CdiffError(
                f"a workspace of {self.workspace_bytes} bytes is too small; leave --workspace out to allow all of the memory"
            )
        words = {
            "refit": self.refit,
            VERSION_COMPATIBLE: self.version_compatible,
            f"hardware-{self.hardware_compatible}": bool(self.hardware_compatible),
            f"workspace-{self.workspace_bytes}": self.workspace_bytes is not None,
        }
        return tuple(sorted(word for word, on in words.items() if on))

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of TensorRT's `BuilderFlag`."""
        return (*["REFIT"] * self.refit, *["VERSION_COMPATIBLE"] * self.version_compatible)


def must_be_buildable(trt: Any, options: BuildOptions, capabilities: tuple[str, ...]) -> None:
    """Raise CdiffError when TensorRT for RTX, the module `trt`, cannot build these options and capabilities on this machine."""
    if options.refit and not visible_gpus():
        raise CdiffError(
            "TensorRT for RTX builds engines that can be refitted only on a machine with a GPU; leave --refit out here"
        )
    must_build_for(trt, capabilities)


def build_engines(
    bundle: Bundle,
    flavour: Flavour,
    gpu: Gpu | tuple[str, ...],
    profile: Profile,
    *,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> tuple[Path, Path]:
    """Build the engines of the encoder and of the denoiser into the bundle's cache; returns their paths, in that order.

    gpu: the current GPU of this thread, or, for TensorRT for RTX on any machine, the compute capabilities to build for. An engine
    that is already in the cache, whole and with the same key, is kept. progress: called as progress(done, total) over both. Each
    engine appears whole or not at all; Ctrl-C stops the builder. Raises CdiffError when TensorRT is not installed, refuses the
    graph or an option, or when layers of a half-precision bundle are not in half precision in the engine.
    """
    options = options or BuildOptions()
    words, trt = options.words(flavour), load_trt(flavour)
    if flavour == "tensorrt" and not isinstance(gpu, Gpu):
        raise CdiffError(
            "TensorRT builds on the GPU that an engine is for, but this machine has none; the engine is built at the first run on such a machine"
        )
    if flavour == "tensorrt-rtx":
        must_be_buildable(trt, options, (gpu.capability,) if isinstance(gpu, Gpu) else gpu)
    report = progress or (lambda done, total: None)
    paths = []
    for number, graph in enumerate(FILES):
        key = engine_key(bundle, graph, flavour, str(trt.__version__), gpu, profile, words)
        key = _widened(key, options)
        path = cached_engine(bundle, graph, key, say, exact=True)
        if path is None:
            path = _build(trt, bundle, key, gpu, options, partial(_scaled, report, number))
        report((number + 1) * PARTS, 2 * PARTS)
        paths.append(path)
    return paths[0], paths[1]


def _scaled(report: Progress, graph: int, part: float) -> None:
    report(int((graph + part) * PARTS), 2 * PARTS)


def _widened(key: EngineKey, options: BuildOptions) -> EngineKey:
    """The key, naming all that the engine runs on: for a hardware-compatible one, more than the GPU that built it."""
    capabilities = ("8.0+",) if options.hardware_compatible == "ampere+" else key.capabilities
    portable = options.hardware_compatible or key.flavour == "tensorrt-rtx"
    return dataclasses.replace(key, capabilities=capabilities, gpu="" if portable else key.gpu)


def free_axes(graph: Graph, profile: Profile) -> dict[str, tuple[int, int, int]]:
    """(least, best, most) length of each input's first axis, by name: rows, or sets of features. The encoder takes one image."""
    if graph == "encoder":
        return {"image": (1, 1, 1)}
    rows = (profile.min_rows, profile.opt_rows, profile.max_rows)
    return dict.fromkeys(ROW_INPUTS, rows) | {"features": (1, profile.slots, profile.slots)}


def _build(
    trt: Any,
    bundle: Bundle,
    key: EngineKey,
    gpu: Gpu | tuple[str, ...],
    options: BuildOptions,
    progress: Callable[[float], None],
) -> Path:
    started = time.monotonic()
    cache = make_folder(writable_cache(bundle))
    timings = _timing_cache(cache, key, gpu)
    request = Request(
        graph=bundle.path / FILES[key.graph],
        free_axes=free_axes(key.graph, key.profile),
        capabilities=key.capabilities if key.flavour == "tensorrt-rtx" else (),
        flags=options.flags,
        hardware=HARDWARE[options.hardware_compatible] if options.hardware_compatible else None,
        workspace_bytes=options.workspace_bytes,
        timing_cache=None if timings is None else timings.read_bytes() if timings.is_file() else b"",
    )
    built = serialise(trt, request, progress)
    bundle.must_be_unchanged()  # the key holds the hash of the graph that was there when the bundle was opened
    report = layer_report(key, built, inspect(trt, built.plan) if isinstance(gpu, Gpu) else "")
    folder = cache / key.folder_name()
    with atomic_folder(folder, replace=True) as part:
        file = part / f"{key.graph}.engine"
        file.write_bytes(built.plan)
        write_json(part / LAYERS, report)
        record = {
            "format": RECORD_FORMAT,
            "key": key.to_json(),
            "sha256": sha256(file),
            "bytes": file.stat().st_size,
            "seconds": round(time.monotonic() - started, 1),
            "cdiff": __version__,
            "half_share": report["half_share"],
            "warnings": built.warnings[:20],
        }
        write_json(part / RECORD, record)
    if VERSION_COMPATIBLE in key.options:
        note_own(str(record["sha256"]), folder / f"{key.graph}.engine")
    if timings is not None and built.timing_cache:
        write_bytes(timings, built.timing_cache)
    return folder / f"{key.graph}.engine"


def _timing_cache(cache: Path, key: EngineKey, gpu: Gpu | tuple[str, ...]) -> Path | None:
    """The file of timings, one per GPU and version, whatever the model. None for TensorRT for RTX, which makes no timings."""
    if key.flavour == "tensorrt-rtx" or not isinstance(gpu, Gpu):
        return None
    return cache / f"timings_{key.version}_{re.sub(r'[^A-Za-z0-9]+', '-', gpu.name)}.cache"


def layer_report(key: EngineKey, built: Built, inspected: str) -> dict[str, Any]:
    """The content of layers.json: its source, the share of half precision, and each convolution and product.

    inspected: the engine inspector's text, "" without a GPU. Raises CdiffError when no source gives a layer's type, or when the bundle
    is in half precision and in some source (the parsed network, the engine) less than MIN_HALF_SHARE of the layers are.
    """
    read = {"inspector": inspected_layers(inspected)}
    if key.flavour == "tensorrt-rtx":
        read["engine file"] = plan_layers(built.plan)
    read["network"] = built.layers
    told = {source: share for source, layers in read.items() if (share := half_share(layers)) is not None}
    for source, share in told.items():
        if key.precision == "float16" and share < MIN_HALF_SHARE:
            raise CdiffError(
                f"{FILES[key.graph]}: only {share:.0%} of the convolutions and products of its {key.flavour} engine ({source}) are "
                f"in half precision, and --fp16 means at least {MIN_HALF_SHARE:.0%}; export the model without --fp16"
            )
    if not told:
        raise CdiffError(
            f"{FILES[key.graph]} holds no convolution that TensorRT {key.version} reports: export it again"
        )
    source = next(iter(told))  # the first is the nearest to what runs
    layers = [product._asdict() for product in read[source]]
    whole = json.loads(inspected) if read["inspector"] else None
    return {"read_from": source, "half_share": round(told[source], 4), "layers": layers, "inspector": whole}
