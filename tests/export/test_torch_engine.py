"""PyTorch as an engine: whole chains on the device that end where the loop's own do."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cdiff
from cdiff.export.reference import TorchEngine
from cdiff.export.torch_chain import full_precision
from cdiff.export.torch_engine import Options, TorchChainEngine, open_torch
from cdiff.runtime.bundle import open_bundle, shipped_bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.engines.base import ChainBinding, Engine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing, Windows
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.sections import NetworkConfig
from tests.export.networks import BASE, random_network

SCHEDULE = NoiseSchedule(BASE.T)
EXACT = Options(half=False)


def slices(count: int, side: int = BASE.image_size) -> np.ndarray:
    return np.random.default_rng(4).uniform(-1, 1, (count, 1, side, side)).astype(np.float32)


def maps(engine: Engine, windows: Windows, sampler: str, **options: int | bool) -> np.ndarray:
    table = sampler_table(sampler, SCHEDULE, 6)
    arguments = {"levels": BASE.levels, "runs": 2, "seed": 2**63 + 1, "batch": 4, **options}
    return np.stack([r.level_means for r in segment_windows(engine, windows, table, **arguments)])  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_chains_end_where_the_loops_own_do(sampler: str) -> None:
    """Two slices of six rows in batches of four: rows of two slices in one batch, and padding in the last."""
    network = random_network(BASE)
    windows = Framing("resize", (16, 16)).frame(slices(2))
    engine = TorchChainEngine(network, SCHEDULE, "cpu", EXACT)
    assert isinstance(engine.bind(1, 1), ChainBinding)
    expected = maps(TorchEngine(network, SCHEDULE), windows, sampler)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(maps(engine, windows, sampler), expected, atol=2e-5)


def test_learned_variance_tiles_and_mirrored_views() -> None:
    config = dataclasses.replace(BASE, variance="learned", target="eps")
    network = random_network(config)
    windows = Framing("tile", (16, 16)).frame(slices(1, 20))
    expected = maps(TorchEngine(network, SCHEDULE), windows, "ddpm", mirror=True)
    found = maps(TorchChainEngine(network, SCHEDULE, "cpu", EXACT), windows, "ddpm", mirror=True)
    # eps as the target divides rounding by sqrt(abar), so a few pixels at the clip's edge part ways a little.
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - expected).mean() < 1e-5


def test_a_longer_chain_after_a_shorter_one_starts_anew() -> None:
    engine = TorchChainEngine(random_network(BASE), SCHEDULE, "cpu", EXACT)
    windows = Framing("resize", (16, 16)).frame(slices(1))
    first = maps(engine, windows, "dpm++2m")
    list(segment_windows(engine, windows, sampler_table("ddpm", SCHEDULE, 3), levels=3, runs=2, batch=4))
    np.testing.assert_array_equal(maps(engine, windows, "dpm++2m"), first)


def test_threads_may_share_a_model(tiny_bundle: Path) -> None:
    """The engine keeps its buffers for the next scan, and two scans at once would share them: wrong maps, and not a word."""
    model, scan = cdiff.load(tiny_bundle, engine="torch"), slices(1)[0, 0]

    def soft(seed: int) -> np.ndarray:
        return model.segment(scan, runs=2, steps=3, seed=seed).soft

    expected = [soft(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(soft, [0, 1, 2, 3] * 4)):
            np.testing.assert_array_equal(found, expected[seed % 4])


def test_a_chain_that_was_not_finite_leaves_nothing_to_the_next() -> None:
    """Else one scan that a network fails on would fail every later one of a folder: 0 times NaN is NaN."""
    engine = TorchChainEngine(random_network(BASE), SCHEDULE, "cpu", EXACT)
    binding = engine.bind(2, 1)
    for buffer in (binding.x, binding.previous):
        buffer.fill_(torch.nan)
    assert np.isfinite(binding.run_chain(one_slice(np.arange(2)), sampler_table("dpm++2m", SCHEDULE, 6), 0)).all()


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
def test_what_a_capture_leaves_behind_does_not_reach_the_chain(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the CUDA graph runs the warm-ups and replays the same call: one capture a kind of table, the same maps."""
    captures: list[tuple[str, Any]] = []

    def captured(step: Callable[[], None], device: str, earlier: Any) -> Any:
        for _ in range(4):
            step()
        captures.append((device, earlier))
        return SimpleNamespace(replay=step, number=len(captures))

    monkeypatch.setattr("cdiff.export.torch_chain.captured", captured)
    network, windows = random_network(BASE), Framing("resize", (16, 16)).frame(slices(2))
    expected = maps(TorchChainEngine(network, SCHEDULE, "cpu", EXACT), windows, sampler)
    engine = TorchChainEngine(network, SCHEDULE, "cpu", EXACT)
    engine.capture = True
    np.testing.assert_array_equal(maps(engine, windows, sampler), expected)
    np.testing.assert_array_equal(maps(engine, windows, sampler), expected)
    assert captures == [("cpu", None)], "the second scan replays what the first one captured"
    for height in (20, 24, 20):
        maps(engine, Framing("centre", (16, 16)).frame(np.zeros((1, 1, height, 16), np.float32)), sampler)
    assert [(device, earlier.number) for device, earlier in captures[1:]] == [("cpu", 1)] * 2, (
        "one memory for all sizes"
    )


