"""Which device, precision and place among the others a process takes; no process is started for that."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_fabric.plugins import MixedPrecision

from cdiff.runtime.errors import CdiffError
from cdiff.train.fabric import PRECISIONS, FailedElsewhere, _blame, _precision, fabric_on, find_device, settle

CPU = torch.device("cpu")


def one_of(world: int, local: int = 0) -> Any:
    """Fabric's face in the last of so many processes, which is number `local` on its machine."""
    return SimpleNamespace(world_size=world, local_rank=local, global_rank=world - 1, is_global_zero=world == 1)


@pytest.mark.parametrize(
    ("name", "world", "gpus", "takes"),
    [
        ("cpu", 1, 2, "cpu"),
        ("auto", 1, 0, "cpu"),
        ("auto", 1, 1, "cuda:0"),
        ("cuda", 1, 2, "cuda:0"),
        ("cuda:1", 1, 2, "cuda:1"),
        ("cuda:2", 1, 2, "--device cuda:2: PyTorch sees cuda:0 to cuda:1"),
        ("cpu", 4, 2, "cpu"),
        ("auto", 4, 2, "cuda:1"),
        ("cuda", 4, 2, "cuda:1"),
        ("cuda:1", 4, 2, "--device cuda:1: each process takes the GPU of its own number; use --device cuda"),
        ("cuda", 4, 1, r"process 3 of 4 on .* needs cuda:1, but PyTorch sees only cuda:0; start one process per GPU"),
        ("cuda", 4, 0, "--device cuda: PyTorch sees no CUDA device here"),
    ],
)
def test_the_device_is_the_one_asked_for_and_among_several_processes_that_of_their_number(
    name: str, world: int, gpus: int, takes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    tried: list[torch.device] = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: tried.append(device))
    fabric = one_of(world, local=int(world > 1))
    if " " in takes:
        with pytest.raises(CdiffError, match=takes):
            find_device(name, fabric)
    else:
        assert find_device(name, fabric) == torch.device(takes)
        assert tried == [torch.device(takes)] * (takes != "cpu"), "a GPU that takes nothing is told at once"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors ..."),
        RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized\n"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nMore"),
    ],
)
def test_a_gpu_that_takes_nothing_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    """Others keep it to themselves or have filled it, or it does not start: no training, and no traceback."""

    def refused(*size: int, device: torch.device) -> Any:
        raise error

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", refused)
    with pytest.raises(CdiffError, match=r"^PyTorch cannot use cuda:1 \(.*\); end what else uses that GPU") as caught:
        find_device("cuda:1", one_of(1))
    assert str(error).splitlines()[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_amp_auto_is_bf16_where_a_gpu_has_it_and_float32_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards that only emulate bf16 would train slower with it."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for device, has, precision in (("cuda", True, "mixed bf16"), ("cuda", False, "float32"), ("cpu", True, "float32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: including_emulation or has
        )
        assert PRECISIONS[_precision("auto", torch.device(device)).precision] == precision
    assert PRECISIONS[_precision("off", torch.device("cuda")).precision] == "float32"
    half = _precision("bf16", CPU)
    assert isinstance(half, MixedPrecision)
    assert half.scaler is None, "its gradients do not underflow"
    scaled = _precision("fp16", CPU)
    assert isinstance(scaled, MixedPrecision)
    assert scaled.scaler is not None


@pytest.mark.parametrize(("world", "here", "machines"), [(2, None, 1), (4, 4, 1), (4, 2, 2), (6, 2, 3)])
def test_processes_are_counted_by_machine(
    world: int, here: int | None, machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", world), ("RANK", 0), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    strategy: Any = fabric_on(CPU).strategy
    assert (strategy.num_nodes, strategy.num_processes) == (machines, here or world)


def test_processes_that_are_spread_unevenly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(CdiffError, match=r"^2 of 3 processes run on .*; start the same number on every machine$"):
        fabric_on(CPU)


def test_all_go_by_the_first_one_s_clock_and_stop_when_any_is_asked_to() -> None:
    for first, others, asked, stops in ((True, 0.0, 0.0, False), (True, 0.0, 1.0, True), (False, 7.5, 0.0, True)):
        fabric: Any = SimpleNamespace(
            is_global_zero=first, all_reduce=lambda told, reduce_op, more=(others, asked): told + torch.tensor(more)
        )
        assert settle(fabric, 3.25, asked=not first) == (3.25 if first else 7.5, stops)


def test_of_the_processes_that_end_the_first_alone_says_why() -> None:
    """And a connection that was lost is told as that, whichever of PyTorch's errors it is."""
    asked: list[str] = []

    def store(answer: int | None) -> Any:
        def add(key: str, number: int) -> int:
            asked.append(key)
            if answer is None:
                raise RuntimeError("Connection reset by peer")
            return answer

        return SimpleNamespace(add=add)

    error = ValueError("what went wrong")
    assert _blame(error, one_of(2), store(1)) is error
    assert isinstance(_blame(error, one_of(2), store(2)), FailedElsewhere)
    assert _blame(error, one_of(2), store(None)) is error, "with the store gone, nobody else may be left to speak"
    assert asked == ["cdiff-failed-0"] * 3
    assert isinstance(_blame(FailedElsewhere(), one_of(2), store(1)), FailedElsewhere)
    assert len(asked) == 3, "or the one that knows why would be silent"
    for lost in (dist.DistBackendError("NCCL error"), RuntimeError("[/third_party/Gloo/pair.cc] Connection closed")):
        assert "process 1 of 2 on " in str(told := _blame(lost, one_of(2), store(1)))
        assert isinstance(told, CdiffError)
        assert "lost its connection to another process" in str(told)
