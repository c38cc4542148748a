"""What Triton's interpreter says of the kernels between the denoiser's convolutions; run by test_torch_fused.py in a process of its own.

Triton is interpreted or compiled as TRITON_INTERPRET says when it is first imported.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from cdiff.export import torch_kernels as kernels
from cdiff.export.reference import TorchEngine
from cdiff.export.torch_engine import Options, TorchChainEngine, half_precision
from cdiff.export.torch_fused import FusedDenoiser
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.noise import normal
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from tests.export.networks import BASE, random_network

LAST = torch.channels_last
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale-shift": {"embedding": "scale-shift"},
    "block": {"resample": "block", "embedding": "scale-shift", "variance": "learned"},
    "ensemble": {"variant": "implicit-ensemble", "rrdbs": 0, "levels": 1, "head_channels": 4},
    "uneven": {"channel_mult": (2, 1, 3), "groups": 8, "attention_depths": (1,)},
}


def features(shape: tuple[int, ...], mean: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3 + mean).to(dtype).contiguous(memory_format=LAST)


@pytest.mark.parametrize("shape", [(2, 32, 8, 8), (3, 12, 7, 5), (1, 5, 1, 1), (2, 128, 36, 36)])
@pytest.mark.parametrize("act", [True, False])
def test_a_sum_and_its_groupnorm_are_pytorchs_in_float64(shape: tuple[int, ...], act: bool) -> None:
    """Odd sizes, one pixel, several chunks; what is added goes in before, each row's own."""
    B, C = shape[:2]
    groups = next(g for g in (32, 4, 1) if C % g == 0)
    x, y = features(shape, seed=1), features(shape, seed=2)
    bias, added, gain, offset = (
        torch.randn(size, generator=torch.Generator().manual_seed(3)) for size in ((C,), (B, C), (C,), (C,))
    )
    whole = kernels.joined(x, y, bias)
    torch.testing.assert_close(whole.x, x + y + bias[:, None, None], rtol=0, atol=2e-6)
    found = kernels.normed((whole,), groups, gain, offset, eps=1e-5, act=act, added=added)
    expected = nnf.group_norm(whole.x.double() + added[..., None, None], groups, gain.double(), offset.double(), 1e-5)
    torch.testing.assert_close(found.double(), nnf.silu(expected) if act else expected, rtol=1e-5, atol=2e-5)
    assert found.is_contiguous(memory_format=LAST)


def test_a_bias_alone_is_added_in_the_pass_that_measures() -> None:
    x, bias = features((2, 12, 7, 5), seed=1), torch.arange(12.0)
    found = kernels.joined(x, None, bias)
    torch.testing.assert_close(found.x, x + bias[:, None, None], rtol=0, atol=2e-6)
    torch.testing.assert_close(found.mean[:, 0], found.x.mean(dim=(2, 3)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 32, 9, 6), (3, 12, 7, 5), (1, 5, 1, 1), (1, 128, 36, 36)])
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_last_convolution_is_pytorchs_in_float64(shape: tuple[int, ...], outputs: int) -> None:
    """Lines of odd length and a single pixel: a neighbour beyond the border gives nothing, and none comes from the next line."""
    C = shape[1]
    generator = torch.Generator().manual_seed(3)
    gain, offset, bias = (torch.randn(size, generator=generator) for size in (C, C, outputs))
    weight = torch.randn((outputs, C, 3, 3), generator=generator)
    groups = next(g for g in (32, 4, 1) if C % g == 0)
    x = features(shape, seed=1)
    found = kernels.normed_conv(kernels.measured(x), groups, gain, offset, weight, bias, eps=1e-5)
    active = nnf.silu(nnf.group_norm(x.double(), groups, gain.double(), offset.double(), 1e-5))
    torch.testing.assert_close(
        found.double(), nnf.conv2d(active, weight.double(), bias.double(), padding=1), rtol=1e-5, atol=2e-4
    )


