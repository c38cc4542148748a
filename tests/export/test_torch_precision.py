"""float32 means float32, whatever the program around asked PyTorch for and by which of its two kinds of switches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cdiff.export.torch_chain import full_precision
from cdiff.export.torch_engine import Options, TorchChainEngine
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from tests.export.networks import BASE, random_network

SCHEDULE, SIZE = NoiseSchedule(BASE.T), BASE.image_size
BACKENDS: Any = torch.backends
"""Not every switch is known to mypy."""


def newer() -> dict[str, str]:
    parts = (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv)
    return dict(zip(("products", "convolutions", "products on a CPU", "convolutions on a CPU"), [p.fp32_precision for p in parts], strict=True))  # fmt: skip


def older() -> list[Any]:
    """What the older switches say; None where PyTorch refuses to tell, since the newer ones say otherwise."""

    def told(get: Callable[[], Any]) -> Any:
        try:
            return get()
        except RuntimeError:
            return None

    return [told(get) for get in (torch.get_float32_matmul_precision, lambda: BACKENDS.cuda.matmul.allow_tf32, lambda: BACKENDS.cudnn.allow_tf32)]  # fmt: skip


@pytest.fixture
def as_pytorch_starts() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.fp32_precision = "none"
    for part in (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv):
        part.fp32_precision = "none"


def generic(value: str) -> None:
    BACKENDS.fp32_precision = value


def of_products(value: str) -> None:
    BACKENDS.cuda.matmul.fp32_precision = value


def of_convolutions(value: str) -> None:
    BACKENDS.cudnn.conv.fp32_precision = value


def both(value: str) -> None:
    torch.set_float32_matmul_precision("high")
    generic(value)


@pytest.mark.usefixtures("as_pytorch_starts")
@pytest.mark.parametrize(
    ("ask", "value"),
    [
        (torch.set_float32_matmul_precision, "highest"),
        (torch.set_float32_matmul_precision, "high"),
        (torch.set_float32_matmul_precision, "medium"),
        (generic, "tf32"),
        (generic, "bf16"),
        (of_products, "tf32"),
        (of_convolutions, "ieee"),
        (both, "tf32"),
    ],
)
def test_a_program_that_chose_a_precision_gets_full_precision_and_its_own_back(
    ask: Callable[[str], None], value: str
) -> None:
    ask(value)
    before = newer(), older()
    with full_precision():
        assert set(newer().values()) == {"ieee"}
        assert older()[:2] == ["highest", False]
    assert (newer(), older()) == before


@pytest.mark.parametrize("asked", [True, False])
def test_products_of_float16_add_up_in_float32_though_a_program_chose_float16(asked: bool) -> None:
    """Programs choose float16 for speed, and for all of PyTorch at once; the digits that it costs are ours to keep."""
    products = BACKENDS.cuda.matmul
    before = products.allow_fp16_accumulation
    products.allow_fp16_accumulation = asked
    try:
        with full_precision():
            assert products.allow_fp16_accumulation is False
        assert products.allow_fp16_accumulation is asked
    finally:
        products.allow_fp16_accumulation = before


@pytest.mark.usefixtures("as_pytorch_starts")
def test_what_one_thread_gives_back_another_still_computes_with() -> None:
    """Engines of several GPUs compute in a thread each: what was PyTorch's rounding again when one had done was the other's too."""
    before = newer(), older()
    one, other = full_precision(), full_precision()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert set(newer().values()) == {"ieee"}
    other.__exit__(None, None, None)
    assert (newer(), older()) == before


@pytest.mark.usefixtures("as_pytorch_starts")
@pytest.mark.parametrize(("ask", "value"), [(torch.set_float32_matmul_precision, "high"), (generic, "tf32")])
def test_an_engine_computes_in_full_precision_whatever_a_program_chose(
    ask: Callable[[str], None], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(value)
    engine = TorchChainEngine(network := random_network(BASE), SCHEDULE, "cpu", Options(half=False))
    seen: list[tuple[set[str], Any, bool]] = []
    forward = torch.nn.Conv2d.forward

    def watched(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        seen.append((set(newer().values()), older()[:2], torch.backends.cuda.cudnn_sdp_enabled()))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    windows = Framing("resize", (SIZE, SIZE)).frame(np.zeros((1, 1, SIZE, SIZE), np.float32))
    list(segment_windows(engine, windows, sampler_table("ddim", SCHEDULE, 1), levels=1, runs=1))
    assert len(seen) == sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    assert all(found == ({"ieee"}, ["highest", False], False) for found in seen)  # attention is never left to cuDNN
    assert torch.backends.cuda.cudnn_sdp_enabled()
