"""TensorRT's two flavours without TensorRT: which module, which engine for which GPU, and the cache of built ones (design, section 3)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256
from cdiff.runtime.manifest import DENOISER, ENCODER

Flavour = Literal["tensorrt", "tensorrt-rtx"]
Graph = Literal["encoder", "denoiser"]
Say = Callable[[str], None]

FILES: dict[Graph, str] = {"encoder": ENCODER, "denoiser": DENOISER}
RECORD, LAYERS = "record.json", "layers.json"
"""Beside each engine: what it was built for and its hash; what the builder made of every layer."""
RECORD_FORMAT = 1

MODULES: dict[Flavour, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
INSTALL: dict[Flavour, str] = {
    "tensorrt": "pip install 'cdiff[gpu]'",
    "tensorrt-rtx": "pip install 'cdiff[rtx]'",
}
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT for RTX 1.7 builds for. Compute capability 9.0 (H100, H200) is not among them."""

PORTABLE_OPTIONS = ("hardware-compatible", "same-compute-capability", "version-compatible")
FAST_RUNS = 5


@dataclass(frozen=True)
class Gpu:
    """One GPU: the driver's name of it, compute capability as "major.minor", and the memory that is free, in bytes."""

    name: str
    capability: str
    free_bytes: int


@dataclass(frozen=True)
class Profile:
    """The shapes that a denoiser's engine takes: min_rows..max_rows rows, fastest at opt_rows, over 1..slots sets of features.

    The encoder's engine always takes one image: the runtime encodes a window at a time.
    """

    min_rows: int
    opt_rows: int
    max_rows: int
    slots: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_rows <= self.opt_rows <= self.max_rows or self.slots < 1:
            raise CdiffError(
                f"engine rows {self.min_rows} / {self.opt_rows} / {self.max_rows} over {self.slots} sets of features make no "
                "sense: give 1 <= min <= opt <= max, and at least one set"
            )

    def covers(self, other: Profile) -> bool:
        """Whether an engine for this profile takes every shape that `other` allows."""
        return self.min_rows <= other.min_rows and self.max_rows >= other.max_rows and self.slots >= other.slots


def row_bytes(bundle: Bundle) -> int:
    """A guess at the device memory that one row needs, in bytes: 16 maps of the widest layer in float32.

    The widest layer has L channels at the full image size. While the last depth is computed, about 5.4 of its maps are held for
    the skips over all depths (4 at full size, then a quarter each), and about ten by the block at work and its formats.
    """
    height, width = bundle.manifest.image_size
    return 16 * 4 * bundle.manifest.features_channels * height * width


