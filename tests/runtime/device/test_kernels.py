"""The CUDA source run on the host: the noise is runtime/sampling/noise.py's, the update runtime/sampling/chain.py's, the sums runtime/sampling/sums.py's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cdiff.runtime.device.kernels import THREADS
from cdiff.runtime.device.layout import GOOD, JOB, ROW, STATE, BatchBlock, place_of_bad, spans_of, step_table
from cdiff.runtime.engines.base import Rows
from cdiff.runtime.sampling.chain import Chain, Timings
from cdiff.runtime.sampling.mirror import view_of
from cdiff.runtime.sampling.noise import INITIAL, Noise, normal
from cdiff.runtime.sampling.sampler import SAMPLERS, SamplerTable, sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from tests.runtime.device.host_kernels import launch, philox

SCHEDULE = NoiseSchedule(T=20, beta_end=1e-2)
SEEDS = (0, 2**64 - 1)


def rows_of(
    count: int, *, canvas: tuple[int, int], valid: int | None = None, views: int = 1, rng_seed: int = 0
) -> Rows:
    rng = np.random.default_rng(rng_seed)
    run = rng.integers(0, 2**31, count) // views * views + rng.integers(0, views, count)
    return Rows(
        valid=count if valid is None else valid,
        slot=rng.integers(0, 3, count) * views + run % views,
        slice_id=rng.integers(0, 2**62, count),
        origin=np.zeros((count, 2), np.int64),
        level=rng.integers(1, 2**31, count),
        run=run,
        canvas=canvas,
    )


class Device:
    """One batch's structs in host memory, and launches with the grids of `Kernels`."""

    def __init__(self, rows: Rows, size: tuple[int, int], table: SamplerTable, seed: int, views: int = 1) -> None:
        self.rows, self.size, self.count = rows, size, len(rows.slot)
        block = BatchBlock(self.count)
        self.block = np.zeros(block.size, np.uint8)
        block.fill(self.block, rows, table, seed, views)
        self.job, self.row = self.block.ctypes.data, self.block.ctypes.data + block.row
        self.table = step_table(table)
        self.state = np.zeros(1, STATE)
        self.state["bad"] = GOOD
        self.t = np.zeros(self.count, np.int64)
        self.window = (*size, spans_of(size[1]))
        self.grid = (-(-size[0] * spans_of(size[1]) // THREADS), self.count)

    def noise(self, step: int) -> np.ndarray[Any, Any]:
        held = np.full(self.count * self.size[0] * self.size[1] + 1, np.nan, np.float32)
        launch("cdiff_noise", self.grid, THREADS, held.ctypes.data, self.job, self.row, step, *self.window)
        assert np.isnan(held[-1]), "a line's last pixel was written beyond it, and so beyond the last window"
        return held[:-1].reshape(self.count, *self.size)

    def start(self, x: Any, previous: Any) -> None:
        pointers = [a.ctypes.data for a in (x, previous, self.t, self.state)]
        launch("cdiff_start", self.grid, THREADS, *pointers, self.job, self.row, self.table.ctypes.data, *self.window)

    def update(self, x: Any, x0: Any, mix: Any, previous: Any) -> None:
        pointers = [0 if a is None else a.ctypes.data for a in (x, x0, mix, previous, self.t, self.state)]
        launch("cdiff_update", self.grid, THREADS, *pointers, self.job, self.row, self.table.ctypes.data, *self.window)
        launch("cdiff_advance", (1, 1), 1, self.state.ctypes.data)


def ulps(got: Any, want: Any) -> float:
    return float((np.abs(got - want) / np.spacing(np.abs(want))).max())


def test_the_words_are_numpy_s_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        key, *counter = (int(word) for word in rng.integers(0, 2**64, 5, np.uint64))
        bits = np.random.Philox(key=np.array([key, 0], np.uint64), counter=np.array(counter, np.uint64))
        want = bits.random_raw(4).tolist()
        # NumPy adds 1 to the counter before it draws.
        counter[0] = (counter[0] + 1) % 2**64
        assert philox(tuple(counter), key) == want  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(16, 16), (5, 31), (3, 1), (7, 2), (4, 6)])
