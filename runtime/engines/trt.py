"""What concerns TensorRT's two flavours but does not need TensorRT: which module, which engine for which GPU, and the cache of built engines."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256
from cdiff.runtime.manifest import DENOISER, ENCODER, Manifest
from cdiff.runtime.sampling.batching import most_rows
from cdiff.runtime.sampling.mirror import VIEWS
from cdiff.runtime.words import one_line

Flavour = Literal["tensorrt", "tensorrt-rtx"]
Graph = Literal["encoder", "denoiser"]
Say = Callable[[str], None]
LOG = logging.getLogger("cdiff")

FILES: dict[Graph, str] = {"encoder": ENCODER, "denoiser": DENOISER}
RECORD, LAYERS = "record.json", "layers.json"
"""Files beside each engine: what it was built for, and its hash; and what the builder made of every layer."""
RECORD_FORMAT = 1

MODULES: dict[Flavour, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
INSTALL: dict[Flavour, str] = {
    "tensorrt": "pip install '.[gpu]' in cdiff's clone (where its wheels cannot be had, install TensorRT 10.16 or 11 as NVIDIA's guide says)",
    "tensorrt-rtx": "pip install '.[rtx]' in cdiff's clone",
}
RTX_CAPABILITIES = {
    "float32": ("8.0", "8.6", "8.9", "12.0", "12.1"),
    "float16": ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
}
"""The compute capabilities for which TensorRT for RTX 1.7 builds a bundle of each precision: it has no float32 matrix product for 7.5
(Turing), and 9.0 (H100, H200) is not among its targets."""

FAST_RUNS = 5
"""The fewest runs per slice that an engine's sets of features are made for; with fewer runs, a batch must hold fewer rows."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: the driver's name for it, its compute capability as "major.minor", and its free memory in bytes."""

    name: str
    capability: str
    free_bytes: int


@dataclass(frozen=True)
class Profile:
    """The shapes that a denoiser's engine takes: min_rows..max_rows rows, fastest at opt_rows, over 1..slots sets of features.

    The encoder's engine always takes one image, because the runtime encodes one window at a time. Raises CdiffError unless 1 <= min_rows
    <= opt_rows <= max_rows and slots >= 1.
    """

    min_rows: int
    opt_rows: int
    max_rows: int
    slots: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_rows <= self.opt_rows <= self.max_rows or self.slots < 1:
            raise CdiffError(
                f"engine rows {self.min_rows} / {self.opt_rows} / {self.max_rows} over {self.slots} sets of features make no "
                "sense; give 1 <= min <= opt <= max, and at least one set"
            )

    def covers(self, other: Profile) -> bool:
        """Whether an engine for this profile takes every shape that `other` allows."""
        return self.min_rows <= other.min_rows and self.max_rows >= other.max_rows and self.slots >= other.slots


def profile_for(
    manifest: Manifest, runs: int, free_bytes: int | None = None, *, max_rows: int | None = None
) -> Profile:
    """The profile that suits the K x R rows of a slice (K maps, R = `runs`) on a GPU with `free_bytes` of free memory.

    All rows of a slice in one batch if they fit (`most_rows`, within `max_rows`), else in the fewest equal batches, so that as few
    padding rows as possible are computed. Without `free_bytes` (no GPU here), the runtime may have to bind fewer rows. min_rows is 1,
    for the end of a scan and for use after running out of memory. slots: enough for every view of each window that such a batch can
    touch with FAST_RUNS runs or more. Raises CdiffError for `runs` or `max_rows` below 1.
    """
    if runs < 1 or (max_rows is not None and max_rows < 1):
        raise CdiffError(f"{runs} runs in batches of {max_rows} rows make no engine; give at least one of each")
    fit = most_rows(manifest.features_channels, manifest.image_size, free_bytes, max_rows)
    wanted = manifest.conditions * runs
    batches = -(-wanted // fit)
    rows = -(-wanted // batches)
    held = max(rows - 2, 0) // (manifest.conditions * min(runs, FAST_RUNS)) + 2
    return Profile(1, rows, rows, VIEWS * held)


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine depends on: builds with equal keys are interchangeable.

    version: TensorRT's. gpu: the driver's name, or "" for an engine that runs on several GPUs. capabilities: the compute
    capabilities that it runs on; "8.0+" means that or newer. precision: the bundle's. graph_sha256: of the ONNX file. options: the
    builder's, as sorted words such as "refit".
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
            lists = {name: data[name] for name in ("capabilities", "options")}
            texts = [data[name] for name in ("graph", "flavour", "version", "gpu", "precision", "graph_sha256")]
            if not all(isinstance(words, list) for words in lists.values()):
                raise TypeError("capabilities and options must be lists")
            if not all(isinstance(text, str) for text in (*texts, *lists["capabilities"], *lists["options"])):
                raise TypeError("a text is of another type")
            if not all(type(number) is int for number in data["profile"].values()):
                raise TypeError("a profile's numbers must be whole")
            words = {name: tuple(found) for name, found in lists.items()}
            return cls(**{**data, **words, "profile": Profile(**data["profile"])})
        except (AttributeError, TypeError, KeyError) as error:
            raise CdiffError(
                f"not the key of an engine ({error}); remove its folder, and it will be built again"
            ) from None

    def folder_name(self) -> str:
        """A readable name that ends with 16 digits of the key's hash, which make it unique."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]
        where = self.gpu or f"sm{'-'.join(self.capabilities)}"
        words = (self.graph, self.flavour, self.version, where, self.precision, f"{self.profile.max_rows}rows", digest)
        return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", word) for word in words)

    def serves(self, wanted: EngineKey) -> bool:
        """Whether an engine with this key can serve where `wanted` is asked for: same graph, on that GPU, covering its shapes and options."""
        return self.is_for(wanted) and self.graph_sha256 == wanted.graph_sha256 and self._loads_in(wanted.version)

    def is_for(self, wanted: EngineKey) -> bool:
        """Like `serves`, but ignoring the TensorRT version and the graph's hash: where only these differ, the engine is stale."""
        same = all(getattr(self, name) == getattr(wanted, name) for name in ("graph", "flavour", "precision"))
        gpu = self.gpu in ("", wanted.gpu) and all(self._runs_on(capability) for capability in wanted.capabilities)
        return same and gpu and set(wanted.options) <= set(self.options) and self.profile.covers(wanted.profile)

    def _runs_on(self, capability: str) -> bool:
        return any(
            capability == mine or (mine.endswith("+") and _numbers(capability.rstrip("+")) >= _numbers(mine[:-1]))
            for mine in self.capabilities
        )

    def _loads_in(self, version: str) -> bool:
        if self.version == version:
            return True
        ours, theirs = _numbers(self.version), _numbers(version)
        return VERSION_COMPATIBLE in self.options and ours[:1] == theirs[:1] and ours <= theirs


