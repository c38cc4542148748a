"""The GPU suite's arithmetic on numbers that are known: how far engines are apart, and what a share of a protocol comes to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cdiff.benchmarks import gpu_measure, gpu_parity
from cdiff.benchmarks.gpu_measure import flops, published, some_rows, whole_protocol
from cdiff.benchmarks.gpu_parity import ROWS, call_errors, map_errors
from tests.benchmarks.tiny import TINY

T, LEVELS = TINY.config.network.T, TINY.config.network.levels


class Known:
    """An engine whose features are 4 and -8 but for `off`, and whose estimates are 0 but for `apart` a row."""

    name, device = "known", "cpu"

    def __init__(self, off: float = 0.0, apart: float = 0.0) -> None:
        self.off, self.apart = off, apart
        self.asked: list[tuple[Any, ...]] = []

    def encode(self, image: Any) -> Any:
        return np.array([[4 + self.off, -8]], np.float32)

    def denoise(self, x: Any, features: Any, slot: Any, t: Any, level: Any) -> Any:
        self.asked.append((x, features, t, level))
        x0 = np.zeros_like(x)
        x0[:, 0, 0, 0] = self.apart * np.arange(1, len(x) + 1)
        return x0, None


def test_differences_of_single_calls_are_those_of_the_rows() -> None:
    engine, reference = Known(off=-2.0, apart=-0.125), Known()
    image = TINY.images()["random"]
    found = call_errors(engine, reference, image, TINY)  # type: ignore[arg-type]
    x, features, t, level = engine.asked[0]
    assert (t[0], t[-1], len(set(t.tolist()))) == (1, T, ROWS)
    assert level.tolist() == [row % LEVELS + 1 for row in range(ROWS)]
    assert features[0, 0] == 2, "its own features"
    assert reference.asked[-1][1][0, 0] == 4
    assert np.array_equal(x, reference.asked[-1][0])
    first, *_ = reference.asked[0]
    np.testing.assert_allclose(x, np.sqrt(1 - TINY.schedule.abar[t]).reshape(-1, 1, 1, 1) * first, rtol=1e-6)
    gaps = 0.125 * np.arange(1, ROWS + 1)
    eps = gaps * np.sqrt(TINY.schedule.abar[t] / (1 - TINY.schedule.abar[t]))
    pixels = image.shape[2] * image.shape[3]
    wanted = {
        "encoder": 2 / 8, "x0": gaps.max(), "x0_mean": gaps.mean() / pixels, "eps": eps.max(), "eps_mean": eps.mean() / pixels,
    }  # fmt: skip
    assert found == pytest.approx(wanted, rel=1e-5)


def test_differences_of_maps_are_those_of_the_means_over_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = np.zeros((2, LEVELS, 4, 4), np.float32)
    own[:, :2] = 1
    other[:] = own
    other[0, 1] = 0  # of 8 pixels, level 1 leaves out 4, and the last level only one
    other[-1, 1, 0] = 0
    maps = iter([other, own])
    monkeypatch.setattr(
        gpu_parity, "segment_windows", lambda *_, **named: iter([SimpleNamespace(level_means=next(maps))])
    )
    found = map_errors(Known(), Known(), TINY.images()["random"], TINY)  # type: ignore[arg-type]
    gap = abs(own.mean(axis=0) - other.mean(axis=0))
    theirs = other.mean(axis=0) >= 0.5
    assert 0 < gap.mean() < gap.max()
    assert found == pytest.approx({
        "mean": float(gap.mean()), "max": float(gap.max()), "dice": 2 * theirs.sum() / (theirs.sum() + 8),
        "dice_levels": 2 * 4 / (4 + 8), "pixels": theirs.sum(), "steps": T, "runs": TINY.runs,
    })  # fmt: skip


def test_a_protocol_in_part_is_the_whole_but_for_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice's encoding takes 1 s and all that happens once 4 s; a step 2 s on the device and 0.75 s on the host."""
    clock: Any = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def segment_windows(engine: Any, windows: Any, table: Any, *, timings: Any, **named: Any) -> Any:
        steps = len(table)
        timings.encode, timings.denoise, timings.noise, timings.update = 1.0, 2.0 * steps, 0.25 * steps, 0.5 * steps
        clock.now += 5 + 2.75 * steps
        return iter(range(len(windows)))

    monkeypatch.setattr(gpu_measure, "time", clock)
    monkeypatch.setattr(gpu_measure, "segment_windows", segment_windows)
    monkeypatch.setattr(gpu_measure, "step_seconds", lambda *_: 0.5)
    image, batches = TINY.images()["random"], -(-2 * TINY.rows // 3)
    found = whole_protocol(Known(), TINY, image, 3, 0.5 * batches * 3.5, slices=2)  # type: ignore[arg-type]
    whole = 5 + 2.75 * T
    assert (found["steps"], found["batch"], found["batches"]) == (3, 3, batches)
    assert found["share"] == pytest.approx(3 / T)
    assert found["measured_seconds"] == pytest.approx(5 + 2.75 * 3)
    assert (found["seconds"], found["seconds_a_slice"]) == pytest.approx((whole, whole / 2))
    assert found["host_share"] == pytest.approx((4 + 0.75 * T) / whole)
    assert list(found["parts"].values()) == pytest.approx([1, 2 * T, 0.75 * T, 4])
    assert found["peak_bytes"] > 0
    complete = whole_protocol(Known(), TINY, image, 3, 1e9)  # type: ignore[arg-type]
    assert (complete["steps"], complete["share"]) == (T, 1)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 6), (20.0, 8), (1e9, T)])
def test_the_published_way_in_part_is_its_chains_and_their_steps(
    monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int
) -> None:
    """A level's chain takes 0.5 s before its first step, and 0.25 s a step."""
    clock: Any = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def plain_loop(network: Any, diffusion: Any, windows: Any, table: Any, runs: int, *_: Any, **named: Any) -> None:
        clock.now += runs * LEVELS * (0.5 + 0.25 * len(table))

    monkeypatch.setattr(gpu_measure, "time", clock)
    monkeypatch.setattr(gpu_measure, "plain_loop", plain_loop)
    known = LEVELS * (2 * 0.5 + 0.25 * (2 + 6))  # what the two chains have taken by which the number of steps is chosen
    limit = known + 8.5 * LEVELS * 0.25 if seconds == 20.0 else seconds
    found = published(TINY, TINY.network(), TINY.images()["random"], "cpu", limit)
    assert found["share"] == pytest.approx(steps / T / TINY.runs)
    assert found["measured_seconds"] == pytest.approx(LEVELS * (2 * 0.5 + 0.25 * (2 + steps)))
    assert found["seconds"] == found["seconds_a_slice"] == pytest.approx(TINY.rows * (0.5 + 0.25 * T))
    assert (found["ms_a_row"], found["ms_a_row_encoder_and_copy"]) == pytest.approx((250, 500))
    assert not found["tf32_convolutions"]


def test_the_rows_of_a_batch_are_levels_in_turn_and_a_protocol_is_one_encoding_and_all_their_steps() -> None:
    rows = some_rows(TINY, LEVELS + 2)
    assert rows.level.tolist() == [*range(1, LEVELS + 1), 1, 2]
    assert rows.run.tolist() == [0] * LEVELS + [1, 1]
    found = flops(TINY)
    assert found["protocol"] == found["encoder"] + found["denoiser"] * TINY.rows * T
