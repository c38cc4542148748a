"""The denoiser for a GPU in channels-last half precision, without transpositions: GroupNorm, SiLU, bias and residual sums by our kernels.

The arithmetic is `train.network.Denoiser`'s, with these differences: a feature map's moments are computed in the pass that makes it;
GroupNorm, the embedding and SiLU are one pass over it; skips are normalised from where they lie, not concatenated first; each block's share
of the embeddings is looked up in one table of all timesteps and levels; and no convolution adds its own bias, but for attention's first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from cdiff.export.torch_kernels import Features, begun, joined, measured, normed, normed_conv, on
from cdiff.train.network import Attention, Denoiser, ResidualBlock, Stage


class FusedDenoiser:
    """`Denoiser` with its weights in `dtype`; GroupNorm's weights, biases and the last convolution in float32.

    Called with x [B,1,H,W], features [S,H,W,L], slot int64 [B] (row b sees features[slot[b]]), t and level int64 [B]; returns what
    the denoiser does, float32 [B,1 or 2,H,W]. Everything lies on `device`.
    """

    def __init__(self, denoiser: Denoiser, device: str, dtype: torch.dtype = torch.float16) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.blocks: list[_Block] = []
        self.first = _Conv(denoiser.first, self, torch.float32)
        self.taps = self.first.weight.flatten(1).t().contiguous()
        self.down = _stages(denoiser.down, self)
        self.middle = [_stage(stage, self) for stage in denoiser.middle]
        self.up = _stages(denoiser.up, self)
        self.shrink = [self._resampling(part) for part in denoiser.shrink]
        self.grow = [self._resampling(part) for part in denoiser.grow]
        self.norm = _Norm(denoiser.norm, self)
        self.last = _Conv(denoiser.last, self, torch.float32)
        self.conditions = denoiser.level_table.num_embeddings
        times, levels = (table.weight.detach().to(self.device) for table in (denoiser.time_table, denoiser.level_table))
        active = nnf.silu(times[:, None] + levels[None]).flatten(0, 1)
        self.told = torch.cat([block.told(active) for block in self.blocks], dim=1)

    def __call__(self, x: Tensor, features: Tensor, slot: Tensor, t: Tensor, level: Tensor) -> Tensor:
        with on(self.device):
            told = self.told.index_select(0, (t - 1) * self.conditions + level - 1)
            h = begun(x, self.taps, features, self.first.bias, slot)
            skips = [h]
            for depth, stages in enumerate(self.down):
                for stage in stages:
                    h = stage((h,), told)
                    skips.append(h)
                if depth < len(self.shrink):
                    h = self.shrink[depth](h, told)
                    skips.append(h)
            for stage in self.middle:
                h = stage((h,), told)
            for depth, stages in enumerate(self.up):
                for stage in stages:
                    h = stage((h, skips.pop()), told)
                if depth < len(self.grow):
                    h = self.grow[depth](h, told)
            norm, last = self.norm, self.last
            return normed_conv(h, norm.groups, norm.gain, norm.offset, last.weight, last.bias, eps=norm.eps)

    def _resampling(self, part: nn.Module) -> Callable[[Features, Tensor], Features]:
        if isinstance(part, ResidualBlock):
            block = _Block(part, self)
            return lambda h, told: block((h,), told)
        assert isinstance(part, nn.Conv2d)
        conv = _Conv(part, self)
        if conv.stride > 1:
            return lambda h, told: joined(conv(h.x), None, conv.bias)
        return lambda h, told: joined(conv(doubled(h.x)), None, conv.bias)


class _Conv:
    """A convolution whose bias is left to the pass that adds its result to something. bias float32 [C]."""

    def __init__(self, conv: nn.Conv2d, to: FusedDenoiser, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or to.dtype
        self.weight = conv.weight.detach().to(to.device, dtype).contiguous(memory_format=torch.channels_last)
        assert conv.bias is not None
        self.bias = conv.bias.detach().to(to.device, torch.float32)
        self.own = self.bias.to(dtype)
        self.stride, self.padding = int(conv.stride[0]), int(conv.padding[0])

    def __call__(self, x: Tensor) -> Tensor:
        return nnf.conv2d(x, self.weight, None, self.stride, self.padding)

    def with_bias(self, x: Tensor) -> Tensor:
        return nnf.conv2d(x, self.weight, self.own, self.stride, self.padding)

    def of_several(self, sources: tuple[Features, ...]) -> Tensor:
        """A 1x1 convolution of the sources' concatenation along the channels, as a sum over the sources, without concatenating them."""
        parts = torch.split(self.weight, [one.x.shape[1] for one in sources], dim=1)
        out = nnf.conv2d(sources[0].x, parts[0])
        flat = out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
        for one, weight in zip(sources[1:], parts[1:], strict=True):
            pixels = one.x.permute(0, 2, 3, 1).reshape(-1, one.x.shape[1])
            flat.addmm_(pixels, weight.flatten(1).t())  # in place: else the sum so far is copied first
        rows, _, height, width = out.shape
        return flat.reshape(rows, height, width, -1).permute(0, 3, 1, 2)