VERSION_COMPATIBLE = "version-compatible"
"""The option of engines that later TensorRT versions with the same major number can load too. They carry code for the host (`hostcode`)."""


class EnginePair(NamedTuple):
    """The two engine files. profile: the shapes that the denoiser's really takes, which `bind` may ask for. host_code: the files that carry
    code for the host."""

    encoder: Path
    denoiser: Path
    profile: Profile
    host_code: frozenset[Path] = frozenset()


BuildEngines = Callable[[Bundle, Flavour, Gpu, Profile], tuple[Path, Path]]
"""Builds the encoder's and the denoiser's engines for that GPU into the cache and returns their paths. It lives in export, which the
runtime cannot import, so the caller that opens an engine passes it in (`cdiff.export.tensorrt.build_engines`)."""


def load_trt(flavour: Flavour) -> Any:
    """Import the flavour's Python module, only now and without the other flavour's.

    Raises CdiffError when it is not installed, saying what to install, or when it is broken, saying how.
    """
    for name in MODULES[flavour]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise CdiffError(
                    f"{flavour}: {name} is installed but lacks {error.name}; {INSTALL[flavour]}"
                ) from error
        except Exception as error:  # a missing library, or a placeholder wheel, which raises errors of its own
            raise CdiffError(
                f"{flavour} is installed but does not load ({one_line(error)}); {INSTALL[flavour]}"
            ) from error
    raise CdiffError(f"{flavour} is not installed: {INSTALL[flavour]}")


def trt_version(flavour: Flavour) -> str:
    """The version of the TensorRT that `load_trt` finds, such as 10.16.1.11. Raises CdiffError as it does."""
    return str(load_trt(flavour).__version__)


def engine_key(
    bundle: Bundle,
    graph: Graph,
    flavour: Flavour,
    version: str,
    gpu: Gpu | tuple[str, ...],
    profile: Profile,
    options: tuple[str, ...] = (),
) -> EngineKey:
    """The key of an engine for one of the bundle's graphs.

    gpu: one GPU, or the compute capabilities of all GPUs that it is for. profile: the denoiser's; it is ignored for the encoder.
    """
    if graph == "encoder":
        profile = Profile(1, 1, 1, 1)
    name, capabilities = (gpu.name, (gpu.capability,)) if isinstance(gpu, Gpu) else ("", gpu)
    digest = bundle.manifest.files[FILES[graph]]["sha256"]
    precision = bundle.manifest.precision
    return EngineKey(graph, flavour, version, name, capabilities, precision, profile, digest, tuple(sorted(options)))


NO_HOME = Path("/nonexistent")
"""What Debian gives as the home of users who have none."""


def user_cache() -> Path:
    """The user's folder of engines, for bundles that cannot be written to: $CDIFF_CACHE, $XDG_CACHE_HOME/cdiff or ~/.cache/cdiff."""
    if named := os.environ.get("CDIFF_CACHE"):
        return Path(named) / "engines"
    try:
        home = Path.home()
    except RuntimeError:  # a container's user without a name or $HOME
        home = NO_HOME  # where nothing will be found, and an attempt to write names the folder
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "cdiff" / "engines"


def writable_cache(bundle: Bundle) -> Path:
    """Where new engines of this bundle go: BUNDLE/engines, or the user's cache where the bundle is read-only."""
    nearest = bundle.engines if bundle.engines.is_dir() else bundle.path
    return bundle.engines if os.access(nearest, os.W_OK) else user_cache()


