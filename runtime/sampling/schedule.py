"""The noise schedule: beta_t and abar_t = prod(1 - beta_s), t = 1..T (Ho et al. 2020, section 2; Amit et al. 2023, section 3;
Nichol & Dhariwal 2021, equation 17, for the cosine)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError

MOST_STEPS = 1_000_000
"""Largest T. Usual values are up to thousands; without a limit, a number in a file would decide how much memory is taken."""


@dataclass(frozen=True)
class NoiseSchedule:
    """A schedule of T steps, linear or cosine. Arrays have length T + 1 and are indexed by t, so `abar[0]` is 1 (no noise).

    kind: "linear" (betas from `beta_start` to `beta_end`) or "cosine", which uses only T.
    `scaled` multiplies both ends by 1000/T, as the published code does: the paper's literal values with T = 100 leave
    abar_T = 0.364, and a chain started from N(0, I) would start from a state that the network never saw.

    Raises CdiffError for an unknown kind, a T outside 1..MOST_STEPS or a beta outside (0, 1).
    """

    T: int = 100
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    scaled: bool = True
    kind: str = "linear"

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "cosine"):
            raise CdiffError(f"noise schedule kind {self.kind!r} is not known; use 'linear' or 'cosine'")
        if not 1 <= self.T <= MOST_STEPS:
            raise CdiffError(f"a noise schedule needs 1 <= T <= {MOST_STEPS}, not {self.T}")
        if self.kind == "linear" and (not (0 < self.beta_start <= self.beta_end) or self.betas.max() >= 1):
            raise CdiffError(
                f"the noise schedule's betas run from {self.betas[1]:.3g} to {self.betas[-1]:.3g} and must lie in (0, 1); "
                "raise T, lower beta_end, or set scaled=false"
            )

    @cached_property
    def betas(self) -> NDArray[np.float64]:
        """beta_t, float64 [T + 1]; betas[0] = 0."""
        if self.kind == "cosine":
            # abar(u) = cos^2(pi/2 (u + 0.008) / 1.008) at u = t / T; beta would be 1 at u = 1, so it is capped at 0.999.
            wave = np.cos((np.arange(self.T + 1) / self.T + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.concatenate([[0.0], np.minimum(1 - wave[1:] / wave[:-1], 0.999)])
        scale = 1000 / self.T if self.scaled else 1.0
        ramp = np.linspace(scale * self.beta_start, scale * self.beta_end, self.T, dtype=np.float64)
        return np.concatenate([[0.0], ramp])

    @cached_property
    def abar(self) -> NDArray[np.float64]:
        """abar_t, float64 [T + 1]; abar[0] = 1."""
        return np.asarray(np.cumprod(1 - self.betas), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "T": self.T,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "scaled": self.scaled,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NoiseSchedule:
        """The inverse of to_json. Raises TypeError for an unknown key, CdiffError for values out of range."""
        return cls(**data)
