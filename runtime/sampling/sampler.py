"""A sampler as a table: x' = a x + b x0 + c x0_prev + d z, a float64 row for each step.

Kept timesteps. `steps` of the T timesteps are kept, equally spaced from the noisy end: t_k = round(T - k T/steps),
k = 0..steps-1 (diffusers calls this "trailing"). The first is always T, where the chain starts from N(0, I), and the last is
near T/steps, where there is still noise to remove; with steps = T all are kept. Every coefficient is for a step between two
kept neighbours t -> s, never for t -> t-1. The last step goes to s = 0, where abar is 1 and all three samplers land on x0
itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.schedule import NoiseSchedule

Float64 = NDArray[np.float64]
SamplerName = Literal["ddpm", "ddim", "dpm++2m"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)


@dataclass(frozen=True)
class SamplerTable:
    """The rows of one sampler, in the order in which they run; every array has length S, the number of steps.

    `t` int64 is the timestep that the network sees (1..T); `a`, `b`, `c`, `d` float64 multiply x, x0, the x0 of the step before
    and the noise z. `log_variance_min` and `log_variance_max` (ddpm only, else None) are the bounds between which a network with
    a learned variance interpolates: wherever d is not 0, exp(((1 - mix) min + mix max) / 2) then replaces it.
    """

    name: SamplerName
    t: NDArray[np.int64]
    a: Float64
    b: Float64
    c: Float64
    d: Float64
    log_variance_min: Float64 | None = field(default=None)
    log_variance_max: Float64 | None = field(default=None)

    def __len__(self) -> int:
        return len(self.t)


def kept_timesteps(T: int, steps: int) -> NDArray[np.int64]:
    """The `steps` kept timesteps of 1..T, from T down, int64 (see the module's docstring). Raises CdiffError unless 1 <= steps <= T."""
    if not 1 <= steps <= T:
        raise CdiffError(f"{steps} steps are asked for, but the model was trained with {T}: use 1 to {T}")
    return np.array([round(T - k * T / steps) for k in range(steps)], np.int64)


def sampler_table(name: str, schedule: NoiseSchedule, steps: int | None = None) -> SamplerTable:
    """The table of sampler `name` over `steps` kept timesteps of the schedule, or over all T when steps is None.

    `ddpm`: Ho et al. 2020, equations 6 and 7, with the fixed variance beta tilde. `ddim`: Song et al. 2021, equation 12 with
    sigma = 0. `dpm++2m`: Lu et al. 2022 (DPM-Solver++), algorithm 2, the data-prediction multistep method.
    Raises CdiffError for an unknown name or an impossible number of steps.
    """
    t = kept_timesteps(schedule.T, schedule.T if steps is None else steps)
    abar_t = schedule.abar[t]
    abar_s = np.append(abar_t[1:], 1.0)
    match name:
        case "ddpm":
            return _ddpm(t, abar_t, abar_s)
        case "ddim":
            return _ddim(t, abar_t, abar_s)
        case "dpm++2m":
            return _dpm_solver(t, abar_t, abar_s)
    raise CdiffError(f"sampler {name!r} is not known; use one of {', '.join(SAMPLERS)}")


def _ddpm(t: NDArray[np.int64], abar_t: Float64, abar_s: Float64) -> SamplerTable:
    """q(x_s | x_t, x0): equation 7 of Ho et al., with alpha_t = abar_t / abar_s so that it holds between kept timesteps."""
    alpha = abar_t / abar_s
    beta = 1 - alpha
    beta_tilde = beta * (1 - abar_s) / (1 - abar_t)
    a = np.sqrt(alpha) * (1 - abar_s) / (1 - abar_t)
    b = np.sqrt(abar_s) * beta / (1 - abar_t)
    # Nichol & Dhariwal 2021, equation 15: bounds beta tilde and beta. The last beta tilde is 0 and has no logarithm; no noise
    # is added in that step (d = 0), so the value is never used, and beta stands in for it.
    log_max = np.log(beta)
    log_min = np.log(np.append(beta_tilde[:-1], beta[-1]))
    return SamplerTable("ddpm", t, a, b, np.zeros_like(a), np.sqrt(beta_tilde), log_min, log_max)


def _ddim(t: NDArray[np.int64], abar_t: Float64, abar_s: Float64) -> SamplerTable:
    """x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s) eps, with eps = (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)."""
    a = np.sqrt(1 - abar_s) / np.sqrt(1 - abar_t)
    b = np.sqrt(abar_s) - a * np.sqrt(abar_t)
    zero = np.zeros_like(a)
    return SamplerTable("ddim", t, a, b, zero, zero)


def _dpm_solver(t: NDArray[np.int64], abar_t: Float64, abar_s: Float64) -> SamplerTable:
    """x_s = (sigma_s / sigma_t) x_t - alpha_s (e^-h - 1) D, with lambda = log(alpha / sigma) and h = lambda_s - lambda_t.

    D = x0 + (x0 - x0_prev) h / (2 h_prev), but D = x0 in the first step, which has no predecessor, and in the last, where h
    is infinite and the step lands on x0.
    """
    sigma_t, sigma_s = np.sqrt(1 - abar_t), np.sqrt(1 - abar_s)
    lambda_t = np.log(np.sqrt(abar_t) / sigma_t)
    h = np.append(np.diff(lambda_t), np.inf)
    half = np.zeros_like(h)
    half[1:-1] = h[1:-1] / (2 * h[:-2])
    weight = -np.sqrt(abar_s) * np.expm1(-h)
    return SamplerTable("dpm++2m", t, sigma_s / sigma_t, weight * (1 + half), -weight * half, np.zeros_like(h))
