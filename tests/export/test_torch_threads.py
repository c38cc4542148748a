"""PyTorch's engine in several threads of a program: what PyTorch keeps once for all of them stays the program's own."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import cdiff
from cdiff.export.torch_engine import Options, TorchChainEngine, algorithms_timed
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.sections import NetworkConfig
from tests.double import in_double
from tests.export.networks import BASE, FLAT, random_network

SCHEDULE, SIZE = NoiseSchedule(BASE.T), BASE.image_size


@pytest.fixture
def double() -> Iterator[None]:
    with in_double():
        yield


def drawn(engine: TorchChainEngine, sampler: str = "ddpm") -> list[np.ndarray[Any, Any]]:
    image = np.random.default_rng(0).normal(size=(1, engine.config.image_channels, SIZE, SIZE)).astype(np.float32)
    windows = Framing("resize", (SIZE, SIZE)).frame(image)
    table = sampler_table(sampler, SCHEDULE, 3)
    return [r.level_means for r in segment_windows(engine, windows, table, levels=1, runs=2, batch=2)]


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(BASE, target="eps", attention_depths=(1,)),
        dataclasses.replace(BASE, variance="learned", target="v", rrdbs=0),
        dataclasses.replace(FLAT, channel_mult=(1, 2), embedding="scale-shift", resample="block"),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_no_step_makes_a_tensor_by_the_default_type_or_changes_it(
    config: NetworkConfig, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread of the program, which computes in double precision meanwhile, found single precision in its own tensors."""
    engine = TorchChainEngine(random_network(config), SCHEDULE, "cpu", Options(half=half))
    samplers = ("ddpm", "dpm++2m")
    plain = [drawn(engine, sampler) for sampler in samplers]
    engine = TorchChainEngine(random_network(config), SCHEDULE, "cpu", Options(half=half))
    types: set[torch.dtype] = set()
    wide: list[str] = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Callable[..., Any], kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            types.add(torch.get_default_dtype())
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                wide.append(str(func))
            return out

    torch.set_default_dtype(torch.float64)
    try:
        with Watched():
            found = [drawn(engine, sampler) for sampler in samplers]
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found, plain)
    assert types == {torch.float64}
    assert wide == []


@pytest.mark.usefixtures("double")
def test_models_that_load_at_once_are_all_single_precision() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            models = list(pool.map(lambda _: cdiff.load(engine="torch"), range(8)))
    finally:
        sys.setswitchinterval(before)
    for model in models:
        engine: Any = model.engine
        assert {p.dtype for p in engine.network.parameters()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float64


def test_cudnns_choice_is_the_programs_again_when_the_last_thread_has_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to come took the first's for the program's, and gave that back for good."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    one, other = algorithms_timed(False), algorithms_timed(False)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not torch.backends.cudnn.benchmark
    other.__exit__(None, None, None)
    assert torch.backends.cudnn.benchmark
