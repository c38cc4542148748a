"""Sampler tables against diffusers' schedulers, state by state with the same noise, and against the samplers' definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.sampler import SAMPLERS, SamplerTable, kept_timesteps, sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule

torch = pytest.importorskip("torch", reason="torch and diffusers are the oracle")
diffusers = pytest.importorskip("diffusers", reason="torch and diffusers are the oracle")

SCHEDULES = [NoiseSchedule(T=100), NoiseSchedule(T=100, scaled=False), NoiseSchedule(T=1000)]
SHAPE = (2, 1, 8, 8)
Draw = Callable[[], np.ndarray]


def network(x: Any, t: int) -> Any:
    """A stand-in for x0, nonlinear in x, in [-1, 1]; arrays of NumPy and torch pass through it alike."""
    lib = np if isinstance(x, np.ndarray) else torch
    return lib.tanh(1.5 * x * x - 0.5 * x + 0.01 * t - 0.6)


def variance_channel(x: Any, t: int) -> Any:
    """A stand-in for the network's second channel, in [-1, 1]."""
    lib = np if isinstance(x, np.ndarray) else torch
    return lib.sin(3 * x + t)


def draws(seed: int) -> Draw:
    """What diffusers draws from a generator of this seed, one array after another, float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: np.asarray(torch.randn(SHAPE, generator=generator, dtype=torch.float64).numpy())


def start() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE)


def run_table(table: SamplerTable, draw: Draw | None, *, learned: bool = False) -> list[np.ndarray]:
    """The states that a plain loop over the table goes through, in float64."""
    x, previous, states = start(), np.zeros(SHAPE), []
    for i, t in enumerate(table.t):
        x0, d = network(x, int(t)), np.asarray(table.d[i])
        if learned and table.log_variance_min is not None and table.log_variance_max is not None and d > 0:
            mix = (variance_channel(x, int(t)) + 1) / 2
            d = np.exp((mix * table.log_variance_max[i] + (1 - mix) * table.log_variance_min[i]) / 2)
        z = draw() if draw else 0.0
        x = table.a[i] * x + table.b[i] * x0 + table.c[i] * previous + d * z
        previous = x0
        states.append(x)
    return states


def run_scheduler(scheduler: Any, *, learned: bool = False, **options: Any) -> list[np.ndarray]:
    """The states that diffusers' own loop goes through. It counts timesteps from 0, the paper and the table from 1."""
    x, states = torch.tensor(start()), []
    for t in scheduler.timesteps:
        output = network(x, int(t) + 1)
        if learned:
            output = torch.cat([output, variance_channel(x, int(t) + 1)], dim=1)
        x = scheduler.step(output, t, x, **options).prev_sample
        states.append(np.asarray(x.numpy()))
    return states


