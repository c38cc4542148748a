"""Intensity normalisation, recorded in checkpoint and bundle: percentiles to -1 and +1, or mean and standard deviation to 0 and 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import several

Limits = tuple[NDArray[Any], NDArray[Any]]
"""The two percentiles, or mean and standard deviation, each [S or 1, channels, 1, 1]."""


@dataclass(frozen=True)
class Intensity:
    """How raw intensities become the network's input, for each channel on its own.

    method "percentile" maps the `lower` and `upper` percentile to -1 and +1, clipped. "standard" subtracts a mean and divides by a
    standard deviation: the numbers in `mean` and `std`, one for all channels or one per channel, for a model that was trained on
    images normalised by its training set's; mean 0 and std 1 leave the values as stored. Without such numbers it takes the
    image's own.
    scope: "slice" takes percentiles, or the image's own mean, of each slice (for scans whose slices were scaled one by one),
    "volume" of the scan.
    """

    scope: str = "slice"
    lower: float = 0.5
    upper: float = 99.5
    method: str = "percentile"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.scope not in ("slice", "volume"):
            raise CdiffError(f"intensity scope {self.scope!r} is not known; use 'slice' or 'volume'")
        if not 0 <= self.lower < self.upper <= 100:
            raise CdiffError(
                f"intensity percentiles must satisfy 0 <= lower < upper <= 100, not {self.lower}, {self.upper}"
            )
        if self.method not in ("percentile", "standard"):
            raise CdiffError(f"intensity method {self.method!r} is not known; use 'percentile' or 'standard'")
        if len(self.mean) != len(self.std) or not all(math.isfinite(m) and 0 < s < math.inf for m, s in self._pairs):
            raise CdiffError(
                f"an intensity's mean and std must be as many numbers, each std positive, not {self.mean} and {self.std}"
            )
        if self.mean and self.method != "standard":
            raise CdiffError("an intensity's mean and std need the method 'standard'")

    @property
    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.mean, self.std, strict=False))

    def apply(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """[S, channels, H, W] of any real dtype -> float32, same shape; in [-1, 1] for percentiles. A constant image becomes zeros.

        Raises CdiffError when `mean` is neither one number nor one per channel, or the result is not finite.
        """
        return self.scaled(array, self.limits(array))

    def limits(self, over: NDArray[Any]) -> Limits | None:
        """The limits for `scaled`, taken of slices, or of a part of each, [S, channels, h, w]: those of each slice, or for the scope "volume" of
        all; None where `mean` and `std` are given."""
        if self.mean:
            return None
        axes = (2, 3) if self.scope == "slice" else (0, 2, 3)
        # Contiguous: a sum over a view of an array may round otherwise than one over its copy.
        seen = np.ascontiguousarray(over, dtype=np.float32)
        if self.method == "standard":
            return seen.mean(axis=axes, keepdims=True, dtype=np.float64), seen.std(
                axis=axes, keepdims=True, dtype=np.float64
            )
        low, high = np.percentile(seen, (self.lower, self.upper), axis=axes, keepdims=True).astype(np.float32)
        return low, high

    def scaled(self, array: NDArray[Any], limits: Limits | None) -> NDArray[np.float32]:
        """`apply` with the `limits` of these slices, or of the scan that they are from."""
        values = np.asarray(array, dtype=np.float32)
        if limits is None:
            if len(self.mean) not in (1, values.shape[1]):
                raise CdiffError(
                    f"the intensity has {several(len(self.mean), 'mean')}, but the image has {several(values.shape[1], 'channel')}"
                )
            with np.errstate(all="ignore"):
                mean, std = (np.asarray(numbers, np.float32)[:, None, None] for numbers in (self.mean, self.std))
                given = np.asarray((values - mean) / std, dtype=np.float32)
            if not np.isfinite(given).all():
                raise CdiffError(
                    f"the image's values, minus {self.mean} and divided by {self.std}, are beyond float32; correct the intensity's mean and std"
                )
            return given
        if self.method == "standard":
            mean, std = limits
            flat = std <= 0
            return np.asarray(np.where(flat, 0, (values - mean) / np.where(flat, 1, std)), dtype=np.float32)
        low, high = limits
        span = high - low
        flat = span <= 0
        scaled: NDArray[np.float32] = values - low
        scaled /= np.where(flat, 1, span)  # in place: for a long scan each array is hundreds of megabytes
        scaled *= 2
        scaled -= 1
        np.clip(scaled, -1, 1, out=scaled)
        np.copyto(scaled, 0, where=flat)
        return scaled

    def describe(self) -> str:
        """The normalisation in words, for a model card."""
        if self.mean:
            if set(self._pairs) == {(0, 1)}:
                return "none: values as stored"
            mean, std = (", ".join(f"{number:g}" for number in numbers) for numbers in (self.mean, self.std))
            return f"minus {mean}, divided by {std}" + (" (a number a channel)" if len(self.mean) > 1 else "")
        if self.method == "standard":
            return f"mean and standard deviation of each {self.scope} to 0 and 1"
        return f"percentiles {self.lower} and {self.upper} of each {self.scope} to -1 and 1"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `method`, `mean` and `std` only for the method "standard"."""
        values: dict[str, Any] = {"scope": self.scope, "lower": self.lower, "upper": self.upper}
        if self.method == "standard":
            values |= {"method": self.method, "mean": list(self.mean), "std": list(self.std)}
        return values

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Intensity:
        """The inverse of to_json. Raises TypeError for a key that to_json does not write."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**values)


class Normalised:
    """Slices [S,channels,h,w] in the intensities of a model, each computed when it is asked for, so that a long scan is not in memory twice."""

    def __init__(self, intensity: Intensity, raw: NDArray[Any], over: NDArray[Any], limits: Limits | None) -> None:
        """raw: the slices as read. over: the part of each of which limits are taken where `limits` is None, as for the scope "slice"."""
        self._intensity, self._raw, self._over, self._limits = intensity, raw, over, limits
        self._last: tuple[int, NDArray[np.float32]] | None = None
        self.shape: tuple[int, ...] = raw.shape

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, part: Any) -> Any:
        """For a number its slice [channels,h,w]; for a Python slice the `Normalised` of that part, as lazy as this one."""
        if isinstance(part, slice):
            return Normalised(self._intensity, self._raw[part], self._over[part], self._limits)
        last = self._last
        if last is None or last[0] != part:  # a slice's tiles are asked for one after another
            one = slice(part, part + 1)
            limits = self._limits or self._intensity.limits(self._over[one])
            last = self._last = part, self._intensity.scaled(self._raw[one], limits)[0]
        return last[1]
