"""The manifest refuses, with the file and the key, whatever is not exactly what this version writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cdiff.runtime.bundle import shipped_bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.scans.intensity import Intensity


def example(**changes: Any) -> Manifest:
    """A valid manifest, with some values changed."""
    entry = {"sha256": "0" * 64, "bytes": 0}
    values: dict[str, Any] = {
        "name": "test",
        "task": "segment circles",
        "citation": ["Somebody, 2023"],
        "variant": "consensus",
        "levels": 4,
        "T": 40,
        "schedule": NoiseSchedule(40).to_json(),
        "target": "x0",
        "variance": "fixed",
        "image_size": (32, 48),
        "image_channels": 1,
        "framing": "tile",
        "tile_overlap": 0.25,
        "intensity": Intensity("volume", 1.0, 99.0).to_json(),
        "slice_axis": 2,
        "mirror": False,
        "precision": "float32",
        "opset": 21,
        "features_channels": 8,
        "fast": {"sampler": "ddim", "steps": 10, "runs": 5},
        "files": {"encoder.onnx": entry, "denoiser.onnx": entry},
    }
    return Manifest(**{**values, **changes})


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    manifest = example(scores={"soft_dice": 0.8})
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest.to_json()))
    read = Manifest.read(path)
    assert read == manifest
    assert read.noise_schedule == NoiseSchedule(40)
    assert read.normalisation == Intensity("volume", 1.0, 99.0)


def test_masks_that_are_zero_outside_are_said_and_others_are_not() -> None:
    data = example().to_json()
    assert "outside" not in data  # as in bundles that were written before there was a choice
    assert Manifest.from_json(data).outside == -1
    data = example(outside=0).to_json()
    assert Manifest.from_json(data).outside == data["outside"] == 0
    with pytest.raises(CdiffError, match="'outside' must be one of -1, 0, not 1"):
        Manifest.from_json(data | {"outside": 1})


@pytest.mark.parametrize("key", sorted(example().to_json()))
def test_every_missing_key_is_named(key: str) -> None:
    data = example().to_json()
    del data[key]
    with pytest.raises(CdiffError, match=rf"some\.json.*{key}"):
        Manifest.from_json(data, "some.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in sorted(set(example().to_json()) - {"format_version"})
        for value in (None, True, ["a", 1], -3.5)
        if (key, value) != ("mirror", True)
    ],
)
def test_every_mistyped_key_is_named(key: str, value: Any) -> None:
    data = example().to_json() | {key: value}
    with pytest.raises(CdiffError, match=rf"some\.json.*'{key}'"):
        Manifest.from_json(data, "some.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("levels", 0),
        ("levels", 10**30),
        ("variant", "majority"),
        ("target", "noise"),
        ("precision", "int8"),
        ("slice_axis", 3),
        ("image_size", [32]),
        ("image_size", [0, 32]),
        ("image_size", [32, 4097]),
        ("tile_overlap", 1.0),
        ("schedule", {"T": 40, "beta": 1}),
        ("schedule", {"T": 40, "beta_end": "high"}),
        ("schedule", NoiseSchedule(30).to_json()),
        ("schedule", NoiseSchedule(40).to_json() | {"scaled": "false"}),
        ("schedule", {key: value for key, value in NoiseSchedule(40).to_json().items() if key != "beta_end"}),
        ("intensity", {"scope": "slice", "lower": 0.5}),
        ("intensity", {"scope": "slice", "lower": False, "upper": 99.5}),
        ("fast", {"sampler": "ddim", "step": 1, "runs": 8}),
        ("intensity", {"scope": "world"}),
        ("files", {"encoder.onnx": {"sha256": "0", "bytes": 1}}),
        ("tile_overlap", 10**400),
        ("schedule", {"T": 40, "beta_start": 10**400}),
        ("intensity", {"method": "standard", "mean": [10**400], "std": [1]}),
        ("fast", {"sampler": ["ddim"], "steps": 10, "runs": 5}),
        ("fast", {"sampler": "ddim", "steps": 41, "runs": 5}),
        ("fast", {"sampler": "ddim", "steps": "few", "runs": 5}),
        ("fast", {"sampler": "ddim", "steps": 0, "runs": 5}),
        ("fast", {"sampler": "ddim", "steps": 10, "runs": None}),
        ("fast", {"sampler": "ddim", "steps": 10, "runs": 10**12}),
        ("training", {"data": {"modalities": 5}}),
        ("training", {"data": {"labels": ["tumour"]}}),
        ("training", {"data": {"masks_by": "luck"}}),
        ("training", {"data": {"pixel_mm": [0.5]}}),
        ("training", {"data": {"pixel_mm": [0.5, 0.4]}}),
        ("training", {"data": {"pixel_mm": [0, 0.4]}}),
        ("training", {"data": {"pixel_mm": [0.5, math.inf]}}),
        ("training", {"data": {"pixel_mm": "0.5"}}),
        ("training", {"data": {"pixel_mm": ["0.4", "0.5"]}}),
        ("training", {"data": {"axes": ["left-right", "front-back"]}}),
        ("training", {"data": {"axes": ["left-right", "front-back", "front-back"]}}),
        ("training", {"data": {"axes": {"left-right": 1, "front-back": 2, "up-down": 3}}}),
        ("training", {"data": {"slice_size": 128}}),
        ("training", {"data": {"slice_size": [128]}}),
        ("training", {"data": {"slice_size": [128, 0]}}),
        ("training", {"data": {"slice_size": [128, 128.0]}}),
    ],
)
def test_values_out_of_range_are_named(key: str, value: Any) -> None:
    with pytest.raises(CdiffError, match=f"'{key}'"):
        Manifest.from_json(example().to_json() | {key: value})


def test_the_size_of_the_trainings_slices_is_there_where_it_was_written() -> None:
    assert example().slice_size is None
    assert example(training={"data": {"slice_size": None}}).slice_size is None
    data = example(training={"data": {"slice_size": [128, 96]}}).to_json()
    assert Manifest.from_json(data).slice_size == (128, 96)
    assert Manifest.read(shipped_bundle() / "manifest.json").slice_size == (128, 128)


def test_a_schedule_cannot_ask_for_all_the_memory() -> None:
    data = example().to_json() | {"T": 10**10, "schedule": {"T": 10**10}}
    with pytest.raises(CdiffError, match=r"'schedule' is wrong .*T <= 1000000, not 10000000000"):
        Manifest.from_json(data)


def test_an_image_size_cannot_ask_for_all_the_memory() -> None:
    assert Manifest.from_json(example(image_size=(4096, 32)).to_json()).image_size == (4096, 32)
    with pytest.raises(CdiffError, match=r"'image_size' must be at most 4096 a side, not 30000 x 30000: .*gigabytes"):
        Manifest.from_json(example().to_json() | {"image_size": [30000, 30000]})


def test_a_fast_may_leave_out_what_has_a_default() -> None:
    for fast in ({}, {"steps": 40}, {"sampler": "dpm++2m", "runs": 1}):
        assert Manifest.from_json(example().to_json() | {"fast": fast}).fast == fast


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "a\\b", "C:x", "manifest.json", ""])
def test_a_file_name_cannot_leave_the_bundle(name: str) -> None:
    files = example().to_json()["files"] | {name: {"sha256": "0", "bytes": 1}}
    with pytest.raises(CdiffError, match="not a plain file name"):
        Manifest.from_json(example().to_json() | {"files": files})


def test_no_size_is_there_twice() -> None:
    """Runs see the sizes in turn: one that is there twice would count twice in every map."""
    with pytest.raises(CdiffError, match="key 'zooms' must be a list of different numbers"):
        Manifest.from_json(example(framing="centre").to_json() | {"zooms": [1.0, 1]})


@pytest.mark.parametrize("version", [0, 2, "1", True, None])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(CdiffError, match="format_version"):
        Manifest.from_json(example().to_json() | {"format_version": version})


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(CdiffError, match="'colour' is not known to this cdiff; install the one that wrote it"):
        Manifest.from_json(example().to_json() | {"colour": "red"})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": NaN}', "\xff", "[" * 100_000])
def test_a_file_that_is_no_manifest_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CdiffError, match=r"manifest\.json"):
        Manifest.read(path)


@pytest.mark.parametrize(
    "odd",
    ["1e999", '"\\ud800"', '{"\\udfff": 1}', '{"a":' * 40 + "1" + "}" * 40, "[" * 900 + "]" * 900],
    ids=["beyond every number", "half a character", "half a key", "nested", "nested lists"],
)
def test_what_no_report_could_hold_is_refused(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "manifest.json"
    text = json.dumps(example(scores={"odd": "here"}).to_json())
    path.write_text(text.replace('"here"', odd))
    with pytest.raises(CdiffError, match=r"manifest\.json: it is not valid JSON"):
        Manifest.read(path)
    path.write_text(text.replace('"here"', '{"a": [{"b": "\\ud83d\\ude00"}]}'))  # a whole pair
    assert Manifest.read(path).scores == {"odd": {"a": [{"b": "\U0001f600"}]}}


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CdiffError, match=r"cannot read .*nothing\.json"):
        Manifest.read(tmp_path / "nothing.json")
