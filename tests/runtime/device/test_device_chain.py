"""Whole scans through the TensorRT engine on doubles that really compute: the maps are the host loop's, and the calls are in order."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cdiff.runtime.device.chain import WARM_UPS
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.engines import tensorrt
from cdiff.runtime.engines.base import ChainBinding, SumBinding, SumLayout
from cdiff.runtime.engines.trt import EnginePair, Profile
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import SliceResult, Timings, segment_windows
from cdiff.runtime.sampling.chain import Chain
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.noise import Noise
from cdiff.runtime.sampling.sampler import SAMPLERS, sampler_table
from tests.runtime.device.fake_cuda import Function
from tests.runtime.device.test_kernels import rows_of
from tests.runtime.sampling.test_batching import SCHEDULE, SIZE, BrokenEngine, C, FakeEngine, R, framed, run, scan


def same(got: list[SliceResult], want: list[SliceResult], atol: float = 2e-6) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.index, a.slice_id) == (b.index, b.slice_id)
        np.testing.assert_allclose(a.level_means, b.level_means, rtol=0, atol=atol)
        np.testing.assert_allclose(a.run_std, b.run_std, rtol=0, atol=atol)
        assert (a.runs is None) == (b.runs is None)
        if a.runs is not None and b.runs is not None:
            assert np.abs(a.runs.astype(int) - b.runs).max() <= 1
            assert (a.runs != b.runs).mean() < 1e-3


@pytest.mark.parametrize("hasty", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 12, 30, 64])
def test_the_maps_are_the_host_s(make: Any, batch: int, hasty: bool) -> None:
    windows, table = framed(scan()), sampler_table("ddpm", SCHEDULE, 6)
    got = run(make(hasty=hasty).engine, windows, table, batch=batch, keep_runs=batch in (5, 30))
    same(got, run(FakeEngine(), windows, table, batch=12, keep_runs=batch in (5, 30)))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_and_the_learned_variance(make: Any, name: str, learned: bool) -> None:
    windows, table = framed(scan((2, SIZE, SIZE))), sampler_table(name, SCHEDULE, 5)
    got = run(make(FakeEngine(learned=learned)).engine, windows, table, batch=7)
    same(got, run(FakeEngine(learned=learned), windows, table, batch=7), atol=1e-5)


@pytest.mark.parametrize(("mode", "shape"), [("tile", (2, 20, 41)), ("centre", (2, SIZE, 31))])
@pytest.mark.parametrize("batch", [5, 40])
def test_mirrored_views_and_tiles(make: Any, mode: str, shape: tuple[int, int, int], batch: int) -> None:
    windows, table = framed(scan(shape), mode), sampler_table("ddpm", SCHEDULE, 3)
    options: dict[str, Any] = {"batch": batch, "mirror": True, "keep_runs": mode == "centre"}
    same(run(make().engine, windows, table, **options), run(FakeEngine(), windows, table, **options))


def test_a_model_of_odd_width(make: Any) -> None:
    slices, table = (
        np.random.default_rng(1).normal(size=(1, 1, 9, 9)).astype(np.float32),
        sampler_table("ddpm", SCHEDULE, 3),
    )
    windows = Framing("resize", (9, 9)).frame(slices)
    same(run(make(size=9).engine, windows, table, batch=5), run(FakeEngine(), windows, table, batch=5))


def test_half_precision_features(make: Any) -> None:
    class Rounded(FakeEngine):
        def encode(self, images: Any) -> Any:
            return super().encode(images).astype(np.float16).astype(np.float32)

    windows, table = framed(scan((2, SIZE, SIZE))), sampler_table("ddpm", SCHEDULE, 3)
    same(run(make(dtype=np.float16).engine, windows, table, batch=7), run(Rounded(), windows, table, batch=7))


def test_rtx_runs_alike(make: Any) -> None:
    windows, table = framed(scan((1, SIZE, SIZE))), sampler_table("ddpm", SCHEDULE, 3)
    setup = make(rtx=True)
    assert (setup.engine.name, setup.engine.device) == ("tensorrt-rtx", "cuda:0")
    same(run(setup.engine, windows, table, batch=7), run(FakeEngine(), windows, table, batch=7))


def test_the_next_scan_reuses_buffers_graph_and_kernels(make: Any) -> None:
    setup, table = make(), sampler_table("ddpm", SCHEDULE, 4)
    for shape in ((3, SIZE, SIZE), (2, SIZE, SIZE)):
        windows = framed(scan(shape))
        same(run(setup.engine, windows, table, batch=12), run(FakeEngine(), windows, table, batch=12))
    assert len(setup.world.named("begin capture")) == 1
    longer = sampler_table("dpm++2m", SCHEDULE, 20)
    same(run(setup.engine, windows, longer, batch=12), run(FakeEngine(), windows, longer, batch=12), atol=1e-5)
    kept = [run(engine, windows, table, batch=12, keep_runs=True) for engine in (setup.engine, FakeEngine())]
    same(*kept)  # whose sums are other ones
    timings = Timings()
    run(setup.engine, windows, table, batch=12, timings=timings)
    assert timings.denoise == pytest.approx(1e-3 * -(-2 * C * R // 12)), "a millisecond a batch by the double's clock"
    assert len(setup.world.named("begin capture")) == 1, "the table is data: another sampler runs the same graph"
    run(setup.engine, windows, table, batch=5)
    assert len(setup.world.named("begin capture")) == 2
    assert len(setup.world.named("executable destroyed")) == 1


def test_a_table_longer_than_its_buffer(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdiff.runtime.device.chain.TABLE_ROWS", 4)
    setup, windows = make(), framed(scan((1, SIZE, SIZE)))
    for steps in (3, 9, 5):
        table = sampler_table("ddpm", SCHEDULE, steps)
        same(run(setup.engine, windows, table, batch=12), run(FakeEngine(), windows, table, batch=12))


def test_one_capture_one_launch_a_step_one_stop_a_slice(make: Any) -> None:
    S, steps = 3, 6
    setup, table = make(), sampler_table("ddpm", SCHEDULE, steps)
    world = setup.world
    binding = setup.engine.bind(C * R, 2)
    assert isinstance(binding, SumBinding)
    before = world.stops
    timings = Timings()
    run(setup.engine, framed(scan((S, SIZE, SIZE))), table, batch=C * R, timings=timings)
    assert (len(world.named("begin capture")), len(world.named("end capture"))) == (1, 1)
    assert len(world.named("graph launch")) == S * steps
    # The table and the cleared state are uploaded with a stop each before the first slice.
    assert world.stops - before <= S + 3
    assert (timings.calls, timings.rows) == (S * steps, S * C * R)
    assert timings.denoise == pytest.approx(S * 1e-3), "the double's device takes a millisecond a batch"

    names = [call[:2] for call in world.calls]
    first = names.index(("begin capture", world.named("begin capture")[0][1]))
    captured = world.calls[first + 1 : names.index(("end capture", world.calls[first][1]))]
    stream = world.calls[first][1]
    assert [call[:2] for call in captured] == [
        ("execute", "denoiser"), ("launch", "cdiff_update"), ("launch", "cdiff_advance")
    ]  # fmt: skip
    assert all(call[2] == stream for call in captured), "everything on the chain's stream"
    plain = [call for call in world.calls[:first] if call[:2] == ("execute", "denoiser")]
    assert len(plain) == WARM_UPS, "TensorRT wants to have run once before it is captured"
    encoders = [call for call in world.calls if call[:2] == ("execute", "encoder")]
    assert len(encoders) == S
    assert all(call[2] != stream for call in encoders), "the encoder has its own stream"
    launches = [i for i, call in enumerate(world.calls) if call[0] == "graph launch"]
    between = world.calls[launches[0] : launches[steps - 1]]
    assert {call[0] for call in between} == {"graph launch"}, "nothing between the steps"


def test_shapes_and_addresses_are_set_once_before_anything_runs(make: Any) -> None:
    setup, table = make(FakeEngine(learned=True)), sampler_table("ddim", SCHEDULE, 3)
    run(setup.engine, framed(scan()), table, batch=5)
    calls = setup.world.calls
    ran = min(i for i, call in enumerate(calls) if call[0] == "execute")
    for graph, inputs, outputs in (
        ("encoder", {"image"}, {"features"}),
        ("denoiser", {"x", "features", "row_slice", "t", "level"}, {"x0", "mix"}),
    ):
        shapes = [call for call in calls if call[:2] == ("shape", graph)]
        addresses = [call for call in calls if call[:2] == ("address", graph)]
        assert {call[2] for call in shapes} == inputs
        assert len(shapes) == len(inputs)
        assert {call[2] for call in addresses} == inputs | outputs
        assert len({call[3] for call in addresses}) == len(inputs | outputs) == len(addresses)
        assert all(calls.index(call) < ran for call in shapes + addresses)
    assert setup.asked == [Profile(5, 5, 5, 2)]


def test_the_context_is_left_as_it_was_found(make: Any) -> None:
    setup, table = make(BrokenEngine(np.nan)), sampler_table("ddpm", SCHEDULE)
    with pytest.raises(CdiffError):
        run(setup.engine, framed(scan()), table)
    setup.engine.close()
    assert setup.world.contexts == []
    assert setup.world.used() == 0, "everything was given back"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_the_row_as_on_the_host(make: Any, value: float) -> None:
    setup, table, windows = make(BrokenEngine(value)), sampler_table("ddpm", SCHEDULE), framed(scan())
    options: dict[str, Any] = {"slice_ids": [40, 41, 42], "batch": 5}
    with pytest.raises(CdiffError) as host:
        run(BrokenEngine(value), windows, table, **options)
    with pytest.raises(CdiffError) as device:
        run(setup.engine, windows, table, **options)
    assert str(device.value) == str(host.value)
    assert "x0 at timestep 7, slice 40, level 2, run 0" in str(device.value)


def test_features_that_are_not_finite_are_an_error(make: Any) -> None:
    setup, table = make(), sampler_table("ddim", SCHEDULE, 3)
    slices = scan()
    slices[1, 0, 3, 3] = np.nan
    results = segment_windows(setup.engine, framed(slices), table, levels=C, runs=R, batch=C * R)
    with pytest.raises(CdiffError, match="encoder returned a value that is not finite"):
        list(results)
    good = framed(scan((1, SIZE, SIZE)))
    same(run(setup.engine, good, table), run(FakeEngine(), good, table))


def test_a_scan_that_was_given_up_leaves_nothing_behind(make: Any) -> None:
    setup, table, windows = make(), sampler_table("ddpm", SCHEDULE, 3), framed(scan((5, SIZE, SIZE)))
    results = segment_windows(setup.engine, windows, table, levels=C, runs=R, seed=9, batch=5)
    next(results)
    results.close()  # type: ignore[attr-defined]
    same(run(setup.engine, windows, table, batch=5), run(FakeEngine(), windows, table, batch=5))


def test_two_scans_at_once_are_refused(make: Any) -> None:
    setup, table, windows = make(), sampler_table("ddpm", SCHEDULE, 3), framed(scan((4, SIZE, SIZE)))
    first = segment_windows(setup.engine, windows, table, levels=C, runs=R, seed=9, batch=12)
    next(first)
    run(setup.engine, windows, table, batch=12)
    with pytest.raises(RuntimeError, match="another scan was begun"):
        list(first)


def test_the_binding_runs_chains_and_single_calls_too(make: Any) -> None:
    setup, host = make(), FakeEngine()
    images = scan((2, SIZE, SIZE))
    np.testing.assert_array_equal(setup.engine.encode(images), host.encode(images))
    rng = np.random.default_rng(3)
    feed = {
        "x": rng.normal(size=(4, 1, SIZE, SIZE)).astype(np.float32),
        "features": host.encode(images),
        "row_slice": np.array([0, 1, 1, 0]),
        "t": np.array([3, 7, 20, 1]),
        "level": np.array([1, 2, 3, 3]),
    }
    got, mix = setup.engine.denoise(**feed)
    np.testing.assert_array_equal(got, host.denoise(**feed)[0])  # type: ignore[arg-type]
    assert mix is None
    binding = setup.engine.bind(12, 2)
    assert isinstance(binding, ChainBinding)
    binding.encode(0, np.full((1, SIZE, SIZE), np.nan, np.float32))
    with pytest.raises(CdiffError, match="encoder"):
        binding.features()
    rows, table = rows_of(12, canvas=(SIZE, SIZE)), sampler_table("ddpm", SCHEDULE, 4)
    rows = replace(rows, slot=rows.slot % 2, level=rows.level % C + 1)
    plain = host.bind(12, 2)
    for slot, image in enumerate(images):
        binding.encode(slot, image)
        plain.encode(slot, image)
    x = binding.run_chain(rows, table, 3)
    np.testing.assert_allclose(
        x, Chain(plain, (SIZE, SIZE), table, Noise(3), Timings()).run(rows, None), rtol=0, atol=1e-5
    )


def test_progress_is_that_of_the_chain(make: Any) -> None:
    seen: list[tuple[int, int]] = []
    steps = 20
    run(make().engine, framed(scan((2, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, steps), batch=12,
        progress=lambda *done: seen.append(done))  # fmt: skip
    total = 2 * C * R * steps
    assert seen[-1] == (total, total)
    assert len(seen) == 2 * 10
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_steps_that_cannot_be_captured_are_launched_one_by_one_and_that_is_said(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    setup, table, windows = make(), sampler_table("ddpm", SCHEDULE, 4), framed(scan())
    setup.world.refuse_capture = True
    same(run(setup.engine, windows, table, batch=12), run(FakeEngine(), windows, table, batch=12))
    assert setup.world.named("graph launch") == []
    assert [record.message for record in caplog.records if "captured" in record.message] == [
        "a step cannot be captured as a CUDA graph, so its parts are launched one by one: cuStreamEndCapture failed: "
        "status 901 (CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)"
    ]


def test_what_the_driver_refuses_within_a_capture_costs_the_capture_alone(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library's call has spoiled the capture, and PyCUDA's next launch in it is what fails."""
    setup, table, windows = make(), sampler_table("ddpm", SCHEDULE, 4), framed(scan())
    launch = Function.prepared_async_call

    def refusing(function: Any, *arguments: Any) -> None:
        setup.world.outside_capture(function.name)
        launch(function, *arguments)

    monkeypatch.setattr(Function, "prepared_async_call", refusing)
    same(run(setup.engine, windows, table, batch=12), run(FakeEngine(), windows, table, batch=12))
    assert any("launched one by one: cdiff_update: operation not permitted" in one.message for one in caplog.records)