@pytest.mark.parametrize("step", [INITIAL, 0, 999])
def test_the_normals_are_noise_py_s(size: tuple[int, int], step: int) -> None:
    rows, table = rows_of(3, canvas=size), sampler_table("ddpm", SCHEDULE, 5)
    for seed in SEEDS:
        got = Device(rows, size, table, seed).noise(step)
        for i in range(3):
            want = normal(seed, int(rows.slice_id[i]), int(rows.level[i]), int(rows.run[i]), step, size)
            # log, sqrt, sin and cos of two libraries: a few units in the last place of the radius, 0 where cos is near 0.
            np.testing.assert_allclose(got[i], want, rtol=0, atol=2e-6)
            assert ulps(got[i], want) <= 8


@pytest.mark.parametrize("width", [12, 10])  # of the latter a line may touch as many blocks as any of its length can
@pytest.mark.parametrize("canvas", [(20, 41), (33, 64), (18, 17)])
def test_windows_read_their_canvas_s_noise(canvas: tuple[int, int], width: int) -> None:
    size, table = (9, width), sampler_table("ddpm", SCHEDULE, 5)
    origins = np.array([[0, 0], [3, 5], [1, 2], [canvas[0] - 9, canvas[1] - width], [7, 1]])
    rows = rows_of(len(origins), canvas=canvas)
    rows = Rows(rows.valid, rows.slot, rows.slice_id, origins, rows.level, rows.run, canvas)
    got = Device(rows, size, table, 7).noise(2)
    for i, (top, left) in enumerate(origins):
        key = int(rows.slice_id[i]), int(rows.level[i]), int(rows.run[i])
        want = normal(7, *key, 2, canvas)[top : top + size[0], left : left + size[1]]
        np.testing.assert_allclose(got[i], want, rtol=0, atol=2e-6)


class Played:
    """A binding whose answers are given."""

    def __init__(self, rows: int, answers: list[tuple[Any, Any]]) -> None:
        self.rows, self.slots, self._answers = rows, 1, iter(answers)
        self.seen: list[tuple[Any, Any]] = []

    def encode(self, slot: int, image: Any) -> None: ...

    def run(self, x: Any, slot: Any, t: Any, level: Any) -> Any:
        self.seen.append((x.copy(), t.tolist()))
        return next(self._answers)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_update_is_chain_py_s(name: str, learned: bool) -> None:
    size, count, steps = (6, 10), 3, 7
    rows, table = rows_of(count, canvas=size), sampler_table(name, SCHEDULE, steps)
    rng = np.random.default_rng(1)
    shape = (count, 1, *size)
    answers = [
        (rng.uniform(-1, 1, shape).astype(np.float32), rng.uniform(0, 1, shape).astype(np.float32) if learned else None)
        for _ in range(steps)
    ]
    played = Played(count, answers)
    want = Chain(played, size, table, Noise(11), Timings()).run(rows, None)

    device = Device(rows, size, table, 11)
    x, previous = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    device.state["step"], device.state["bad"] = 99, 0
    device.start(x, previous)
    assert device.state["step"] == 0
    for (x0, mix), (seen, t) in zip(answers, played.seen, strict=True):
        # At every step: the last lands on its x0, whatever was there before.
        np.testing.assert_allclose(x, seen, rtol=0, atol=3e-6)
        assert device.t.tolist() == t
        device.update(x, x0, mix, previous)
    assert device.state["step"] == steps
    assert device.state["bad"] == GOOD
    np.testing.assert_allclose(x, want, rtol=0, atol=3e-6)


def test_without_noise_the_update_is_exact() -> None:
    # ddim draws no noise, and every product is rounded as NumPy rounds it: the same bits, from the same x_T.
    size, table = (6, 10), sampler_table("ddim", SCHEDULE, 4)
    rows, rng = rows_of(2, canvas=size), np.random.default_rng(2)
    x0 = rng.uniform(-1, 1, (2, 1, *size)).astype(np.float32)
    device = Device(rows, size, table, 5)
    x, previous = np.empty_like(x0), np.empty_like(x0)
    device.start(x, previous)
    want = x.copy()
    for step in range(4):
        device.update(x, x0, None, previous)
        want *= float(table.a[step])
        want += x0 * np.float32(table.b[step])
    assert np.array_equal(x, want)


