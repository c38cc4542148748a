"""Triton kernels for what lies between the convolutions: moments, GroupNorm with SiLU, residual sums, all channels last; the first
and the last convolution; and the noise.

PyTorch's GroupNorm returns channels-last features in the other order, so that each of its calls on a GPU costs two transpositions;
SiLU, the embedding, the bias and the residual sum cost a pass each. Here a feature map is read once for its moments, where possible in
the pass that makes it, and read and written once to be normalised.

Moments and sums are float32, merged without cancellation (Chan, Golub & LeVeque 1983, eq. 2.1) in the same order whatever the batch:
a row's result does not depend on the others. Importing this module needs Triton, which comes with PyTorch's CUDA builds for Linux.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
import triton
import triton.language as tl
from torch import Tensor

from cdiff.export.torch_noise import MULTIPLIERS, ROUNDS, WEYL, normals

ELEMENTS = 4096
"""Size of a program's tile, pixels x channels. An image's tiles lie along the grid's first axis, the only one that may exceed 65,535."""
MOST_CHUNKS = 64
"""Most parts that a row's pixels are divided into, each with moments of its own."""
FUSION = {"enable_fp_fusion": True}
"""A product and a sum in one rounding: given with every launch, since Triton's default depends on its version and the environment."""


@triton.jit
def _measure(
    x, other, bias, slot, image, taps, out, mean, m2, pixels, channels, chunk, width,
    SUM: tl.constexpr, OTHER: tl.constexpr, FIRST: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Moments of one chunk of a row's pixels, per channel; with SUM, of x + other (with OTHER) + bias (with BIAS), also written to `out`.

    x, other, out [B,pixels,channels]; bias [channels]. FIRST: x is [S,pixels,channels], read at slot [B], and the 3x3 convolution of
    image [B,pixels], lines of `width`, with taps [9,channels] is added to it. mean, m2 [B,chunks,channels]: the mean, and the sum of
    squared differences from it.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, WIDE)
    which = tl.load(slot + row) if FIRST else row
    here = x + which.to(tl.int64) * pixels * channels
    there = other
    if OTHER:
        there = other + row.to(tl.int64) * pixels * channels
    # Differences from the chunk's first pixel: squares of the values themselves would cancel where the mean is large.
    first = part * chunk
    near = tl.load(here + first * channels + c, mask=c < channels, other=0.0).to(tl.float32)
    added = tl.zeros((WIDE,), tl.float32)
    if BIAS:
        added = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    if OTHER:
        near += tl.load(there + first * channels + c, mask=c < channels, other=0.0).to(tl.float32)
    near += added
    sums = tl.zeros((TILE, WIDE), tl.float32)
    squares = tl.zeros((TILE, WIDE), tl.float32)
    last = tl.minimum(first + chunk, pixels)
    for start in range(first, last, TILE):
        pixel = start + tl.arange(0, TILE)
        at = pixel[:, None] * channels + c[None, :]
        inside = (pixel[:, None] < last) & (c[None, :] < channels)
        value = tl.load(here + at, mask=inside, other=0.0)
        if SUM:
            whole = value.to(tl.float32)
            if OTHER:
                whole += tl.load(there + at, mask=inside, other=0.0).to(tl.float32)
            if FIRST:
                for tap in range(9):
                    line, column = pixel + (tap // 3 - 1) * width, pixel % width + tap % 3 - 1
                    seen = (line >= 0) & (line < pixels) & (column >= 0) & (column < width)
                    one = tl.load(image + row * pixels + line + tap % 3 - 1, mask=seen & (pixel < last), other=0.0)
                    whole += one[:, None] * tl.load(taps + tap * channels + c, mask=c < channels, other=0.0)[None, :]
            value = (whole + added[None, :]).to(out.dtype.element_ty)
            tl.store(out + row.to(tl.int64) * pixels * channels + at, value, mask=inside)
        apart = tl.where(inside, value.to(tl.float32) - near[None, :], 0.0)
        sums += apart
        squares += apart * apart
    count = (last - first).to(tl.float32)
    total = tl.sum(sums, axis=0)
    place = (row.to(tl.int64) * tl.num_programs(1) + part) * channels + c
    tl.store(mean + place, near + total / count, mask=c < channels)
    tl.store(m2 + place, tl.maximum(tl.sum(squares, axis=0) - total * total / count, 0.0), mask=c < channels)


@triton.jit
def _weigh(
    mean, m2, added, gain, offset, scale, shift, pixels, channels, chunk, chunks, per_row, added_per_row, eps,
    ADDED: tl.constexpr, CHUNKS: tl.constexpr, PER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """GroupNorm of x + added as y = x scale + shift, from the moments of x; one program per row and group of PER channels.

    added [B,channels], or [channels] with added_per_row 0; gain and offset likewise with per_row. Written: scale, shift [B,channels].
    """
    row, group = tl.program_id(0), tl.program_id(1)
    k, lane = tl.arange(0, CHUNKS), tl.arange(0, WIDE)
    c = group * PER + lane
    inside = (k[:, None] < chunks) & (lane[None, :] < PER)
    at = (row.to(tl.int64) * chunks + k[:, None]) * channels + c[None, :]
    more = tl.zeros((WIDE,), tl.float32)
    if ADDED:
        more = tl.load(added + row * added_per_row + c, mask=lane < PER, other=0.0)
    means = tl.load(mean + at, mask=inside, other=0.0) + more[None, :]
    counts = tl.where(inside, tl.minimum(chunk, pixels - k[:, None] * chunk), 0).to(tl.float32)
    whole = tl.sum(counts)
    middle = tl.sum(counts * means) / whole
    apart = means - middle
    variance = (tl.sum(tl.load(m2 + at, mask=inside, other=0.0)) + tl.sum(counts * apart * apart)) / whole
    factor = tl.load(gain + row * per_row + c, mask=lane < PER, other=0.0) / tl.sqrt(variance + eps)
    tl.store(scale + row * channels + c, factor, mask=lane < PER)
    lifted = tl.load(offset + row * per_row + c, mask=lane < PER, other=0.0) + (more - middle) * factor
    tl.store(shift + row * channels + c, lifted, mask=lane < PER)


@triton.jit
def _apply(
    x, scale, shift, out, pixels, channels, all_channels, before,
    ACT: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out[:, :, before:before + channels] = x scale + shift, with ACT its SiLU; out [B,pixels,all_channels]."""
    row = tl.program_id(1)
    c, pixel = tl.arange(0, WIDE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    own = c < channels
    inside = (pixel[:, None] < pixels) & own[None, :]
    times = tl.load(scale + row * all_channels + before + c, mask=own, other=0.0)
    plus = tl.load(shift + row * all_channels + before + c, mask=own, other=0.0)
    at = row.to(tl.int64) * pixels * channels + pixel[:, None] * channels + c[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * times[None, :] + plus[None, :]
    if ACT:
        y = y * tl.sigmoid(y)
    to = row.to(tl.int64) * pixels * all_channels + pixel[:, None] * all_channels + before + c[None, :]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _give(
    x, scale, shift, taps, out, pixels, channels, TAPS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """out [B,TAPS,pixels]: the sum over channels of SiLU(x scale + shift) times each of taps [TAPS,channels]."""
    row = tl.program_id(1)
    c, pixel = tl.arange(0, WIDE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    own = c < channels
    inside = (pixel[:, None] < pixels) & own[None, :]
    times = tl.load(scale + row * channels + c, mask=own, other=0.0)
    plus = tl.load(shift + row * channels + c, mask=own, other=0.0)
    at = row.to(tl.int64) * pixels * channels + pixel[:, None] * channels + c[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * times[None, :] + plus[None, :]
    y = y * tl.sigmoid(y)
    for tap in tl.static_range(TAPS):
        weight = tl.load(taps + tap * channels + c, mask=own, other=0.0)
        to = out + (row.to(tl.int64) * TAPS + tap) * pixels + pixel
        tl.store(to, tl.sum(y * weight[None, :], axis=1), mask=pixel < pixels)


@triton.jit
def _draw(
    seed, slice_, level, run, step, origin, out, height, width, stride, pairs,
    M0: tl.constexpr, M1: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Standard normals of a row's window out [B,height,width], as `runtime.sampling.noise` lays them out: one Philox word per pair of pixels.

    The block of four that a word belongs to is computed anew for each word: its 40 products of 64 bits cost less than sharing it. stride: words per
    line of the canvas; pairs: words that a line of the window may touch.
    """
    row = tl.program_id(1)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    top, left = tl.load(origin + 2 * row), tl.load(origin + 2 * row + 1)
    y, pair = i // pairs, i % pairs
    word = (top + y) * stride + left // 2 + pair
    c0 = (word // 4 + 1).to(tl.uint64)
    c1 = tl.zeros((TILE,), tl.uint64) + (tl.load(step) + 1).to(tl.uint64)
    c2 = tl.zeros((TILE,), tl.uint64) + ((tl.load(level + row) << 32) | tl.load(run + row)).to(tl.uint64)
    c3 = tl.zeros((TILE,), tl.uint64) + tl.load(slice_ + row).to(tl.uint64)
    k0 = tl.load(seed).to(tl.uint64)
    k1 = k0 * 0
    m0, m1, w0, w1 = k1 + M0, k1 + M1, k1 + W0, k1 + W1
    for _ in tl.static_range(ROUNDS):
        high0, low0 = tl.umulhi(c0, c0 * 0 + m0), c0 * m0
        high1, low1 = tl.umulhi(c2, c2 * 0 + m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += w0
        k1 += w1
    lane = word % 4
    drawn = tl.where(lane < 2, tl.where(lane == 0, c0, c1), tl.where(lane == 2, c2, c3))
    low, high = (drawn & 0xFFFFFFFF).to(tl.uint32), (drawn >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    r = tl.sqrt_rn(tl.log(low.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10) * -2.0)
    theta = high.to(tl.float32) * 1.4629180792671596e-09
    x = 2 * pair - left % 2
    line = out + row.to(tl.int64) * height * width + y * width + x
    tl.store(line, r * tl.cos(theta), mask=(y < height) & (x >= 0) & (x < width))
    tl.store(line + 1, r * tl.sin(theta), mask=(y < height) & (x + 1 < width))


@dataclass(frozen=True)
class Features:
    """Feature maps x [B,C,H,W], channels last, and their moments mean and m2, [B,chunks,C] float32 each."""

    x: Tensor
    mean: Tensor
    m2: Tensor


def measured(x: Tensor) -> Features:
    """x [B,C,H,W] with its moments; made channels last where it is not."""
    x = x.contiguous(memory_format=torch.channels_last)
    return _measured(x, x, None, None)


def joined(x: Tensor, other: Tensor | None, bias: Tensor | None = None) -> Features:
    """x + other + bias in the type of x, with its moments, in one pass. x and other [B,C,H,W], channels last; bias [C] float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    if other is not None:
        other = other.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return _measured(x, out, other, bias)


def begun(x: Tensor, taps: Tensor, features: Tensor, bias: Tensor, slot: Tensor) -> Features:
    """The 3x3 convolution, padded by 1, of x float32 [B,1,H,W] + features[slot] + bias, with its moments, in one pass, in the type of features.

    taps float32 [9,C], line after line; features [S,H,W,C]; bias float32 [C]; slot int64 [B]. PyTorch's convolution of one channel does not
    return channels last: its result would have to be transposed at each step.
    """
    rows, _, height, width = x.shape
    out = torch.empty((rows, height, width, taps.shape[1]), dtype=features.dtype, device=x.device).permute(0, 3, 1, 2)
    return _measured(features, out, None, bias, slot, x.contiguous(), taps)


def normed(
    sources: tuple[Features, ...],
    groups: int,
    gain: Tensor,
    offset: Tensor,
    *,
    eps: float,
    act: bool,
    added: Tensor | None = None,
) -> Tensor:
    """GroupNorm of (the sources concatenated along the channels, plus `added`); with `act` its SiLU. [B,C,H,W], channels last.

    gain, offset and added: float32 [C], or [B,C] with a row's own values; gain and offset have one shape, and each row is contiguous.
    """
    first = sources[0].x
    rows, _, height, width = first.shape
    scale, shift = _weighed(sources, groups, gain, offset, eps, added)
    pixels, channels = height * width, scale.shape[1]
    out = torch.empty(
        (rows, channels, height, width),
        dtype=first.dtype,
        device=first.device,
        memory_format=torch.channels_last,
    )
    before = 0
    for one in sources:
        own = one.x.shape[1]
        tile, wide = _tile(own)
        _apply[(triton.cdiv(pixels, tile), rows)](
            one.x, scale, shift, out, pixels, own, channels, before, ACT=act, TILE=tile, WIDE=wide, **FUSION
        )
        before += own
    return out


def normed_conv(
    source: Features, groups: int, gain: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, *, eps: float
) -> Tensor:
    """The 3x3 convolution, padded by 1, of `normed` with SiLU; summed and returned in float32, [B,O,H,W].

    source [B,C,H,W]; weight [O,C,3,3] and bias [O], float32; slow unless O is small. A pixel's contributions to its 3x3 neighbourhood are
    summed over the channels where the pixel is normalised, and only then added up for each neighbour: no map of C channels is written.
    """
    rows, channels, height, width = source.x.shape
    scale, shift = _weighed((source,), groups, gain, offset, eps, None)
    # Flipped: `fold` adds up what each pixel gives to its neighbours, a convolution what each takes from them.
    taps = weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
    given = torch.empty((rows, len(taps), height * width), dtype=torch.float32, device=source.x.device)
    tile, wide = _tile(channels)
    _give[(triton.cdiv(height * width, tile), rows)](
        source.x, scale, shift, taps, given, height * width, channels, TAPS=len(taps), TILE=tile, WIDE=wide, **FUSION
    )  # fmt: skip
    return nnf.fold(given, (height, width), 3, padding=1) + bias[:, None, None]


def drawn(
    seed: Tensor,
    slice_: Tensor,
    level: Tensor,
    run: Tensor,
    step: Tensor,
    origin: Tensor,
    size: tuple[int, int],
    canvas: tuple[int, int],
) -> Tensor:
    """Standard normals float32 [B,1,H,W]: `torch_noise.normals` in one kernel, with the same arguments."""
    rows, (height, width) = len(slice_), size
    out = torch.empty((rows, 1, height, width), dtype=torch.float32, device=slice_.device)
    pairs = width // 2 + 1
    with on(slice_.device):
        _draw[(triton.cdiv(height * pairs, 256), rows)](
            seed, slice_, level, run, step, origin, out, height, width, (canvas[1] + 1) // 2, pairs,
            M0=MULTIPLIERS[0], M1=MULTIPLIERS[1], W0=WEYL[0], W1=WEYL[1], ROUNDS=ROUNDS, TILE=256, **FUSION,
        )  # fmt: skip
    return out


def on(device: torch.device) -> AbstractContextManager[object]:
    """Within the block `device` is the current GPU: Triton launches on that one, wherever its tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def try_out(device: str) -> None:
    """Compile and run each kernel on a few numbers. Raises whatever Triton raises, and RuntimeError when the results are wrong."""
    where = torch.device(device)
    with on(where):
        x = torch.ones((1, 4, 2, 2), dtype=torch.float16, device=where).contiguous(memory_format=torch.channels_last)
        weights, number = torch.ones(4, device=where), torch.ones(1, dtype=torch.int64, device=where)
        even = joined(x, x, weights)
        taps, features = torch.ones((9, 4), device=where), x.permute(0, 2, 3, 1)
        begin = begun(weights.view(1, 1, 2, 2), taps, features, weights, number - 1)
        # Equal features have no variance, so an eps of 1 divides them by 1. An eps of 1e-5 would multiply by 316 what a card's approximate
        # roots and quotients and its fused products round otherwise than the host, and right results would count as wrong.
        found = normed((even,), 2, weights, weights, eps=1.0, act=False)
        ended = normed_conv(even, 2, weights, weights, torch.ones((1, 4, 3, 3), device=where), weights[:1], eps=1.0)
        sixteen = 16 * nnf.silu(weights[:1]) + 1  # four channels of the four pixels, and the bias
        corner = number.expand(1, 2).contiguous()
        noise = drawn(number, number, number, number, number, corner, (4, 6), (8, 8))
        expected = normals(number, number, number, number, number, corner, (4, 6), (8, 8))
        right = torch.equal(found, torch.ones_like(found)) and torch.allclose(ended, sixteen.expand_as(ended))
        right = right and torch.equal(begin.x, 6 * x)  # four pixels that see all four, the features and the bias
        if not (right and torch.allclose(noise, expected, atol=1e-5)):
            raise RuntimeError("they give wrong numbers")


def _measured(x: Tensor, out: Tensor, other: Tensor | None, bias: Tensor | None, *first: Tensor) -> Features:
    """`out` with its moments; where it is not x itself, `_measure` first writes the sum to it. first: slot, image, taps, for `begun`."""
    rows, channels, height, width = out.shape
    tile, wide = _tile(channels)
    chunk, chunks = _chunks(height * width)
    mean, m2 = torch.empty((2, rows, chunks, channels), dtype=torch.float32, device=out.device).unbind(0)
    _measure[(rows, chunks)](
        x, x if other is None else other, mean if bias is None else bias, *(first or (mean, mean, mean)),
        out, mean, m2, height * width, channels, chunk, width if first else 0,
        SUM=out is not x, OTHER=other is not None, FIRST=bool(first), BIAS=bias is not None, TILE=tile, WIDE=wide,
        **FUSION,
    )  # fmt: skip
    return Features(out, mean, m2)


def _weighed(
    sources: tuple[Features, ...], groups: int, gain: Tensor, offset: Tensor, eps: float, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """scale and shift, float32 [B,C] each, with which `normed` is x scale + shift."""
    rows, _, height, width = sources[0].x.shape
    pixels, channels = height * width, sum(one.x.shape[1] for one in sources)
    mean, m2 = (sources[0].mean, sources[0].m2) if len(sources) == 1 else _side_by_side(sources)
    chunk, chunks = _shared_out(pixels, sources)
    scale, shift = torch.empty((2, rows, channels), dtype=torch.float32, device=mean.device).unbind(0)
    per = channels // groups
    _weigh[(rows, groups)](
        mean, m2, gain if added is None else added, gain, offset, scale, shift, pixels, channels, chunk, chunks,
        gain.stride(0) if gain.ndim == 2 else 0, added.stride(0) if added is not None and added.ndim == 2 else 0, eps,
        ADDED=added is not None, CHUNKS=triton.next_power_of_2(chunks), PER=per, WIDE=triton.next_power_of_2(per), num_warps=1,
        **FUSION,
    )  # fmt: skip
    return scale, shift


def _side_by_side(sources: tuple[Features, ...]) -> tuple[Tensor, Tensor]:
    """The sources' moments, concatenated along the channels. Chunks depend on the number of pixels alone, so they match."""
    return torch.cat([one.mean for one in sources], dim=2), torch.cat([one.m2 for one in sources], dim=2)


def _shared_out(pixels: int, sources: tuple[Features, ...]) -> tuple[int, int]:
    chunk, chunks = _chunks(pixels)
    if any(one.mean.shape[1] != chunks or one.x.shape[2:] != sources[0].x.shape[2:] for one in sources):
        raise ValueError("the sources of one GroupNorm are of different sizes")
    return chunk, chunks


def _chunks(pixels: int) -> tuple[int, int]:
    """Pixels per chunk, and how many chunks; the same whatever the batch, channels and card."""
    chunk = max(64, triton.cdiv(pixels, MOST_CHUNKS))
    return chunk, triton.cdiv(pixels, chunk)


def _tile(channels: int) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two."""
    wide = triton.next_power_of_2(channels)
    return max(1, ELEMENTS // wide), wide
