"""What becomes of a picture's colours, and of its grey, by its mode and by how many channels are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.scans.picture import read_picture

SHADES = np.random.default_rng(0).integers(0, 256, (300, 301)).astype(np.uint8)
"""Enough noise that a PNG of it has several chunks of pixels."""


def read(path: Path, channels: int) -> tuple[Any, list[str]]:
    pixels, notes = read_picture(path.read_bytes(), path, channels)
    assert pixels.dtype == np.float32
    return pixels, notes


def test_grey_in_three_equal_channels_is_that_grey_and_nothing_is_said(tmp_path: Path) -> None:
    Image.fromarray(np.stack([SHADES] * 3, axis=-1)).save(tmp_path / "a.png")
    pixels, notes = read(tmp_path / "a.png", 1)
    np.testing.assert_array_equal(pixels, SHADES)
    assert notes == []


def test_grey_for_three_channels_is_told(tmp_path: Path) -> None:
    Image.fromarray(SHADES).save(tmp_path / "a.png")
    pixels, notes = read(tmp_path / "a.png", 3)
    np.testing.assert_array_equal(pixels, np.stack([SHADES] * 3, axis=-1))
    assert notes == ["the grey picture was used for each of the three channels"]


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "tif"), ("CMYK", "jpg"), ("YCbCr", "tif"), ("P", "png")])
def test_colours_stored_otherwise_are_the_red_green_and_blue_that_viewers_show(
    tmp_path: Path, mode: str, suffix: str
) -> None:
    colours = np.stack([SHADES, SHADES[::-1], SHADES[:, ::-1]], axis=-1)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colours).convert(mode).save(path)  # type: ignore[arg-type]
    with Image.open(path) as picture:
        assert picture.mode == mode
        shown = np.asarray(picture.convert("RGB"))
    pixels, _ = read(path, 3)
    np.testing.assert_array_equal(pixels, shown)
