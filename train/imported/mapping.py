"""Which tensor of the published networks becomes which of ours, and how it must be converted.

Both codes number blocks consecutively over all depths: `input_blocks` counts the first convolution, the residual blocks and the
downsampling; `output_blocks` counts the residual blocks, the last one of a depth also holding the upsampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from cdiff.train.imported.options import CONSENSUS, TABLE, Options
from cdiff.train.network import Attention, ConsensusNet

Into = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Link:
    """One tensor of theirs, the shape it must have, and the tensors of ours that it becomes, by name."""

    theirs: str
    shape: tuple[int, ...]
    into: Into


def links(network: ConsensusNet, options: Options) -> list[Link]:
    """A link for every tensor that a checkpoint of `options` holds. `network` may be on the meta device: only shapes are read."""
    ours = network.state_dict()
    found: list[Link] = []

    def same(our_module: str, their_module: str) -> None:
        for part in ("weight", "bias"):
            name = f"{our_module}.{part}"
            found.append(Link(f"{their_module}.{part}", tuple(ours[name].shape), _rename(name)))

    def pointwise(our_module: str, their_module: str, heads: int = 0) -> None:
        """Theirs are 1-D convolutions over the positions, ours 2-D ones; `heads` > 0 also brings q, k and v into our order."""
        for part in ("weight", "bias"):
            name = f"{our_module}.{part}"
            shape = tuple(ours[name].shape)
            into = _attention_part(name, shape, heads)
            found.append(Link(f"{their_module}.{part}", shape[:-1] if part == "weight" else shape, into))

    def residual(our_block: str, their_block: str) -> None:
        same(f"{our_block}.norm1", f"{their_block}.in_layers.0")
        same(f"{our_block}.conv1", f"{their_block}.in_layers.2")
        same(f"{our_block}.embed", f"{their_block}.emb_layers.1")
        same(f"{our_block}.norm2", f"{their_block}.out_layers.0")
        same(f"{our_block}.conv2", f"{their_block}.out_layers.3")
        if f"{our_block}.skip.weight" in ours:
            same(f"{our_block}.skip", f"{their_block}.skip_connection")

    def stage(our_stage: str, their_block: str, their_attention: str) -> None:
        residual(f"{our_stage}.block", their_block)
        attention = network.get_submodule(f"{our_stage}.attention")
        if isinstance(attention, Attention):
            # use_new_attention_order splits q, k and v before the heads, as we do; the older order splits the heads first.
            heads = 0 if options.values.get("use_new_attention_order") else attention.heads
            same(f"{our_stage}.attention.norm", f"{their_attention}.norm")
            pointwise(f"{our_stage}.attention.qkv", f"{their_attention}.qkv", heads)
            pointwise(f"{our_stage}.attention.out", f"{their_attention}.proj_out")

    config = network.config
    found += _first_convolutions(ours, options)
    if options.source == CONSENSUS:
        for ours_, theirs in _rrdb_modules(config.rrdbs):
            same(ours_, theirs)

    block = 1
    last_depth = len(config.channel_mult) - 1
    for depth in range(last_depth + 1):
        for i in range(config.residual_blocks):
            stage(f"denoiser.down.{depth}.{i}", f"input_blocks.{block}.0", f"input_blocks.{block}.1")
            block += 1
        if depth < last_depth:
            if config.resample == "block":
                residual(f"denoiser.shrink.{depth}", f"input_blocks.{block}.0")
            else:
                same(f"denoiser.shrink.{depth}", f"input_blocks.{block}.0.op")
            block += 1

    stage("denoiser.middle.0", "middle_block.0", "middle_block.1")
    stage("denoiser.middle.1", "middle_block.2", "")

    block = 0
    for step, depth in enumerate(reversed(range(last_depth + 1))):
        for i in range(config.residual_blocks + 1):
            stage(f"denoiser.up.{step}.{i}", f"output_blocks.{block}.0", f"output_blocks.{block}.1")
            block += 1
        if depth > 0:
            there = f"output_blocks.{block - 1}.{2 if depth in config.attention_depths else 1}"
            if config.resample == "block":
                residual(f"denoiser.grow.{step}", there)
            else:
                same(f"denoiser.grow.{step}", f"{there}.conv")

    same("denoiser.norm", "out.0")
    found += _last_convolution(ours, options)
    found += _embeddings(config.base_channels, options)
    return found


def convert(network: ConsensusNet, options: Options, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by name, float32, from theirs, which must be exactly those of `links`, by name and shape (`check_fit`)."""
    converted: dict[str, Tensor] = {}
    for link in links(network, options):
        # PyTorch may mark a tensor as the negative of its stored numbers, and a run's file would hold the stored ones.
        converted |= link.into(theirs[link.theirs].resolve_neg().float())
    converted["denoiser.time_table.weight"] = time_table(options, theirs)
    table = "denoiser.level_table.weight"
    if table not in converted:  # a network that is told no level
        converted[table] = torch.zeros(network.state_dict()[table].shape)
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def time_table(options: Options, theirs: dict[str, Tensor]) -> Tensor:
    """A table, rows t = 1..T, float32 [T, 4L], of what their network computes anew at each call: two linear layers on a position code.

    Their timesteps count from 0, so that row t is their t - 1; rescale_timesteps stretches them to 0..1000. The code is
    (cos(t w_k), sin(t w_k)) with w_k = 10000^(-k / (L/2)), k = 0..L/2-1 (Vaswani et al. 2017, with the cosines first), in float32
    like theirs: at t = 999 single precision moves an angle by 3e-5, and the network was trained with that.
    """
    T, half = options["diffusion_steps"], options["num_channels"] // 2
    steps = torch.arange(T).float()
    if options["rescale_timesteps"]:
        steps = steps * (1000.0 / T)
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = steps[:, None] * rates[None]
    code = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    weights = {name: theirs[name].float() for name in theirs if name.startswith("time_embed.")}
    hidden = nnf.silu(nnf.linear(code, weights["time_embed.0.weight"], weights["time_embed.0.bias"]))
    return nnf.linear(hidden, weights["time_embed.2.weight"], weights["time_embed.2.bias"])


