"""PyTorch as an engine of its own: half precision, channels last, whole chains on the device, each step replayed as a CUDA graph.

For GPUs without TensorRT, and as the baseline that other engines have to beat. It draws the runtime's own noise on the device.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cdiff.export.graphs import DenoiserGraph
from cdiff.export.reference import load_network
from cdiff.export.torch_chain import TorchBinding, exact, within_memory
from cdiff.export.torch_noise import normals
from cdiff.runtime.bundle import Bundle
from cdiff.runtime.device.gpu import parse_device
from cdiff.runtime.engines.base import Float32, Int64, Prediction, variance_as_listed
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.switches import for_all_threads
from cdiff.train.machine import as_it_starts, no_room, thread_as_it_starts, usable
from cdiff.train.network import ConsensusNet

if TYPE_CHECKING:
    from cdiff.export.torch_fused import FusedDenoiser


LOG = logging.getLogger("cdiff")


@dataclass(frozen=True)
class Options:
    """How the engine runs the network.

    half: convolutions and products in float16, GroupNorm's sums, the last convolution and the chain in float32; else all float32.
    channels_last: the memory order in which half-precision convolutions are fastest. capture: replay a step as a CUDA graph (on a GPU only).
    compiled: compile the denoiser in this mode of `torch.compile`, and on a GPU the noise in the default mode; None for eager.
    tuned: cuDNN times its algorithms for each convolution at the first call and takes the fastest, instead of going by its heuristics;
    another process may choose differently, so the last bits may differ.
    fused: run the denoiser with our kernels between its convolutions (`torch_fused`), and draw the noise in one kernel; by default in half
    precision, channels last, on a GPU where Triton works and nothing is compiled.
    """

    half: bool = True
    channels_last: bool = True
    capture: bool = True
    compiled: str | None = None
    tuned: bool = False
    fused: bool | None = None


class TorchChainEngine:
    """The network by PyTorch on `device`, with bindings that run whole chains there. Implements `runtime.engines.base.Engine`.

    Raises CdiffError when `device` names no device or a GPU that PyTorch does not see or cannot put the model on, when a weight does not
    fit into float16, or when `fused` was asked for and cannot run.
    """

    name = "torch"
    version = str(torch.__version__)

    def __init__(
        self, network: ConsensusNet, schedule: NoiseSchedule, device: str = "cpu", options: Options | None = None
    ) -> None:
        number = parse_device(device)
        if number is not None and number >= (count := torch.cuda.device_count()):
            seen = f"only cuda:0 to cuda:{count - 1}" if count > 1 else "only cuda:0" if count else "no GPU"
            raise CdiffError(f"device {device}: PyTorch {torch.__version__} sees {seen}; use --device cpu")
        self.options = options or Options(half=number is not None)
        self.capture = self.options.capture and number is not None
        self.device = "cpu" if number is None else f"cuda:{number}"
        self.dtype = torch.float16 if self.options.half else torch.float32
        self.config, self.schedule = network.config, schedule
        order = torch.channels_last if self.options.channels_last else torch.contiguous_format
        prepared = half_precision(network) if self.options.half else copy.deepcopy(network)
        with usable(self.device):
            prepared = prepared.to(self.device)
            prepared = prepared.to(memory_format=order).eval().requires_grad_(False)  # type: ignore[call-overload]
            self.fused = self._fused(network)
            self.graph = DenoiserGraph(prepared.denoiser, network.config, schedule).to(self.device)
        self.encoder: Callable[[Tensor], Tensor] = prepared.encoder
        self.network: Callable[..., Tensor] = prepared.denoiser
        self.noise: Callable[..., Tensor] = normals
        self._binding: TorchBinding | None = None
        self.turn = threading.Lock()
        if self.options.compiled is not None:
            self.network = torch.compile(prepared.denoiser, mode=self.options.compiled, dynamic=False)
            if number is not None:  # compiled for a CPU by PyTorch 2.11, the noise has other words
                self.noise = torch.compile(normals, dynamic=False)
        elif self.fused is not None:
            from cdiff.export.torch_kernels import drawn

            self.noise = drawn

    def _fused(self, network: ConsensusNet) -> FusedDenoiser | None:
        """The denoiser with our kernels, or None without them; with a warning where Triton does not work on this machine."""
        options = self.options
        wanted = options.fused
        if wanted is None:
            wanted = options.half and options.channels_last and options.compiled is None and self.device != "cpu"
        if not wanted:
            return None
        try:
            from cdiff.export.torch_fused import FusedDenoiser
            from cdiff.export.torch_kernels import try_out

            try_out(self.device)
            return FusedDenoiser(network.denoiser, self.device, self.dtype)
        except Exception as error:  # Triton compiles at its first use, and what it lacks there raises what it likes
            if no_room(error):
                raise
            why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        without = f"the kernels between the convolutions do not run here ({why}); Triton needs a C compiler and Python's headers"
        if options.fused:
            raise CdiffError(f"{without}; leave out fused")
        LOG.warning("%s: going on with PyTorch's own, slower; the maps are the same but for rounding", without)
        return None

    @exact
    def encode(self, images: Float32) -> NDArray[Any]:
        """See `runtime.engines.base.Engine.encode`."""
        return np.asarray(self.features(torch.from_numpy(images).to(self.device)).cpu().numpy())

    @exact
    def denoise(self, x: Float32, features: NDArray[Any], row_slice: Int64, t: Int64, level: Int64) -> Prediction:
        """See `runtime.engines.base.Engine.denoise`."""
        x_, features_, slot, t_, level_ = (
            torch.from_numpy(v).to(self.device) for v in (x, features, row_slice, t, level)
        )
        x0, mix = self.predict(x_, features_.permute(0, 2, 3, 1).contiguous(), slot, t_, level_)
        return x0.cpu().numpy(), None if mix is None else mix.cpu().numpy()

    @within_memory
    @thread_as_it_starts()
    def bind(self, rows: int, slots: int) -> TorchBinding:
        """See `runtime.engines.base.Engine.bind`. The last binding, with its captures, is returned again for as many rows and no more slots."""
        if self._binding is None or self._binding.rows != rows or self._binding.slots < slots:
            self._binding = None  # frees its memory before the next one's is taken
            self._binding = TorchBinding(self, rows, slots)
        return self._binding

    def features(self, image: Tensor) -> Tensor:
        """G(I) [S,L,H,W] in the engine's type."""
        with algorithms_timed(self.options.tuned):
            return self.encoder(image.to(self.dtype))

    def predict(
        self, x: Tensor, features: Tensor, slot: Tensor, t: Tensor, level: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """One call: x0, and mix for a learned variance. features [S,H,W,L], so that each set is one piece of memory."""
        with algorithms_timed(self.options.tuned):
            if self.fused is not None:
                out = self.fused(x, features, slot, t, level)
            else:
                own = features.index_select(0, slot).permute(0, 3, 1, 2)
                own = own if self.options.channels_last else own.contiguous()
                out = self.network(x.to(self.dtype), own, t, level)
        found = self.graph.to_x0(out.float(), x, t)
        return found if isinstance(found, tuple) else (found, None)


@for_all_threads
@contextmanager
def cudnns_choice_kept() -> Iterator[None]:
    """The block may change how cuDNN chooses its algorithms; the old way is restored when the last thread has left it."""
    before = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def algorithms_timed(tuned: bool) -> Iterator[None]:
    """Within the block cuDNN takes the algorithms that it timed as fastest, timing them where needed; if not `tuned`, its heuristics'."""
    with cudnns_choice_kept():
        torch.backends.cudnn.benchmark = tuned
        yield


@as_it_starts()
def open_torch(bundle: Bundle, device: str) -> TorchChainEngine:
    """The engine over a bundle's weights, in the bundle's own precision.

    Raises CdiffError as `load_network`, `variance_as_listed` and `TorchChainEngine` do.
    """
    options = Options(half=bundle.manifest.precision == "float16")
    network = load_network(bundle)
    variance_as_listed(bundle, network.config.variance == "learned")
    return TorchChainEngine(network, bundle.manifest.noise_schedule, device, options)


def half_precision(network: ConsensusNet) -> ConsensusNet:
    """A copy whose weights and activations are float16, but for the last convolution, whose error a chain would magnify.

    PyTorch's GroupNorm and attention add up in float32 by themselves. Raises CdiffError when a weight does not fit into float16.
    """
    copied = copy.deepcopy(network).half()
    for name, weight in copied.named_parameters():
        if not torch.isfinite(weight).all():
            raise CdiffError(f"weight {name} does not fit into float16 (its limit is 65504); use the float32 model")
    copied.denoiser.last = _InFloat32(network.denoiser.last)  # type: ignore[assignment]
    return copied


class _InFloat32(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = copy.deepcopy(conv).float()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.float())
        return out
