"""What the engine torch holds while it is used for long, and that it goes when the engine does."""

from __future__ import annotations

import dataclasses
import gc
import re
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cdiff
from cdiff.export.torch_chain import MOST_GRAPHS
from cdiff.export.torch_engine import TorchChainEngine
from cdiff.runtime.bundle import shipped_bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.framing import Framing
from tests.export.networks import BASE, random_network
from tests.export.test_torch_engine import EXACT, SCHEDULE, maps


def segment(engine: TorchChainEngine, height: int) -> None:
    maps(engine, Framing("centre", (16, 16)).frame(np.zeros((1, 1, height, 16), np.float32)), "ddim")


def test_an_engines_memory_goes_with_it_and_waits_for_no_garbage_collector() -> None:
    """On a GPU the next model would have no room, and nothing tells the collector so."""
    engine = TorchChainEngine(random_network(BASE), SCHEDULE, "cpu", EXACT)
    segment(engine, 16)
    assert engine._binding is not None
    held = [weakref.ref(engine), weakref.ref(engine._binding), weakref.ref(engine._binding.features)]
    gc.disable()
    try:
        del engine
        assert [one() for one in held] == [None] * 3
    finally:
        gc.enable()


def test_captured_steps_do_not_grow_with_the_sizes_of_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last used stay, the longest unused goes, and the next one shares the memory of one that is still there."""
    made: list[Any] = []

    def captured(step: Callable[[], None], device: str, earlier: Any) -> Any:
        assert (earlier is None) == (not made)
        made.append(SimpleNamespace(replay=lambda: None))
        return made[-1]

    monkeypatch.setattr("cdiff.export.torch_chain.captured", captured)
    engine = TorchChainEngine(random_network(BASE), SCHEDULE, "cpu", EXACT)
    engine.capture = True
    for height in range(16, 16 + MOST_GRAPHS):
        segment(engine, height)
    segment(engine, 16)
    assert len(made) == MOST_GRAPHS
    segment(engine, 100)  # 17 goes
    assert engine._binding is not None
    assert len(engine._binding.graphs) == MOST_GRAPHS
    for height in (16, 18, 100):
        segment(engine, height)
    assert len(made) == MOST_GRAPHS + 1
    segment(engine, 17)
    assert len(made) == MOST_GRAPHS + 2


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore")
BUSY = torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors ...")
UNSTARTED = RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized\n")


@pytest.mark.parametrize("error", [FULL, BUSY, UNSTARTED])
def test_a_gpu_that_takes_no_model_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    """Other programs have filled it or keep it to themselves; or the driver lists it and cannot start it."""

    def refused(module: Any, device: Any) -> Any:
        assert device == "cuda:1"
        raise error

    network = random_network(BASE)
    monkeypatch.setattr("cdiff.export.torch_engine.torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(torch.nn.Module, "to", refused)
    told = re.escape(str(error).splitlines()[0])
    with pytest.raises(CdiffError, match=rf"^PyTorch cannot use cuda:1 \({told}\); end what else uses"):
        TorchChainEngine(network, SCHEDULE, "cuda:1", EXACT)


@pytest.mark.parametrize("error", [FULL, RuntimeError("CUDA error: out of memory\nMore")])
def test_want_of_memory_for_our_kernels_is_not_taken_for_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """Or the model would run on, slower, on a GPU that has no room for it."""

    def refused(device: str) -> Any:
        raise error

    moved = torch.nn.Module.to
    monkeypatch.setattr("cdiff.export.torch_engine.torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: self if a == ("cuda:1",) else moved(self, *a, **k))
    monkeypatch.setitem(sys.modules, "cdiff.export.torch_fused", SimpleNamespace(FusedDenoiser=None))
    monkeypatch.setitem(sys.modules, "cdiff.export.torch_kernels", SimpleNamespace(try_out=refused))
    with pytest.raises(CdiffError, match=r"^PyTorch cannot use cuda:1 \(CUDA .*\); end what else uses"):
        TorchChainEngine(random_network(BASE), SCHEDULE, "cuda:1")


@pytest.mark.parametrize(
    ("words", "full"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_memory_that_cuda_lacks_beside_pytorchs_is_want_of_memory_too(
    monkeypatch: pytest.MonkeyPatch, words: str, full: bool
) -> None:
    """Its own allocator may have taken everything that cuBLAS needs; with fewer rows there is room for both."""
    engine = TorchChainEngine(random_network(BASE), SCHEDULE, "cpu", EXACT)

    def fails(*_: Any) -> Any:
        raise RuntimeError(words)

    monkeypatch.setattr(engine, "predict", fails)
    with pytest.raises(OutOfMemory if full else RuntimeError, match=re.escape(words.splitlines()[0])):
        segment(engine, 16)


def test_the_public_face_opens_torch_on_the_device_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor in place of a GPU would be no error: only slow, and with other last digits."""
    asked: list[Any] = []

    def open_torch(bundle: Any, device: str) -> Any:
        asked.append((bundle.path, device))
        raise CdiffError("so far")

    monkeypatch.setattr("cdiff.export.torch_engine.open_torch", open_torch)
    for device in ("cpu", "cuda:1"):
        with pytest.raises(CdiffError, match="so far"):
            cdiff.load(engine="torch", device=device)
    assert asked == [(shipped_bundle(), "cpu"), (shipped_bundle(), "cuda:1")]


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda:0", torch.float16)])
def test_a_network_in_training_is_copied_and_made_ready_to_run(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype
) -> None:
    """With dropout it would draw other maps each time; and in half precision where that is fast, unless something else is asked for."""
    moved = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: self if a == ("cuda:0",) else moved(self, *a, **k))
    monkeypatch.setattr("cdiff.export.torch_engine.torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(TorchChainEngine, "_fused", lambda self, network: None)
    network = random_network(dataclasses.replace(BASE, dropout=0.5)).train()
    engine: Any = TorchChainEngine(network, SCHEDULE, device)
    assert (engine.dtype, engine.capture) == (dtype, device != "cpu")
    assert next(engine.network.parameters()).dtype == next(engine.encoder.parameters()).dtype == dtype
    assert not any(part.training for part in (*engine.network.modules(), *engine.encoder.modules()))
    assert all(part.training for part in network.modules()), "the caller's own stays as it is"
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
