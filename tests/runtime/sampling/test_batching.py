"""The batched loop against a slow plain one: one row at a time, the textbook's formulas, the same noise function."""

from __future__ import annotations

import tracemalloc
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cdiff.runtime.engines.base import Binding, ChainBinding, Engine, Float32, HostBinding, Int64, Prediction, Rows
from cdiff.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling import chain
from cdiff.runtime.sampling.batching import SliceResult, Timings, rows_per_batch, segment_windows
from cdiff.runtime.sampling.chain import check_finite
from cdiff.runtime.sampling.framing import Framing, Windows
from cdiff.runtime.sampling.noise import INITIAL, Noise, normal
from cdiff.runtime.sampling.sampler import SAMPLERS, SamplerTable, sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from tests.runtime.graphs import write_pair

C, R, SIZE = 3, 4, 16
SCHEDULE = NoiseSchedule(T=20, beta_end=1e-2)


class FakeEngine:
    """A network in NumPy: nonlinear, mixing neighbouring pixels, and different for every slice, t and level."""

    name, device, version = "fake", "cpu", "0"

    def __init__(self, *, learned: bool = False) -> None:
        self.learned = learned
        self.encoded, self.shapes = 0, set[tuple[tuple[int, ...], tuple[int, ...]]]()

    def encode(self, images: Float32) -> Float32:
        self.encoded += len(images)
        return np.concatenate([np.sin(3 * images), np.roll(images, 1, axis=-1) ** 2], axis=1).astype(np.float32)

    def denoise(self, x: Float32, features: Any, row_slice: Int64, t: Int64, level: Int64) -> Prediction:
        self.shapes.add((x.shape, features.shape))
        f = features[row_slice]
        z = (0.02 * t + 0.3 * level)[:, None, None, None]
        h = x * (1 + 0.3 * f[:, :1]) + 0.4 * np.roll(x, 1, axis=-2) * np.roll(x, 2, axis=-1) + f[:, 1:2] - z
        x0 = np.clip(1.3 * np.tanh(h), -1, 1).astype(np.float32)
        return x0, ((1 + np.sin(2 * h)) / 2).astype(np.float32) if self.learned else None

    def bind(self, rows: int, slots: int) -> Binding:
        return HostBinding(self, rows, slots)


def scan(shape: tuple[int, int, int] = (3, SIZE, SIZE)) -> Float32:
    return np.random.default_rng(5).normal(size=(shape[0], 1, *shape[1:])).astype(np.float32)


def framed(slices: Float32, mode: Any = "resize") -> Windows:
    return Framing(mode, (SIZE, SIZE)).frame(slices)


def run(engine: Engine, windows: Windows, table: SamplerTable, **options: Any) -> list[SliceResult]:
    return list(segment_windows(engine, windows, table, levels=C, runs=R, seed=9, **options))


def plain_chain(engine: Engine, image: Float32, table: SamplerTable, z_of: Any, level: int) -> np.ndarray:
    """Ho et al. 2020, algorithm 2, for one row, in float64, between kept timesteps: no table but its list of t."""
    features = engine.encode(image[None])
    x = z_of(INITIAL).astype(np.float64)
    kept = [*(int(t) for t in table.t), 0]
    for step, (t, s) in enumerate(pairwise(kept)):
        one = np.ones(1, np.int64)
        x0, mix = engine.denoise(x[None, None].astype(np.float32), features, 0 * one, t * one, level * one)
        abar_t, abar_s = SCHEDULE.abar[t], SCHEDULE.abar[s]
        alpha = abar_t / abar_s
        beta = 1 - alpha
        mean = (np.sqrt(abar_s) * beta * x0[0, 0] + np.sqrt(alpha) * (1 - abar_s) * x) / (1 - abar_t)
        variance = beta * (1 - abar_s) / (1 - abar_t)
        if s > 0 and mix is not None:
            variance = np.exp(mix[0, 0] * np.log(beta) + (1 - mix[0, 0]) * np.log(variance))
        x = mean if s == 0 else mean + np.sqrt(variance) * z_of(step)
    return x


