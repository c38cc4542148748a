"""manifest.json, the description of a bundle that export writes and the runtime reads."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypedDict, get_args

from cdiff.runtime.data.case import ARRAY, MASKS_BY
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.framing import Framing, FramingMode
from cdiff.runtime.sampling.sampler import SAMPLERS
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.scans.intensity import Intensity
from cdiff.runtime.scans.lie import DIRECTIONS, Lie
from cdiff.runtime.variants import VARIANTS, Variant
from cdiff.runtime.words import by

FORMAT_VERSION = 1
NAME = "manifest.json"
MOST_RUNS = 1_000_000
"""Largest number of runs that `fast` may state."""
LONGEST_SIDE = 4096
"""Most pixels along a side of what a network sees. Beyond it one slice's features alone fill gigabytes: such a number in a file is a
mistake, and memory would run out before a graph could refuse it."""
MOST_LEVELS = 1_000
"""Largest C; single figures are usual."""
DEEPEST = 32
"""How deep the values of a manifest may be nested."""
OUTSIDE = -1
"""`Manifest.outside` where the file lacks the key: manifests older than the key stay valid."""
ONE_ZOOM = (1.0,)
"""`Manifest.zooms` where the file lacks the key."""
SMALLEST_ZOOM, LARGEST_ZOOM = 0.25, 4.0
TARGETS, VARIANCES = ("eps", "x0", "v"), ("fixed", "learned")
"""What a network predicts, and whether the variance of a step's noise is fixed or learned, as its second output."""
ENCODER, DENOISER, WEIGHTS, CARD = "encoder.onnx", "denoiser.onnx", "model.safetensors", "README.md"


