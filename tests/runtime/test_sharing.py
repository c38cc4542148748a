"""Slices shared out among engines, and batches halved until they fit: the maps stay the same."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from cdiff.runtime import segmenter as loop
from cdiff.runtime.bundle import Bundle, open_bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.engines.base import Binding
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling import batching
from cdiff.runtime.sampling.batching import Progress, Timings
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.segmenter import Segmenter
from cdiff.runtime.sharing import segment_shared
from tests.runtime.sampling.test_batching import SCHEDULE, SIZE, BrokenEngine, C, FakeEngine, R, framed, run, scan
from tests.runtime.test_segmenter import make_bundle


class Small(FakeEngine):
    """An engine with room for so many rows."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.asked = room, list[int]()

    def bind(self, rows: int, slots: int) -> Binding:
        self.asked.append(rows)
        if rows > self.room:
            raise OutOfMemory("no room; use a smaller batch")
        return super().bind(rows, slots)


@pytest.mark.parametrize("engines", [1, 2, 3, 7])
def test_several_engines_give_the_maps_of_one(engines: int) -> None:
    windows, table = framed(scan((5, SIZE, 20)), "tile"), sampler_table("ddpm", SCHEDULE, 4)
    want = run(FakeEngine(), windows, table, batch=12, slice_ids=[3, 4, 5, 6, 7])
    seen: list[tuple[int, int]] = []
    several, spent = [FakeEngine() for _ in range(engines)], Timings()
    got = segment_shared(
        several, windows, table, slice_ids=[3, 4, 5, 6, 7], levels=C, runs=R, seed=9, batch=12,
        progress=lambda *done: seen.append(done), timings=spent,
    )  # fmt: skip
    assert [(one.index, one.slice_id) for one in got] == [(i, i + 3) for i in range(5)]
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a.level_means, b.level_means)
        assert np.array_equal(a.run_std, b.run_std)
    total = len(windows) * C * R * len(table)
    assert seen[-1] == (total, total)
    assert {whole for _, whole in seen} == {total}
    assert sum(engine.encoded for engine in several) == len(windows)
    assert spent.rows == len(windows) * C * R


def test_one_engine_s_error_ends_all() -> None:
    windows, table = framed(scan((6, SIZE, SIZE))), sampler_table("ddpm", SCHEDULE)
    with pytest.raises(CdiffError, match=r"x0 at timestep 7, slice [345]"):
        segment_shared(
            [FakeEngine(), BrokenEngine(np.nan)], windows, table, slice_ids=range(6), levels=C, runs=R, seed=9,
            timings=Timings(),
        )  # fmt: skip
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if "cdiff-gpu" in t.name]


@pytest.mark.parametrize("broken_first", [True, False])
def test_the_others_end_after_the_slice_that_they_are_at(broken_first: bool) -> None:
    """Whichever fails: hours of work on the others' shares would come to nothing."""
    failed = threading.Event()

    class Broken(FakeEngine):
        def encode(self, images: Any) -> Any:
            failed.set()
            raise CdiffError("broken")

    class Slow(FakeEngine):
        def encode(self, images: Any) -> Any:
            failed.wait(10)
            time.sleep(0.02)  # a slice takes so long: the other's error has come by the second or third
            return super().encode(images)

    slow = Slow()
    engines = [Broken(), slow] if broken_first else [slow, Broken()]
    windows, table = framed(scan((60, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 1)
    with pytest.raises(CdiffError, match="broken"):
        segment_shared(
            engines, windows, table, slice_ids=range(60), levels=C, runs=1, seed=9, batch=C, timings=Timings()
        )
    assert slow.encoded < 15, "of a share of 30"


def test_a_batch_that_does_not_fit_is_halved_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "tiny"))
    engine = Small(3)
    segmenter = Segmenter(bundle, engine)
    slices = np.random.default_rng(0).normal(size=(SIZE, SIZE, 2)).astype(np.float32)
    options: dict[str, Any] = {"runs": 4, "steps": 2, "seed": 1}
    first = segmenter.segment(slices, batch=20, **options)
    second = segmenter.segment(slices, batch=20, **options)
    assert engine.asked == [20, 10, 5, 3, 3], "the second scan begins with what fitted"
    assert first.report["batch"] == second.report["batch"] == 3
    assert segmenter.segment(slices, batch=2, **options).report["batch"] == 2, "who asks for less gets less"
    assert [record.message for record in caplog.records] == [
        f"no room; use a smaller batch; going on with {b} rows per batch instead of {a}"
        for a, b in ((20, 10), (10, 5), (5, 3))
    ]
    want = Segmenter(bundle, Small(100)).segment(slices, batch=20, **options)
    np.testing.assert_allclose(first.stack.soft, want.stack.soft, rtol=0, atol=2e-5)
    with pytest.raises(OutOfMemory):
        Segmenter(bundle, Small(0)).segment(slices, batch=2, **options)


