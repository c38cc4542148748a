"""How a run proceeds: how much of it is over, and the windows, batch and learning rate that follow from that."""

from __future__ import annotations

import math
import time

from cdiff.runtime.words import lasting, several
from cdiff.train.config import Config


def now(config: Config) -> float:
    """Seconds, from an arbitrary moment, on the clock that the run's budget counts: the wall's, or this process's processor time."""
    return time.process_time() if config.training.clock == "cpu" else time.monotonic()


def progress(config: Config, done: int, seconds: float) -> float:
    """How much of the run is over after `done` steps, 0..1: by steps, or by the clock when `minutes` is set."""
    settings = config.training
    share = done / settings.steps
    return max(share, seconds / (60 * settings.minutes)) if settings.minutes else share


def grows(config: Config, done: int, seconds: float) -> bool:
    """Whether windows are still to grow in a run that has taken `done` steps in `seconds`."""
    return window_size(config, progress(config, done, seconds)) != window_size(config, 1.0)


def forecast(config: Config, done: int, seconds: float, step: float, late: float) -> str:
    """In words, how long a run that has taken `done` steps in `seconds` will still take if a step takes `step` seconds on the budget's clock,
    and one of the late phase `late` seconds."""
    settings, clock = config.training, " of processor time" if config.training.clock == "cpu" else ""
    left, small = max(0, settings.steps - done), 0
    if grows(config, done, seconds):
        small = sum(window_size(config, k / settings.steps) == config.crop for k in range(done, settings.steps))
    else:
        step = late
    said = f"a step takes about {lasting(step)}{clock} here"
    said += f", and {lasting(late)} once windows have {config.network.image_size} pixels" if small else ""
    said += f", so {left:,} {'more ' if done else ''}steps take about {lasting(small * step + (left - small) * late)}"
    said += f", and {several(math.ceil(left / settings.val_every), 'validation')} besides"
    if settings.minutes:
        budget, end = settings.minutes * 60, (1 - config.data.late if small else 0) * settings.minutes * 60
        fit = max(0, end - seconds) / step + max(0, budget - max(seconds, end)) / late
        if fit < left:
            said += f"; the setting minutes ends the run after {fit:,.0f} of them at most"
    return said


def window_size(config: Config, progress: float) -> int:
    """The side of a step's windows, pixels: `crop`, then image_size for the last `late` share of the run."""
    late = config.data.late > 0 and progress >= 1 - config.data.late  # also at 1, where the last validation is made
    return config.network.image_size if late else config.crop


def batch_size(config: Config, window: int) -> int:
    """Images per step when its windows have `window` pixels."""
    settings = config.training
    return settings.late_batch or settings.batch if window == config.network.image_size else settings.batch


def learning_rate(config: Config, done: int, progress: float) -> float:
    """AdamW's learning rate for the step after `done`: linear warm-up, then level or a half cosine to 0."""
    settings = config.training
    warm = min(1.0, (done + 1) / max(1, settings.warmup))
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if settings.decay == "cosine" else 1.0
    return settings.lr * warm * decay
