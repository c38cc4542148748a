"""What an engine says of its layers, in every form that TensorRT gives it, becomes the share of half precision."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cdiff.export.engine_report import Layer, half_share, inspected_layers, plan_layers


def inspected(*layers: Any) -> list[Layer]:
    return inspected_layers(json.dumps({"Layers": list(layers), "Bindings": ["x"]}))


def convolution(**values: Any) -> dict[str, Any]:
    return {"Name": "node_conv2d", "LayerType": "CaskConvolution", "Inputs": [], "Outputs": [], **values}


@pytest.mark.parametrize(
    ("text", "half"),
    [
        ("Half", True),
        ("Channel major FP16 format where channel % 8 == 0", True),
        ("Row major linear FP16 format", True),
        ("Float", False),
        ("Row major linear FP32", False),
        ("BF16", False),
        ("Thirty-two wide channel vectorized row major Int8 format", False),
        ("FP8", False),
        ("N/A due to dynamic shapes", None),
    ],
)
def test_the_first_input_s_type_counts(text: str, half: bool | None) -> None:
    residual = {"Name": "skip", "Format/Datatype": "Float"}  # what is added to a product is float32 by design
    (layer,) = inspected(convolution(Inputs=[{"Name": "x", "Format/Datatype": text}, residual]))
    assert layer.half is half


@pytest.mark.parametrize(
    ("tactic", "half"),
    [
        ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x32", True),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", False),
        ("sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc", False),
        ("", None),
    ],
)
def test_a_kernel_s_name_tells_where_the_formats_do_not(tactic: str, half: bool | None) -> None:
    (layer,) = inspected(convolution(Inputs=[{"Format/Datatype": "N/A due to dynamic shapes"}], TacticName=tactic))
    assert (layer.half, layer.tactic) == (half, tactic)


def test_weights_must_be_half_too() -> None:
    (layer,) = inspected(convolution(Inputs=[{"Format/Datatype": "Half"}], Weights={"Type": "Float", "Count": 9}))
    assert layer.half is False


def test_only_layers_that_multiply_count() -> None:
    half = [{"Format/Datatype": "Half"}]
    layers = inspected(
        convolution(Inputs=half),
        {"Name": "a", "LayerType": "gemm", "Inputs": half},
        {
            "Name": "b",
            "LayerType": "kgen",
            "TacticName": "__myl_ReshCastGath_0x1",
            "Inputs": [{"Format/Datatype": "Float"}],
        },
        {
            "Name": "c",
            "LayerType": "Reformat",
            "ParameterType": "Convolution",
            "Inputs": [{"Format/Datatype": "Float"}],
        },
        {"Name": "d", "LayerType": "Constant"},
        "a layer's name alone",
    )
    assert [layer.name for layer in layers] == ["node_conv2d", "a"]
    assert half_share(layers) == 1


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"Layers": ["conv1", "conv2"]}', "{}"])
def test_an_inspector_that_tells_nothing(text: str) -> None:
    assert inspected_layers(text) == []
    assert half_share([]) is None


def test_the_share_is_of_those_that_tell() -> None:
    layers = [
        Layer("", "", factors, "") for factors in (("float16", ""), ("float16", "float32"), ("", ""), ("", "float16"))
    ]
    assert half_share(layers) == pytest.approx(2 / 3)


def test_an_rtx_engine_s_own_text() -> None:
    """The shape of what TensorRT for RTX 1.7 writes into its files, between binary parts."""
    tensor = '  tensor={{ alignment=128 dims={{ "n" 16 64 64 }} name="{}" offset=0 strides={{ 1 64 }} type={} }}\n'
    plan = (
        "\x00\xff binary\nheader {\n"
        + tensor.format("x", "half")
        + tensor.format("w", "half")
        + tensor.format("y", "float")
    ) + (
        '  corrltn={ name="conv" output={"y" } input={"x" "w" "bias" } stream=0 kernel=__stub layers="[a]\n[b]" }\n'
        '  fully_connected={ name="matmul" output={"y" } input={"x^deref" "w^deref" "alpha" } stream=0 trA=false }\n'
        '  function={ name=other output_args={ "y" } input_args={ "x" } }\n'
    )
    layers = plan_layers(memoryview(plan.encode("latin-1")))
    assert layers == [
        Layer("conv", "corrltn", ("float16", "float16"), "__stub"),
        Layer("matmul", "fully_connected", ("float32",), ""),
    ]
    assert half_share(layers) == 0.5
    assert plan_layers(b"\x00 no text at all") == []
