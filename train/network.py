"""The consensus-diffusion network eps_theta = D(E(F(x_t) + G(I), z), z) (Amit et al. 2023, section 3).

G depends on neither t, c nor the run, so it is a module of its own (Encoder) that runs once per slice; F, E and D are the
Denoiser, which runs at each step.
"""

from __future__ import annotations

import abc

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdiff.train.sections import NetworkConfig


class Recomputed(nn.Module, abc.ABC):
    """A block whose inner activations may be dropped and computed again for the gradient: `recompute` trades time for memory.

    Chen et al. 2016, "Training deep nets with sublinear memory cost". Results are the same bit for bit.
    """

    recompute = False

    def forward(self, *inputs: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self.compute(*inputs)
        out: Tensor = checkpoint(self.compute, *inputs, use_reentrant=False)
        return out

    @abc.abstractmethod
    def compute(self, *inputs: Tensor) -> Tensor:
        """What the block does; `forward` calls it, now or again for the gradient."""


def recompute_activations(network: nn.Module) -> None:
    """Make every block of the network keep only its input for the gradient."""
    for module in network.modules():
        if isinstance(module, Recomputed):
            module.recompute = True


class DenseBlock(Recomputed):
    """Five 3x3 convolutions, each seeing all that came before; the last is added at 0.2 (Wang et al. 2018, ESRGAN, fig. 4)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels + i * growth, growth if i < 4 else channels, 3, padding=1) for i in range(5)
        )

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        seen = x
        for conv in self.convs[:-1]:
            seen = torch.cat([seen, nnf.leaky_relu(conv(seen), 0.2)], dim=1)
        out: Tensor = x + 0.2 * self.convs[-1](seen)
        return out


class RRDB(nn.Module):
    """Residual-in-residual dense block: three dense blocks, added at 0.2."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[DenseBlock(channels, growth) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + 0.2 * self.blocks(x)
        return out


class Encoder(nn.Module):
    """G: image [S, channels, H, W] -> features [S, L, H, W]. RRDBs without normalisation, or one convolution."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        inner, outer = config.rrdb_channels, config.base_channels
        self.single = config.rrdbs == 0
        if self.single:
            self.first = nn.Conv2d(config.image_channels, outer, 3, padding=1)
            return
        self.first = nn.Conv2d(config.image_channels, inner, 3, padding=1)
        self.trunk = nn.Sequential(
            *[RRDB(inner, config.rrdb_growth) for _ in range(config.rrdbs)], nn.Conv2d(inner, inner, 3, padding=1)
        )
        self.head = nn.Conv2d(inner, inner, 3, padding=1)
        self.last = nn.Conv2d(inner, outer, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h: Tensor = self.first(image)
        if self.single:
            return h
        h = h + self.trunk(h)
        out: Tensor = self.last(nnf.leaky_relu(self.head(h), 0.2))
        return out


class ResidualBlock(nn.Module):
    """Twice (GroupNorm, SiLU, 3x3 convolution); the embedding is added after the first; 1x1 skip where the width changes.

    With embedding "scale-shift" z instead multiplies (by 1 + its first half) and shifts (by its second) what the second GroupNorm
    returns. size: 0.5 halves the features' sides by averaging and 2.0 doubles them by repetition, before the first
    convolution and in the skip; 1.0 leaves them.
    """

    def __init__(self, inp: int, out: int, embedding: int, config: NetworkConfig, size: float = 1.0) -> None:
        super().__init__()
        self.size, self.scale_shift = size, config.embedding == "scale-shift"
        self.norm1 = nn.GroupNorm(_groups(inp, config), inp)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.embed = nn.Linear(embedding, 2 * out if self.scale_shift else out)
        self.norm2 = nn.GroupNorm(_groups(out, config), out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if inp == out else nn.Conv2d(inp, out, 1)
        # The block starts as its skip: the published initialisation.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = self.conv1(self._resampled(nnf.silu(self.norm1(x))))
        z = self.embed(nnf.silu(z))[:, :, None, None]
        if self.scale_shift:
            scale, shift = z.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + z)
        h = self.conv2(self.dropout(nnf.silu(h)))
        out: Tensor = self.skip(self._resampled(x)) + h
        return out

    def _resampled(self, x: Tensor) -> Tensor:
        if self.size < 1:
            return nnf.avg_pool2d(x, 2)
        return nnf.interpolate(x, scale_factor=2.0, mode="nearest") if self.size > 1 else x


class Attention(nn.Module):
    """Multi-head self-attention over the positions of a feature map, with a residual connection."""

    def __init__(self, channels: int, heads: int, config: NetworkConfig) -> None:
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else heads
        self.norm = nn.GroupNorm(_groups(channels, config), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        # [B, heads, positions, channels per head], three times
        q, k, v = (
            part.reshape(b, self.heads, c // self.heads, height * width).transpose(2, 3)
            for part in self.qkv(self.norm(x)).chunk(3, dim=1)
        )
        h = nnf.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(h.transpose(2, 3).reshape(b, c, height, width))
        return out


class Stage(Recomputed):
    """A residual block and, at some depths, the self-attention that follows it; 0 heads stand for none."""

    def __init__(self, inp: int, out: int, embedding: int, heads: int, config: NetworkConfig) -> None:
        super().__init__()
        self.block = ResidualBlock(inp, out, embedding, config)
        self.attention = Attention(out, heads, config) if heads else nn.Identity()

    def compute(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.attention(self.block(x, z))
        return out


class Denoiser(nn.Module):
    """D(E(F(x_t) + features, z), z) with z = z_t + z_c.

    forward: x [B, 1, H, W], features [B, L, H, W] (one per row), t int64 [B] in 1..T, level int64 [B] in 1..K: the level of
    agreement, or whatever else the variant tells the network.
    Returns [B, 1, H, W], the target's prediction; with learned variance [B, 2, H, W], the second channel being v, about
    -1 to 1, that interpolates the log variance (Nichol & Dhariwal 2021, eq. 15).
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, embedding = config.base_channels, 4 * config.base_channels
        self.by_block = config.resample == "block"
        self.time_table = nn.Embedding(config.T, embedding)
        self.level_table = nn.Embedding(config.conditions, embedding)
        with torch.no_grad():
            self.time_table.weight.copy_(_sinusoids(config.T, embedding))
        self.first = nn.Conv2d(1, width, 3, padding=1)

        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        widths, channels = [width], width
        for depth, mult in enumerate(config.channel_mult):
            stages = nn.ModuleList()
            heads = config.heads if depth in config.attention_depths else 0
            for _ in range(config.residual_blocks):
                stages.append(Stage(channels, mult * width, embedding, heads, config))
                channels = mult * width
                widths.append(channels)
            self.down.append(stages)
            if depth < len(config.channel_mult) - 1:
                self.shrink.append(
                    ResidualBlock(channels, channels, embedding, config, size=0.5)
                    if self.by_block
                    else nn.Conv2d(channels, channels, 3, stride=2, padding=1)
                )
                widths.append(channels)

        self.middle = nn.ModuleList(
            [
                Stage(channels, channels, embedding, config.heads, config),
                Stage(channels, channels, embedding, 0, config),
            ]
        )

        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for depth, mult in reversed(list(enumerate(config.channel_mult))):
            stages = nn.ModuleList()
            heads = (config.heads_up or config.heads) if depth in config.attention_depths else 0
            for _ in range(config.residual_blocks + 1):
                inp = channels + widths.pop()
                stages.append(Stage(inp, mult * width, embedding, heads, config))
                channels = mult * width
            self.up.append(stages)
            if depth > 0:
                self.grow.append(
                    ResidualBlock(channels, channels, embedding, config, size=2.0)
                    if self.by_block
                    else nn.Conv2d(channels, channels, 3, padding=1)
                )

        self.norm = nn.GroupNorm(_groups(channels, config), channels)
        self.last = nn.Conv2d(channels, 2 if config.variance == "learned" else 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, features: Tensor, t: Tensor, level: Tensor) -> Tensor:
        z = self.time_table(t - 1) + self.level_table(level - 1)
        h = self.first(x) + features
        skips = [h]
        for depth, stages in enumerate(self.down):
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(h, z)
                skips.append(h)
            if depth < len(self.shrink):
                h = self.shrink[depth](h, z) if self.by_block else self.shrink[depth](h)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, z)
        for depth, stages in enumerate(self.up):
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(torch.cat([h, skips.pop()], dim=1), z)
            if depth < len(self.grow):
                grow = self.grow[depth]
                h = grow(h, z) if self.by_block else grow(nnf.interpolate(h, scale_factor=2.0, mode="nearest"))
        out: Tensor = self.last(nnf.silu(self.norm(h)))
        return out


class ConsensusNet(nn.Module):
    """Encoder and denoiser together. forward: x [S r, 1, H, W], image [S, channels, H, W], t and level int64 [S r].

    The r rows of an image lie next to each other and share its encoding.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.denoiser = Denoiser(config)

    def forward(self, x: Tensor, image: Tensor, t: Tensor, level: Tensor) -> Tensor:
        features = self.encoder(image).repeat_interleave(len(x) // len(image), 0)
        out: Tensor = self.denoiser(x, features, t, level)
        return out


def _groups(channels: int, config: NetworkConfig) -> int:
    # Concatenated skips can have a width that the number of groups does not divide: take the largest divisor below it.
    return next(g for g in range(config.groups, 0, -1) if channels % g == 0)


def _sinusoids(T: int, width: int) -> Tensor:
    """Rows t = 1..T of Vaswani et al.'s position code: neighbouring timesteps start alike; training then changes the table."""
    rates = torch.exp(-torch.arange(width // 2) / (width // 2) * torch.log(torch.tensor(1e4)))
    angles = torch.arange(1, T + 1)[:, None] * (1000 / T) * rates[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
