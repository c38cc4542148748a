"""Exported graphs against PyTorch in float32: call by call, and over whole reverse chains through the runtime's own loop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.export.reference import TorchEngine
from cdiff.runtime.bundle import Bundle
from cdiff.runtime.engines.base import Engine, Float32
from cdiff.runtime.engines.registry import open_engine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.noise import normal
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule

BOUNDS: dict[str, dict[str, float]] = {
    "float32": {"encoder": 1e-4, "denoiser": 1e-3, "maps": 1e-4},
    "float16": {"encoder": 2e-2, "denoiser": 5e-2, "maps": 1e-2},
}
"""The largest error allowed, see `verify`: far above what docs/export.md measured, far below what would change a decision."""

SEED = 20230609
SLICES, ROWS = 4, 8
BUDGET_S = 120.0


@dataclass(frozen=True)
class Chain:
    """How much of a scan the chain comparison runs."""

    slices: int
    levels: int
    runs: int
    steps: int


def verify(bundle: Bundle, reference: TorchEngine, real_slices: Float32 | None) -> dict[str, Any]:
    """Compare the bundle's graphs, run by ONNX Runtime on the CPU, with PyTorch; return what the manifest records.

    real_slices: float32 [S, channels, h, w], normalised, any size; the first few are used. Without them random images only.
    Three errors, each the largest over all inputs:
    encoder: |difference| over the largest |feature|. denoiser: |difference| of x0 (and mix), for the eps target times
    min(1, sqrt(abar_t / (1 - abar_t))), since there x0 = (x - sqrt(1-abar) eps) / sqrt(abar) magnifies the network's own rounding.
    maps: mean |difference| of the soft map after a DDIM chain with the same noise, 0..1.
    Raises CdiffError when one of them is above `BOUNDS[precision]`, or not finite.
    """
    manifest = bundle.manifest
    engine = open_engine(bundle, "onnxruntime", "cpu")
    sets = {"random": _random_images(manifest.image_channels, manifest.image_size)}
    if real_slices is not None and len(real_slices):
        sets["real"] = _framed(real_slices, manifest.slice_framing)

    result: dict[str, Any] = {
        "reference": f"PyTorch {reference.version} float32",
        "engine": f"ONNX Runtime {engine.version}",
    }
    largest: dict[str, float] = dict.fromkeys(("encoder", "denoiser", "maps"), 0.0)
    row_seconds = 0.0
    for name, images in sets.items():
        errors, row_seconds = _calls(
            engine, reference, images, manifest.noise_schedule, manifest.conditions, manifest.target
        )
        result[name] = errors
    chain = _affordable(row_seconds, manifest.conditions, manifest.T)
    for name, images in sets.items():
        result[name] |= _maps(engine, reference, images, chain, manifest.noise_schedule, manifest.outside)
        largest = {key: _worst(largest[key], result[name][key]) for key in largest}
    bounds = BOUNDS[manifest.precision]
    result |= {"chain": vars(chain) | {"sampler": "ddim"}, "largest": largest, "bounds": bounds}
    for key, error in largest.items():
        if not error <= bounds[key]:  # a NaN fails too
            raise CdiffError(
                f"the exported {manifest.precision} graphs differ from PyTorch: {key} error {error:.2g}, above the bound "
                f"{bounds[key]:.2g}; "
                + ("export without --fp16" if manifest.precision == "float16" else "report this as a bug")
            )
    return result


def _calls(
    engine: Engine, reference: TorchEngine, images: Float32, schedule: NoiseSchedule, levels: int, target: str
) -> tuple[dict[str, float], float]:
    """Errors of single calls over rows that cover the timesteps and levels, and the slower side's seconds per row."""
    ours, theirs = engine.encode(images), reference.encode(images)
    encoder = float(np.abs(np.asarray(ours, np.float32) - theirs).max() / max(np.abs(theirs).max(), 1e-12))

    t = np.linspace(1, schedule.T, ROWS).round().astype(np.int64)
    level = np.arange(ROWS, dtype=np.int64) % levels + 1
    row_slice = np.arange(ROWS, dtype=np.int64) % len(images)
    noise = np.stack([normal(SEED, i, 1, 0, 0, images.shape[2:]) for i in range(ROWS)])[:, None].astype(np.float32)
    # States as a chain meets them: the network's own first guess, noised to t.
    guess = reference.denoise(noise, theirs, row_slice, np.full(ROWS, schedule.T), level)[0]
    abar = schedule.abar[t].reshape(-1, 1, 1, 1)
    x = (np.sqrt(abar) * guess + np.sqrt(1 - abar) * noise).astype(np.float32)
    begin = time.perf_counter()
    expected = reference.denoise(x, theirs, row_slice, t, level)
    middle = time.perf_counter()
    found = engine.denoise(x, ours, row_slice, t, level)
    seconds = max(middle - begin, time.perf_counter() - middle) / ROWS
    damping = np.minimum(1, np.sqrt(abar / (1 - abar))) if target == "eps" else np.ones_like(abar)
    denoiser = float((damping * np.abs(found[0] - expected[0])).max())
    if expected[1] is not None and found[1] is not None:
        denoiser = _worst(denoiser, float(np.abs(found[1] - expected[1]).max()))
    return {"encoder": encoder, "denoiser": denoiser}, seconds


def _maps(
    engine: Engine, reference: TorchEngine, images: Float32, chain: Chain, schedule: NoiseSchedule, outside: int
) -> dict[str, float]:
    """Mean and largest difference of both sides' soft maps over the same DDIM chains; a map is 0 where x is at `outside`, 1 inside."""
    windows = Framing("resize", (images.shape[2], images.shape[3])).frame(images[: chain.slices])
    table = sampler_table("ddim", schedule, chain.steps)
    soft = []
    for each in (engine, reference):
        found = segment_windows(each, windows, table, levels=chain.levels, runs=chain.runs, seed=SEED)
        maps = [result.for_masks_from_zero() if outside == 0 else result for result in found]
        soft.append(np.stack([result.level_means.mean(axis=0) for result in maps]))
    difference = np.abs(soft[0] - soft[1])
    return {"maps": float(difference.mean()), "maps_largest": float(difference.max())}


def _affordable(row_seconds: float, levels: int, T: int) -> Chain:
    """The first of three chains that both sides finish within BUDGET_S; the paper's network on a CPU gets the last."""
    steps = min(10, T)
    plans = [Chain(2, levels, 2, steps), Chain(1, levels, 1, steps), Chain(1, 1, 1, min(4, T))]
    costs = [2 * row_seconds * plan.slices * plan.levels * plan.runs * plan.steps for plan in plans]
    return next((plan for plan, cost in zip(plans, costs, strict=True) if cost <= BUDGET_S), plans[-1])


def _random_images(channels: int, size: tuple[int, int]) -> Float32:
    images = np.random.default_rng(SEED).uniform(-1, 1, (2, channels, *size))
    return images.astype(np.float32)


def _framed(slices: Float32, framing: Framing) -> Float32:
    """At most SLICES evenly spread slices as windows of the model's size, as the runtime would cut or resample them; a tiled slice gives its
    central window."""
    chosen = slices[_spread(len(slices), SLICES)]
    windows = framing.frame(np.ascontiguousarray(chosen, dtype=np.float32))
    middle = windows.per_slice // 2
    return np.stack([windows.image(i * windows.per_slice + middle) for i in range(len(chosen))])


def _spread(total: int, wanted: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, total - 1, min(total, wanted)).round().astype(np.int64))


def _worst(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