def _first_convolutions(ours: dict[str, Tensor], options: Options) -> list[Link]:
    """F and, for the implicit ensemble, G: conv([I, x]) = conv_I(I) + conv_x(x), x being the last channel."""
    weight = tuple(ours["denoiser.first.weight"].shape)
    if options.source == CONSENSUS:
        return [
            Link("input_blocks.0.0.weight", weight, _rename("denoiser.first.weight")),
            Link("input_blocks.0.0.bias", weight[:1], _rename("denoiser.first.bias")),
        ]
    channels = ours["encoder.first.weight"].shape[1]

    def split(joined: Tensor) -> dict[str, Tensor]:
        return {"encoder.first.weight": joined[:, :channels], "denoiser.first.weight": joined[:, channels:]}

    def once(bias: Tensor) -> dict[str, Tensor]:
        return {"encoder.first.bias": bias, "denoiser.first.bias": torch.zeros_like(bias)}

    return [
        Link("input_blocks.0.0.weight", (weight[0], channels + 1, *weight[2:]), split),
        Link("input_blocks.0.0.bias", weight[:1], once),
    ]


def _last_convolution(ours: dict[str, Tensor], options: Options) -> list[Link]:
    """The output's convolution. A network whose variance is beta_t itself gets a second channel that is always 1.

    At 1 equation 15 of Nichol & Dhariwal 2021 gives beta_t, so a fixed large variance needs no other code.
    """

    def widened(name: str, fill: float) -> Into:
        if not options.fixed_large:
            return _rename(name)
        return lambda tensor: {name: torch.cat([tensor, torch.full_like(tensor, fill)])}

    shape = tuple(ours["denoiser.last.weight"].shape)
    outputs = 1 if options.fixed_large else shape[0]
    return [
        Link("out.2.weight", (outputs, *shape[1:]), widened("denoiser.last.weight", 0.0)),
        Link("out.2.bias", (outputs,), widened("denoiser.last.bias", 1.0)),
    ]


def _embeddings(width: int, options: Options) -> list[Link]:
    """The two linear layers that `time_table` reads, and the table of levels (or annotators), whose rows become ours unchanged."""
    found = [
        Link("time_embed.0.weight", (4 * width, width), _nothing),
        Link("time_embed.0.bias", (4 * width,), _nothing),
        Link("time_embed.2.weight", (4 * width, 4 * width), _nothing),
        Link("time_embed.2.bias", (4 * width,), _nothing),
    ]
    if options.annotators:
        into = _nothing if options.variant == "soft-label" else _rename("denoiser.level_table.weight")
        found.append(Link(TABLE, (options.annotators, 4 * width), into))
    return found


def _rrdb_modules(rrdbs: int) -> Iterator[tuple[str, str]]:
    yield "encoder.first", "rrdb.conv_first"
    for i in range(rrdbs):
        for j in range(3):
            for k in range(5):
                yield f"encoder.trunk.{i}.blocks.{j}.convs.{k}", f"rrdb.RRDB_trunk.{i}.RDB{j + 1}.conv{k + 1}"
    yield f"encoder.trunk.{rrdbs}", "rrdb.trunk_conv"
    yield "encoder.head", "rrdb.HRconv"
    yield "encoder.last", "rrdb.conv_last"


def _rename(name: str) -> Into:
    return lambda tensor: {name: tensor}


def _nothing(tensor: Tensor) -> dict[str, Tensor]:
    return {}


def _attention_part(name: str, shape: tuple[int, ...], heads: int) -> Into:
    """Reshapes a tensor to `shape`; for heads > 0 its rows (head, q|k|v, channel) become (q|k|v, head, channel)."""

    def into(tensor: Tensor) -> dict[str, Tensor]:
        if heads:
            rows = tensor.shape[0]
            tensor = tensor.reshape(heads, 3, rows // (3 * heads), -1).transpose(0, 1)
        return {name: tensor.reshape(shape)}

    return into