def test_a_step_is_captured_once_a_kind_of_table_and_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are fewer timesteps than warm-ups; a table without noise, or with the last x0, is another step."""
    captures: list[Callable[[], None]] = []

    def captured(step: Callable[[], None], *_: Any) -> Any:
        for _ in range(4):
            step()
        captures.append(step)
        return SimpleNamespace(replay=lambda: None)

    monkeypatch.setattr("cdiff.export.torch_chain.captured", captured)
    schedule = NoiseSchedule(3, kind="cosine")
    engine = TorchChainEngine(random_network(dataclasses.replace(BASE, T=3)), schedule, "cpu", EXACT)
    engine.capture = True
    binding, rows = engine.bind(2, 1), one_slice(np.arange(2))
    for each in (rows, dataclasses.replace(rows, canvas=(20, 16))):
        for sampler in ("ddpm", "ddim", "dpm++2m", "ddpm"):
            binding.run_chain(each, sampler_table(sampler, schedule), 0)
    assert len(captures) == 6


@pytest.mark.parametrize("tuned", [True, False])
def test_algorithms_are_timed_within_the_network_alone_and_only_if_asked(
    tuned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tuned)  # whatever the program around has set
    network = random_network(BASE)
    engine = TorchChainEngine(network, SCHEDULE, "cpu", dataclasses.replace(EXACT, tuned=tuned))
    seen: list[bool] = []
    forward = torch.nn.Conv2d.forward

    def watched(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.benchmark)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    maps(engine, Framing("resize", (16, 16)).frame(slices(1)), "ddim")
    convolutions = [sum(isinstance(m, torch.nn.Conv2d) for m in part.modules()) for part in (network.encoder, network)]
    assert len(seen) > convolutions[1] > convolutions[0] > 0, "encoder and denoiser were watched"
    assert set(seen) == {tuned}
    assert torch.backends.cudnn.benchmark is not tuned, "the program's own setting is given back"


def test_each_gpu_is_captured_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of `torch.cuda` whose streams know their GPU: a step is captured only where its own GPU's stream is the current one."""
    from contextlib import contextmanager

    from cdiff.export.torch_chain import captured

    now = {"device": "cuda:0", "stream": "cuda:0"}
    capturing: list[str] = []

    @contextmanager
    def put(key: str, value: str) -> Iterator[None]:
        before, now[key] = now[key], value
        try:
            yield
        finally:
            now[key] = before

    def stream() -> Any:
        return SimpleNamespace(device=now["device"], wait_stream=lambda other: None)

    shared: list[tuple[Any, Any]] = []

    class Graph:
        first: Any = None  # PyTorch makes its stream for captures once in a process

        def __init__(self, graph: Any, pool: Any, stream: Any = None, capture_error_mode: str = "global") -> None:
            assert capture_error_mode == "thread_local"
            if stream is None:
                Graph.first = stream = Graph.first or cuda.Stream()
            self.device = stream.device
            shared.append((pool, stream))

        def __enter__(self) -> None:
            assert not gc.isenabled(), "what is collected within a capture can break it"
            capturing.append(self.device)
            self.before, now["stream"] = now["stream"], "the capture's"

        def __exit__(self, broken: object, *_: object) -> None:
            capturing.pop()
            if broken:  # PyTorch 2.11 and 2.13 raise here before they put the stream back
                raise RuntimeError("operation failed due to a previous error during capture")
            now["stream"] = self.before

    cuda = SimpleNamespace(
        Stream=stream, current_stream=stream, graph=Graph, CUDAGraph=lambda: SimpleNamespace(pool=lambda: "pool"),
        synchronize=lambda: None, device=lambda device: put("device", device), stream=lambda one: put("stream", one.device),
    )  # fmt: skip
    monkeypatch.setattr("cdiff.export.torch_chain.torch.cuda", cuda)
    for device in ("cuda:0", "cuda:1"):
        held: list[str] = []
        first = captured(
            lambda held=held, device=device: held.extend(one for one in capturing if one == device),  # type: ignore[misc]
            device,
        )
        assert held == [device]
        assert shared.pop() == (None, first.stream)
        captured(lambda: None, device, first)
        assert shared.pop() == ("pool", first.stream), "memory is shared on one stream alone"

    def fails(when: bool, error: Exception | None = None) -> Callable[[], None]:
        def step() -> None:
            if bool(capturing) is when:
                raise error or RuntimeError("no kernel image is available\nmore")

        return step

    with pytest.raises(CdiffError, match=r"could not be captured as a CUDA graph \(no kernel image is available\)"):
        captured(fails(True), "cuda:0")
    assert (now["stream"], gc.isenabled()) == ("cuda:0", True)
    for lack in (torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: out of memory")):
        with pytest.raises(type(lack), match=f"^{lack}$"):
            captured(fails(True, lack), "cuda:0")
    # A launch that fails without a capture too is not the capture's fault, and to run without it would not help.
    with pytest.raises(RuntimeError, match=r"^no kernel image"):
        captured(fails(False), "cuda:0")


def test_half_precision_is_half_and_stays_close() -> None:
    network = random_network(BASE)
    windows = Framing("resize", (16, 16)).frame(slices(1))
    engine = TorchChainEngine(network, SCHEDULE, "cpu", Options(half=True))
    kinds = {p.dtype for name, p in engine.graph.denoiser.named_parameters() if not name.startswith("last.")}
    assert kinds == {torch.float16}
    assert engine.encode(windows.slices).dtype == np.float16
    exact = maps(TorchChainEngine(network, SCHEDULE, "cpu", EXACT), windows, "ddim")
    gap = np.abs(maps(engine, windows, "ddim") - exact).mean()
    assert 0 < gap < 1e-2


def test_a_value_that_is_not_finite_is_an_error() -> None:
    windows = Framing("resize", (16, 16)).frame(slices(1))
    broken = random_network(BASE)
    broken.denoiser.last.bias.fill_(float("inf"))
    with pytest.raises(CdiffError, match="not finite: the result, slice 0"):
        maps(TorchChainEngine(broken, SCHEDULE, "cpu", EXACT), windows, "ddpm")
    broken = random_network(BASE)
    broken.encoder.last.bias.fill_(float("nan"))
    with pytest.raises(CdiffError, match="encoder returned a value that is not finite"):
        maps(TorchChainEngine(broken, SCHEDULE, "cpu", EXACT), windows, "ddpm")
    heavy = random_network(BASE)
    heavy.denoiser.first.weight.mul_(1e9)
    with pytest.raises(CdiffError, match=r"denoiser\.first\.weight does not fit into float16"):
        TorchChainEngine(heavy, SCHEDULE, "cpu", Options(half=True))


def test_a_binding_serves_as_many_rows_and_no_more_slots() -> None:
    engine = TorchChainEngine(random_network(BASE), SCHEDULE, "cpu", EXACT)
    kept = engine.bind(2, 3)
    assert engine.bind(2, 1) is kept
    assert engine.bind(2, 3) is kept
    assert engine.bind(2, 4) is not kept
    assert engine.bind(1, 1).rows == 1


def test_parts_of_a_step_are_timed() -> None:
    engine = TorchChainEngine(random_network(BASE), SCHEDULE, "cpu", EXACT)
    binding = engine.bind(2, 1)
    binding.encode(0, slices(1)[0])
    two = np.arange(2)
    rows = one_slice(two)
    parts = binding.parts(rows, sampler_table("ddpm", SCHEDULE, 2), 0)
    assert set(parts) == {"noise", "denoise", "update", "replay"}
    assert 0 < parts["noise"] < parts["replay"] * 10


def one_slice(run: np.ndarray):  # type: ignore[no-untyped-def]
    from cdiff.runtime.engines.base import Rows

    zeros = np.zeros(len(run), np.int64)
    size = (BASE.image_size, BASE.image_size)
    return Rows(len(run), zeros, zeros, np.zeros((len(run), 2), np.int64), zeros + 1, run, size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(CdiffError, match="sees no GPU; use --device cpu"):
        TorchChainEngine(random_network(BASE), SCHEDULE, "cuda:0")


def test_a_device_that_is_not_one_or_beyond_the_last_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    network = random_network(BASE)
    for count, seen in ((1, "only cuda:0"), (4, "only cuda:0 to cuda:3")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        with pytest.raises(CdiffError, match=rf"device cuda:5: PyTorch .* sees {seen}; use --device cpu"):
            TorchChainEngine(network, SCHEDULE, "cuda:5")
    for device in ("gpu", "cuda:0,cuda:1"):
        with pytest.raises(CdiffError, match=f"device '{device}' is not known; use cpu, cuda or cuda:N"):
            TorchChainEngine(network, SCHEDULE, device)


def test_load_takes_torch_by_name(tiny_bundle) -> None:  # type: ignore[no-untyped-def]
    scan = np.random.default_rng(1).uniform(0, 99, (32, 32)).astype(np.float32)
    options = {"runs": 2, "steps": 4, "sampler": "ddim"}
    by_torch = cdiff.load(tiny_bundle, engine="torch").segment(scan, **options)
    assert by_torch.report["engine"] == "torch"
    np.testing.assert_allclose(by_torch.soft, cdiff.load(tiny_bundle).segment(scan, **options).soft, atol=1e-4)
    with pytest.raises(CdiffError, match="name one"):
        cdiff.load(tiny_bundle, engine="torch", device="cuda:0,cuda:1")


def test_weights_whose_variance_is_not_the_manifests_are_refused() -> None:
    bundle = open_bundle(shipped_bundle())
    wrong = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, variance="learned"))
    with pytest.raises(CdiffError, match="says variance learned, but the denoiser gives no variance"):
        open_torch(wrong, "cpu")


def compiles() -> bool:
    """Whether what Triton compiles with is here; where it is, its failure is one."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and any([os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")])


@pytest.mark.gpu
@pytest.mark.skipif(not compiles(), reason="Triton needs a C compiler and Python's headers: gcc and python3-dev")
@pytest.mark.parametrize("change", [{}, {"resample": "block", "embedding": "scale-shift", "variance": "learned"}])
def test_our_kernels_are_the_networks_own_on_a_gpu(change: dict[str, str]) -> None:
    """One call in half precision, compiled and not interpreted, with the tables of the paper's own width."""
    config = dataclasses.replace(BASE, base_channels=128, groups=32, image_size=32, **change)  # type: ignore[arg-type]
    network = random_network(config)
    engines = [TorchChainEngine(network, SCHEDULE, "cuda:0", Options(fused=fused)) for fused in (True, False)]
    rng = np.random.default_rng(0)
    x, features = rng.normal(size=(5, 1, 32, 32)).astype(np.float32), engines[0].encode(slices(2, 32))
    slot, t, level = np.array([0, 1, 1, 0, 1]), np.array([1, 9, 20, 33, 50]), np.array([1, 2, 3, 1, 2])
    with full_precision():  # TF32 would round as coarsely as half precision
        expected = TorchEngine(network, SCHEDULE, "cuda:0").denoise(x, features.astype(np.float32), slot, t, level)[0]
    ours, plain = (engine.denoise(x, features, slot, t, level)[0] for engine in engines)
    assert np.ptp(expected) > 0.1
    assert np.abs(ours - expected).mean() < 1.5 * np.abs(plain - expected).mean()


@pytest.mark.gpu
def test_replay_gives_what_plain_launches_give() -> None:
    """Over slices of several sizes in turn, whose captures share their memory."""
    network: NetworkConfig = BASE
    engines = [
        TorchChainEngine(random_network(network), SCHEDULE, "cuda:0", Options(half=False, capture=capture))
        for capture in (True, False)
    ]
    for side, sampler in ((16, "ddpm"), (24, "ddpm"), (16, "dpm++2m"), (16, "ddpm"), (24, "ddpm")):
        windows = Framing("centre", (16, 16)).frame(slices(2, side))
        replayed, launched = (maps(engine, windows, sampler) for engine in engines)
        np.testing.assert_allclose(replayed, launched, atol=1e-5)


def test_a_gpu_without_room_is_out_of_memory_and_keeps_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop then halves the batch. The error must not hold the frames, and the tensors in them, of what did not fit."""
    engine = TorchChainEngine(random_network(BASE), SCHEDULE, options=EXACT)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")

    binding = engine.bind(2, 1)
    monkeypatch.setattr(engine, "noise", full)
    calls: list[Callable[[], Any]] = [
        lambda: binding.run_chain(one_slice(np.arange(2)), sampler_table("ddim", SCHEDULE, 2), 0),
        lambda: engine.bind(4, 1),
    ]
    monkeypatch.setattr("cdiff.export.torch_engine.TorchBinding", full)
    for call in calls:
        with pytest.raises(
            OutOfMemory, match=r"ran out of memory on the GPU \(CUDA out of memory. Tried to allocate 20.00 GiB.\)"
        ) as caught:
            call()
        assert caught.value.__context__ is None
    monkeypatch.undo()
    assert engine.bind(1, 1).rows == 1
