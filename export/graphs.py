"""The two ONNX graphs: the encoder G, run once per slice, and the denoiser, run at each step, which returns x0."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import DENOISER, ENCODER
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.switches import for_all_threads, without_warnings
from cdiff.train.network import Denoiser, Encoder
from cdiff.train.sections import NetworkConfig

if TYPE_CHECKING:
    import onnx

OPSETS = {torch.float32: 20, torch.float16: 21}
"""Measured in docs/export.md. Opset 21 keeps GroupNormalization whole, which TensorRT fuses, and half precision is for GPUs; opset 20
splits it into operators that ONNX Runtime's CPU provider runs faster. Opset 23 has Attention, which few engines run in float32."""

MAX_BYTES = 2**31 - 2**24
"""Protobuf's limit for a file, less room for everything besides the weights."""


class EncoderGraph(nn.Module):
    """image float32 [S, channels, H, W] -> features [S, L, H, W] in `dtype`."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encoder, self.dtype = encoder, dtype

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.encoder(image)
        return features.to(self.dtype)


class DenoiserGraph(nn.Module):
    """One call of the network, up to the estimate of x0 that every sampler's update starts from.

    x float32 [B, 1, H, W]; features [S, L, H, W], shared by a slice's rows; row_slice int64 [B] in 0..S-1;
    t int64 [B] in 1..T; level int64 [B] in 1..K. Returns x0 float32 [B, 1, H, W] = clip(x0, -1, 1), and with a learned variance
    also mix float32 [B, 1, H, W], the share of log beta_t against log beta~_t (Nichol & Dhariwal 2021, eq. 15), unbounded as
    there: clipping it would give an imported network another chain than it was trained for.
    """

    def __init__(self, denoiser: Denoiser, config: NetworkConfig, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.denoiser, self.target, self.learned = denoiser, config.target, config.variance == "learned"
        of_x, of_output = x0_coefficients(config.target, schedule)
        self.register_buffer("of_x", torch.from_numpy(of_x.astype(np.float32)))
        self.register_buffer("of_output", torch.from_numpy(of_output.astype(np.float32)))

    def forward(
        self, x: Tensor, features: Tensor, row_slice: Tensor, t: Tensor, level: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        output = self.denoiser(x, torch.index_select(features, 0, row_slice), t, level).float()
        return self.to_x0(output, x, t)

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x0 (and mix) from the network's own output, float32."""
        x0 = output[:, :1]
        if self.target != "x0":
            x0 = self._of(self.of_x, t) * x + self._of(self.of_output, t) * x0
        x0 = _clip(x0, -1, 1)
        return (x0, (output[:, 1:] + 1) / 2) if self.learned else x0

    @staticmethod
    def _of(table: Any, t: Tensor) -> Tensor:
        return torch.index_select(table, 0, t)[:, None, None, None]


def _clip(value: Tensor, low: float, high: float) -> Tensor:
    """clip(value, low, high), but NaN where the value is not finite: a clip would turn an overflow into a plausible number."""
    finite = value.abs() <= torch.finfo(torch.float32).max
    return torch.where(finite, value.clamp(low, high), torch.full_like(value, torch.nan))


def x0_coefficients(target: str, schedule: NoiseSchedule) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p and q, float64 [T + 1], such that x0 = p_t x_t + q_t output (Salimans & Ho 2022, section 4 for v).

    eps: x0 = (x_t - sqrt(1-abar) eps) / sqrt(abar);  v: x0 = sqrt(abar) x_t - sqrt(1-abar) v;  x0: the output itself.
    """
    signal, noise = np.sqrt(schedule.abar), np.sqrt(1 - schedule.abar)
    if target == "eps":
        return 1 / signal, -noise / signal
    if target == "v":
        return signal, -noise
    return np.zeros_like(signal), np.ones_like(signal)


def write_encoder(graph: EncoderGraph, config: NetworkConfig, folder: Path) -> Path:
    """Write encoder.onnx into `folder`: any number of slices, fixed image size. Returns its path."""
    image = torch.zeros(2, config.image_channels, config.image_size, config.image_size)
    return export_graph(
        graph, {"image": image}, {"image": "slices"}, ["features"], folder / ENCODER, OPSETS[graph.dtype]
    )


def write_denoiser(
    graph: DenoiserGraph, config: NetworkConfig, folder: Path, dtype: torch.dtype, opset: int | None = None
) -> Path:
    """Write denoiser.onnx into `folder`: any number of rows and slices, fixed image size. `dtype` is the features'."""
    rows, size = 3, config.image_size
    inputs = {
        "x": torch.zeros(rows, 1, size, size),
        "features": torch.zeros(2, config.base_channels, size, size, dtype=dtype),
        "row_slice": torch.zeros(rows, dtype=torch.int64),
        "t": torch.ones(rows, dtype=torch.int64),
        "level": torch.ones(rows, dtype=torch.int64),
    }
    axes = dict.fromkeys(inputs, "rows") | {"features": "slices"}
    return export_graph(
        graph, inputs, axes, ["x0", "mix"] if graph.learned else ["x0"], folder / DENOISER, opset or OPSETS[dtype]
    )


def export_graph(
    graph: nn.Module,
    inputs: dict[str, Tensor],
    axes: dict[str, str],
    outputs: list[str],
    path: Path,
    opset: int,
) -> Path:
    """Write a module as an ONNX file and return its path.

    inputs: example tensors by input name. axes: for each input the name of its free first axis, "" for a fixed one. Free axes of
    one name must be equally long; in the examples not 1, which the exporter takes for a constant.
    Raises CdiffError when the weights exceed `MAX_BYTES`, or PyTorch cannot export the module.
    """
    import onnx  # only here: the PyTorch engine uses this module's arithmetic without it

    size = sum(t.numel() * t.element_size() for t in (*graph.parameters(), *graph.buffers()))
    if size >= MAX_BYTES:
        raise CdiffError(
            f"{path.name} would hold {size / 2**30:.1f} GiB, and an ONNX file at most 2; use --fp16 or a smaller network"
        )
    free = {name: torch.export.Dim(name, min=1) for name in axes.values() if name}
    try:
        with _quiet(), torch.no_grad():  # the same graph, sooner: nothing is traced for gradients
            program = torch.onnx.export(
                graph.eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes={name: {0: free[axis]} if axis else {} for name, axis in axes.items()},
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise CdiffError(f"PyTorch {torch.__version__} could not export {path.name}: {reason[0]}") from error
    assert program is not None  # what dynamo=True returns
    model = tidy(program.model_proto)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove stale intermediate types, and stack traces, which hold the exporting machine's paths; changes and returns `model`."""
    graph = model.graph
    del graph.value_info[:]  # opset conversion leaves types that no longer hold, and ONNX Runtime refuses those
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    return model


@for_all_threads
@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter prints and logs its progress and warns about its own internals; its exceptions still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with without_warnings(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
