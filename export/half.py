"""The half-precision form of the network: convolutions and matrix products in float16, all else in float32."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from cdiff.export.engine_report import MIN_HALF_SHARE
from cdiff.runtime.errors import CdiffError
from cdiff.train.network import Attention, ConsensusNet

COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Attention")
"""The operators that hold the arithmetic; the others only move, normalise or add."""


class HalfConv2d(nn.Module):
    """A convolution whose input, weights and output are float16; its result is handed on as float32.

    What surrounds it (GroupNorm, SiLU, residual sums, concatenation) thereby stays float32: GroupNorm's variance overflows in
    half precision above |x| = 256, and a residual stream rounded at every block loses what the blocks add to it.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.half()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.half())
        return out.float()


class HalfLinear(nn.Module):
    """`HalfConv2d` for a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.half()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.half())
        return out.float()


class HalfAttention(nn.Module):
    """Self-attention with both products in float16 and the softmax in float32."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.norm = attention.heads, attention.norm
        self.qkv, self.out = HalfConv2d(attention.qkv), HalfConv2d(attention.out)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        q, k, v = (
            part.reshape(b, self.heads, c // self.heads, height * width)
            for part in self.qkv(self.norm(x)).chunk(3, dim=1)
        )
        # Scaling both factors beforehand keeps the product, in float16, as small as the logits.
        scale = (c // self.heads) ** -0.25
        logits = torch.matmul((scale * q).half().transpose(2, 3), (scale * k).half()).float()
        weights = torch.softmax(logits, dim=-1).half()
        h = torch.matmul(v.half(), weights.transpose(2, 3)).float()
        out: Tensor = x + self.out(h.reshape(b, c, height, width))
        return out


def half_network(network: ConsensusNet) -> ConsensusNet:
    """A copy of the network in half precision, for inputs and outputs in float32.

    Raises CdiffError when a weight does not fit into float16.
    """
    copied = copy.deepcopy(network).eval()
    _swap(copied)
    for name, weight in copied.named_parameters():
        if not torch.isfinite(weight).all():
            raise CdiffError(f"weight {name} does not fit into float16 (its limit is 65504); export without --fp16")
    return copied


def _swap(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, Attention):
            setattr(module, name, HalfAttention(child))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, HalfConv2d(child))
        elif isinstance(child, nn.Linear):
            setattr(module, name, HalfLinear(child))
        else:
            _swap(child)


def half_share(path: Path) -> float:
    """Share of the saved graph's compute nodes (`COMPUTE`) whose factors and product are all float16; 0..1.

    Read back from the file by type inference: what an engine will find, not what was intended.
    """
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    nodes = [node for node in graph.node if node.op_type in COMPUTE]
    half = [
        all(types.get(name) == onnx.TensorProto.FLOAT16 for name in (*node.input, *node.output) if name)
        for node in nodes
    ]
    return sum(half) / len(half) if half else 0.0


def check_half(path: Path) -> float:
    """`half_share`, or CdiffError when it is below `MIN_HALF_SHARE`."""
    share = half_share(path)
    if share < MIN_HALF_SHARE:
        raise CdiffError(
            f"{path.name}: only {share:.0%} of its convolutions and products are in half precision, "
            f"and --fp16 means at least {MIN_HALF_SHARE:.0%}; export without --fp16"
        )
    return share