@pytest.mark.parametrize(
    ("row", "in_mix", "valid", "want"),
    [
        (1, False, 3, ("x0 at timestep 10", 1)),
        (2, True, 3, ("the variance at timestep 10", 2)),
        *[(2, in_mix, 2, None) for in_mix in (False, True)],
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_kept(
    row: int, in_mix: bool, valid: int, want: tuple[str, int] | None, value: float
) -> None:
    size, table = (4, 8), sampler_table("ddpm", SCHEDULE, 2)
    device = Device(rows_of(3, canvas=size, valid=valid), size, table, 5)
    x, previous = np.empty((3, 1, *size), np.float32), np.empty((3, 1, *size), np.float32)
    device.start(x, previous)
    for step in range(2):
        x0, mix = np.zeros_like(x), np.full_like(x, 0.5)
        if step == 1:
            (mix if in_mix else x0)[row, 0, 2, 3] = value
            (mix if in_mix else x0)[2, 0, 1, 0] = value
        device.update(x, x0, mix, previous)
    bad = int(device.state["bad"][0])
    assert (None if bad == GOOD else place_of_bad(bad, 3, table)) == want


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("keep", [False, True])
def test_the_sums_are_the_host_s(views: int, keep: bool) -> None:
    size, C, R, places, count, valid = (5, 7), 3, 5, 2, 12, 10
    rng = np.random.default_rng(3)
    table = sampler_table("ddim", SCHEDULE, 2)
    run, place = rng.integers(0, R, count), rng.integers(0, places, count)
    rows = Rows(
        valid, place * views + run % views, np.zeros(count, np.int64), np.zeros((count, 2), np.int64),
        rng.integers(1, C + 1, count), run, size,
    )  # fmt: skip
    x = rng.normal(size=(count, 1, *size)).astype(np.float32)
    device = Device(rows, size, table, 0, views)
    sums = np.zeros((places, C + R, *size), np.float32)
    kept = np.zeros((places, C, R, *size), np.uint8)
    numbers = count, C, R, *size
    pointers = x.ctypes.data, sums.ctypes.data, kept.ctypes.data if keep else 0, device.state.ctypes.data
    launch("cdiff_sum", (1, 1), THREADS, *pointers, device.job, device.row, *numbers)

    want, want_kept = np.zeros_like(sums), np.zeros_like(kept)
    for i in range(valid):
        fraction = np.clip((view_of(x[i, 0], run[i] % views) + 1) * np.float32(0.5), 0, 1)
        want[place[i], rows.level[i] - 1] += fraction
        want[place[i], C + run[i]] += fraction
        want_kept[place[i], rows.level[i] - 1, run[i]] = np.rint(fraction * 255)
    assert np.array_equal(sums, want), "row by row in order: the same bits as on the host"
    assert np.array_equal(kept, want_kept if keep else np.zeros_like(kept))
    assert device.state["bad"] == GOOD

    x[9, 0, 4, 6] = np.inf
    launch("cdiff_sum", (1, 1), THREADS, *pointers, device.job, device.row, *numbers)
    assert place_of_bad(int(device.state["bad"][0]), count, table) == ("the result", 9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_that_are_not_finite_are_found(dtype: Any) -> None:
    values = np.full(1000, np.finfo(dtype).max, dtype)
    state = np.zeros(1, STATE)
    arguments = values.ctypes.data, values.size, values.itemsize, state.ctypes.data
    launch("cdiff_finite", (2, 1), THREADS, *arguments)
    assert state["bad_features"] == 0
    for at, value in ((777, -np.inf), *((i, np.nan) for i in range(len(values)))):
        values[at] = value
        state["bad_features"] = 0
        launch("cdiff_finite", (2, 1), THREADS, *arguments)
        assert state["bad_features"] == 1, at
        values[at] = 0


def test_the_structs_have_the_sizes_that_c_gives_them() -> None:
    # A mistake here would show above as nonsense; this says where to look.
    assert (JOB.itemsize, ROW.itemsize, step_table(sampler_table("ddim", SCHEDULE, 2)).itemsize) == (24, 40, 32)
    assert STATE.itemsize == 16