def test_a_batch_that_does_not_fit_is_out_of_memory_and_leaks_nothing(make: Any) -> None:
    setup = make(memory=200_000)
    with pytest.raises(OutOfMemory, match=r"cuda:0 \(Double\) has 0\.0 GiB free.*use a smaller batch"):
        setup.engine.bind(64, 2)
    windows, table = framed(scan((2, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 2)
    same(run(setup.engine, windows, table, batch=2), run(FakeEngine(), windows, table, batch=2))


def test_a_scan_of_fewer_slots_takes_the_binding_that_is_there(make: Any) -> None:
    """Its buffers, and the step that was captured over them, serve it as well."""
    setup, table = make(), sampler_table("ddpm", SCHEDULE, 3)
    tall, one = framed(scan((3, SIZE, SIZE))), framed(scan((1, SIZE, SIZE)))
    for windows, mirror in ((tall, True), (one, True), (tall, False), (one, False), (tall, True)):
        options: dict[str, Any] = {"batch": 12, "mirror": mirror}
        same(run(setup.engine, windows, table, **options), run(FakeEngine(), windows, table, **options))
    assert len(setup.world.named("begin capture")) == 1
    held = setup.engine.bind(12, 2)
    assert setup.engine.bind(12, held.slots + 1) is not held


def test_other_shapes_take_no_more_memory_than_they_need(make: Any) -> None:
    """What the old buffers held is given back first: a library that allocates by itself cannot use our pool."""
    windows, table = framed(scan((1, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 2)
    small = make()
    run(small.engine, windows, table, batch=2)
    setup = make()
    for batch in (40, 20, 2):
        run(setup.engine, windows, table, batch=batch)
    assert setup.world.used() == small.world.used()
    starved = make(memory=200_000)
    with pytest.raises(OutOfMemory):
        starved.engine.bind(64, 2)
    starved.engine.close()
    assert starved.world.used() == 0


def test_pinned_memory_goes_back_with_its_binding_while_the_context_is_current(make: Any) -> None:
    """PyCUDA frees it in any thread then; left to the garbage collector it stays taken where that runs in another thread."""
    setup, table = make(), sampler_table("ddim", SCHEDULE, 2)
    gc.collect()
    gc.disable()
    try:
        for batch, keep in ((12, False), (12, True), (5, True)):
            run(setup.engine, framed(scan((2, SIZE, SIZE))), table, batch=batch, keep_runs=keep)
        setup.engine.close()
        freed = setup.world.named("unpinned")
    finally:
        gc.enable()
    assert len(freed) == len(setup.world.pinned)
    assert all(current for _, current in freed)


@pytest.mark.parametrize("call", range(1, 8))
def test_sums_that_find_no_room_give_back_what_they_took(make: Any, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The n-th allocation of a scan's sums fails, on the device or pinned on the host."""
    setup = make()
    binding = setup.engine.bind(12, 2)
    held, left = setup.world.used(), [call]

    def counted(function: Any) -> Any:
        def allocate(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OutOfMemory("no room")
            return function(*arguments, **options)

        return allocate

    gpu = setup.engine.gpu
    for name in ("allocate", "pinned"):
        monkeypatch.setattr(gpu, name, counted(getattr(gpu, name)))
    with pytest.raises(OutOfMemory):
        binding.begin(SumLayout(2, C, R, 1, True), sampler_table("ddim", SCHEDULE, 2), 0)
    monkeypatch.undo()
    with gpu.current():
        gpu.trim()
    assert setup.world.used() == held


def test_the_engines_are_built_when_the_cache_has_none(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make()
    find = tensorrt.open_or_build

    def missing(bundle: Any, flavour: Any, gpu: Any, profile: Profile, build: Any = None) -> EnginePair:
        found = find(bundle, flavour, gpu, profile, build)
        if build is None:
            raise CdiffError("no engine; build it")
        return found

    monkeypatch.setattr(tensorrt, "open_or_build", missing)
    with pytest.raises(CdiffError, match="build it"):
        setup.engine.bind(12, 8)
    setup.engine._build = lambda *_: None
    setup.engine._bundle = SimpleNamespace(
        manifest=SimpleNamespace(image_size=(16, 16), features_channels=2, conditions=3, variance="fixed")
    )
    setup.engine.bind(12, 8)
    built = setup.asked[-1]
    assert (built.min_rows, built.opt_rows, built.max_rows) == (1, 12, 75), (
        "for the usual 25 runs too, fastest for these"
    )
    assert built.slots >= 8
