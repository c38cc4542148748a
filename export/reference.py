"""PyTorch behind the runtime's engine protocol: the reference for the exported graphs, and the baseline of benchmarks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cdiff.export.graphs import DenoiserGraph
from cdiff.runtime.bundle import Bundle
from cdiff.runtime.engines.base import Binding, Float32, HostBinding, Int64, Prediction
from cdiff.runtime.manifest import WEIGHTS
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.network import ConsensusNet


class TorchEngine:
    """The network in float32 by eager PyTorch on `device`, with the arithmetic of the exported denoiser."""

    name = "pytorch"
    version = str(torch.__version__)

    def __init__(self, network: ConsensusNet, schedule: NoiseSchedule, device: str = "cpu") -> None:
        self.device = device
        self._encoder = network.encoder.to(device).eval()
        self._denoiser = DenoiserGraph(network.denoiser, network.config, schedule).to(device).eval()

    @torch.inference_mode()
    def encode(self, images: Float32) -> Float32:
        """Features [S, L, H, W] of images [S, channels, H, W]."""
        return _host(self._encoder(torch.from_numpy(images).to(self.device)))

    @torch.inference_mode()
    def denoise(self, x: Float32, features: Float32, row_slice: Int64, t: Int64, level: Int64) -> Prediction:
        """See `runtime.engines.base.Engine.denoise`."""
        inputs = (torch.from_numpy(array).to(self.device) for array in (x, features, row_slice, t, level))
        output = self._denoiser(*inputs)
        return (_host(output[0]), _host(output[1])) if isinstance(output, tuple) else (_host(output), None)

    def bind(self, rows: int, slots: int) -> Binding:
        """See `runtime.engines.base.Engine.bind`."""
        return HostBinding(self, rows, slots)


def _host(tensor: Tensor) -> Float32:
    return np.asarray(tensor.cpu().numpy())


def load_network(bundle: Bundle, device: str = "cpu") -> ConsensusNet:
    """The bundle's weights in the network that they were trained in, float32, ready to run.

    Raises CdiffError when the bundle lists no weights, or they cannot be read or do not say which network they belong to.
    """
    from cdiff.train.checkpoint import config_of_weights, load_weights, read_tensors

    path = bundle.file(WEIGHTS)
    network = ConsensusNet(config_of_weights(path).network)
    load_weights(network, read_tensors(path), path)
    return network.to(device).eval().requires_grad_(False)
