"""The denoiser with kernels of its own: Triton's interpreter runs them here, and its compiler builds them for the cards."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cdiff.export import torch_engine
from cdiff.export.torch_engine import Options, TorchChainEngine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.sections import NetworkConfig
from tests.export.networks import BASE, random_network

KERNELS, FUSED = "cdiff.export.torch_kernels", "cdiff.export.torch_fused"
ROOT = Path(__file__).parents[2]


@pytest.mark.minutes
def test_what_the_interpreter_says() -> None:
    """The tests of interpreted_kernels.py: sums, moments, GroupNorm, the whole denoiser, chains through the engine."""
    must_interpret()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "tests/export/interpreted_kernels.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def must_interpret() -> None:
    """Skip where Triton's interpreter does not run."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")
    if release(triton.__version__) < (3, 7) and release(np.__version__) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 makes numbers of arrays as NumPy 2.4 no longer does")


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


def test_without_triton_the_engine_warns_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No GPU is needed to ask: the engine is told that it has one until it has chosen."""
    monkeypatch.setitem(sys.modules, KERNELS, None)
    engine = TorchChainEngine(random_network(BASE), NoiseSchedule(BASE.T), "cpu", Options(half=True))
    assert engine.fused is None
    engine.device = "cuda:0"
    assert engine._fused(random_network(BASE)) is None
    assert "going on with PyTorch's own" in caplog.text
    with pytest.raises(CdiffError, match="leave out fused"):
        TorchChainEngine(random_network(BASE), NoiseSchedule(BASE.T), "cpu", Options(fused=True))


@pytest.mark.parametrize("options", [Options(half=False), Options(compiled="default"), Options(channels_last=False)])
def test_who_asked_for_other_ways_gets_them(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine.torch, "compile", lambda module, **_: functools.partial(module))  # type: ignore[attr-defined]
    engine = TorchChainEngine(random_network(BASE), NoiseSchedule(BASE.T), "cpu", dataclasses.replace(options))
    assert isinstance(engine.network, functools.partial) is (options.compiled is not None)
    assert engine.noise is torch_engine.normals, "which PyTorch 2.11, compiling for a processor, made other numbers of"
    engine.device = "cuda:0"
    assert engine._fused(random_network(BASE)) is None


def test_a_skip_over_two_sources_is_summed_where_its_first_part_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy would be two more passes over a map at full size."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")
    fused, kernels = importlib.import_module(FUSED), importlib.import_module(KERNELS)
    denoiser = random_network(BASE).denoiser
    skip: Any = denoiser.up[0][0].block.skip  # type: ignore[index, union-attr]
    widths = (skip.in_channels - 4, 4)
    x = [torch.randn(2, width, 3, 5).contiguous(memory_format=torch.channels_last) for width in widths]
    made, plain = [], torch.nn.functional.conv2d
    monkeypatch.setattr(fused.nnf, "conv2d", lambda *args: made.append(plain(*args)) or made[-1])
    conv = fused._Conv(skip, fused.FusedDenoiser(denoiser, "cpu", torch.float32))
    with torch.inference_mode():
        found = conv.of_several(tuple(kernels.Features(one, one, one) for one in x))
        assert found.data_ptr() == made[0].data_ptr()
        expected = plain(torch.cat(x, dim=1), skip.weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "dtype"), [(16, torch.float16), (12, torch.float16), (4, torch.float32), (5, torch.float32)]
)
def test_pixels_are_doubled_as_pytorch_does(channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever the bits are; and without its kernel, which is slow on a GPU for maps that are channels last."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")
    x = torch.randn(2, channels, 3, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[0, 1, 0, 0] = torch.nan, torch.inf
    bits = torch.int16 if dtype == torch.float16 else torch.int32
    expected = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    monkeypatch.setattr(torch.nn.functional, "interpolate", None)
    found = importlib.import_module(FUSED).doubled(x)
    assert torch.equal(found.view(bits), expected.view(bits))
    assert found.is_contiguous(memory_format=torch.channels_last)
    launches(dataclasses.replace(BASE, resample="block" if channels == 16 else "convolution"), monkeypatch)


class Recorder:
    """Stands where a kernel does and keeps what it was launched with."""

    def __init__(self, kernel: Any, calls: list[Any]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **named: self.calls.append((self.kernel, arguments, named))


def launches(network: NetworkConfig, patch: pytest.MonkeyPatch) -> list[Any]:
    """Every kernel with every set of constants that one step launches, once each."""
    module, calls = importlib.import_module(KERNELS), []  # type: ignore[var-annotated]
    for name in ("_measure", "_weigh", "_apply", "_give", "_draw"):
        patch.setattr(module, name, Recorder(getattr(module, name), calls))
    denoiser = random_network(network).denoiser
    made = importlib.import_module(FUSED).FusedDenoiser(denoiser, "cpu")
    side = network.image_size
    zeros = torch.zeros(1, dtype=torch.int64)
    maps = torch.zeros(1, side, side, network.base_channels, dtype=torch.float16)
    made(torch.zeros(1, 1, side, side), maps, zeros, zeros + 1, zeros + 1)
    module.drawn(*[zeros] * 5, torch.zeros(1, 2, dtype=torch.int64), (side, side), (side, side))
    kinds = {
        (kernel.fn.__name__, tuple(_kind(a) for a in args), tuple(sorted(named.items()))): (kernel, args, named)
        for kernel, args, named in calls
    }
    return list(kinds.values())


def test_no_feature_map_is_turned_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one channel a tensor is of both orders at once, and PyTorch then takes the other one."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")
    made, plain = [], torch.nn.functional.conv2d
    monkeypatch.setattr(
        importlib.import_module(FUSED).nnf, "conv2d", lambda *args: made.append(plain(*args)) or made[-1]
    )
    launches(BASE, monkeypatch)
    assert len(made) > 10
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in made)


def _kind(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return {torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def _even(argument: Any) -> bool:
    return argument % 16 == 0 if isinstance(argument, int) else isinstance(argument, Tensor)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_every_launch_compiles_for_the_cards_without_spilling(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the paper's widths ask for them, up to 1024 channels side by side; ptxas counts the registers that did not suffice."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    wide = NetworkConfig(
        image_size=16, channel_mult=(1, 2, 4), attention_depths=(2,), residual_blocks=1, rrdbs=0, groups=32
    )
    found = launches(wide, monkeypatch)
    assert len(found) > 10
    ptxas = get_ptxas(capability).path  # which of its two is for which card changes from version to version
    for number, (kernel, arguments, named) in enumerate(found):
        named = dict(named)
        options = {name: named.pop(name) for name in ("num_warps", "enable_fp_fusion") if name in named}
        assert "enable_fp_fusion" in options  # unless said, it depends on Triton's version and warns
        # As a launch specialises it: a number that is 1 is a constant; addresses from PyTorch's allocator, and numbers that 16 divides, allow loads
        # of 16 bytes.
        ones = {name: 1 for name, a in zip(kernel.arg_names, arguments, strict=False) if isinstance(a, int) and a == 1}
        named |= ones
        signature = dict(zip(kernel.arg_names, map(_kind, arguments), strict=False)) | dict.fromkeys(named, "constexpr")
        attrs = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(arguments) if _even(a)}
        made = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=named, attrs=attrs),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4} | options,
        )
        assert made.metadata.shared <= 48 * 1024
        if kernel.fn.__name__ in ("_measure", "_apply", "_give"):
            assert "ld.global.v4.b32" in made.asm["ptx"]
            assert not re.search(r"st\.global\.[ub]16", made.asm["ptx"])
        file = tmp_path / f"{number}.ptx"
        file.write_text(made.asm["ptx"])
        target = re.findall(r"\.target (\w+)", made.asm["ptx"])[0]
        said = subprocess.run(
            [ptxas, "-v", f"-arch={target}", file, "-o", tmp_path / "x"], capture_output=True, text=True, check=True
        )
        assert "0 bytes spill stores, 0 bytes spill loads" in said.stderr, said.stderr
