"""What an engine is made of, read back from it: its convolutions and products, their precision and tactics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

MIN_HALF_SHARE = 0.95
"""Least share of convolutions and products in float16 for a graph or an engine to count as half precision."""

# Our name for each type, and a pattern of TensorRT's spellings. They overlap ("bfloat16" contains "float16"): see `_type`.
TYPES = (
    ("bfloat16", r"bf16|bfloat16"),
    ("float16", r"fp16|half|f16|float16"),
    ("float32", r"fp32|tf32|float|f32"),
    ("float8", r"fp8|f8"),
    ("int8", r"int8"),
)
COMPUTE = r"conv|corr|gemm|matmul|matrix|fprop|mha|attention|fully_connected"
"""What the builders call the layers that hold the arithmetic."""


class Layer(NamedTuple):
    """One layer that multiplies. factors: the types of its input and weights, "" where the source does not say."""

    name: str
    kind: str
    factors: tuple[str, ...]
    tactic: str

    @property
    def half(self) -> bool | None:
        """Whether its factors are float16; None where no type is known."""
        told = [factor for factor in self.factors if factor]
        return all(factor == "float16" for factor in told) if told else None


def half_share(layers: Sequence[Layer]) -> float | None:
    """Of the layers with known types, the share, 0..1, whose factors are float16; None when no type is known."""
    told = [product.half for product in layers if product.half is not None]
    return sum(told) / len(told) if told else None


def network_layers(trt: Any, network: Any) -> list[Layer]:
    """The convolutions and products of a parsed, strongly typed network, with the types that the builder has to keep."""
    kinds = {
        getattr(trt.LayerType, name): name.lower()
        for name in ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "ATTENTION_INPUT")
        if hasattr(trt.LayerType, name)
    }
    found = []
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type in kinds:
            tensors = [layer.get_input(i) for i in range(min(layer.num_inputs, 2))]
            factors = tuple(_type(str(tensor.dtype)) for tensor in tensors if tensor is not None)
            found.append(Layer(layer.name, kinds[layer.type], factors, ""))
    return found


def inspected_layers(information: str) -> list[Layer]:
    """The convolutions and products in what TensorRT's engine inspector says (LayerInformationFormat.JSON, DETAILED).

    Empty when the text gives only the layers' names, or is not JSON.
    """
    try:
        layers = json.loads(information).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    return [_inspected(layer) for layer in layers if isinstance(layer, dict) and _computes(layer)]


def _computes(layer: dict[str, Any]) -> bool:
    words = " ".join(str(layer.get(key, "")) for key in ("LayerType", "ParameterType", "TacticName"))
    return bool(re.search(COMPUTE, words, re.IGNORECASE)) and layer.get("LayerType") != "Reformat"


def _inspected(layer: dict[str, Any]) -> Layer:
    # Inputs after the first are not factors: they are added to the product (a residual, in float32 by design).
    first = [
        _type(str(item.get("Format/Datatype", ""))) for item in layer.get("Inputs", [])[:1] if isinstance(item, dict)
    ]
    weights = layer.get("Weights")
    factors = [*first, _type(str(weights.get("Type", "")) if isinstance(weights, dict) else "")]
    tactic = str(layer.get("TacticName", ""))
    if not any(
        factors
    ):  # with dynamic shapes the inspector may leave formats open; a kernel's name begins with its factors
        factors = [_type(tactic)]
    return Layer(str(layer.get("Name", "")), str(layer.get("LayerType", "")), tuple(factors), tactic)


def plan_layers(plan: bytes | memoryview) -> list[Layer]:
    """The convolutions and products that a TensorRT-for-RTX engine file describes in plain text; needs no GPU.

    The format is not documented (seen in 1.7): layers that do not match are missing, and with another format the list is empty.
    """
    types: dict[bytes, str] = {}
    found = []
    for tensor, type_, kind, name, output, first, second, rest in _plan_lines(plan):
        if tensor:
            types[tensor] = _type(type_.decode())
            continue
        # A suffix such as ^deref marks a view of another buffer, whose type the file does not give; the output's type then stands in.
        factors = [types.get(factor, "") for factor in (first, second)]
        tactic = re.search(rb" kernel=(\S+)", rest)
        found.append(
            Layer(
                name.decode(),
                kind.decode(),
                tuple(factors) if any(factors) else (types.get(output, ""),),
                tactic[1].decode() if tactic else "",
            )
        )
    return found


def _plan_lines(plan: bytes | memoryview) -> Iterator[tuple[bytes, ...]]:
    pattern = re.compile(
        rb'^  tensor=\{[^\n]*? name="([^"\n]+)"[^\n]*? type=(\w+)'
        rb'|^  (corrltn|fully_connected)=\{ name="([^"]*)" output=\{"([^"]+)"[^}]*\} input=\{"([^"]+)" "([^"]+)"([^\n]*)',
        re.MULTILINE,
    )
    for match in pattern.finditer(plan):
        yield tuple(part or b"" for part in match.groups())


def _type(text: str) -> str:
    """Our name (`TYPES`) for the type that the text mentions first; "" when it mentions none."""
    hits = [(match.start(), name) for name, words in TYPES if (match := re.search(words, text, re.IGNORECASE))]
    return min(hits)[1] if hits else ""
