"""Intensity normalisation: percentiles of each slice or volume go to -1 and +1, recorded in checkpoint and bundle."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError


@dataclass(frozen=True)
class Intensity:
    """Maps the `lower` and `upper` percentile to -1 and +1, clipped, for each channel on its own.

    scope: "slice" takes the percentiles of each slice (for scans whose slices were scaled one by one), "volume" of the scan.
    """

    scope: str = "slice"
    lower: float = 0.5
    upper: float = 99.5

    def __post_init__(self) -> None:
        if self.scope not in ("slice", "volume"):
            raise CdiffError(f"intensity scope {self.scope!r} is not known; use 'slice' or 'volume'")
        if not 0 <= self.lower < self.upper <= 100:
            raise CdiffError(
                f"intensity percentiles must satisfy 0 <= lower < upper <= 100, not {self.lower}, {self.upper}"
            )

    def apply(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """[S, channels, H, W] of any real dtype -> float32 in [-1, 1], same shape. A constant image becomes zeros."""
        axes = (2, 3) if self.scope == "slice" else (0, 2, 3)
        values = np.asarray(array, dtype=np.float32)
        low, high = np.percentile(values, (self.lower, self.upper), axis=axes, keepdims=True).astype(np.float32)
        span = high - low
        flat = span <= 0
        scaled = (values - low) / np.where(flat, 1, span) * 2 - 1
        return np.asarray(np.where(flat, 0, np.clip(scaled, -1, 1)), dtype=np.float32)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Intensity:
        return cls(**data)