def profile_for(
    levels: int, runs: int, *, row_bytes: int, free_bytes: int | None = None, views: int = 2, share: float = 0.7
) -> Profile:
    """The rows that suit C = `levels` levels x `runs` runs of a slice on a GPU with `free_bytes` of memory free.

    All C x R rows of a slice at once if they fit into `share` of the free memory at `row_bytes` a row, else the fewest equal
    batches, so that as few padding rows as possible are computed; at most MAX_ROWS. Without `free_bytes` (no GPU here) memory sets no
    limit: the runtime then binds fewer rows. One row is always allowed, for the end of a scan and after running out of memory.
    slots: enough for rows of `views` views (the slice and its mirror image) with FAST_RUNS runs or more a level.
    """
    wanted = levels * runs
    if levels < 1 or runs < 1:
        raise CdiffError(f"{levels} levels x {runs} runs make no batch; give at least one of each")
    fit = MAX_ROWS if free_bytes is None else max(1, min(MAX_ROWS, int(share * free_bytes) // row_bytes))
    batches = -(-wanted // fit)
    rows = -(-wanted // batches)
    held = max(rows - 2, 0) // (levels * min(runs, FAST_RUNS)) + 2
    return Profile(1, rows, rows, held * views)


MAX_ROWS = 256
"""Beyond this many rows a GPU's arithmetic is busy at any image size that the network makes sense for."""


@dataclass(frozen=True)
class EngineKey:
    """All that an engine depends on. Two builds with equal keys may stand in for one another.

    gpu: the driver's name, "" for a portable engine. capabilities: the GPU's alone, or all that a portable engine runs on.
    precision: the bundle's. graph_sha256: of the ONNX file. options: the builder's, sorted words such as "refit".
    """

    graph: Graph
    flavour: Flavour
    version: str
    gpu: str
    capabilities: tuple[str, ...]
    precision: str
    profile: Profile
    graph_sha256: str
    options: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_json(cls, data: Any) -> EngineKey:
        """The inverse of to_json. Raises CdiffError when a field is missing, unknown or of the wrong type."""
        try:
            values = {**data, "profile": Profile(**data["profile"])}
            for name in ("capabilities", "options"):
                values[name] = tuple(values[name])
            key = cls(**values)
        except (TypeError, KeyError, CdiffError) as error:
            raise CdiffError(f"not the key of an engine ({error}); delete the folder, it will be built again") from None
        return key

    def folder_name(self) -> str:
        """A name that a person can read, and 16 digits of the key's hash that make it unique."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]
        where = self.gpu or "portable"
        words = (self.graph, self.flavour, self.version, where, self.precision, f"{self.profile.max_rows}rows", digest)
        return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word) for word in words)

    def serves(self, wanted: EngineKey) -> bool:
        """Whether an engine with this key does what `wanted` asks for: same graph, and a GPU, version and shapes that it covers."""
        same = all(getattr(self, n) == getattr(wanted, n) for n in ("graph", "flavour", "precision", "graph_sha256"))
        version = self.version == wanted.version or (
            "version-compatible" in self.options and _release(self.version) <= _release(wanted.version)
            and _release(self.version)[0] == _release(wanted.version)[0]
        )  # fmt: skip
        gpu = self.gpu in ("", wanted.gpu) and set(wanted.capabilities) <= set(self.capabilities)
        return same and version and gpu and self.profile.covers(wanted.profile)


BuildEngines = Callable[[Bundle, Flavour, Gpu, Profile], tuple[Path, Path]]
"""Builds both graphs' engines for that GPU into the cache: returns the paths of the encoder's and the denoiser's. It lives in
export, which the runtime cannot import; whoever opens the runtime hands it down (`cdiff.export.tensorrt.build_engines`)."""


class EnginePair(NamedTuple):
    """The two engine files, and the profile that the denoiser's really has: what `bind` may ask for."""

    encoder: Path
    denoiser: Path
    profile: Profile


def load_trt(flavour: Flavour) -> Any:
    """Import TensorRT's Python module. Raises CdiffError that says what to install, or what the library refused."""
    raise NotImplementedError


def trt_version(flavour: Flavour) -> str:
    """The version of the TensorRT that `load_trt` finds, such as 10.16.1.11. Raises CdiffError as it does."""
    return str(load_trt(flavour).__version__)


def wanted_key(bundle: Bundle, graph: Graph, flavour: Flavour, version: str, gpu: Gpu, profile: Profile) -> EngineKey:
    """The key of an engine of one of the bundle's graphs for one GPU, without builder options."""
    entry = bundle.manifest.files[FILES[graph]]
    return EngineKey(
        graph, flavour, version, gpu.name, (gpu.capability,), bundle.manifest.precision, profile, entry["sha256"]
    )


def cached_engine(bundle: Bundle, graph: Graph, key: EngineKey, say: Say | None = None) -> Path | None:
    """The engine file in the cache that serves `key`, its hash checked; None when there is none that is whole.

    One that is stale (another graph, version or GPU) is passed over; one that is damaged is passed over and said.
    """
    raise NotImplementedError


def open_or_build(
    bundle: Bundle,
    flavour: Flavour,
    gpu: Gpu,
    profile: Profile,
    build: BuildEngines | None = None,
    say: Say | None = None,
) -> EnginePair:
    """Both engines for this GPU from the cache, or built now by `build`; what the runtime engine opens.

    Raises CdiffError that says what command builds them when there is no `build`.
    """
    raise NotImplementedError
