"""What runs on the emulated GPU, in a process of its own: the engine `torch` with its captured steps, and the training."""

from __future__ import annotations

import dataclasses
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdiff.export.torch_engine import Options, TorchChainEngine
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing, Windows
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.learner import Learner
from cdiff.train.presets import preset
from cdiff.train.sections import NetworkConfig
from cdiff.train.trainer import train
from tests.emulated_gpu.cuda import REPLAYS, Graph
from tests.emulated_gpu.cuda import captured as capture
from tests.emulated_gpu.tensors import CROSSINGS, MEMORY
from tests.export.networks import BASE, FLAT, random_network
from tests.synthetic import write_synthetic_dataset

GPU = "cuda:0"
SMALL = {"channel_mult": (1,), "attention_depths": (), "rrdbs": 1, "image_size": 16}
LEARNED = dataclasses.replace(BASE, variance="learned", embedding="scale-shift")


def windows(framing: str, shape: tuple[int, int, int], seed: int = 4) -> Windows:
    images = np.random.default_rng(seed).uniform(-1, 1, (shape[0], 1, *shape[1:])).astype(np.float32)
    return Framing(framing, (16, 16)).frame(images)


def maps(engine: TorchChainEngine, framed: Windows, kind: str, steps: int = 2) -> Any:
    table = sampler_table(kind, NoiseSchedule(BASE.T), steps)
    found = segment_windows(engine, framed, table, levels=BASE.levels, runs=1, seed=3, batch=4)
    return np.stack([one.level_means for one in found])


@pytest.mark.parametrize(
    ("network", "half"), [(dataclasses.replace(FLAT, rrdbs=1), True), (LEARNED, False)], ids=["half", "learned"]
)
def test_replayed_steps_are_the_processors(network: NetworkConfig, half: bool) -> None:
    """Of scans of several slices and sizes, by one binding: every replay reads memory that is there, and all of it on the GPU."""
    weights, schedule, replays = random_network(network), NoiseSchedule(network.T), len(REPLAYS)
    engines = [TorchChainEngine(weights, schedule, device, Options(half=half, fused=False)) for device in (GPU, "cpu")]
    for framed, sampler in ((windows("resize", (2, 16, 16)), "ddpm"), (windows("tile", (1, 16, 21), seed=5), "ddim")):
        found, expected = (maps(engine, framed, sampler) for engine in engines)
        assert np.ptp(expected) > 0.1
        if half:  # each rounds in another order
            assert np.abs(found - expected).mean() < 2e-3
        else:
            np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len(REPLAYS) > replays
    assert all(weight.device == torch.device(GPU) for weight in engines[0].graph.parameters())


def test_replayed_steps_are_those_launched_plainly() -> None:
    network, schedule = random_network(FLAT), NoiseSchedule(FLAT.T)
    framed = windows("resize", (1, 16, 16))
    found = [
        maps(TorchChainEngine(network, schedule, GPU, Options(capture=capture, fused=False)), framed, "ddpm")
        for capture in (True, False)
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="a run of its own interprets our kernels: it takes minutes"
)
def test_replayed_steps_of_our_kernels_are_the_processors() -> None:
    """As the engine is on a GPU unless told otherwise: float16, our kernels between the convolutions and for the noise, captured."""
    weights, schedule, framed = random_network(FLAT), NoiseSchedule(FLAT.T), windows("resize", (1, 16, 16))
    engine = TorchChainEngine(weights, schedule, GPU)
    assert engine.fused is not None
    assert engine.options.half
    found = maps(engine, framed, "ddpm")
    expected = maps(TorchChainEngine(weights, schedule, "cpu", Options(half=False)), framed, "ddpm")
    assert len(REPLAYS) == 2
    assert np.ptp(expected) > 0.1
    assert np.abs(found - expected).mean() < 2e-3


