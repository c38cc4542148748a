"""A tiny pair of graphs with a bundle's interface, written node by node, so that the runtime is tested without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

L = 4


def write_pair(
    folder: Path, *, size: int = 16, T: int = 20, levels: int = 3, channels: int = 1, learned: bool = False
) -> tuple[Path, Path]:
    """Write encoder.onnx and denoiser.onnx; x0 = clip(conv(tanh(conv(x) + features + z_t + z_c)), -1, 1)."""
    rng = np.random.default_rng(0)

    def constant(name: str, *shape: int, scale: float = 0.5) -> Any:
        return numpy_helper.from_array((scale * rng.normal(size=shape)).astype(np.float32), name)

    def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs.split(), [output], **attributes)

    def save(
        name: str, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: list[Any]
    ) -> Path:
        def declare(items: dict[str, Any]) -> list[Any]:
            return [helper.make_tensor_value_info(key, *value) for key, value in items.items()]

        graph = helper.make_graph(nodes, name, declare(inputs), declare(outputs), constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, folder / name)
        return folder / name

    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    same = {"pads": [1, 1, 1, 1]}
    encoder = save(
        "encoder.onnx",
        [node("Conv", "image w b", "h", **same), node("Tanh", "h", "features")],
        {"image": (f32, ["S", channels, size, size])},
        {"features": (f32, ["S", L, size, size])},
        [constant("w", L, channels, 3, 3), constant("b", L)],
    )
    nodes = [
        node("Conv", "x w_in b_in", "h0", **same),
        node("Gather", "features row_slice", "own"),
        node("Add", "h0 own", "h1"),
        node("Gather", "t_table t", "z_t"),
        node("Add", "h1 z_t", "h2"),
        node("Gather", "level_table level", "z_c"),
        node("Add", "h2 z_c", "h3"),
        node("Tanh", "h3", "h4"),
        node("Conv", "h4 w_out b_out", "out", **same),
        node("Clip", "out low high", "x0"),
    ]
    constants = [
        constant("w_in", L, 1, 3, 3, scale=0.3),
        constant("b_in", L),
        constant("t_table", T + 1, L, 1, 1),
        constant("level_table", levels + 1, L, 1, 1),
        constant("w_out", 1, L, 3, 3, scale=0.3),
        constant("b_out", 1),
        numpy_helper.from_array(np.float32(-1), "low"),
        numpy_helper.from_array(np.float32(1), "high"),
    ]
    rows = (i64, ["B"])
    inputs = {
        "x": (f32, ["B", 1, size, size]),
        "features": (f32, ["S", L, size, size]),
        "row_slice": rows,
        "t": rows,
        "level": rows,
    }
    outputs = {"x0": (f32, ["B", 1, size, size])}
    if learned:
        nodes += [node("Conv", "h4 w_mix b_mix", "m", **same), node("Sigmoid", "m", "mix")]
        constants += [constant("w_mix", 1, L, 3, 3), constant("b_mix", 1)]
        outputs["mix"] = (f32, ["B", 1, size, size])
    return encoder, save("denoiser.onnx", nodes, inputs, outputs, constants)
