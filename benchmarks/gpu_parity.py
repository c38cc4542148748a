"""How far an engine is from PyTorch in float32: single calls, and final maps over full chains with the same noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.benchmarks.gpu_measure import evened, table_of, windows_of
from cdiff.benchmarks.gpu_subjects import SEED, Subject
from cdiff.runtime.engines.base import Engine, Float32
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.noise import normal
from cdiff.runtime.scoring.metrics import at_least, dice

ROWS = 4


def call_errors(engine: Engine, reference: Engine, image: Float32, model: Subject) -> dict[str, float]:
    """How far an engine is from the reference: in one encoding (largest difference over the largest feature), and in one denoiser call whose
    rows cover timesteps and levels (largest and mean difference).

    `x0` is the clipped estimate; `eps` is the same difference times sqrt(abar / (1 - abar)), by which an output for eps differs where the
    estimate is not clipped. Raises CdiffError when the engine's values are not finite.
    """
    ours, theirs = np.asarray(engine.encode(image)), np.asarray(reference.encode(image))
    encoder = np.abs(ours.astype(np.float32) - theirs).max() / max(np.abs(theirs).max(), 1e-12)
    x, slot, t, level = _states(reference, theirs, image, model)
    alpha = model.schedule.abar[t].reshape(-1, 1, 1, 1)
    x0 = engine.denoise(x, ours, slot, t, level)[0]
    for what, value in (("encoder", ours), ("denoiser", x0)):
        if not np.isfinite(value).all():
            raise CdiffError(f"a single call of the {what} on {engine.name} returned a value that is not finite")
    gap = np.abs(x0 - reference.denoise(x, theirs, slot, t, level)[0])
    eps = gap * np.sqrt(alpha / (1 - alpha))
    return {
        "encoder": float(encoder),
        "x0": float(gap.max()),
        "x0_mean": float(gap.mean()),
        "eps": float(eps.max()),
        "eps_mean": float(eps.mean()),
    }


def batch_error(engine: Engine, image: Float32, model: Subject, batch: int) -> dict[str, float]:
    """Largest difference of x0 between rows in a batch of `batch` rows, at every place in it, and the same rows in a batch of their own.

    Tensors of large batches have more bytes than 32 bits can count, which a kernel can get wrong. Raises CdiffError for non-finite values.
    """
    features = np.asarray(engine.encode(image))
    rows = _states(engine, features, image, model)
    alone = _x0(engine, features, rows)
    again = -(-batch // ROWS)
    together = _x0(engine, features, tuple(np.concatenate([each] * again)[:batch] for each in rows))
    apart = [np.abs(together[at : at + ROWS] - alone[: batch - at]).max() for at in range(0, batch, ROWS)]
    if not np.isfinite(apart).all():
        raise CdiffError(f"a batch of {batch} rows on {engine.name} returned a value that is not finite")
    return {"batch": batch, "x0": float(max(apart))}


States = tuple[NDArray[Any], ...]


def _states(engine: Engine, features: Any, image: Float32, model: Subject) -> States:
    """x, slot, t and level of ROWS rows: timesteps spread out, levels in turn, and x as in a chain, the network's own first guess noised to t."""
    network = model.config.network
    t = np.linspace(1, network.T, ROWS).round().astype(np.int64)
    level = np.arange(ROWS, dtype=np.int64) % network.levels + 1
    slot = np.zeros(ROWS, np.int64)
    z = np.stack([normal(SEED, 0, 1, row, 0, image.shape[2:]) for row in range(ROWS)])[:, None]
    guess = engine.denoise(z, features, slot, np.full(ROWS, network.T), level)[0]
    alpha = model.schedule.abar[t].reshape(-1, 1, 1, 1)
    return (np.sqrt(alpha) * guess + np.sqrt(1 - alpha) * z).astype(np.float32), slot, t, level


def _x0(engine: Engine, features: Any, rows: States) -> Float32:
    x, slot, t, level = rows
    return engine.denoise(x, features, slot, t, level)[0]


def map_errors(engine: Engine, reference: Engine, image: Float32, model: Subject) -> dict[str, Any]:
    """How far the soft map of the whole protocol is from the reference's with the same noise: mean and largest difference, and Dice.

    `dice` is of the soft maps at one half, `dice_levels` the least over the levels' maps at one half.
    """
    levels = model.config.network.levels
    both = []
    for each in (reference, engine):
        (result,) = segment_windows(
            each, windows_of(image), table_of(model, model.config.network.T), levels=levels, runs=model.runs, seed=SEED,
            batch=evened(model, 32),
        )  # fmt: skip
        both.append(result.level_means)
    soft = [maps.mean(axis=0) for maps in both]
    gap = np.abs(soft[0] - soft[1])
    masks = [[at_least(maps[c], 0.5) for c in range(levels)] for maps in both]
    return {
        "mean": float(gap.mean()), "max": float(gap.max()),
        "dice": dice(at_least(soft[0], 0.5), at_least(soft[1], 0.5)),
        "dice_levels": min(dice(a, b) for a, b in zip(*masks, strict=True)),
        "pixels": int(np.count_nonzero(at_least(soft[0], 0.5))), "steps": model.config.network.T, "runs": model.runs,
    }  # fmt: skip
