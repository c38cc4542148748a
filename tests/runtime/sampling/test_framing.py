"""Framing: equal sizes are untouched, resampling agrees with Pillow, tiles cover the slice and blend back to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.framing import Framing, Shrunk, resize


def smooth(h: int, w: int) -> np.ndarray:
    """A smooth field [2,1,h,w] with a different slice each."""
    y, x = np.linspace(0, 1, h)[:, None], np.linspace(0, 1, w)[None]
    return np.stack([np.sin(3 * y + x), np.cos(2 * x - y)])[:, None].astype(np.float32)


@pytest.mark.parametrize("mode", ["resize", "tile"])
def test_equal_sizes_are_the_identity(mode: str) -> None:
    slices = np.random.default_rng(0).normal(size=(3, 2, 16, 24)).astype(np.float32)
    windows = Framing(mode, (16, 24)).frame(slices)
    framed = np.stack(list(windows))
    assert np.array_equal(framed, slices)
    assert np.array_equal(windows.unframe(framed), slices)


@pytest.mark.parametrize("size", [(16, 16), (64, 48), (20, 90)])
def test_resize_agrees_with_pillow(size: tuple[int, int]) -> None:
    array = np.random.default_rng(1).normal(size=(2, 37, 41)).astype(np.float32)
    want = [np.asarray(Image.fromarray(plane).resize(size[::-1], Image.Resampling.BILINEAR)) for plane in array]
    np.testing.assert_allclose(resize(array, size), want, rtol=0, atol=1e-5)


def test_resize_keeps_constants_ranges_and_positions() -> None:
    ones = np.ones((1, 30, 50), np.float32)
    np.testing.assert_allclose(resize(ones, (64, 17)), 1, rtol=1e-6)
    column = np.arange(64, dtype=np.float32)[:, None].repeat(8, 1)
    # The centre of output pixel i lies at 2 i + 0.5 of the input: nothing drifts when an image is halved.
    np.testing.assert_allclose(resize(column, (32, 8))[1:-1, 0], 2 * np.arange(32)[1:-1] + 0.5, rtol=1e-6)


@pytest.mark.parametrize("shape", [(40, 100), (12, 20)])
def test_a_resized_smooth_map_comes_back(shape: tuple[int, int]) -> None:
    slices = smooth(*shape)
    windows = Framing("resize", (32, 32)).frame(slices)
    assert len(windows) == 2
    assert windows.canvas == (32, 32)
    back = windows.unframe(np.stack(list(windows)))
    assert back.shape == slices.shape
    # Nowhere further off than half a step between neighbours, on the coarser of the two grids, along both axes.
    coarse = smooth(min(shape[0], 32), min(shape[1], 32))
    assert abs(back - slices).max() < (abs(np.diff(coarse, axis=-1)).max() + abs(np.diff(coarse, axis=-2)).max()) / 2


@pytest.mark.parametrize("shape", [(32, 32), (33, 70), (200, 45), (9, 100), (20, 11), (1, 3)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_tiles_blend_back_to_the_slice(shape: tuple[int, int], overlap: float) -> None:
    slices = np.random.default_rng(2).normal(size=(2, 1, *shape)).astype(np.float32)
    windows = Framing("tile", (32, 32), overlap).frame(slices)
    framed = np.stack(list(windows))
    assert framed.shape == (2 * windows.per_slice, 1, 32, 32)
    np.testing.assert_allclose(windows.unframe(framed), slices, rtol=0, atol=1e-6)


def test_tiles_overlap_at_least_as_asked_and_reach_the_end() -> None:
    windows = Framing("tile", (32, 32), 0.25).frame(np.zeros((1, 1, 150, 32), np.float32))
    rows = [y for y, _ in windows.origins]
    assert rows[0] == 0
    assert rows[-1] == 150 - 32
    assert max(np.diff(rows)) <= 24
    assert len(rows) == 6  # 1 + ceil(118 / 24): no tile more than needed


def test_blending_has_no_seam() -> None:
    # Neighbouring tiles that disagree (0 and 1) meet in a ramp, not in a step.
    windows = Framing("tile", (32, 32), 0.5).frame(np.zeros((1, 1, 32, 48), np.float32))
    maps = np.stack([np.full((32, 32), value, np.float32) for value in range(windows.per_slice)])
    profile = windows.unframe_slice(maps)[0]
    assert windows.per_slice == 2
    assert (profile[0], profile[-1]) == (0, 1)
    assert np.diff(profile).min() >= 0
    assert np.diff(profile).max() < 0.1


def test_small_slices_lie_in_the_middle_and_repeat_their_edge() -> None:
    row = np.arange(6, dtype=np.float32).reshape(1, 1, 1, 6)
    windows = Framing("tile", (1, 10)).frame(row)
    assert windows.image(0).tolist() == [[[0, 0, 0, 1, 2, 3, 4, 5, 5, 5]]]


def test_bad_framing_is_refused() -> None:
    with pytest.raises(CdiffError, match="framing 'crop'"):
        Framing("crop", (8, 8))  # type: ignore[arg-type]
    with pytest.raises(CdiffError, match="overlap"):
        Framing("tile", (8, 8), 1.0)
    with pytest.raises(CdiffError, match="shape"):
        Framing("tile", (8, 8)).frame(np.zeros((0, 1, 8, 8), np.float32))


@pytest.mark.parametrize("shape", [(12, 16), (13, 9), (8, 6), (5, 20), (20, 4)])
def test_the_centre_is_the_middle_window_and_the_rest_is_zero(shape: tuple[int, int]) -> None:
    slices = np.random.default_rng(0).normal(size=(2, 1, *shape)).astype(np.float32)
    windows = Framing("centre", (8, 6)).frame(slices)
    assert (len(windows), windows.per_slice) == (2, 1)
    back = windows.unframe(np.stack(list(windows)))
    top, left = (max(n - N, 0) // 2 for n, N in zip(shape, (8, 6), strict=True))
    inside = np.zeros(shape, bool)
    inside[top : top + 8, left : left + 6] = True
    assert np.array_equal(back[..., inside], slices[..., inside])
    assert not back[..., ~inside].any()


def test_a_shrunk_window_lies_on_the_slice_s_own_grid() -> None:
    shrunk = Shrunk(2, (40, 50), (slice(4, 36), slice(10, 46)))
    small = shrunk.shrink(np.zeros((1, 1, 40, 50), np.float32))
    assert small.shape == (1, 1, 16, 18)
    windows = replace(Framing("centre", (8, 6)).frame(small), shrunk=shrunk)
    maps = np.random.default_rng(0).random((1, 8, 6), dtype=np.float32)
    expected = np.zeros((40, 50), np.float32)
    expected[12:28, 22:34] = resize(maps[0], (16, 12))
    np.testing.assert_array_equal(windows.unframe_slice(maps), expected)