def cached_engine(
    bundle: Bundle, graph: Graph, key: EngineKey, say: Say | None = None, *, exact: bool = False
) -> Path | None:
    """The file of a cached engine that serves `key`, its hash checked; None when no intact one does.

    BUNDLE/engines and the user's cache are searched. Of several, one for a single GPU with the fewest options is preferred, then the
    one whose opt_rows is nearest to the one asked for. An engine that is stale (another version or graph) or damaged is
    reported, by `say` or else by a warning, and never returned. exact: accept only an equal key.
    """
    found = _find(bundle, graph, key, say, exact)
    return found[0] if found else None


def cached_rows(bundle: Bundle, flavour: Flavour, gpu: Gpu) -> int | None:
    """The most rows that a cached engine takes on this GPU; None when there is none for it. Reads only records, not the engine files."""
    one = engine_key(bundle, "denoiser", flavour, trt_version(flavour), gpu, Profile(1, 1, 1, 1))
    found = [key.profile.max_rows for _, key, _ in _records(bundle, "denoiser", lambda _: None) if key.serves(one)]
    return max(found, default=None)


def has_engines(bundle: Bundle, flavour: Flavour) -> bool:
    """Whether the cache has any engine of this model, for any GPU and version; whether one can serve here shows when it is bound."""
    return any(key.flavour == flavour for _, key, _ in _records(bundle, "denoiser", lambda _: None))


def open_or_build(
    bundle: Bundle,
    flavour: Flavour,
    gpu: Gpu,
    profile: Profile,
    build: BuildEngines | None = None,
) -> EnginePair:
    """Both engines for this GPU from the cache, or built now by `build`.

    Raises CdiffError, naming the command that builds them, when they are missing and there is no `build`; and whatever `build` raises.
    """
    version = trt_version(flavour)
    keys = {graph: engine_key(bundle, graph, flavour, version, gpu, profile) for graph in FILES}
    found = {graph: _find(bundle, graph, key) for graph, key in keys.items()}
    if not all(found.values()) and build is not None:
        build(bundle, flavour, gpu, profile)
        found = {graph: _find(bundle, graph, key) for graph, key in keys.items()}
    encoder, denoiser = found["encoder"], found["denoiser"]
    if encoder is None or denoiser is None:
        raise CdiffError(
            f"{bundle.path} has no {flavour} {version} engine for {gpu.name} (compute capability {gpu.capability}) with "
            f"{profile.max_rows} rows; build it: cdiff export {bundle.path} --engine {flavour}"
        )
    host_code = frozenset(path for path, key in (encoder, denoiser) if VERSION_COMPATIBLE in key.options)
    return EnginePair(encoder[0], denoiser[0], denoiser[1].profile, host_code)


def _find(
    bundle: Bundle, graph: Graph, wanted: EngineKey, say: Say | None = None, exact: bool = False
) -> tuple[Path, EngineKey] | None:
    tell = say or _warn
    serving: list[tuple[tuple[bool, int, int], Path, EngineKey, str]] = []
    for path, key, digest in _records(bundle, graph, tell):
        if key == wanted or (not exact and key.serves(wanted)):
            distance = abs(key.profile.opt_rows - wanted.profile.opt_rows)
            serving.append(((key.gpu == "", len(key.options), distance), path, key, digest))
        elif key.is_for(wanted) and not key.serves(wanted):
            stale = f"TensorRT {key.version}" if key.graph_sha256 == wanted.graph_sha256 else "another graph"
            tell(f"{path.parent} was built for {stale} and is not used; remove it, or build again")
    for _, path, key, digest in sorted(serving, key=lambda one: one[0]):
        if path.is_file() and sha256(path) == digest:
            return path, key
        tell(
            f"{path} is missing or damaged (its SHA-256 is not the recorded one) and is not used; it must be built again"
        )
    return None


@functools.cache
def _warn(text: str) -> None:
    """Warn once per text, because engines are searched for several times while one model opens."""
    LOG.warning("%s", text)


def _records(bundle: Bundle, graph: Graph, tell: Say) -> Iterator[tuple[Path, EngineKey, str]]:
    """Each engine for `graph` in the caches: its file, key and recorded SHA-256.

    In the user's cache, which all models share, only engines of this bundle's own graph count."""
    for folder in dict.fromkeys((bundle.engines, user_cache())):
        for record in sorted(folder.glob(f"{graph}_*/{RECORD}")):
            try:
                data = json.loads(record.read_text(encoding="utf-8"))
                if data["format"] != RECORD_FORMAT:
                    continue  # written by another version of cdiff
                key, digest = EngineKey.from_json(data["key"]), str(data["sha256"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError, CdiffError) as error:
                tell(f"{record} cannot be read ({error}), so its engine is not used; remove {record.parent}")
                continue
            if folder == bundle.engines or key.graph_sha256 == bundle.manifest.files[FILES[graph]]["sha256"]:
                yield record.parent / f"{graph}.engine", key, digest


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