def test_a_gpu_is_asked_for_no_more_rows_than_it_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that 32-bit indices reach, or that the engine is made for; whoever gives the batch gets it."""
    bundle = open_bundle(make_bundle(tmp_path / "tiny"))
    slices = np.random.default_rng(0).normal(size=(SIZE, SIZE, 2)).astype(np.float32)

    class OnAGpu(FakeEngine):
        device = "cuda:0"

    class Made(OnAGpu):
        most_rows = 4

    def batch(*engines: FakeEngine, **options: int) -> int:
        return int(Segmenter(bundle, *engines).segment(slices, runs=4, steps=1, **options).report["batch"])

    assert batch(OnAGpu()) == 4 * C
    monkeypatch.setattr(batching, "most_rows", lambda channels, size: 7)
    assert batch(FakeEngine()) == 8, "a processor's batch is small anyway"
    assert batch(OnAGpu()) == 6, "two equal batches of a slice"
    assert batch(Made()) == batch(OnAGpu(), Made()) == 4
    assert batch(Made(), batch=5) == 5


def test_where_no_batch_fits_the_next_scan_begins_with_a_whole_one_again(tmp_path: Path) -> None:
    """Else a moment without room, or one scan that never fits, would make a whole folder crawl row by row."""
    engine = Small(0)
    segmenter = Segmenter(open_bundle(make_bundle(tmp_path / "tiny")), engine)
    slices = np.random.default_rng(0).normal(size=(SIZE, SIZE, 1)).astype(np.float32)
    options: dict[str, Any] = {"runs": 2, "steps": 1, "batch": 6}
    with pytest.raises(OutOfMemory):
        segmenter.segment(slices, **options)
    assert engine.asked == [6, 3, 2, 1]
    engine.room = 100
    segmenter.segment(slices, **options)
    assert engine.asked[4:] == [6]


class Kept(FakeEngine):
    """As the engines of a GPU do, it gives every scan the same buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = threading.Lock()
        self.kept: Binding | None = None

    def bind(self, rows: int, slots: int) -> Binding:
        self.kept = self.kept or super().bind(rows, slots)
        return self.kept


@pytest.mark.parametrize("engines", [1, 2])
def test_threads_that_share_engines_do_not_write_over_one_another_s_features(engines: int) -> None:
    table, shared = sampler_table("ddpm", SCHEDULE, 6), [Kept() for _ in range(engines)]

    def maps(number: int, engines: list[Any]) -> np.ndarray:
        windows = framed(scan((4, SIZE, SIZE)) + number)
        found = segment_shared(
            engines, windows, table, slice_ids=range(4), levels=C, runs=R, seed=9, batch=12, timings=Timings()
        )
        return np.stack([one.level_means for one in found])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: maps(number, shared), range(8)))
    for number, got in enumerate(found):
        np.testing.assert_array_equal(got, maps(number, [FakeEngine() for _ in range(engines)]))


@pytest.mark.parametrize("engines", [1, 2])
def test_progress_that_segments_with_its_own_model_is_an_error_and_does_not_wait_for_itself(engines: int) -> None:
    table, shared = sampler_table("ddpm", SCHEDULE, 2), [Kept() for _ in range(engines)]

    def maps(progress: Progress | None = None) -> np.ndarray:
        found = segment_shared(
            shared,
            framed(scan((4, SIZE, SIZE))),
            table,
            slice_ids=range(4),
            levels=C,
            runs=R,
            seed=9,
            batch=12,
            timings=Timings(),
            progress=progress,
        )
        return np.stack([one.level_means for one in found])

    told: list[CdiffError] = []

    def work() -> None:
        try:
            maps(lambda done, total: (maps(), None)[1])
        except CdiffError as error:
            told.append(error)

    # A thread that does not keep the process: one that waited for itself would never end.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert [str(error) for error in told] == [
        "progress cannot segment with the model that it reports on: fake on cpu takes one scan at a time; segment the other scan after "
        "this one, or open the model a second time"
    ]
    np.testing.assert_array_equal(maps(), maps(lambda done, total: None))


def test_devices_are_opened_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def open_engine(bundle: Bundle, name: str, device: str, build: Any = None) -> Any:
        opened.append(device)
        engine = FakeEngine()
        engine.device = device  # type: ignore[misc]
        return engine

    monkeypatch.setattr(loop, "open_engine", open_engine)
    bundle = make_bundle(tmp_path / "tiny")
    segmenter = Segmenter.open(bundle, device="cuda:0,cuda:2")
    assert opened == ["cuda:0", "cuda:2"]
    assert cast(Any, segmenter)._model_report()["device"] == "cuda:0,cuda:2"
    for wrong in ("cuda:0,cuda:0", "cuda,cuda:0", "cpu,cuda:0", "cuda:0,"):
        with pytest.raises(CdiffError, match="device"):
            Segmenter.open(bundle, device=wrong)