class _Norm:
    """A GroupNorm, with SiLU or without."""

    def __init__(self, norm: nn.GroupNorm, to: FusedDenoiser) -> None:
        self.gain, self.offset = (part.detach().to(to.device, torch.float32) for part in (norm.weight, norm.bias))
        self.groups, self.eps = norm.num_groups, norm.eps

    def __call__(
        self,
        sources: tuple[Features, ...],
        *,
        act: bool,
        added: Tensor | None = None,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        gain, offset = self.gain if gain is None else gain, self.offset if offset is None else offset
        return normed(sources, self.groups, gain, offset, eps=self.eps, act=act, added=added)


class _Block:
    """`ResidualBlock`: the first convolution's bias is added with the embedding in the second GroupNorm, the second's in the residual sum."""

    def __init__(self, block: ResidualBlock, to: FusedDenoiser) -> None:
        self.size, self.scale_shift, self.embed = block.size, block.scale_shift, block.embed
        self.norm1, self.norm2 = _Norm(block.norm1, to), _Norm(block.norm2, to)
        self.conv1, self.conv2 = _Conv(block.conv1, to), _Conv(block.conv2, to)
        self.skip = _Conv(block.skip, to) if isinstance(block.skip, nn.Conv2d) else None
        self.bias = self.conv2.bias if self.skip is None else self.conv2.bias + self.skip.bias
        self.columns = slice(start := sum(one.width for one in to.blocks), start + self.width)
        to.blocks.append(self)

    @property
    def width(self) -> int:
        """How many of the table's columns are the block's."""
        return self.embed.out_features

    def told(self, active: Tensor) -> Tensor:
        """The block's columns of the table, [T K, width] float32, a row for each timestep and level: what is added before the second
        GroupNorm, or that GroupNorm's gain and offset."""
        weight, bias = (part.detach().to(active.device) for part in (self.embed.weight, self.embed.bias))
        z = nnf.linear(active, weight, bias)
        if not self.scale_shift:
            return z + self.conv1.bias
        scale, shift = z.chunk(2, dim=1)
        return torch.cat([self.norm2.gain * (1 + scale), self.norm2.offset * (1 + scale) + shift], dim=1)

    def __call__(self, sources: tuple[Features, ...], told: Tensor) -> Features:
        h = measured(self.conv1(self._resampled(self.norm1(sources, act=True))))
        own = told[:, self.columns]
        if self.scale_shift:
            gain, offset = own.chunk(2, dim=1)
            out = self.norm2((h,), act=True, added=self.conv1.bias, gain=gain, offset=offset)
        else:
            out = self.norm2((h,), act=True, added=own)
        return joined(self.conv2(out), self._skipped(sources), self.bias)

    def _skipped(self, sources: tuple[Features, ...]) -> Tensor:
        # Two sources are always wider than the block, which then has a convolution; a block that resamples keeps its width, and has none.
        if self.skip is not None:
            return self.skip.of_several(sources)
        (one,) = sources
        return self._resampled(one.x)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.size < 1:
            return nnf.avg_pool2d(x, 2)
        return doubled(x) if self.size > 1 else x


class _Attention:
    """`Attention`, its heads taken from the channels-last projection without a copy."""

    def __init__(self, attention: Attention, to: FusedDenoiser) -> None:
        self.heads, self.norm = attention.heads, _Norm(attention.norm, to)
        self.qkv, self.out = _Conv(attention.qkv, to), _Conv(attention.out, to)

    def __call__(self, h: Features) -> Features:
        rows, channels, height, width = h.x.shape
        projected = self.qkv.with_bias(self.norm((h,), act=False)).permute(0, 2, 3, 1)
        # [B, heads, positions, channels a head], three times
        q, k, v = (
            part.reshape(rows, height * width, self.heads, channels // self.heads).transpose(1, 2)
            for part in projected.chunk(3, dim=3)
        )
        seen = nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, height, width, channels)
        return joined(self.out(seen.permute(0, 3, 1, 2)), h.x, self.out.bias)


def doubled(x: Tensor) -> Tensor:
    """x [B,C,H,W] enlarged to [B,C,2H,2W] by repeating pixels, both channels last.

    PyTorch's own kernel for this order divides six times for each number. Here a copy moves 16 bytes at once, as PyTorch's widest type,
    where a pixel's bytes are a multiple of 16.
    """
    pixels = x.permute(0, 2, 3, 1)
    rows, height, width, channels = pixels.shape
    wide = pixels.view(torch.complex128) if channels * x.element_size() % 16 == 0 else pixels
    out = wide[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).reshape(rows, 2 * height, 2 * width, -1)
    return out.view(x.dtype).permute(0, 3, 1, 2)


def _stages(depths: nn.ModuleList, to: FusedDenoiser) -> list[list[Callable[[tuple[Features, ...], Tensor], Features]]]:
    """The stages of each depth."""
    return [[_stage(stage, to) for stage in depth.children()] for depth in depths]


def _stage(stage: nn.Module, to: FusedDenoiser) -> Callable[[tuple[Features, ...], Tensor], Features]:
    """A residual block, and the attention that may follow it."""
    assert isinstance(stage, Stage)
    block = _Block(stage.block, to)
    if not isinstance(stage.attention, Attention):
        return block
    attention = _Attention(stage.attention, to)
    return lambda sources, told: attention(block(sources, told))