def plain_segment(
    engine: Engine, windows: Windows, table: SamplerTable, slice_: int, *, mirror: bool = False
) -> np.ndarray:
    """Every run's map [C,R,h,w] of one slice, one row after another; with `mirror`, of the whole slice mirrored and back."""
    if mirror:
        whole, maps = windows.slices[slice_], []
        for r in range(R):
            axes = tuple(axis for axis, bit in ((-1, 1), (-2, 2)) if r % 4 & bit)
            turned = windows.framing.frame(np.flip(whole, axes)[None])
            maps.append(np.flip(plain_segment(engine, turned, table, 0)[:, r], axes))
        return np.stack(maps, axis=1)
    maps = np.zeros((windows.per_slice, C, R, SIZE, SIZE), np.float32)
    for tile, origin in enumerate(windows.origins):
        image = windows.image(slice_ * windows.per_slice + tile)
        for level in range(1, C + 1):
            for r in range(R):

                def z_of(step: int, level: int = level, r: int = r, origin: tuple[int, int] = origin) -> np.ndarray:
                    top, left = origin
                    return normal(9, slice_, level, r, step, windows.canvas)[top : top + SIZE, left : left + SIZE]

                maps[tile, level - 1, r] = np.clip((plain_chain(engine, image, table, z_of, level) + 1) / 2, 0, 1)
    return windows.unframe_slice(maps)


@pytest.mark.parametrize("batch", [None, 1, 5, 12, 64])
@pytest.mark.parametrize("steps", [20, 7])
@pytest.mark.parametrize("learned", [False, True])
def test_the_loop_is_the_plain_loop(batch: int | None, steps: int, learned: bool) -> None:
    engine, windows = FakeEngine(learned=learned), framed(scan())
    table = sampler_table("ddpm", SCHEDULE, steps)
    for result in run(engine, windows, table, batch=batch, keep_runs=True):
        maps = plain_segment(FakeEngine(learned=learned), windows, table, result.slice_id)
        np.testing.assert_allclose(result.level_means, maps.mean(axis=1), rtol=0, atol=2e-5)
        np.testing.assert_allclose(result.run_std, maps.mean(axis=0).std(axis=0), rtol=0, atol=2e-5)
        assert result.runs is not None
        np.testing.assert_allclose(result.runs / 255, maps, rtol=0, atol=0.5 / 255 + 2e-5)
    if batch is not None:
        assert {x[0] for x, _ in engine.shapes} == {batch}
    assert len(engine.shapes) == 1, "the batch and the features must have one shape throughout"


@pytest.mark.parametrize("learned", [False, True])
def test_the_loop_through_onnx_runtime_is_the_plain_loop(tmp_path: Path, learned: bool) -> None:
    engine = OnnxRuntimeEngine(*write_pair(tmp_path, size=SIZE, T=20, levels=C, learned=learned), threads=1)
    windows, table = framed(scan((2, SIZE, SIZE))), sampler_table("ddpm", SCHEDULE, 10)
    for result in run(engine, windows, table, batch=7):
        maps = plain_segment(engine, windows, table, result.slice_id)
        np.testing.assert_allclose(result.level_means, maps.mean(axis=1), rtol=0, atol=2e-5)


def test_tiles_of_a_large_slice_share_their_canvas_s_noise() -> None:
    windows, table = framed(scan((2, 20, 41)), "tile"), sampler_table("ddpm", SCHEDULE, 5)
    assert windows.per_slice == 8
    results = run(FakeEngine(), windows, table, batch=10)
    assert [result.level_means.shape for result in results] == [(C, 20, 41)] * 2
    for result in results:
        maps = plain_segment(FakeEngine(), windows, table, result.slice_id)
        np.testing.assert_allclose(result.level_means, maps.mean(axis=1), rtol=0, atol=2e-5)
        np.testing.assert_allclose(result.run_std, maps.mean(axis=0).std(axis=0), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("mode", "shape"), [("resize", (SIZE, SIZE)), ("tile", (20, 41)), ("centre", (SIZE, 30))])
