"""The U-Net peers' networks, made of MONAI's parts: a plain U-Net, and the probabilistic U-Net of Kohl et al. 2018 around it.

Kohl, Romera-Paredes, Meyer, De Fauw, Ledsam, Maier-Hein, Eslami, Rezende, Ronneberger: A Probabilistic U-Net for Segmentation of
Ambiguous Images, NeurIPS 2018, arXiv:1806.05034.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cdiff.runtime.errors import CdiffError

FEATURES = (32, 32, 64, 128, 256, 32)  # 1.98 M parameters
ENCODER = (16, 16, 32, 64, 128)
"""Channels of the probabilistic U-Net's prior and posterior nets: half the U-Net's, since otherwise a third of the time would go into them."""
DIVISOR = 16
"""Rows and columns must be multiples of it: the networks halve a slice four times."""
LATENT = 6
"""Kohl et al.'s dimensions of z on LIDC-IDRI."""
NORM = ("group", {"num_groups": 8})
ACTIVATION = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})


def _monai() -> Any:
    """MONAI's module of the basic U-Net. Raises CdiffError when MONAI is not installed."""
    try:
        from monai.networks.nets import basic_unet
    except ImportError as error:
        raise CdiffError("the U-Net peers need MONAI; pip install --no-deps monai") from error
    return basic_unet


def unet(outputs: int = 1, dropout: float = 0.0) -> nn.Module:
    """A plain 2-D U-Net: image [B, 1, H, W] -> logits [B, outputs, H, W]; H and W divisible by 16.

    dropout: the rate at which features are dropped after every normalised convolution. Raises CdiffError when MONAI is not installed.
    """
    network: nn.Module = _monai().BasicUNet(
        spatial_dims=2, in_channels=1, out_channels=outputs, features=FEATURES, norm=NORM, dropout=dropout
    )
    return _channels_last(network)


@dataclass(frozen=True)
class Gaussian:
    """Gaussians with a diagonal covariance: mean and log_std float32 [B, D]."""

    mean: Tensor
    log_std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """z [..., B, D] of standard normal noise of that shape; gradients pass through (Kingma & Welling 2014)."""
        return self.mean + self.log_std.exp() * noise

    def kl_to(self, other: Gaussian) -> Tensor:
        """D_KL(self || other) in nats, [B]: the sum over D of log(s2/s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2."""
        apart = self.log_std - other.log_std
        squares = (2 * apart).exp() + ((self.mean - other.mean) * (-other.log_std).exp()) ** 2
        return (squares / 2 - apart - 0.5).sum(-1)


class GaussianNet(nn.Module):
    """The prior or the posterior net: an encoder as the U-Net's, its mean over the picture, and one 1x1 convolution (section 2)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        parts = _monai()
        self.encoder = nn.Sequential(
            parts.TwoConv(2, inputs, ENCODER[0], ACTIVATION, NORM, True),
            *(parts.Down(2, a, b, ACTIVATION, NORM, True) for a, b in pairwise(ENCODER)),
        )
        self.head = nn.Conv2d(ENCODER[-1], 2 * LATENT, 1)

    def forward(self, x: Tensor) -> Gaussian:
        """[B, inputs, H, W] -> a Gaussian over z for each."""
        pooled = self.encoder(x).mean((2, 3), keepdim=True)
        mean, log_std = self.head(pooled)[:, :, 0, 0].chunk(2, dim=1)
        return Gaussian(mean, log_std)


class ProbabilisticUNet(nn.Module):
    """Kohl et al. 2018: z joins the U-Net's last feature map through three 1x1 convolutions. z is drawn from a posterior that sees
    image and mask in training, and from a prior that sees the image when segmenting. Raises CdiffError when MONAI is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unet = _monai().BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=FEATURES, norm=NORM)
        self.unet.final_conv = nn.Identity()  # the feature map itself
        self.prior, self.posterior = GaussianNet(1), GaussianNet(2)
        width = FEATURES[-1]
        self.combine = nn.Sequential(
            nn.Conv2d(width + LATENT, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, 1, 1),
        )
        _channels_last(self)

    def posterior_of(self, image: Tensor, mask: Tensor) -> Gaussian:
        """The posterior of images and masks (0 or 1), both [B, 1, H, W]. Masks enter as -1/2 and 1/2, as in the published code."""
        return self.posterior(torch.cat([image, mask - 0.5], 1))  # type: ignore[no-any-return]

    def logits(self, features: Tensor, z: Tensor) -> Tensor:
        """features [B, L, H, W] and z [B, 6] -> logits [B, 1, H, W]."""
        everywhere = z[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return self.combine(torch.cat([features, everywhere], 1))  # type: ignore[no-any-return]

    def draw(self, image: Tensor, noise: Tensor) -> Tensor:
        """Masks of one image [1, 1, H, W] for noise [n, 6] ~ N(0, 1): probabilities [n, 1, H, W]. The U-Net runs once."""
        features = self.unet(image).expand(len(noise), -1, -1, -1)
        return torch.sigmoid(self.logits(features, self.prior(image).sample(noise)))


def _channels_last(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]
