"""The runtime's noise (`runtime.sampling.noise`) in PyTorch, so that a chain on a device draws it there: same words, same normals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
"""Philox4x64-10's constants (Salmon et al. 2011, table 2 and section 4.3)."""

HALF = 0xFFFFFFFF


def words(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 64-bit words of Philox4x64-10 with the key (seed, 0), as int64 bit patterns.

    seed and the counter's words are int64 tensors whose shapes broadcast; numbers of 2^63 and above are held as the negative ones with
    the same bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed, torch.zeros_like(seed)
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _signed(WEYL[0]), k1 + _signed(WEYL[1])
    return c0, c1, c2, c3


def normals(
    seed: Tensor,
    slice_: Tensor,
    level: Tensor,
    run: Tensor,
    step: Tensor,
    origin: Tensor,
    size: tuple[int, int],
    canvas: tuple[int, int],
) -> Tensor:
    """Standard normals float32 [B,1,H,W], those that `runtime.sampling.noise.Noise.fill` writes for each row.

    seed and step: int64, one number each, on the device (step -1 is x_T's); slice_, level and run: int64 [B]; origin: int64 [B,2], where
    each row's window of `size` (H, W) begins in the `canvas` (height, width). The words agree bit for bit; the normals up to the last bits
    of log, sin and cos.
    """
    (height, width), stride = size, (canvas[1] + 1) // 2
    whole = size == canvas
    first = origin[:, :1] * stride  # [B,1], the first word of each window's first line
    blocks = -(-(height * stride + (0 if whole else 3)) // 4)
    block = first // 4 + torch.arange(blocks, device=slice_.device) + 1
    level_run = (level << 32) | run
    # [B, blocks, 4] -> [B, words]: the stream from word 4 * (first // 4) on.
    found = torch.broadcast_tensors(*words(seed, (block, step + 1, level_run[:, None], slice_[:, None])))  # type: ignore[no-untyped-call]
    stream = torch.stack(found, dim=-1).flatten(1)
    r = (stream & HALF).float() * 2.0**-32 + 2.0**-33
    r = torch.sqrt(torch.log(r) * -2.0)
    theta = (stream >> 32).float() * (2 * math.pi * 2.0**-32)
    pairs = torch.stack([r * torch.cos(theta), r * torch.sin(theta)], dim=-1).flatten(1)
    if whole:
        return pairs[:, : 2 * height * stride].view(-1, 1, height, 2 * stride)[..., :width]
    lines = torch.arange(height, device=slice_.device)[:, None] * (2 * stride)
    columns = torch.arange(width, device=slice_.device)
    start = 2 * (first % 4) + origin[:, 1:]
    index = start[:, :, None] + (lines + columns)[None]
    return torch.gather(pairs, 1, index.flatten(1)).view(-1, 1, height, width)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of a times b, both read as unsigned: schoolbook in halves, since PyTorch has no uint64 product."""
    a_high, a_low = a >> 32, a & HALF
    b_high, b_low = (b >> 32) & HALF, b & HALF
    low_low, low_high, high_low = a_low * b_low, a_low * b_high, a_high * b_low
    middle = ((low_low >> 32) & HALF) + (low_high & HALF) + high_low
    high = a_high * b_high + ((low_high >> 32) & HALF) + ((middle >> 32) & HALF)
    return high, b * _signed(a)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value