def test_mirrored_runs_are_those_of_the_mirrored_slice(mode: str, shape: tuple[int, int]) -> None:
    windows, table = framed(scan((1, *shape)), mode), sampler_table("ddpm", SCHEDULE, 4)
    engine = FakeEngine()
    (result,) = run(engine, windows, table, batch=7, mirror=True, keep_runs=True)
    maps = plain_segment(FakeEngine(), windows, table, 0, mirror=True)
    np.testing.assert_allclose(result.level_means, maps.mean(axis=1), rtol=0, atol=2e-5)
    np.testing.assert_allclose(result.run_std, maps.mean(axis=0).std(axis=0), rtol=0, atol=2e-5)
    assert result.runs is not None
    # A tile's map is rounded to 8 bits before tiles are put together, and the slice's after it.
    roundings = 1 if windows.per_slice == 1 else 2
    np.testing.assert_allclose(result.runs / 255, maps, rtol=0, atol=roundings * 0.5 / 255 + 2e-5)
    assert engine.encoded == 4 * windows.per_slice, "each view of a window is encoded once"


@pytest.mark.parametrize("batch", [1, 5, 30])
def test_mirrored_runs_do_not_depend_on_the_batch(batch: int) -> None:
    windows, table = framed(scan((3, SIZE, 20)), "tile"), sampler_table("ddpm", SCHEDULE, 3)
    want = run(FakeEngine(), windows, table, batch=12, mirror=True)
    for a, b in zip(run(FakeEngine(), windows, table, batch=batch, mirror=True), want, strict=True):
        np.testing.assert_allclose(a.level_means, b.level_means, rtol=0, atol=2e-5)


