"""How large a pixel is that a network sees: a model of 0.7 mm pixels that is given 2 mm pixels says so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.prepared import notes, prepare
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.scale import out_of_scale, pixel_mm, span
from cdiff.runtime.scoring.evaluate import Protocol, evaluate
from cdiff.runtime.segmenter import Segmenter
from cdiff.train.data import fit_to_data, read_data
from cdiff.train.presets import preset
from tests.layouts import write_qubiq
from tests.runtime.test_manifest import example
from tests.runtime.test_segmenter import make_bundle


def grid(spacing: tuple[float, ...], shape: tuple[int, ...], slice_axis: int | None = 2) -> Grid:
    header = nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([*(*spacing, 1.0)[:3], 1.0])).header
    header["pixdim"][1 : 1 + len(spacing)] = spacing
    return Grid(shape, slice_axis, header)


def test_a_pixel_is_as_large_as_its_square_and_as_what_it_is_resampled_to() -> None:
    assert pixel_mm(grid((0.5, 0.8, 3.0), (40, 60, 7))) == pytest.approx(math.sqrt(0.4))
    assert pixel_mm(grid((0.5, 0.8, 3.0), (40, 60, 7), 0)) == pytest.approx(math.sqrt(2.4))
    # A slice of 20 mm x 48 mm as 32 x 32 pixels.
    assert pixel_mm(grid((0.5, 0.8, 3.0), (40, 60, 7)), (32, 32)) == pytest.approx(math.sqrt(20 * 48) / 32)
    assert pixel_mm(grid((0.5, 0.8), (40, 60), None)) == pytest.approx(math.sqrt(0.4))
    assert pixel_mm(grid((1, 1, 1), (40, 60, 7))) is pixel_mm(Grid((40, 60, 7), 2)) is None


def test_sizes_beyond_the_trainings_by_half_are_told() -> None:
    assert span([None, 0.9, 0.5]) == (0.5, 0.9)
    assert span([None]) is None
    for size in (0.5 / 1.49, 0.7, 0.9 * 1.49, None):
        assert out_of_scale(size, (0.5, 0.9)) is None
    assert out_of_scale(2.0, None) is None
    assert str(out_of_scale(900.0, (0.5, 0.9))).endswith("look 1000 times smaller to it")  # metres without their unit
    text = "pixels are 2 mm wide, but those that the model learned from are 0.5 to 0.9 mm: structures look 2.2 times smaller to it"
    assert out_of_scale(2.0, (0.5, 0.9)) == text
    text = (
        "pixels are 0.2 mm wide, but those that the model learned from are 0.6 mm: structures look 3 times larger to it"
    )
    assert out_of_scale(0.2, (0.6, 0.6)) == text


def told(
    spacing: float, shape: tuple[int, ...] = (64, 64, 3), at: Any = None, shrink: int | None = None, **changes: Any
) -> list[str]:
    manifest = example(image_size=(32, 32), training={"data": {"pixel_mm": [0.6, 0.8]}}, **changes)
    scan = nib.Nifti1Image(np.random.default_rng(0).random(shape).astype(np.float32), np.diag([spacing, spacing, 3, 1]))
    found = notes(prepare(scan, manifest, None, None, at, None, shrink), manifest)
    return [note for note in found if "by its header" in note]


def test_a_scan_of_another_scale_is_told() -> None:
    assert told(0.7, framing="tile") == []
    (note,) = told(2.0, framing="tile")
    assert (
        "pixels are 2 mm wide, but those that the model learned from are 0.6 to 0.8 mm: structures look 2.5 times smaller"
        in note
    )
    # 64 pixels of 0.7 mm resampled to 32 are as large as 32 of 1.4 mm, and told; 64 of 0.35 mm are not.
    assert len(told(0.7, framing="resize")) == 1
    assert told(0.35, framing="resize") == []


def test_what_is_shrunk_counts_as_shrunk() -> None:
    assert len(told(0.35, at=(20, 20, 1), framing="centre")) == 1
    assert told(0.35, at=(20, 20, 1), shrink=2, framing="centre") == []


@pytest.mark.parametrize(("framing", "mm"), [("tile", 0.5477), ("resize", 0.5477)])
def test_a_model_keeps_the_scale_of_its_training(tmp_path: Path, framing: str, mm: float) -> None:
    write_qubiq(tmp_path, {"Training": 2, "Validation": 1}, spacing=(0.5, 0.6, 3.0), shapes=[(32, 32, 1), (64, 64, 1)])
    read = read_data(tmp_path, fit_to_data(preset("tiny"), tmp_path, [f"framing={framing}"]))
    low, high = read.summary["pixel_mm"]
    assert low == mm
    assert high == pytest.approx(mm * (2 if framing == "resize" else 1), rel=1e-3)
    write_qubiq(tmp_path / "fake", {"Training": 2, "Validation": 1})
    assert "pixel_mm" not in read_data(tmp_path / "fake", fit_to_data(preset("tiny"), tmp_path / "fake", [])).summary


def test_evaluation_tells_it_too(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", training={"data": {"pixel_mm": [0.5, 0.6]}})
    data = write_qubiq(tmp_path / "data", {"Testing": 2}, spacing=(1.5, 1.5, 3.0))
    said: list[str] = []
    evaluate(Segmenter.open(bundle), find_cases(data)["test"], Protocol(runs=1, steps=1), notice=said.append)
    assert any("of another size than in training, in 2 cases" in line and "2.5 times smaller" in line for line in said)
