"""The whole configuration of a training run, as JSON and as `--set key=value`; the names are the paper's."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.variants import ANNOTATOR, IMPLICIT_ENSEMBLE
from cdiff.train.sections import DataConfig, DiffusionConfig, NetworkConfig, TrainingConfig, check_size

HOW = ("accumulate", "checkpointing", "compile", "deterministic", "prefetch", "peak_tflops", "threads")
"""Settings that say how a run is computed, not what it learns from: a resumed run may change them."""


@dataclass(frozen=True)
class Config:
    """A whole training run. Keys are unique over the sections, so `--set batch=8` needs no section's name."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def schedule(self) -> NoiseSchedule:
        noise = self.diffusion
        return NoiseSchedule(self.network.T, noise.beta_start, noise.beta_end, noise.scaled, noise.schedule)

    @property
    def crop(self) -> int:
        """The side of the square that training sees before its late phase, pixels."""
        return self.data.crop or self.network.image_size

    def __post_init__(self) -> None:
        _ = self.schedule  # an impossible one is an error before any data is read
        check_size(self.crop, self.network, "crop")
        if self.network.variant == ANNOTATOR.name and self.data.missing_raters == "as-is":
            raise CdiffError(
                "missing_raters=as-is uses masks without knowing whose they are, but variant=annotator must know; "
                "use skip or error"
            )
        if self.data.crop and self.data.framing != "tile":
            raise CdiffError(
                f"crop needs framing=tile; with framing={self.data.framing} every window has image_size={self.network.image_size}"
            )
        if self.crop > self.network.image_size:
            raise CdiffError(f"crop={self.crop} must not be above image_size={self.network.image_size}")
        if self.training.late_batch and self.crop == self.network.image_size:
            raise CdiffError(
                f"late_batch={self.training.late_batch} is for windows that grow, but without a crop below image_size none does; set batch instead"
            )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def values(self) -> dict[str, Any]:
        """Every setting by its name, which is unique over the sections."""
        return {key: value for section in self.to_json().values() for key, value in section.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """The inverse of to_json (JSON's lists become tuples). Raises CdiffError for a key that does not exist, or a value of another type."""
        sections: dict[str, Any] = {}
        for section in dataclasses.fields(cls):
            kind = typing.get_type_hints(cls)[section.name]
            known = typing.get_type_hints(kind)
            values = data.get(section.name, {})
            if not isinstance(values, dict):
                raise CdiffError(f"the configuration's section {section.name!r} is not a JSON object")
            if unknown := sorted(set(values) - set(known)):
                raise CdiffError(f"the configuration's section {section.name!r} has unknown keys: {', '.join(unknown)}")
            for key, value in values.items():
                if not _is(known[key], value):
                    raise CdiffError(f"the configuration has {key}={value!r}; expected {_called(known[key])}")
            sections[section.name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        return cls(**sections)

    def with_values(self, values: dict[str, Any]) -> Config:
        """A copy with some keys replaced, each looked up over all sections. A variant also sets what it requires, unless given."""
        tree = self.to_json()
        for key, value in (BROUGHT.get(values.get("variant", ""), {}) | values).items():
            tree[_section_of(key)][key] = value
        config = Config.from_json(tree)
        # Checked only where it is asked for: the pair does nothing, and a run that began with it can still be read and resumed.
        if {"late", "late_batch"} & values.keys() and config.training.late_batch and not config.data.late:
            raise CdiffError(
                f"late_batch={config.training.late_batch} is for the late phase, but with late=0 there is none; set batch instead"
            )
        return config

    def with_settings(self, settings: list[str]) -> Config:
        """A copy with `key=value` texts applied, values in JSON or bare words. Raises CdiffError on a bad key or value."""
        values: dict[str, Any] = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise CdiffError(f"--set {setting}: write it as key=value")
            value = _parse(key, text)
            if values.setdefault(key, value) != value:
                one, other = (list(v) if isinstance(v, tuple) else v for v in (values[key], value))
                raise CdiffError(f"{key} is set twice, to {one} and to {other}; keep one")
        return self.with_values(values)


LARGEST = {int: 2**40, float: 2**63}
"""Whole numbers must be below these, by the setting's type: PyTorch's have 64 bits, and a tensor's size in bytes is one of them."""
BROUGHT: dict[str, dict[str, Any]] = {IMPLICIT_ENSEMBLE.name: {"rrdbs": 0}}
"""By variant, the settings that it requires."""


def _section_of(key: str) -> str:
    hints = typing.get_type_hints(Config)
    for section, kind in hints.items():
        if key in {f.name for f in dataclasses.fields(kind)}:
            return str(section)
    keys = sorted(f.name for kind in hints.values() for f in dataclasses.fields(kind))
    raise CdiffError(f"there is no setting {key!r}; the settings are {', '.join(keys)}")


def _is(kind: Any, value: Any) -> bool:
    """Whether a value, from JSON or a section, is of a setting's type. A whole number must be below `LARGEST`, and passes for a float too."""
    if isinstance(kind, types.GenericAlias):
        return isinstance(value, list | tuple) and all(_is(typing.get_args(kind)[0], item) for item in value)
    if kind in (int, float) and type(value) is int:
        return abs(value) < LARGEST[kind]
    return type(value) is kind


def _parse(key: str, text: str) -> Any:
    kind = typing.get_type_hints(typing.get_type_hints(Config)[_section_of(key)])[key]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits, or brackets nested too deep
        value = text
    if _is(kind, value) and not (kind is float and not math.isfinite(value)):
        return tuple(value) if isinstance(value, list) else value
    if kind is str:
        return text
    raise CdiffError(f"--set {key}={text}: expected {_called(kind)}, for example {key}={_example(kind)}")


def _called(kind: Any) -> str:
    """A setting's type in words."""
    below = {kind: f"below 2^{most.bit_length() - 1}" for kind, most in LARGEST.items()}
    words = {
        int: f"a whole number {below[int]}",
        float: f"a number {below[float]}",
        bool: "true or false",
        str: "a word",
    }
    return words.get(kind, "a list of numbers")


def _example(kind: Any) -> str:
    return {int: "8", float: "0.5", bool: "true", str: "word"}.get(kind, "[1,2,4]")
