"""The forward process, the three prediction targets and the loss (Ho et al. 2020; Salimans & Ho 2022 for v; Nichol & Dhariwal 2021
for the learned variance), in PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cdiff.runtime.sampling.schedule import NoiseSchedule


class Diffusion:
    """Schedule constants on a device, indexed by t in 0..T, and what is computed from them.

    outside: the value of M^c where nobody drew, -1 or 0; inside it is 1.
    Everything here is float32 or float64 whatever the network's precision is. Shapes: x, noise [B, 1, H, W], t int64 [B].
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        target: str,
        device: torch.device | str = "cpu",
        dice_weight: float = 0.0,
        outside: int = -1,
    ) -> None:
        self.schedule, self.target, self.dice_weight, self.outside = schedule, target, dice_weight, outside
        self.abar = torch.from_numpy(schedule.abar).to(device)
        self.beta = torch.from_numpy(schedule.betas).to(device)

    def coded(self, m: Tensor) -> Tensor:
        """A mask in [-1, 1] rescaled to the range that is diffused, `outside` to 1."""
        return m if self.outside == -1 else (m + 1) / 2

    def fraction(self, x0: Tensor) -> Tensor:
        """x0 as a fraction: 0 at `outside` and below, 1 inside."""
        return (x0.clamp(self.outside, 1) - self.outside) / (1 - self.outside)

    def noised(self, m: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) M^c + sqrt(1 - abar_t) eps."""
        alpha, sigma = self._scales(t)
        return alpha * m + sigma * noise

    def aim(self, m: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return for M^c and eps: eps, x0 = M^c, or v = sqrt(abar) eps - sqrt(1 - abar) M^c."""
        if self.target == "eps":
            return noise
        if self.target == "x0":
            return m
        alpha, sigma = self._scales(t)
        return alpha * noise - sigma * m

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 from the network's first channel, clipped to [-1, 1] as in both published codes, whatever `outside` is."""
        alpha, sigma = self._scales(t)
        prediction = output[:, :1].float()
        if self.target == "eps":
            prediction = (x - sigma * prediction) / alpha
        elif self.target == "v":
            prediction = alpha * x - sigma * prediction
        return prediction.clamp(-1, 1)

    def loss(self, output: Tensor, m: Tensor, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Mean squared error to the target; plus dice_weight times 1 - Dice of x0; with learned variance plus the variational bound,
        in bits per pixel, times T / 1000. Float32 [].

        The bound trains only the variance: the mean is detached, as in Nichol & Dhariwal's L_hybrid. The weight is their 0.001, times
        T because the term at one t stands for the sum of T terms.
        """
        output = output.float()
        mse = torch.mean((output[:, :1] - self.aim(m, noise, t)) ** 2)
        if self.dice_weight:
            overlap = _soft_overlap(self.fraction(self.to_x0(output, x, t)), self.fraction(m))
            mse = mse + self.dice_weight * (1 - overlap).mean()
        if output.shape[1] == 1:
            return mse
        x0 = self.to_x0(output[:, :1].detach(), x, t)
        return mse + self._bound(output[:, 1:], x0, m, t).mean() * (self.schedule.T / 1000)

    def _bound(self, mix: Tensor, x0: Tensor, m: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, M) || p(x_{t-1} | x_t)) in bits per pixel, [B]; at t = 1 the bits to encode M, in steps of 2/255, under p."""
        abar, previous, beta = (
            _column(values[i]) for values, i in ((self.abar, t), (self.abar, t - 1), (self.beta, t))
        )
        tilde = beta * (1 - previous) / (1 - abar)
        # beta tilde is 0 at t = 1; its neighbour stands in, as in the published code, so that the logarithm exists. With T = 1, which
        # has no neighbour, beta does, as in the sampler's table.
        floor = self.beta[1]
        if self.schedule.T > 1:
            floor = self.beta[2] * (1 - self.abar[1]) / (1 - self.abar[2])
        log_tilde = torch.log(torch.where(_column(t) == 1, floor, tilde)).float()
        fraction = (mix + 1) / 2
        log_variance = fraction * torch.log(beta).float() + (1 - fraction) * log_tilde
        b = (torch.sqrt(previous) * beta / (1 - abar)).float()
        gap = b * (m - x0)  # the means differ only through x0; at t = 1 they are M and x0
        precision = torch.exp(-log_variance)
        kl = 0.5 * (log_variance - log_tilde - 1 + torch.exp(log_tilde - log_variance) + gap**2 * precision)
        terms = torch.where(_column(t) == 1, _surprise(m, gap, torch.sqrt(precision)), kl)
        terms = terms / torch.log(torch.tensor(2.0))
        return terms.mean(dim=(1, 2, 3))

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = _column(self.abar[t])
        return torch.sqrt(abar).float(), torch.sqrt(1 - abar).float()


def _surprise(m: Tensor, gap: Tensor, scale: Tensor) -> Tensor:
    """-log of the probability that a normal of mean m - `gap` and deviation 1 / `scale` falls into m's bin of width 2/255, in nats, at
    most 27.6 (Ho et al. 2020, equation 13; the outer bins are open).

    A density would be unbounded: losses became negative, and at T = 1000 a wrong x0 at t = 1 cost thousands of bits, so that after
    gradient clipping nothing was left of the other rows' gradients.
    """
    above, below = (scale * (gap + side / 255) for side in (1, -1))
    # At a wide gap both values would be near 1, and their difference lost: the mirrored bin has the same probability, of values near 0.
    inner = _normal_cdf(scale * (1 / 255 - gap.abs())) - _normal_cdf(scale * (-1 / 255 - gap.abs()))
    share = torch.where(m > 0.999, _normal_cdf(-below), torch.where(m < -0.999, _normal_cdf(above), inner))
    return -torch.log(share.clamp(min=1e-12))


def _normal_cdf(z: Tensor) -> Tensor:
    """CDF of the standard normal by the published codes' approximation, (1 + tanh(a)) / 2; as a sigmoid, which is exact near 0 in float32."""
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


def _soft_overlap(p: Tensor, y: Tensor) -> Tensor:
    """Soft Dice per row, [B], of two maps in [0, 1] (Milletari et al. 2016: squares in the denominator); 1 where both are empty."""
    p, y = p.flatten(1), y.flatten(1)
    # One pixel's worth of smoothing: a level that nobody reached has no overlap to gain, but a stray mask there must still cost.
    return (2 * (p * y).sum(1) + 1) / ((p * p).sum(1) + (y * y).sum(1) + 1)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