def make(kind: Any, schedule: NoiseSchedule, **options: Any) -> Any:
    """One of diffusers' schedulers for this schedule, its abar in float64 so that formulas are compared and not rounding."""
    betas = schedule.betas[1:]
    scheduler = kind(num_train_timesteps=schedule.T, trained_betas=betas, prediction_type="sample", **options)
    scheduler.alphas_cumprod = torch.tensor(schedule.abar[1:])
    return scheduler


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 33, 100])
@pytest.mark.parametrize("learned", [False, True])
def test_ddpm_is_diffusers_ddpm(schedule: NoiseSchedule, steps: int, learned: bool) -> None:
    table = sampler_table("ddpm", schedule, steps)
    variance = "learned_range" if learned else "fixed_small"
    scheduler = make(diffusers.DDPMScheduler, schedule, clip_sample=False, variance_type=variance)
    scheduler.set_timesteps(timesteps=[int(t) - 1 for t in table.t])
    got = run_table(table, draws(3), learned=learned)
    want = run_scheduler(scheduler, learned=learned, generator=torch.Generator().manual_seed(3))
    # The last step is another matter when its t is not 1: diffusers adds noise there, a hair (of variance 1e-20) when the
    # variance is fixed and a great deal when it is learned. The table lands on x0 (tested below).
    for ours, theirs in zip(got[:-1], want[:-1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    if not learned or table.t[-1] == 1:
        np.testing.assert_allclose(got[-1], want[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 100])  # diffusers' DDIM takes only steps that divide T
def test_ddim_is_diffusers_ddim(schedule: NoiseSchedule, steps: int) -> None:
    scheduler = make(diffusers.DDIMScheduler, schedule, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    table = sampler_table("ddim", schedule, steps)
    assert (table.t - 1).tolist() == scheduler.timesteps.tolist()
    for ours, theirs in zip(run_table(table, None), run_scheduler(scheduler), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 33, 100])
def test_dpm_solver_is_diffusers_dpm_solver(schedule: NoiseSchedule, steps: int) -> None:
    table = sampler_table("dpm++2m", schedule, steps)
    scheduler = make(diffusers.DPMSolverMultistepScheduler, schedule, final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=[int(t) - 1 for t in table.t])
    for ours, theirs in zip(run_table(table, None), run_scheduler(scheduler), strict=True):
        # diffusers keeps sigma and the state in float32 here.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 77, 100])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_lands_on_x0(name: str, schedule: NoiseSchedule, steps: int) -> None:
    table = sampler_table(name, schedule, steps)
    assert (table.a[-1], table.b[-1], table.c[-1], table.d[-1]) == (0, 1, 0, 0)
    assert len(table) == steps
    assert all(np.isfinite(column).all() for column in (table.a, table.b, table.c, table.d))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [3, 7, 30, 100])
def test_an_exact_network_keeps_the_chain_on_the_forward_process(name: str, steps: int) -> None:
    # If the network always returns the true x0, then x_s has the mean sqrt(abar_s) x0 and the variance 1 - abar_s at every
    # kept s, because x_t had those at t: for any sampler, respaced as it likes.
    schedule = NoiseSchedule(T=100)
    table = sampler_table(name, schedule, steps)
    mean, variance = np.sqrt(schedule.abar[table.t[0]]), 1 - schedule.abar[table.t[0]]
    for i, s in enumerate([*table.t[1:], 0]):
        mean = table.a[i] * mean + table.b[i] + table.c[i]
        variance = table.a[i] ** 2 * variance + table.d[i] ** 2
        assert mean == pytest.approx(np.sqrt(schedule.abar[s]), abs=1e-12)
        assert variance == pytest.approx(1 - schedule.abar[s], abs=1e-12)


def test_learned_variance_interpolates_between_the_two_fixed_ones() -> None:
    schedule = NoiseSchedule(T=100)
    table = sampler_table("ddpm", schedule)
    assert table.log_variance_min is not None
    assert table.log_variance_max is not None
    np.testing.assert_allclose(np.exp(table.log_variance_max), schedule.betas[table.t], rtol=1e-12)
    np.testing.assert_allclose(np.exp(table.log_variance_min[:-1] / 2), table.d[:-1], rtol=1e-12)
    assert sampler_table("ddim", schedule).log_variance_min is None


@pytest.mark.parametrize(("T", "steps"), [(100, 100), (100, 10), (100, 7), (3, 2), (5, 4), (1000, 999)])
def test_kept_timesteps_start_at_T_and_are_evenly_spread(T: int, steps: int) -> None:
    t = kept_timesteps(T, steps)
    gaps = -np.diff(np.append(t, 0))
    assert t[0] == T
    assert len(t) == steps
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    oracle = diffusers.DDIMScheduler(num_train_timesteps=T, timestep_spacing="trailing")
    oracle.set_timesteps(steps)
    assert (t - 1).tolist() == oracle.timesteps.tolist()


def test_what_cannot_be_sampled_is_refused() -> None:
    schedule = NoiseSchedule(T=100)
    with pytest.raises(CdiffError, match="'euler' is not known; use one of ddpm, ddim"):
        sampler_table("euler", schedule, 10)
    for steps in (0, 101):
        with pytest.raises(CdiffError, match="trained with 100"):
            sampler_table("ddpm", schedule, steps)
