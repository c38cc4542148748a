"""Runs that see the slice at several sizes: what they see, the maps of all of them against sums by hand, every mistake in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cdiff
from cdiff.runtime.engines.base import Binding, Engine, HostBinding, Rows
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.sampling.chain import not_finite
from cdiff.runtime.sampling.framing import Framing, resize
from cdiff.runtime.sampling.noise import Noise
from cdiff.runtime.sampling.sums import Gathered, SliceResult
from cdiff.runtime.sampling.zoom import APART, check_zooms, numbered, shared_out, together
from cdiff.runtime.segmenter import Segmenter
from tests.runtime.test_manifest import example
from tests.runtime.test_segmenter import make_bundle, volume

STEPS: dict[str, Any] = {"steps": 3, "sampler": "ddim"}
DATA = {"data": {"slice_size": [32, 32]}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return cdiff.load(make_bundle(tmp_path_factory.mktemp("zoom") / "tiny", framing="centre", training=DATA))


@pytest.mark.parametrize("zoom", [0.5, 0.8, 1.25, 1.5, 2])
@pytest.mark.parametrize("shape", [(32, 32), (33, 40), (12, 40)])
def test_a_window_sees_the_middle_of_a_resized_slice(zoom: float, shape: tuple[int, int]) -> None:
    """Also where the slice is narrower than the window at its own size, at the other one, or at both."""
    slices = np.random.default_rng(0).normal(size=(2, 1, *shape)).astype(np.float32)
    windows = Framing("centre", (16, 16)).frame(slices).zoomed(zoom)
    large = resize(slices[1, 0], (round(shape[0] * zoom), round(shape[1] * zoom)))
    lacking = max(16 - large.shape[0], 0)
    large = np.pad(large, ((lacking // 2, lacking - lacking // 2), (0, 0)), mode="edge")
    y, x = windows.origins[0]
    for corner, n, N in ((y, large.shape[0], shape[0]), (x, large.shape[1], shape[1])):
        middle = (N - 16) // 2 + 8  # of the window in the slice as it is
        assert abs(corner - min(max(zoom * middle - 8, 0), n - 16)) <= 0.5
    np.testing.assert_allclose(windows.image(1)[0], large[y : y + 16, x : x + 16], atol=1e-6)


@pytest.mark.parametrize("zoom", [0.8, 1.25, 2])
def test_a_map_lies_where_the_window_saw_it(zoom: float) -> None:
    """A straight slope keeps its values within the window, whose edges do not fade; beyond it nothing is."""
    rows = np.linspace(0.1, 0.9, 40, dtype=np.float32)
    slices = np.broadcast_to(rows[:, None], (40, 40)).copy()[None, None]
    windows = Framing("centre", (16, 16)).frame(slices).zoomed(zoom)
    found = windows.unframe_slice(windows.image(0)[None])[0]
    seen = windows.covered
    assert abs(seen.sum() - (16 / zoom) ** 2) < 3 * 16 / zoom
    inner = np.zeros_like(seen)
    inner[windows.seen[0].start + 1 : windows.seen[0].stop - 1, windows.seen[1]] = True
    np.testing.assert_allclose(found[inner], slices[0, 0][inner], atol=0.005)
    assert not found[~seen].any()
    assert (seen == (found > 0)).all()


@pytest.mark.parametrize("zoom", [0.5, 1.25, 2])
@pytest.mark.parametrize(
    ("point", "width"), [(None, 70), ((3, 60), 70), ((45, 30), 70), (None, 12), ((3, 9), 12), ((45, 6), 12)]
)
def test_only_what_a_window_saw_is_resampled_and_nothing_is_lost(
    zoom: float, point: tuple[int, int] | None, width: int
) -> None:
    """Against the whole canvas resampled; the part that is held is the window's, however large the slice, without padding."""
    slices, field = np.zeros((1, 1, 90, width), np.float32), None if point is None else (32, 40)
    windows = Framing("centre", (16, 16)).frame(slices, point, field).zoomed(zoom)
    maps = np.random.default_rng(0).random((1, 3, 16, 16), dtype=np.float32)
    (y, x), size, (rows, columns) = windows.origins[0], windows.resized, windows.part or (slice(0, 90), slice(0, width))
    assert size is not None
    assert (size != windows.canvas) == (width * zoom < 16), "whether there is padding"
    canvas, seen = np.zeros((3, *windows.canvas), np.float32), np.zeros(windows.canvas, np.float32)
    canvas[:, y : y + 16, x : x + 16], seen[y : y + 16, x : x + 16] = maps[0], 1
    top, left = ((n - inner) // 2 for n, inner in zip(windows.canvas, size, strict=True))
    inside, shape = (
        np.s_[top : top + size[0], left : left + size[1]],
        (rows.stop - rows.start, columns.stop - columns.start),
    )
    weight, wanted = resize(seen[inside], shape), np.zeros((3, 90, width), np.float32)
    drawn = resize(canvas[:, *inside], shape) / np.maximum(weight, 0.5)
    wanted[:, rows, columns] = np.where(weight >= 0.5, drawn, 0)
    np.testing.assert_allclose(windows.unframe_slice(maps), wanted, rtol=0, atol=1e-6)
    part = windows.unframe_part(maps)
    assert max(part.shape[1:]) <= round(16 / zoom) + 1
    np.testing.assert_array_equal(part, windows.unframe_slice(maps)[..., *windows.reach])


@pytest.mark.parametrize(("size", "zoom"), [((102, 102), 1.25), ((102, 115), 1.25)])
def test_rounding_does_not_decide_which_pixels_of_an_edge_are_seen(size: tuple[int, int], zoom: float) -> None:
    """Half of what such an edge's pixels are resampled from lies in the window: but for the corners, all of them are seen."""
    seen = Framing("centre", (64, 64)).frame(np.zeros((1, 1, *size), np.float32)).zoomed(zoom).covered
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    assert seen[rows[0] : rows[-1] + 1, columns[1:-1]].all()
    assert seen[rows[1:-1], columns[0] : columns[-1] + 1].all()


def test_other_framings_have_one_size() -> None:
    windows = Framing("tile", (16, 16)).frame(np.zeros((1, 1, 32, 32), np.float32))
    assert windows.zoomed(1) is windows
    with pytest.raises(CdiffError, match="framing 'tile' covers the whole slice"):
        windows.zoomed(2)


def test_runs_are_shared_out() -> None:
    assert shared_out(8, (1, 1.25)) == [(1, 4), (1.25, 4)]
    assert shared_out(25, (1, 1.25)) == [(1, 13), (1.25, 12)]
    assert shared_out(1, (1, 1.25)) == [(1, 1)]


def test_each_zoom_has_noise_of_its_own() -> None:
    """And the same whichever zooms are beside it. At its own size a slice has the number that it has in the scan."""
    assert numbered(range(3, 5), 1) == [3, 4]
    assert numbered([3], 1.1) == [1100 * APART + 3], (
        "a thousandth of a zoom is a number: another rule would be other maps for the same seed"
    )
    assert [number % APART for number in numbered([3, 4], 1.25)] == [3, 4]
    zooms = [0.5, 0.8, 1, 1.001, 1.25, 4]
    assert len({numbered([3], zoom)[0] for zoom in zooms}) == len(zooms)
    assert max(numbered([2**31], 4)) < 2**63
    nothing = np.zeros(1, np.int64)
    row = Rows(1, nothing, np.array(numbered([7], 1.25)), nothing, nothing, nothing, (16, 16))
    assert "slice 7, level 0" in str(not_finite(row, "x0", 0)), "a user knows the slice by its number in the scan"


def test_no_two_runs_of_a_scan_draw_the_same_noise(model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row's key, as the noise is asked for it: of two zooms, three slices and five runs none comes twice."""
    asked: list[tuple[int, ...]] = []
    fill = Noise.fill

    def watched(self: Noise, out: Any, **key: Any) -> None:
        asked.append(tuple(key[name] for name in ("slice_", "level", "run", "step")))
        fill(self, out, **key)

    monkeypatch.setattr(Noise, "fill", watched)
    model.segment(volume(32, 32, 3), runs=5, zooms=(1, 1.25), **STEPS)
    assert len(asked) >= 5 * 3 * model.manifest.levels
    assert len(set(asked)) == len(asked)


def test_all_runs_together_are_what_their_maps_say(model: Segmenter) -> None:
    """Mean and spread from every run's kept map, over those whose window covers the pixel; the others' are not asked."""
    array = volume(32, 32, 3)
    zooms, keep = (1, 1.25), {"keep_runs": True, **STEPS}
    both = model.segment(array, runs=5, zooms=zooms, **keep)
    plain, large = (model.segment(array, runs=n, zooms=(z,), **keep) for z, n in zip(zooms, (3, 2), strict=True))
    assert plain.stack.runs is not None
    assert large.stack.runs is not None
    assert both.stack.runs is not None
    windows = model.prepare(array).windows
    near, far = windows.zoomed(1.25).covered, windows.covered
    assert 0 < near.sum() < far.sum() < 32 * 32
    runs = np.concatenate([plain.stack.runs, large.stack.runs], axis=2) / 255
    np.testing.assert_allclose(both.stack.maps[..., near], runs.mean(axis=2)[..., near], atol=0.003)
    spread = runs.mean(axis=1).std(axis=1)
    np.testing.assert_allclose(both.stack.run_std[..., near], spread[..., near], atol=0.003)
    only = far & ~near
    for name in ("maps", "run_std"):
        np.testing.assert_allclose(
            getattr(both.stack, name)[..., only], getattr(plain.stack, name)[..., only], atol=1e-6
        )
    assert not both.stack.maps[..., ~far].any()
    np.testing.assert_array_equal(both.stack.runs[:, :, ::2], plain.stack.runs)
    np.testing.assert_array_equal(both.stack.runs[:, :, 1::2, near], large.stack.runs[..., near])
    np.testing.assert_array_equal(both.stack.runs[:, :, 1::2, only], plain.stack.runs[:, :, :2, only])
    assert both.report["zooms"] == [1, 1.25]
    assert both.report["runs"] == 5
    assert "zooms" not in plain.report


@pytest.mark.parametrize("fewer", [2, 3, 4])
def test_the_first_runs_are_those_that_fewer_runs_would_be(model: Segmenter, fewer: int) -> None:
    """So a curve over the number of runs shows what that number gives, each size in turn."""
    chain: dict[str, Any] = {"zooms": (1, 1.25, 1.5), "keep_runs": True, **STEPS}
    array = volume(32, 32, 1)
    all_runs, first = (model.segment(array, runs=n, **chain).stack.runs for n in (5, fewer))
    assert all_runs is not None
    assert first is not None
    np.testing.assert_array_equal(all_runs[:, :, :fewer], first)


class OnGpu:
    """The bundle's engine as if it ran on a GPU; it notes the batches that it was asked for."""

    name, version, device = "onnxruntime", "0", "cuda:0"

    def __init__(self, engine: Engine) -> None:
        self.encode, self.denoise = engine.encode, engine.denoise
        self.rows: list[int] = []

    def bind(self, rows: int, slots: int) -> Binding:
        self.rows.append(rows)
        return HostBinding(self, rows, slots)


def test_on_a_gpu_all_zooms_have_batches_of_one_size(model: Segmenter) -> None:
    """A batch of another size would cost the GPU's buffers and a captured step, twice a scan."""
    engine, array = OnGpu(model.engine), volume(32, 32, 2)
    found = Segmenter(model.bundle, engine).segment(array, runs=5, zooms=(1, 1.25), **STEPS)
    assert engine.rows == [3 * model.manifest.levels] * 2
    wanted = model.segment(array, runs=5, zooms=(1, 1.25), **STEPS)
    np.testing.assert_allclose(found.levels, wanted.levels, atol=1e-5)


def test_a_larger_window_decides_alone_where_the_first_does_not_reach() -> None:
    box, means, spread = (
        (slice(1, 2), slice(1, 3)),
        np.full((2, 1, 2), 0.25, np.float32),
        np.full((1, 2), 0.5, np.float32),
    )
    one = SliceResult(0, 0, means, spread, None, box, (2, 3))
    wide = np.zeros((2, 2), np.float32)
    two = dataclasses.replace(one, means=np.stack([wide, wide]) + 0.75, spread=wide, box=(slice(0, 2), slice(1, 3)))
    seen = np.zeros((2, 2, 3), bool)
    seen[:, 1, 1] = seen[1, 1, 2] = seen[1, 0, 1] = True
    (found,) = together([Gathered.of([part], 1) for part in (one, two)], [1, 3], list(seen))
    np.testing.assert_allclose(found.level_means[0], [[0, 0.75, 0], [0, 0.625, 0.75]])
    variance = (0.5**2 + 0.375**2 + 3 * 0.125**2) / 4
    np.testing.assert_allclose(found.run_std, [[0, 0, 0], [0, variance**0.5, 0]], atol=1e-7)


def test_a_crops_maps_wherever_it_lies(model: Segmenter) -> None:
    """With zooms too a crop within a larger slice has its own maps, and so has a shrunk one."""
    crop = volume(32, 32, 2)
    large = np.random.default_rng(1).integers(0, 255, (90, 70, 2)).astype(np.uint8)
    large[40:72, 21:53] = crop
    chain: dict[str, Any] = {"runs": 4, "zooms": (1, 1.25, 0.7), **STEPS}
    alone, found = model.segment(crop, **chain), model.segment(large, at=(56, 37, 0), slices="0:2", **chain)
    np.testing.assert_array_equal(found.levels[40:72, 21:53], alone.levels)
    twice = np.kron(crop, np.ones((2, 2, 1), np.uint8))
    shrunk = model.segment(twice, at=(32, 32, 0), slices="0:2", shrink=2, **chain)
    small = np.stack([resize(one, (32, 32)) for one in np.moveaxis(twice, 2, 0).astype(np.float32)], axis=2)
    by_hand = model.segment(small, **chain)
    middle = slice(14, 18)
    np.testing.assert_allclose(
        shrunk.soft[29:35, 29:35], np.stack([resize(m, (64, 64)) for m in np.moveaxis(by_hand.soft, 2, 0)], 2)[29:35, 29:35],
        atol=1e-3,
    )  # fmt: skip
    assert 0.01 < float(by_hand.soft[middle, middle].mean()) < 0.99


def test_what_the_bundle_states_is_done(tmp_path: Path, model: Segmenter) -> None:
    own = cdiff.load(make_bundle(tmp_path / "b", framing="centre", training=DATA, zooms=(1.0, 1.5)))
    array = volume(32, 32, 1)
    asked = model.segment(array, runs=4, zooms=(1, 1.5), **STEPS)
    np.testing.assert_array_equal(own.segment(array, runs=4, **STEPS).levels, asked.levels)
    plain = own.segment(array, runs=4, zooms=(1,), **STEPS)
    np.testing.assert_array_equal(plain.levels, model.segment(array, runs=4, **STEPS).levels)
    assert np.abs(plain.levels - asked.levels).max() > 0.01


@pytest.mark.parametrize("zooms", [(1, 1.25), (1, 1.25, 0.8)])
def test_progress_is_that_of_all_runs(model: Segmenter, zooms: tuple[float, ...]) -> None:
    seen: list[tuple[int, int]] = []
    model.segment(
        volume(32, 32, 3), runs=5, zooms=zooms, progress=lambda done, total: seen.append((done, total)), **STEPS
    )
    done = [one for one, _ in seen]
    assert done == sorted(done)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]
    single: list[int] = []
    model.segment(volume(32, 32, 3), runs=5, progress=lambda _, total: single.append(total), **STEPS)
    assert seen[-1][1] == single[-1], "as much work as without zooms"


@pytest.mark.parametrize("zooms", [(), (0.1,), (5,), (1, 1), (float("nan"),)])
def test_numbers_that_are_no_zooms(model: Segmenter, zooms: tuple[float, ...]) -> None:
    with pytest.raises(
        CdiffError, match=r"zooms .* cannot be used; give different numbers from 0.25 to 4, such as 1,1.25"
    ):
        model.segment(volume(32, 32, 1), zooms=zooms, **STEPS)
    assert check_zooms((0.25, 4), "centre") == (0.25, 4)


def test_a_model_of_whole_slices_takes_none(tmp_path: Path) -> None:
    tiles = cdiff.load(make_bundle(tmp_path / "b"))
    with pytest.raises(CdiffError, match="framing 'tile' looks at whole slices; only framing 'centre' takes zooms"):
        tiles.segment(volume(32, 32, 1), zooms=(1, 2), **STEPS)
    tiles.segment(volume(32, 32, 1), runs=1, zooms=(1,), **STEPS)


@pytest.mark.parametrize("value", [[], [0.1], [1, 1], ["1"], 1.25, [True], [1, 9]])
def test_a_manifest_with_other_zooms_is_refused(value: Any) -> None:
    data = example(files={}, framing="centre").to_json() | {"zooms": value}
    with pytest.raises(CdiffError, match=r"key 'zooms' must be a list of different numbers from 0.25 to 4"):
        Manifest.from_json(data)


def test_a_manifest_keeps_its_zooms() -> None:
    kept = example(framing="centre", zooms=(1.0, 1.25))
    assert Manifest.from_json(kept.to_json()) == kept
    assert "zooms" not in example().to_json(), "bundles without them are what they were"
    with pytest.raises(CdiffError, match=r"key 'zooms' must be \[1\] for the framing 'tile'"):
        Manifest.from_json(example(framing="tile").to_json() | {"zooms": [1, 2]})