def test_a_chain_waits_for_the_gpu_once() -> None:
    """After its steps, for their result; whatever their number."""
    engine = TorchChainEngine(random_network(FLAT), NoiseSchedule(FLAT.T), GPU, Options(fused=False))
    framed, waits = windows("resize", (1, 16, 16)), []
    maps(engine, framed, "ddpm", 2)  # captures
    for steps in (2, 5):
        CROSSINGS.clear()
        maps(engine, framed, "ddpm", steps)
        waits.append(list(CROSSINGS))
    assert waits[0] == waits[1]


def test_a_capture_that_finds_no_room_gives_back_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: a smaller batch is tried next, and the garbage collector comes when it likes."""
    engine = TorchChainEngine(random_network(FLAT), NoiseSchedule(FLAT.T), GPU, Options(fused=False))
    framed = windows("resize", (1, 16, 16))
    engine.capture = False
    gc.collect()
    monkeypatch.setattr(MEMORY, "limit", 2**40)
    maps(engine, framed, "ddpm")
    engine.capture, before = True, MEMORY.now()
    monkeypatch.setattr(MEMORY, "limit", MEMORY.peak)  # here a capture needs more: it uses none of its memory twice
    gc.disable()
    try:
        with pytest.raises(OutOfMemory, match="ran out of memory on the GPU"):
            maps(engine, framed, "ddpm")
        assert MEMORY.now() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "setting",
    [{"amp": "off", "checkpointing": True, "accumulate": 2}, {"amp": "fp16"}],
    ids=["float32", "fp16"],
)
def test_a_training_is_the_processors_and_waits_once_a_step(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a resumed one: were AdamW's counts of steps on the GPU, every step would wait for each of them."""
    data = write_synthetic_dataset(tmp_path / "data", {"Training": 2, "Validation": 1}, raters=3, shape=(20, 20, 2))
    config = preset("tiny").with_values({"steps": 3, "val_every": 3, "log_every": 1, **SMALL, **setting})
    waits, step = [], Learner.step

    def counted(self: Learner, *args: Any) -> tuple[float, float]:
        CROSSINGS.clear()
        try:
            return step(self, *args)
        finally:
            waits.append(len(CROSSINGS))

    results = []
    for device in ("cuda", "cpu"):
        waits.clear()
        monkeypatch.setattr(Learner, "step", counted)
        run = tmp_path / device
        train(config, data, run, device=device, quiet=True, max_steps=2)
        results.append(train(config, data, run, device=device, quiet=True, resume=True))
        if device == "cuda":
            # fp16's scaler asks whether a gradient overflowed, and after one that did for the new scale.
            most = 3 if setting["amp"] == "fp16" else 1
            assert len(waits) == 3
            assert max(waits) <= most
    on_gpu, on_cpu = results
    assert on_gpu.step == on_cpu.step == 3
    close = 1e-5 if setting["amp"] == "off" else 2e-3
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=close)
    assert on_gpu.best == pytest.approx(on_cpu.best, rel=10 * close)


def test_the_emulated_gpu_refuses_what_a_gpu_refuses() -> None:
    x = torch.ones(3, device=GPU)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="cuda:0"):
        np.asarray(x)
    for waits in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x.copy_(torch.zeros(3)), lambda: x[x > 0]):
        with capture(Graph()), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            waits()
        waits()


def test_an_emulated_capture_computes_nothing_and_replays_on_the_same_memory() -> None:
    x, total, graph = torch.ones(3, device=GPU), torch.zeros(3, device=GPU), Graph()
    with capture(graph):
        y = x * 2
        total.add_(y)
    assert total.tolist() == [0, 0, 0]
    assert np.isnan(y.tolist()).all()
    x.fill_(5)
    graph.replay()
    graph.replay()
    assert y.tolist() == [10, 10, 10]
    assert total.tolist() == [20, 20, 20]


def test_an_emulated_replay_over_freed_memory_is_an_error() -> None:
    x, total, graph = torch.ones(3, device=GPU), torch.zeros(3, device=GPU), Graph()
    with capture(graph):
        total.add_(x)
    graph.replay()
    del x
    with pytest.raises(RuntimeError, match="memory that was freed"):
        graph.replay()
