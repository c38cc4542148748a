"""The GPU suite's numbers, tried on a tiny network: noise, parity, the time of a step, memory, and a protocol in part."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cdiff.benchmarks import gpu_checks, gpu_measure
from cdiff.benchmarks.gpu_checks import Settings
from cdiff.benchmarks.gpu_measure import (
    DeviceMemory,
    kernel_times,
    noise_of,
    published,
    step_seconds,
    usual_batch,
    whole_protocol,
)
from cdiff.benchmarks.gpu_parity import ROWS, batch_error, call_errors, map_errors
from cdiff.benchmarks.gpu_report import markdown
from cdiff.benchmarks.gpu_subjects import PAPER, SHIPPED, subject
from cdiff.export.reference import TorchEngine, load_network
from cdiff.export.torch_engine import TorchChainEngine
from cdiff.runtime.bundle import open_bundle, shipped_bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.errors import CdiffError
from tests.benchmarks.tiny import CPU, TINY


def test_the_shipped_network_is_read_without_safetensors() -> None:
    expected = load_network(open_bundle(shipped_bundle())).state_dict()
    found = subject(SHIPPED, small=False).network()
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert found.state_dict().keys() == expected.keys()
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_without_a_compiler_torch_compile_is_refused_and_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(device: str) -> None:
        raise RuntimeError("Failed to find C compiler.")

    kernels = SimpleNamespace(try_out=none)
    monkeypatch.setitem(sys.modules, "cdiff.export.torch_kernels", kernels)
    found = gpu_checks.run_check("protocol:compiled:paper", Settings("cuda:0", small=True))
    assert (found["status"], "C compiler and Python's headers" in found["message"]) == ("refused", True), found


@pytest.fixture(scope="module")
def engine() -> TorchChainEngine:
    return TorchChainEngine(TINY.network(), TINY.schedule, "cpu")


def test_noise_check_finds_a_wrong_stream(engine: TorchChainEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    image = TINY.images()["random"]
    right = noise_of(engine, TINY, image, 3, 2**63 + 5)
    assert right["max"] < 1e-6
    assert right["values"] == 2 * 3 * 16 * 16
    noise = engine.noise
    monkeypatch.setattr(engine, "noise", lambda seed, *rest: noise(seed + 1, *rest))
    assert noise_of(engine, TINY, image, 3, 2**63 + 5)["max"] > 1


def test_parity_is_near_nought_for_the_same_weights_and_not_for_others(engine: TorchChainEngine) -> None:
    network, images = TINY.network(), TINY.images()
    reference = TorchEngine(network, TINY.schedule)
    for image in images.values():
        assert max(call_errors(engine, reference, image, TINY).values()) < 1e-4
    same = map_errors(engine, reference, images["real"], TINY)
    assert same["mean"] < 1e-5
    assert same["dice"] == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        network.denoiser.last.bias.add_(0.5)
    other = TorchEngine(network, TINY.schedule)
    assert call_errors(engine, other, images["real"], TINY)["x0"] > 0.1
    assert map_errors(engine, other, images["real"], TINY)["mean"] > 0.01


def test_a_large_batch_is_held_to_its_rows_alone(engine: TorchChainEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    image, denoise = TINY.images()["real"], engine.denoise
    for batch in (ROWS, 2 * ROWS + 3):
        found = batch_error(engine, image, TINY, batch)
        assert found["batch"] == batch
        assert found["x0"] < 1e-5

    def wrong_at_the_end(x: Any, *rest: Any) -> Any:
        x0, mix = denoise(x, *rest)
        x0[ROWS:][-1:] += 0.5  # where there are more rows than ROWS
        return x0, mix

    monkeypatch.setattr(engine, "denoise", wrong_at_the_end)
    assert batch_error(engine, image, TINY, 2 * ROWS + 3)["x0"] == pytest.approx(0.5, abs=1e-3)
    monkeypatch.setattr(
        engine, "denoise", lambda x, *rest: (denoise(x, *rest)[0] * (np.nan if len(x) > ROWS else 1), None)
    )
    with pytest.raises(CdiffError, match=r"a batch of 11 rows on .* returned a value that is not finite"):
        batch_error(engine, image, TINY, 2 * ROWS + 3)


class Clock:
    """A clock that stands still unless a chain moves it: 2 ms a chain and `step` a step, and every fifth chain is held up for 50 ms."""

    def __init__(self, step: float) -> None:
        self.now, self.step, self.calls = 0.0, step, 0

    def perf_counter(self) -> float:
        return self.now

    def chain(self, engine: Any, image: Any, rows: Any, table: Any, seed: int = 0) -> None:
        self.calls += 1
        self.now += 2e-3 + self.step * len(table) + (50e-3 if self.calls % 5 == 3 else 0)


def test_a_step_is_a_median_and_no_jitter(engine: TorchChainEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5e-4, 0.0):
        clock = Clock(step)
        monkeypatch.setattr(gpu_measure, "time", clock)
        monkeypatch.setattr(gpu_measure, "chain", clock.chain)
        if step:
            assert step_seconds(engine, TINY, TINY.images()["real"], 4) == pytest.approx(step)
        else:
            with pytest.raises(CdiffError, match="the time of a step is not known"):
                step_seconds(engine, TINY, TINY.images()["real"], 4)


def test_the_kernels_of_a_step_are_not_those_of_the_ends_of_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """x_T is drawn before the first step, and x goes to the host, slowly, after the last."""
    ran: list[int] = []

    class Binding:
        def encode(self, slot: int, image: Any) -> None: ...

        def run_chain(self, rows: Any, table: Any, seed: int) -> None:
            ran.append(len(table))

    class Profile:
        def __init__(self, activities: Any) -> None: ...

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None: ...

        def key_averages(self) -> list[Any]:
            steps = ran[-1]
            found = {
                "conv": (40.0, 2 * steps),
                "draw": (7.0, steps + 1),
                "to the host": (5e3, 1),
                "launch": (0.0, steps),
            }
            return [
                SimpleNamespace(key=key, count=calls, self_device_time_total=spent * calls)
                for key, (spent, calls) in found.items()
            ]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    engine: Any = SimpleNamespace(device="cuda:0", bind=lambda rows, slots: Binding())
    found = kernel_times(engine, TINY, TINY.images()["real"], 4)
    assert [(one["name"], one["calls_a_step"]) for one in found["kernels"]] == [("conv", 2), ("draw", 1)]
    assert found["ms_a_step"] == pytest.approx(0.087)


def test_memory_is_looked_at_apart_from_the_clock_and_without_leftovers(
    engine: TorchChainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU of 100 bytes: 10 are used, 30 more were kept from an earlier batch size."""
    kept, watched, steps = [30], [0], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90 - kept[0], 100))
    with DeviceMemory("cuda:0") as memory:
        pass
    assert memory.peak == 10
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (_ for _ in ()).throw(RuntimeError("not supported")))
    with DeviceMemory("cuda:0") as memory:
        pass
    assert memory.peak == 0, "no time is lost for want of it"

    class Watch(DeviceMemory):
        def __enter__(self) -> DeviceMemory:
            watched[0] += 1
            return super().__enter__()

        def __exit__(self, *rest: object) -> None:
            super().__exit__(*rest)
            watched[0] -= 1

    def seen(name: str, table: int) -> None:
        real = getattr(gpu_measure, name)

        def call(*args: Any, **named: Any) -> Any:
            steps.append((len(args[table]), watched[0]))
            return real(*args, **named)

        monkeypatch.setattr(gpu_measure, name, call)

    monkeypatch.setattr(gpu_measure, "DeviceMemory", Watch)
    seen("segment_windows", 2)
    seen("plain_loop", 3)
    image = TINY.images()["real"]
    whole_protocol(engine, TINY, image, 6, seconds=1e9)
    published(TINY, TINY.network(), image, "cpu", seconds=0)
    T = TINY.config.network.T
    assert steps == [(2, 0), (2, 1), (T, 0), (2, 0), (2, 1), (2, 0), (6, 0)], (
        "steps, and whether the memory was watched"
    )


