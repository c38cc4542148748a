"""The noise schedules are the published ones, with diffusers' as the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.sampler import SAMPLERS, sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule


@pytest.mark.parametrize("T", [10, 100, 1000])
def test_cosine_is_nichol_and_dhariwal_s(T: int) -> None:
    schedule = NoiseSchedule(T, kind="cosine")
    oracle = DDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")
    np.testing.assert_allclose(schedule.betas[1:], oracle.betas.double().numpy(), rtol=1e-6)
    assert schedule.abar[0] == 1
    assert schedule.betas.max() == 0.999
    assert NoiseSchedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_a_finite_table_for_it(name: str) -> None:
    table = sampler_table(name, NoiseSchedule(1000, kind="cosine"), 20)
    assert all(np.isfinite(column).all() for column in (table.a, table.b, table.c, table.d))


def test_linear_is_ho_s_for_a_thousand_steps() -> None:
    oracle = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    np.testing.assert_allclose(NoiseSchedule(1000).betas[1:], oracle.betas.double().numpy(), rtol=1e-6)


def test_scaled_ends_noise_a_short_chain_and_literal_ones_do_not() -> None:
    short, literal = NoiseSchedule(100), NoiseSchedule(100, scaled=False)
    assert short.betas[[1, -1]] == pytest.approx([1e-3, 0.2], rel=1e-12)
    assert literal.betas[[1, -1]] == pytest.approx([1e-4, 0.02], rel=1e-12)
    assert literal.abar[-1] == pytest.approx(0.364, abs=5e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"T": 0}, "needs 1 <= T <= 1000000, not 0"),
        ({"T": 10**6 + 1}, "needs 1 <= T <= 1000000"),
        ({"T": 20}, r"run from 0.005 to 1 and must lie in \(0, 1\)"),
        ({"T": 100, "beta_start": 0.0}, "run from 0 to 0.2"),
        ({"T": 100, "beta_start": 0.03}, "run from 0.3 to 0.2"),
    ],
)
def test_a_schedule_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CdiffError, match=message):
        NoiseSchedule(**values)


def test_a_schedule_of_one_beta_is_taken() -> None:
    schedule = NoiseSchedule(10, beta_start=0.1, beta_end=0.1, scaled=False)
    np.testing.assert_allclose(schedule.abar, 0.9 ** np.arange(11))


def test_the_cosine_has_no_ends_that_could_be_out_of_range() -> None:
    assert NoiseSchedule(20, kind="cosine", beta_start=0.0).abar[-1] > 0


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(CdiffError, match="use 'linear' or 'cosine'"):
        NoiseSchedule(100, kind="sigmoid")