@pytest.mark.parametrize("shape", [(2, 32, 9, 6), (3, 12, 7, 5), (1, 5, 1, 1), (2, 16, 36, 36)])
def test_the_first_convolution_is_pytorchs_in_float64(shape: tuple[int, ...]) -> None:
    """Odd lines, a single pixel, several chunks; each row sees the features of its slot, and the map is channels last as it comes."""
    B, C, height, width = shape
    generator = torch.Generator().manual_seed(3)
    x, weight, bias, maps = (
        torch.randn(size, generator=generator)
        for size in ((B, 1, height, width), (C, 1, 3, 3), (C,), (2, height, width, C))
    )
    slot = torch.arange(B) % 2
    found = kernels.begun(x, weight.flatten(1).t().contiguous(), maps, bias, slot)
    expected = nnf.conv2d(x.double(), weight.double(), bias.double(), padding=1) + maps[slot].permute(0, 3, 1, 2)
    torch.testing.assert_close(found.x.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.x.is_contiguous(memory_format=LAST)
    moments = kernels.measured(found.x)
    torch.testing.assert_close(found.mean, moments.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.m2, moments.m2, rtol=1e-4, atol=1e-4)


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    """A sum of squares about 0 would lose it: of 1024 squared float32's last digit is a hundredth of the variance."""
    x = features((2, 8, 24, 24), mean=1024.0)
    found = kernels.normed((kernels.measured(x),), 4, torch.ones(8), torch.zeros(8), eps=1e-5, act=False)
    torch.testing.assert_close(found.double(), nnf.group_norm(x.double(), 4, eps=1e-5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_what_keeps_the_variance_from_zero_counts_where_a_group_hardly_varies(eps: float) -> None:
    x, ones, weight = features((2, 8, 6, 5)) / 1000, torch.ones(8), torch.ones(1, 8, 3, 3)
    expected = nnf.group_norm(x.double(), 4, eps=eps)
    found = kernels.normed((kernels.measured(x),), 4, ones, torch.zeros(8), eps=eps, act=False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    ended = kernels.normed_conv(kernels.measured(x), 4, ones, torch.zeros(8), weight, torch.zeros(1), eps=eps)
    plain = nnf.conv2d(nnf.silu(expected), weight.double(), padding=1)
    torch.testing.assert_close(ended.double(), plain, rtol=1e-4, atol=1e-4)


def test_sources_side_by_side_are_their_concatenation() -> None:
    """Groups of 5 channels that reach over the seam, and each row its own gain and offset, cut out of a wider table."""
    x, y = features((2, 7, 6, 9), seed=1), features((2, 8, 6, 9), seed=2, mean=9)
    table = torch.randn((2, 40), generator=torch.Generator().manual_seed(3))
    gain, offset = table[:, 3:18], table[:, 20:35]
    found = kernels.normed((kernels.measured(x), kernels.measured(y)), 3, gain, offset, eps=1e-5, act=True)
    plain = nnf.group_norm(torch.cat([x, y], dim=1).double(), 3, eps=1e-5)
    expected = nnf.silu(plain * gain.double()[..., None, None] + offset.double()[..., None, None])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match="different sizes"):
        kernels.normed((kernels.measured(x), kernels.measured(y[..., :5])), 3, gain, offset, eps=1e-5, act=True)


def test_a_row_does_not_depend_on_the_others() -> None:
    """Bit for bit: rows are batched in any number, and moments are of what was written, not of what was added up."""
    x, y = features((5, 16, 12, 12), dtype=torch.float16), features((5, 16, 12, 12), seed=2, dtype=torch.float16)
    maps = torch.stack([y[3], y[1], y[0]]).permute(0, 2, 3, 1).contiguous()
    slot = torch.tensor([2, 1, 0, 0, 1])
    image, taps = x[:, :1].float().contiguous(), x.reshape(-1, 16)[:9].float()
    many = kernels.begun(image, taps, maps, torch.ones(16), slot)
    alone = kernels.begun(image[3:4], taps, y[3].permute(1, 2, 0).contiguous()[None], torch.ones(16), slot[2:3])
    assert torch.equal(many.x[3:4], alone.x)
    assert torch.equal(many.mean[3:4], alone.mean)
    many = kernels.joined(x, y, torch.ones(16))
    one = kernels.joined(x[3:4], y[3:4], torch.ones(16))
    assert torch.equal(many.x[3:4], one.x)
    assert torch.equal(many.mean[3:4], one.mean)
    chunk = one.x[0].flatten(1)[:, :64].double()
    torch.testing.assert_close(one.mean[0, 0].double(), chunk.mean(dim=1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.m2[0, 0].double(), chunk.var(dim=1, correction=0) * 64, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [9, 2**63 + 7])
@pytest.mark.parametrize(
    ("size", "canvas", "origins"),
    [((8, 8), (8, 8), [(0, 0)] * 3), ((7, 5), (7, 5), [(0, 0)] * 3), ((8, 9), (33, 31), [(0, 0), (5, 7), (25, 22)])],
    ids=["even", "odd", "tiles"],
)
def test_the_noise_is_the_runtimes(
    seed: int, size: tuple[int, int], canvas: tuple[int, int], origins: list[tuple[int, int]]
) -> None:
    slices, levels, runs = [0, 5, 2**40], [1, 2, 4], [0, 24, 3]
    numbers = [torch.tensor(values) for values in ([seed - 2**64 if seed >> 63 else seed], slices, levels, runs)]
    for step in (-1, 7):
        found = kernels.drawn(*numbers, torch.tensor([step]), torch.tensor(origins), size, canvas)
        assert found.shape == (3, 1, *size)
        for row in range(3):
            top, left = origins[row]
            expected = normal(seed, slices[row], levels[row], runs[row], step, canvas)[
                top : top + size[0], left : left + size[1]
            ]
            np.testing.assert_allclose(found[row, 0].numpy(), expected, atol=1e-6, rtol=0)


def test_trying_out_notices_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.try_out("cpu")
    monkeypatch.setattr(kernels, "normals", lambda *arguments: torch.zeros(1))
    with pytest.raises(RuntimeError, match="wrong numbers"):
        kernels.try_out("cpu")


@pytest.mark.parametrize("last_bits", [-2, -1, 1, 2])
def test_trying_out_takes_no_cards_rounding_for_wrong_numbers(monkeypatch: pytest.MonkeyPatch, last_bits: int) -> None:
    """A card's quotients are a bit or two off, and a product and the sum that it goes into are rounded once: the interpreter does neither."""

    exact: dict[int, tuple[Any, Any]] = {}  # of each product, which is kept beside it or another would get its number

    def quotient(self: Any, a: Any, b: Any) -> Any:
        found = self.binary_op(a, b, np.divide)
        found.data = found.data * np.float32(1 + last_bits * 2.0**-23)
        return found

    def product(self: Any, a: Any, b: Any) -> Any:
        found = self.binary_op(a, b, np.multiply)
        exact[id(found)] = found, a.data.astype(np.float64) * b.data
        return found

    def sum_(self: Any, a: Any, b: Any) -> Any:
        found = self.binary_op(a, b, np.add)
        left, right = (exact.get(id(one), (one, one.data))[1] for one in (a, b))
        found.data = (left + right).astype(found.data.dtype)
        return found

    kernels.try_out("cpu")
    for name, fused in (("create_fdiv", quotient), ("create_fmul", product), ("create_fadd", sum_)):
        monkeypatch.setattr(InterpreterBuilder, name, fused)
    kernels.try_out("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_is_the_networks_own(kind: str) -> None:
    """float32: equal to rounding. float16: no further from float32 than PyTorch's own half precision."""
    config = dataclasses.replace(BASE, **KINDS[kind])
    network = random_network(config)
    generator = torch.Generator().manual_seed(1)
    x, maps = (torch.randn(shape, generator=generator) for shape in ((2, 1, 16, 16), (2, 16, 16, config.base_channels)))
    slot, t = torch.tensor([1, 0]), torch.tensor([1, config.T])
    level = torch.tensor([min(2, config.conditions), config.conditions])
    seen = maps[slot].permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = network.denoiser(x, seen, t, level)
        exact = FusedDenoiser(network.denoiser, "cpu", torch.float32)(x, maps, slot, t, level)
        half = FusedDenoiser(network.denoiser, "cpu")(x, maps.half(), slot, t, level)
        plain = half_precision(network).denoiser(x.half(), seen.half(), t, level)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(exact, expected, rtol=0, atol=2e-6)
    assert (half - expected).abs().mean() < 1.1 * (plain - expected).abs().mean()


def test_chains_through_the_engine() -> None:
    network, schedule = random_network(BASE), NoiseSchedule(BASE.T)
    images = np.random.default_rng(4).uniform(-1, 1, (1, 1, 16, 16)).astype(np.float32)
    windows, table = Framing("resize", (16, 16)).frame(images), sampler_table("ddpm", schedule, 2)
    engines = [
        TorchEngine(network, schedule),
        TorchChainEngine(network, schedule, "cpu", Options(half=False, fused=True)),
    ]
    expected, found = (
        np.stack([one.level_means for one in segment_windows(engine, windows, table, levels=3, runs=1, batch=2)])
        for engine in engines
    )
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5)