def test_the_published_way_is_measured_as_pytorch_is_set_and_row_by_row_and_without_tf32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[bool, bool]] = []

    def noted(*_: Any, by_row: bool = False) -> dict[str, Any]:
        seen.append((torch.backends.cudnn.allow_tf32, by_row))
        return {"seconds_a_slice": float(len(seen))}

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(gpu_measure, "published", noted)
    found = gpu_checks.check_published("published", TINY, CPU, lambda found: None)
    assert seen == [(True, False), (True, True), (False, False)]
    looks = [found, found["by_row"], found["without_tf32"]]
    assert [one["seconds_a_slice"] for one in looks] == [1.0, 2.0, 3.0]
    assert found["flop"] > 0
    assert {one["flop"] for one in looks} == {found["flop"]}


def test_a_protocol_in_part_is_extrapolated_and_says_so(engine: TorchChainEngine) -> None:
    image = TINY.images()["real"]
    whole = whole_protocol(engine, TINY, image, 4, seconds=1e9)
    assert (whole["share"], whole["steps"], whole["batches"]) == (1.0, TINY.config.network.T, 2)
    assert whole["seconds"] == pytest.approx(whole["measured_seconds"], rel=0.05)
    part = whole_protocol(engine, TINY, image, 4, seconds=0)
    assert part["steps"] == 2
    assert part["share"] == pytest.approx(2 / TINY.config.network.T)
    assert part["seconds"] > part["measured_seconds"]
    assert part["seconds"] == pytest.approx(sum(part["parts"].values()))
    assert 0 <= part["host_share"] < 1
    plain = published(TINY, TINY.network(), image, "cpu", seconds=0)
    assert 0 < plain["share"] < 1
    assert plain["seconds"] > plain["measured_seconds"]
    assert plain["batch"] == TINY.config.network.levels
    assert published(TINY, TINY.network(), image, "cpu", seconds=0, by_row=True)["batch"] == 1