class FileEntry(TypedDict):
    """What the manifest says of one file: SHA-256 in hexadecimal, and size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """All that the runtime must know about a model, besides its graphs.

    variant: what the network was trained to draw (`runtime.variants`). levels: C, the number of annotators and of levels of
    agreement. These two give `conditions`, the number of maps per slice. target and variance: what the network was trained for;
    the denoiser's graph returns x0 whatever the target. image_size: (H, W), the graphs' fixed size. framing, tile_overlap and
    slice_axis: how a scan is brought to that size; intensity: how it is normalised. precision: the graphs' arithmetic.
    features_channels: the width L of the encoder's output. mirror: whether the network was trained on mirrored images, so that
    its runs may see them. zooms: the sizes, as multiples of the slice's own, at which runs see it in turn; only the framing
    `centre` has any besides 1. fast: sampler, steps and runs of `--fast`. outside: the value of x0 outside a mask, -1 or 0
    (inside it is 1). files: every file of the bundle except the manifest itself and the engines' cache. training, scores and
    verification tell how the model was trained, how it scored, and how far the exported graphs were from PyTorch.
    """

    name: str
    task: str
    citation: list[str]
    variant: str
    levels: int
    T: int
    schedule: dict[str, Any]
    target: str
    variance: str
    image_size: tuple[int, int]
    image_channels: int
    framing: str
    tile_overlap: float
    intensity: dict[str, Any]
    slice_axis: int
    mirror: bool
    precision: str
    opset: int
    features_channels: int
    fast: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    outside: int = OUTSIDE
    zooms: tuple[float, ...] = ONE_ZOOM
    format_version: int = FORMAT_VERSION

    @property
    def draws(self) -> Variant:
        """What the network draws, and what its maps mean."""
        return VARIANTS[self.variant]

    @property
    def conditions(self) -> int:
        """K, the number of maps per slice, and the largest value of the graphs' input `level` (1..K)."""
        return self.draws.conditions(self.levels)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_json(self.schedule)

    @property
    def normalisation(self) -> Intensity:
        return Intensity.from_json(self.intensity)

    @property
    def slice_framing(self) -> Framing:
        """How slices are brought to the network's size, and maps back."""
        return Framing(self.framing, self.image_size, self.tile_overlap)  # type: ignore[arg-type]  # `_check` knows the modes

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the channels, in order, where training read each from a file of its own; else empty."""
        return tuple(map(str, self._data.get("modalities", [])))

    @property
    def labels_inside(self) -> tuple[int, ...]:
        """The values of a mask that training took as inside; empty where training named none."""
        return tuple(map(int, self._data.get("labels", [])))

    @property
    def masks_by(self) -> str:
        """How training aligned masks with their images, one of MASKS_BY."""
        return str(self._data.get("masks_by", ARRAY))

    @property
    def lie(self) -> Lie | None:
        """How the training's slices lay in the patient; None where they differed or the manifest does not say."""
        told = self._data.get("axes")
        return None if told is None else Lie(*told)

    @property
    def pixel_mm(self) -> tuple[float, float] | None:
        """The smallest and the largest edge, in mm, of the pixels that the network saw in training; None where the manifest does not say."""
        span = self._data.get("pixel_mm")
        return None if span is None else (float(span[0]), float(span[1]))

    @property
    def resampled(self) -> tuple[int, int] | None:
        """The size (H, W) that whole slices are resampled to for the network; None where it sees their own pixels."""
        return self.image_size if self.framing == "resize" else None

    @property
    def slice_size(self) -> tuple[int, int] | None:
        """(h, w) in pixels of the slices that training read and normalised; None where they differed or the manifest does not say."""
        size = self._data.get("slice_size")
        return None if size is None else (size[0], size[1])

    @property
    def _data(self) -> dict[str, Any]:
        """What `training` says about its data; empty where it says nothing."""
        data = self.training.get("data", {})
        return data if isinstance(data, dict) else {}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the format version first."""
        values = dataclasses.asdict(self) | {"image_size": list(self.image_size)}
        if self.outside == OUTSIDE:
            del values["outside"]
        values["zooms"] = list(self.zooms)
        if self.zooms == ONE_ZOOM:
            del values["zooms"]
        return {"format_version": values.pop("format_version"), **values}

    @classmethod
    def from_json(cls, data: Any, source: str = NAME) -> Manifest:
        """The inverse of to_json.

        source: the file's name, for messages. Raises CdiffError naming the file and the key when the format version is another,
        a key is missing, unknown or of the wrong type, or a value is out of range.
        """
        if not isinstance(data, dict):
            _refuse(source, "it must hold one JSON object")
        version = data.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise CdiffError(
                f"{source}: format_version is {version!r}, but this cdiff reads {FORMAT_VERSION}; "
                "export the model again, or install the cdiff that wrote it"
            )
        keys = [f.name for f in dataclasses.fields(cls)]
        data = {"outside": OUTSIDE, "zooms": list(ONE_ZOOM)} | data
        if missing := [key for key in keys if key not in data]:
            _refuse(source, f"key {missing[0]!r} is missing")
        if unknown := [key for key in data if key not in keys]:
            raise CdiffError(
                f"{source}: key {unknown[0]!r} is not known to this cdiff; install the one that wrote it, which is newer, or correct the key"
            )
        manifest = cls(**{key: _typed(key, data[key], source) for key in keys})
        manifest._check(source)
        return manifest

    def _check(self, source: str) -> None:
        for key in ("levels", "T", "image_channels", "features_channels", "opset"):
            if getattr(self, key) < 1:
                _refuse(source, f"key {key!r} must be at least 1, not {getattr(self, key)}")
        if self.levels > MOST_LEVELS:
            _refuse(source, f"key 'levels' must be at most {MOST_LEVELS}, not {self.levels}")
        if max(self.image_size) > LONGEST_SIDE:
            _refuse(
                source,
                f"key 'image_size' must be at most {LONGEST_SIDE} a side, not {by(self.image_size)}: one slice's features would fill gigabytes",
            )
        choices = {
            "variant": tuple(VARIANTS),
            "target": TARGETS,
            "variance": VARIANCES,
            "outside": (-1, 0),
            "framing": get_args(FramingMode),
            "precision": ("float32", "float16"),
            "slice_axis": (0, 1, 2),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                words = ", ".join(map(str, allowed))
                _refuse(source, f"key {key!r} must be one of {words}, not {getattr(self, key)!r}")
        if self.zooms != ONE_ZOOM and self.framing != "centre":
            _refuse(source, f"key 'zooms' must be [1] for the framing {self.framing!r}, which covers the whole slice")
        if not 0 <= self.tile_overlap < 1:
            _refuse(source, f"key 'tile_overlap' must lie in [0, 1), not {self.tile_overlap}")
        for key, build in (("schedule", NoiseSchedule.from_json), ("intensity", Intensity.from_json)):
            try:
                built = build(getattr(self, key))
            except (TypeError, ValueError, OverflowError, CdiffError) as error:
                _refuse(source, f"key {key!r} is wrong ({error})")
            _check_part(key, getattr(self, key), type(built)().to_json(), source)
            if isinstance(built, NoiseSchedule) and built.T != self.T:
                _refuse(source, f"key 'schedule' has T = {built.T}, but key 'T' is {self.T}")
        self._check_fast(source)
        for key, kind in (("modalities", str), ("labels", int)):
            values = self._data.get(key, [])
            if not (isinstance(values, list) and all(type(value) is kind for value in values)):
                words = "texts" if kind is str else "whole numbers"
                _refuse(source, f"key 'training', data, {key} must be a list of {words}, not {values!r}")
        if self.masks_by not in MASKS_BY:
            _refuse(source, f"key 'training', data, masks_by must be {' or '.join(MASKS_BY)}, not {self.masks_by!r}")
        lie = self._data.get("axes")
        if lie is not None and (not isinstance(lie, list) or sorted(map(str, lie)) != sorted(DIRECTIONS)):
            _refuse(source, f"key 'training', data, axes must be {', '.join(DIRECTIONS)} in some order, not {lie!r}")
        span = self._data.get("pixel_mm")
        if span is not None and not _is_span(span):
            _refuse(
                source, f"key 'training', data, pixel_mm must be two positive numbers, the smaller first, not {span!r}"
            )
        size = self._data.get("slice_size")
        if size is not None and not _is_size(size):
            _refuse(source, f"key 'training', data, slice_size must be two positive whole numbers, not {size!r}")
        for name in (ENCODER, DENOISER):
            if name not in self.files:
                _refuse(source, f"key 'files' does not list {name}")

    def _check_fast(self, source: str) -> None:
        """Refuse a `fast` that no sampler could take. Keys may be missing: `segment` has defaults for them."""
        fast: dict[str, Any] = {"sampler": SAMPLERS[0], "steps": 1, "runs": 1}
        if unknown := sorted(self.fast.keys() - fast.keys()):
            _refuse(source, f"key 'fast' has {unknown[0]!r}, which is none of {', '.join(fast)}")
        fast |= self.fast
        if fast["sampler"] not in SAMPLERS:
            _refuse(source, f"key 'fast', sampler must be one of {', '.join(SAMPLERS)}, not {fast['sampler']!r}")
        for key, most in (("steps", self.T), ("runs", MOST_RUNS)):
            if type(fast[key]) is not int or not 1 <= fast[key] <= most:
                _refuse(source, f"key 'fast', {key} must be a whole number from 1 to {most}, not {fast[key]!r}")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest file. Raises CdiffError when it cannot be read, is not JSON, or as from_json does."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
            if _is_deeper(data, DEEPEST):
                raise ValueError(f"it is nested more than {DEEPEST} deep")
            # JSON may hold 1e999 and lone surrogates, which no report or picture could.
            json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
        except OSError as error:
            raise CdiffError(
                f"cannot read {path}: {error.strerror}; export the bundle again or copy it whole"
            ) from None
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or NaN; nested without end
            _refuse(str(path), f"it is not valid JSON ({error})")
        return cls.from_json(data, str(path))


def _typed(key: str, value: Any, source: str) -> Any:
    """`value` in the type of `key`, where tuples are lists in JSON. Raises CdiffError where it has another type or is out of range."""
    if key == "image_size":
        if not _is_size(value):
            _refuse(source, f"key 'image_size' must be two positive whole numbers, not {value!r}")
        return tuple(value)
    if key == "zooms":
        fits = isinstance(value, list) and all(
            type(zoom) in (int, float) and SMALLEST_ZOOM <= zoom <= LARGEST_ZOOM for zoom in value
        )
        if not fits or not value or len(set(value)) < len(value):
            words = f"a list of different numbers from {SMALLEST_ZOOM:g} to {LARGEST_ZOOM:g}"
            _refuse(source, f"key 'zooms' must be {words}, not {value!r}")
        return tuple(map(float, value))
    if key == "citation":
        if not (isinstance(value, list) and all(isinstance(line, str) for line in value)):
            _refuse(source, "key 'citation' must be a list of texts")
        return value
    if key == "files":
        _check_files(value, source)
        return value
    kind, words = _KINDS[_ANNOTATED[key]]
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            _refuse(source, f"key {key!r} is too large a number")
    if type(value) is not kind:
        _refuse(source, f"key {key!r} must be {words}, not {value!r}")
    return value


def _check_part(key: str, value: dict[str, Any], example: dict[str, Any], source: str) -> None:
    """Refuse an object that lacks keys of `example` or has values of other types: a default in their place, or "false" taken for true, would
    be another model."""
    for name, like in example.items():
        if name not in value:
            _refuse(source, f"key {key!r} lacks {name!r}")
        fits = (type(like), int) if type(like) is float else (type(like),)
        if type(value[name]) not in fits:
            _refuse(source, f"key {key!r}, {name} cannot be {value[name]!r}")


def _is_deeper(value: Any, most: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (most == 0 or any(_is_deeper(one, most - 1) for one in inner))


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)


def _is_span(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(v) in (int, float) and 0 < v < math.inf for v in value)
        and value[0] <= value[1]
    )


_ANNOTATED = {part.name: part.type for part in dataclasses.fields(Manifest)}
_KINDS: dict[Any, tuple[type, str]] = {
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "dict[str, Any]": (dict, "an object"),
}


def _check_files(value: Any, source: str) -> None:
    if not isinstance(value, dict):
        _refuse(source, "key 'files' must be an object")
    for name, entry in value.items():
        # Names are joined to the bundle's path: one with folders could point outside it.
        if name in ("", ".", "..", NAME) or any(sign in name for sign in "/\\\0:"):
            _refuse(source, f"key 'files' lists {name!r}, which is not a plain file name")
        if not (
            isinstance(entry, dict)
            and set(entry) == {"sha256", "bytes"}
            and isinstance(entry["sha256"], str)
            and type(entry["bytes"]) is int
        ):
            _refuse(source, f"key 'files', entry {name!r}, must hold sha256 (a text) and bytes (a whole number)")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _refuse(source: str, what: str) -> NoReturn:
    raise CdiffError(f"{source}: {what}; export the model again to write a valid manifest")