def test_a_single_run_sees_the_slice_as_it_is() -> None:
    windows, table = framed(scan((1, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 3)
    one, plain = (
        next(segment_windows(FakeEngine(), windows, table, levels=C, runs=1, mirror=mirror)) for mirror in (True, False)
    )
    assert np.array_equal(one.level_means, plain.level_means)


@pytest.mark.parametrize("batch", range(2, 8))
def test_no_two_windows_of_a_batch_share_a_place(batch: int) -> None:
    """Of three rows a window, so that a batch of five begins with a window's last row and ends with another's first."""
    windows, table = framed(scan((6, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 2)
    found, want = (
        [one.means for one in segment_windows(FakeEngine(), windows, table, levels=C, runs=1, batch=rows)]
        for rows in (batch, 1)
    )
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


def test_more_runs_than_views_see_them_in_turn_again() -> None:
    slices, table = scan((1, SIZE, SIZE)), sampler_table("ddim", SCHEDULE, 3)

    def kept(slices: Float32, mirror: bool) -> Any:
        options: dict[str, Any] = {"levels": C, "runs": 6, "mirror": mirror, "keep_runs": True}
        return next(segment_windows(FakeEngine(), framed(slices), table, **options)).runs

    found = kept(slices, True)
    assert np.array_equal(found[:, 4], kept(slices, False)[:, 4])
    assert np.array_equal(found[:, 5], kept(slices[..., ::-1], False)[:, 5, :, ::-1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_run_as_their_table_says(name: str) -> None:
    # The table itself is tested against diffusers; here, that the loop keeps x0_prev and the noise of each step apart.
    engine, table = FakeEngine(), sampler_table(name, SCHEDULE, 6)
    windows = framed(scan((1, SIZE, SIZE)))
    features = engine.encode(windows.image(0)[None])
    maps = np.zeros((C, R, SIZE, SIZE))
    for level in range(1, C + 1):
        for r in range(R):
            x, previous = normal(9, 0, level, r, INITIAL, (SIZE, SIZE)).astype(np.float64), np.zeros((SIZE, SIZE))
            for i in range(len(table)):
                row = np.zeros(1, np.int64)
                x0 = engine.denoise(x[None, None].astype(np.float32), features, row, row + table.t[i], row + level)[0][
                    0, 0
                ]
                z = normal(9, 0, level, r, i, (SIZE, SIZE))
                x = table.a[i] * x + table.b[i] * x0 + table.c[i] * previous + table.d[i] * z
                previous = x0
            maps[level - 1, r] = np.clip((x + 1) / 2, 0, 1)
    (result,) = run(engine, windows, table, batch=5)
    np.testing.assert_allclose(result.level_means, maps.mean(axis=1), rtol=0, atol=2e-5)


def test_the_same_batch_gives_the_same_bits_and_another_seed_another_map() -> None:
    windows, table = framed(scan()), sampler_table("ddpm", SCHEDULE, 5)
    first, again = (run(FakeEngine(), windows, table, batch=5) for _ in range(2))
    other = list(segment_windows(FakeEngine(), windows, table, levels=C, runs=R, seed=10, batch=5))
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a.level_means, b.level_means)
        assert np.array_equal(a.run_std, b.run_std)
        assert not np.array_equal(a.level_means, c.level_means)


def test_part_of_a_scan_gets_the_maps_that_it_has_in_the_whole() -> None:
    slices, table = scan((4, SIZE, SIZE)), sampler_table("ddpm", SCHEDULE, 5)
    whole = run(FakeEngine(), framed(slices), table)
    part = run(FakeEngine(), framed(slices[1:3]), table, slice_ids=[1, 2])
    assert [(result.index, result.slice_id) for result in part] == [(0, 1), (1, 2)]
    for result in part:
        np.testing.assert_allclose(result.level_means, whole[result.slice_id].level_means, rtol=0, atol=1e-6)


def test_seconds_add_up_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(chain, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    spent = Timings()
    for _ in range(2):
        with spent.part("encode"):
            pass
    assert asdict(spent) == dict.fromkeys(asdict(spent), 0) | {"encode": 3.5}
    assert spent + Timings(encode=1, calls=2) == Timings(encode=4.5, calls=2)


def test_each_window_is_encoded_once_and_slices_come_as_they_finish() -> None:
    engine, timings, seen = FakeEngine(), Timings(), list[tuple[int, int]]()
    windows, table = framed(scan((5, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 3)
    results = segment_windows(
        engine, windows, table, levels=C, runs=R, batch=5, timings=timings, progress=lambda *done: seen.append(done)
    )
    assert next(results).index == 0
    # 12 rows a slice: the first is finished with the third batch of five, which has begun the second and nothing more.
    assert (timings.calls, engine.encoded) == (3 * len(table), 2)
    assert [result.index for result in results] == [1, 2, 3, 4]
    assert engine.encoded == 5
    assert timings.rows == 60
    assert min(timings.encode, timings.noise, timings.denoise, timings.update, timings.collect) > 0
    total = 5 * C * R * len(table)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_memory_does_not_grow_with_the_scan() -> None:
    def peak(S: int) -> int:
        windows, table = framed(scan((S, SIZE, SIZE))), sampler_table("ddpm", SCHEDULE, 2)
        tracemalloc.start()
        for _ in segment_windows(FakeEngine(), windows, table, levels=C, runs=R, batch=6):
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(2)  # what Python allocates once
    # Forty slices more would take at least their 40 * (C + R) maps, if they were kept.
    assert peak(42) - peak(2) < 40 * (C + R) * SIZE * SIZE * 4 / 10


class OneArray(FakeEngine):
    held = np.empty((12, 1, SIZE, SIZE), np.float32)  # for every prediction, as in engines with buffers of their own

    def denoise(self, *inputs: Any) -> Prediction:
        self.held[...], mix = super().denoise(*inputs)
        return self.held, mix


def test_the_prediction_before_is_kept_where_the_engine_overwrites_it() -> None:
    windows, table = framed(scan()), sampler_table("dpm++2m", SCHEDULE, 6)
    both = [run(engine(), windows, table, batch=12) for engine in (OneArray, FakeEngine)]
    np.testing.assert_array_equal(*([one.means for one in found] for found in both))


class BrokenEngine(FakeEngine):
    """Returns one bad pixel in one row: level 2, at t = 7."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def denoise(self, x: Float32, features: Any, row_slice: Int64, t: Int64, level: Int64) -> Prediction:
        x0, mix = super().denoise(x, features, row_slice, t, level)
        if t[0] == 7:
            x0[np.argmax(level == 2), 0, 3, 4] = self.value
        return x0, mix


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_an_error_that_names_the_row(value: float) -> None:
    with pytest.raises(CdiffError, match=r"not finite: x0 at timestep 7, slice 40, level 2, run 0"):
        run(BrokenEngine(value), framed(scan()), sampler_table("ddpm", SCHEDULE), slice_ids=[40, 41, 42])


def test_large_values_are_finite_even_where_their_sum_is_not() -> None:
    rows = Rows(2, *(np.zeros(2, np.int64) for _ in range(2)), np.zeros((2, 2), np.int64), np.ones(2, np.int64),
                np.zeros(2, np.int64), (4, 4))  # fmt: skip
    value = np.full((2, 1, 4, 4), 3e38, np.float32)
    check_finite(rows, value, "mix")
    value[1, 0, 2, 2] = -np.inf
    with pytest.raises(CdiffError, match="slice 0, level 1, run 0"):
        check_finite(rows, value, "mix")


class WholeChain(HostBinding):
    """A binding that runs the whole chain by itself, as a GPU engine would."""

    def run_chain(self, rows: Rows, table: SamplerTable, seed: int) -> Float32:
        x, noise = np.zeros((self.rows, 1, SIZE, SIZE), np.float32), Noise(seed)
        z = np.zeros_like(x)
        for step in range(-1, len(table)):
            for i in range(rows.valid):
                key = {"slice_": int(rows.slice_id[i]), "level": int(rows.level[i]), "run": int(rows.run[i])}
                noise.fill(z[i, 0], step=step, **key)
            if step == INITIAL:
                x[:] = z
                continue
            x0, _ = self.run(x, rows.slot, np.full(self.rows, table.t[step]), rows.level)
            x = (table.a[step] * x + table.b[step] * x0 + table.d[step] * z).astype(np.float32)
        return x


class ChainEngine(FakeEngine):
    def bind(self, rows: int, slots: int) -> Binding:
        return WholeChain(self, rows, slots)


def test_an_engine_may_run_the_whole_chain() -> None:
    assert isinstance(ChainEngine().bind(1, 1), ChainBinding)
    assert not isinstance(FakeEngine().bind(1, 1), ChainBinding)
    windows, table, seen = framed(scan()), sampler_table("ddpm", SCHEDULE, 4), list[tuple[int, int]]()
    want = run(FakeEngine(), windows, table, batch=5)
    spent = Timings()
    got = run(ChainEngine(), windows, table, batch=5, progress=lambda *done: seen.append(done), timings=spent)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.level_means, b.level_means, rtol=0, atol=2e-5)
    assert seen[-1][0] == seen[-1][1] == 3 * C * R * 4
    assert spent.calls == -(-3 * C * R // 5) * 4, "the steps of every batch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "at least one run"),
        ({"batch": 0}, "at least one row"),
        ({"slice_ids": [1]}, "3 slices need as many"),
        ({"slice_ids": [0, 1, -2]}, "0 or more"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    arguments = {"levels": C, "runs": R, **options}
    with pytest.raises(CdiffError, match=message):
        segment_windows(FakeEngine(), framed(scan()), sampler_table("ddim", SCHEDULE, 2), **arguments)


@pytest.mark.parametrize("total", [1, 7, 8, 9, 20, 100, 175, 4375])
def test_the_default_batch_wastes_less_than_a_row_a_batch(total: int) -> None:
    for device, most in (("cpu", 8), ("cuda:1", 256)):
        batch = rows_per_batch(total, device)
        batches = -(-total // batch)
        assert 1 <= batch <= most
        assert batches * batch - total < batches


@pytest.mark.parametrize(("C", "R", "want"), [(7, 25, 175), (4, 25, 100), (4, 100, 200), (3, 1, 3)])
def test_a_gpu_gets_a_slice_at_once(C: int, R: int, want: int) -> None:
    assert rows_per_batch(50 * C * R, "cuda:0", C * R) == want
    assert rows_per_batch(C * R, "cuda:0", C * R) == want
    assert rows_per_batch(2, "cuda:0", C * R) == 2