def test_the_usual_batch_is_what_the_runtime_takes_of_that_engine() -> None:
    """Of the paper's 175 rows 63 are within the reach of 32-bit indices, and an engine may be made for fewer."""
    model = subject(PAPER, small=False)

    def batch(**engine: Any) -> int:
        made: Any = SimpleNamespace(**engine)
        return usual_batch(made, model)

    assert batch(device="cuda:0") == 59
    assert batch(device="cuda:0", most_rows=40) == 35
    assert batch(device="cpu") == 8


class Limited:
    """An engine made for at most 40 rows, as TensorRT's is; it notes what was asked for."""

    name, version, device, most_rows = "tensorrt", "0", "cuda:0", 40

    def __init__(self) -> None:
        self.bound: list[tuple[int, int]] = []

    def bind(self, rows: int, slots: int) -> Any:
        self.bound.append((rows, slots))
        return SimpleNamespace(encode=lambda slot, image: None)


def test_an_engine_that_is_built_is_made_for_the_runtime_s_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for the single row of the first comparison it would be fastest for one row in every measurement after that."""
    made = Limited()
    monkeypatch.setattr(gpu_checks, "bundle_of", lambda *_: None)
    monkeypatch.setattr(gpu_checks, "open_engine", lambda bundle, name, device, build: made)
    assert gpu_checks.open_path("tensorrt", subject(PAPER, small=False), Settings()) is made
    assert made.bound == [(35, 1)]


def test_no_batch_is_measured_that_another_engine_would_have_to_be_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def step_seconds(engine: Any, model: Any, image: Any, size: int) -> float:
        sizes.append(size)
        return 0.1

    limits: list[float] = []

    def whole_protocol(engine: Any, model: Any, image: Any, batch: int, seconds: float) -> dict[str, Any]:
        limits.append(seconds)
        return {"seconds": 1.0}

    monkeypatch.setattr(gpu_measure, "step_seconds", step_seconds)
    monkeypatch.setattr(gpu_measure, "whole_protocol", whole_protocol)
    monkeypatch.setattr(gpu_checks, "step_parts", lambda *_: {})
    paper = subject(PAPER, small=False)
    for path, engine, wanted in (
        ("tensorrt", Limited(), [1, 8, 35]),
        ("graph", SimpleNamespace(name="torch", version="0", device="cuda:0"), [1, 8, 59, 88]),
        ("onnxruntime-tensorrt", SimpleNamespace(name="onnxruntime", version="0", device="cuda:0"), [88]),
    ):
        monkeypatch.setattr(gpu_checks, "open_path", lambda *_, engine=engine: engine)
        gpu_checks.check_protocol(path, paper, Settings(), lambda found: None)
        assert sizes == wanted
        sizes.clear()
        # What the targets are of is run as a whole where it can be.
        assert limits.pop() == Settings().seconds * (3 if path == "graph" else 1)


def test_no_room_for_the_parts_of_a_step_costs_no_measured_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> Any:
        raise OutOfMemory("PyTorch ran out of memory on the GPU")

    monkeypatch.setattr(gpu_checks, "step_parts", no_room)
    name = "protocol:graph:paper"
    found = gpu_checks.run_check(name, CPU)
    assert found["status"] == "done"
    page = markdown({"settings": vars(CPU), "targets": [], "plan": [], "checks": {name: found}})
    assert f"| {name} | done but for a step's parts | PyTorch ran out of memory on the GPU |" in page
    assert "| cdiff, PyTorch float16, our kernels, captured |" in page


def test_values_that_are_not_finite_are_said_and_not_compared(
    engine: TorchChainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = TorchEngine(TINY.network(), TINY.schedule)
    denoise = engine.denoise
    monkeypatch.setattr(engine, "denoise", lambda *arrays: (denoise(*arrays)[0] * np.float32(np.nan), None))
    with pytest.raises(CdiffError, match="the denoiser on torch returned a value that is not finite"):
        call_errors(engine, reference, TINY.images()["real"], TINY)


@pytest.mark.parametrize(("seconds", "rounds", "four"), [(1.0, 3, 4.0), (9.0, 2, 5.5), (30.0, 1, 4.0)])
def test_scaling_is_a_median_of_the_rounds_that_there_is_time_for(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int, four: float
) -> None:
    """The second of three rounds is held up by 3 s a slice."""
    now, calls = [0.0], []

    def whole_protocol(engine: Any, model: Any, image: Any, batch: int, limit: float, slices: int) -> dict[str, Any]:
        calls.append(slices)
        now[0] += seconds / 3
        return {"seconds_a_slice": slices + 3.0 * (len(calls) in (4, 5, 6)), "share": 1.0 - 0.1 * (len(calls) == 3)}

    monkeypatch.setattr(gpu_measure, "whole_protocol", whole_protocol)
    monkeypatch.setattr(gpu_checks, "open_path", lambda *_: None)
    monkeypatch.setattr(gpu_checks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = gpu_checks.check_scaling("graph", TINY, CPU, lambda found: None)
    assert calls == [1, 2, 4] * rounds
    assert found["rounds"] == rounds
    assert found["seconds_a_slice"]["4"] == four
    assert found["share"] == pytest.approx(0.9)
