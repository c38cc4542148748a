"""Targets, forward process and the learned variance, against diffusers and against the formulas written out slowly."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.diffusion import Diffusion

SCHEDULE = NoiseSchedule(T=100)


def example(t: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    m = (torch.rand(len(t), 1, 6, 6, generator=generator) > 0.5).float() * 2 - 1
    return m, torch.randn(m.shape, generator=generator), torch.tensor(t)


def test_forward_process_and_v_agree_with_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=100, trained_betas=SCHEDULE.betas[1:].astype(np.float32))
    m, noise, t = example([1, 37, 100])
    m *= 0.3  # a soft map: 1 and -1 are their own inverses
    diffusion = Diffusion(SCHEDULE, "v")
    torch.testing.assert_close(diffusion.noised(m, noise, t), theirs.add_noise(m, noise, t - 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(diffusion.aim(m, noise, t), theirs.get_velocity(m, noise, t - 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_a_perfect_network_gives_back_the_mask_and_no_loss(target: str) -> None:
    diffusion = Diffusion(SCHEDULE, target)
    m, noise, t = example([1, 20, 60])
    x = diffusion.noised(m, noise, t)
    perfect = diffusion.aim(m, noise, t)
    torch.testing.assert_close(diffusion.to_x0(perfect, x, t), m, rtol=0, atol=1e-4)
    assert diffusion.loss(perfect, m, noise, x, t).item() == 0
    assert diffusion.loss(perfect + 0.5, m, noise, x, t).item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_the_dice_term_is_that_of_the_predicted_mask(target: str) -> None:
    m = torch.full((2, 1, 6, 6), -1.0)
    m[0, 0, :2] = 1  # twelve pixels; the second row's mask is empty
    guess = torch.full_like(m, -1.0)
    guess[:, 0, 1:3] = 1  # six pixels of the first in common, and twelve of an empty mask
    noise, t = torch.randn(m.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 60])
    diffusion = Diffusion(SCHEDULE, target, dice_weight=0.5)
    x = diffusion.noised(m, noise, t)
    abar = torch.from_numpy(SCHEDULE.abar)[t][:, None, None, None].float()
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    # What a network that takes `guess` for the mask would return.
    aim = diffusion.aim(guess, (x - alpha * guess) / sigma, t)
    plain = Diffusion(SCHEDULE, target).loss(aim, m, noise, x, t)
    dice = ((2 * 6 + 1) / (12 + 12 + 1) + (0 + 1) / (12 + 0 + 1)) / 2
    assert (diffusion.loss(aim, m, noise, x, t) - plain).item() == pytest.approx(0.5 * (1 - dice), rel=1e-4)
    assert diffusion.loss(diffusion.aim(m, noise, t), m, noise, x, t).item() == pytest.approx(0, abs=1e-6)
    both = torch.cat([aim, torch.full_like(aim, 0.4)], dim=1)  # with a learned variance, which is no part of the mask
    torch.testing.assert_close(diffusion.to_x0(both, x, t), guess, rtol=0, atol=1e-4)
    bound = Diffusion(SCHEDULE, target).loss(both, m, noise, x, t)
    assert (diffusion.loss(both, m, noise, x, t) - bound).item() == pytest.approx(0.5 * (1 - dice), rel=1e-4)


def test_x0_is_clipped_to_the_range_of_masks() -> None:
    diffusion = Diffusion(SCHEDULE, "eps")
    x = torch.randn(1, 1, 4, 4) * 100
    assert diffusion.to_x0(torch.zeros_like(x), x, torch.tensor([90])).abs().max() <= 1


@pytest.mark.parametrize("t", [2, 10, 40])
def test_the_learned_variance_is_pulled_to_the_posterior_variance(t: int) -> None:
    # With a perfect mean the bound is least where the variance is beta tilde, that is v = -1, and there it is zero (late t are left out: beta and beta tilde differ by less than rounding).
    diffusion = Diffusion(SCHEDULE, "eps")
    m, noise, when = example([t])
    x = diffusion.noised(m, noise, when)
    losses = [
        diffusion.loss(torch.cat([noise, torch.full_like(noise, v)], dim=1), m, noise, x, when).item()
        for v in (-1.0, -0.5, 0.0, 0.5, 1.0)
    ]
    # x0 recovered from eps carries float32 rounding, amplified by 1/sqrt(abar); it costs less than 1e-4 bits.
    assert losses[0] == pytest.approx(0, abs=1e-4)
    assert all(a < b for a, b in itertools.pairwise(losses))


def test_the_bound_is_the_kl_of_two_normals() -> None:
    t = 40
    abar, before, beta = SCHEDULE.abar[t], SCHEDULE.abar[t - 1], SCHEDULE.betas[t]
    tilde = beta * (1 - before) / (1 - abar)
    b = math.sqrt(before) * beta / (1 - abar)
    m, noise, when = example([t])
    diffusion = Diffusion(SCHEDULE, "x0")
    x, x0, v = diffusion.noised(m, noise, when), 0.3 * m, 0.4
    variance = math.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(tilde))
    p, q = torch.distributions.Normal(b * x0, math.sqrt(variance)), torch.distributions.Normal(b * m, math.sqrt(tilde))
    slow = torch.distributions.kl_divergence(q, p).mean().item() / math.log(2)
    got = diffusion.loss(torch.cat([x0, torch.full_like(x0, v)], dim=1), m, noise, x, when).item()
    mse = torch.mean((x0 - m) ** 2).item()
    assert got - mse == pytest.approx(slow * 100 / 1000, rel=1e-4)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_a_single_timestep_has_a_bound(target: str) -> None:
    """beta tilde is 0 there; the variance is beta, as in the sampler's table, and the bound the probability of M under it."""
    schedule = NoiseSchedule(T=1, kind="cosine")
    diffusion = Diffusion(schedule, target)
    m, noise, when = example([1])
    x = diffusion.noised(m, noise, when)
    perfect = torch.cat([diffusion.aim(m, noise, when), torch.full_like(m, 0.3)], dim=1)
    bits = -math.log2(statistics.NormalDist(0, math.sqrt(schedule.betas[1])).cdf(1 / 255))  # the outer bins are open
    assert diffusion.loss(perfect, m, noise, x, when).item() == pytest.approx(bits / 1000, rel=1e-3)


@pytest.mark.parametrize("outside", [-1, 0])
@pytest.mark.parametrize("x0", [-1.0, 0.0, 0.4, 1.0])
def test_the_last_step_is_the_probability_of_the_mask_in_8_bits(x0: float, outside: int) -> None:
    """Never below 0, and 40 bits at most however wrong x0 is, so that no single row decides a clipped step."""
    schedule = NoiseSchedule(T=1000)
    diffusion = Diffusion(schedule, "x0", outside=outside)
    m, noise, when = example([1])
    m[..., :2] = torch.tensor([0.2, 0.4])  # a soft label is neither
    m = diffusion.coded(m)
    x = diffusion.noised(m, noise, when)
    tilde = schedule.betas[2] * (1 - schedule.abar[1]) / (1 - schedule.abar[2])
    for v in (-1.0, 0.0, 1.0):
        sigma = math.exp((v + 1) / 4 * math.log(schedule.betas[1]) + (1 - v) / 4 * math.log(tilde))
        normal = statistics.NormalDist(x0, sigma)
        bits = []
        for value in m.flatten().tolist():
            above = 1.0 if value > 0.999 else normal.cdf(value + 1 / 255)
            below = 0.0 if value < -0.999 else normal.cdf(value - 1 / 255)
            bits.append(-math.log2(max(above - below, 1e-12)))
        output = torch.cat([torch.full_like(m, x0), torch.full_like(m, v)], dim=1)
        mse = torch.mean((x0 - m) ** 2).item()
        got = diffusion.loss(output, m, noise, x, when).item() - mse
        assert got == pytest.approx(statistics.fmean(bits), rel=0.01)
        assert 0 <= got < 40


def test_the_least_variance_of_the_last_step_is_its_neighbour_s() -> None:
    """Of a soft label that the network gets right, whose bin of 2/255 is about as wide as the variance at T = 1000."""
    schedule = NoiseSchedule(T=1000)
    m, noise, when = torch.full((1, 1, 2, 2), 0.4), torch.zeros(1, 1, 2, 2), torch.tensor([1])
    sigma = math.sqrt(schedule.betas[2] * (1 - schedule.abar[1]) / (1 - schedule.abar[2]))
    bits = -math.log2(2 * statistics.NormalDist(0, sigma).cdf(1 / 255) - 1)
    got = Diffusion(schedule, "x0").loss(torch.cat([m, torch.full_like(m, -1)], dim=1), m, noise, m, when).item()
    assert got == pytest.approx(bits, rel=1e-3)


def test_the_bound_does_not_move_the_mean() -> None:
    diffusion = Diffusion(SCHEDULE, "x0")
    m, noise, when = example([30])
    x = diffusion.noised(m, noise, when)
    output = torch.zeros(1, 2, 6, 6, requires_grad=True)
    diffusion.loss(output, m, noise, x, when).backward()  # type: ignore[no-untyped-call]
    plain = torch.zeros(1, 1, 6, 6, requires_grad=True)
    diffusion.loss(plain, m, noise, x, when).backward()  # type: ignore[no-untyped-call]
    assert output.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(output.grad[:, :1], plain.grad)
    assert output.grad[:, 1:].abs().max() > 0


def test_masks_of_zero_and_one() -> None:
    """What is diffused, what becomes a map, and a Dice term that a perfect prediction leaves at the squared error."""
    m = torch.tensor([-1.0, 1.0, -1.0, 1.0]).reshape(1, 1, 2, 2)
    for outside, coded in ((-1, m), (0, torch.tensor([0.0, 1.0, 0.0, 1.0]).reshape(1, 1, 2, 2))):
        diffusion = Diffusion(SCHEDULE, "x0", dice_weight=0.5, outside=outside)
        assert torch.equal(diffusion.coded(m), coded)
        assert diffusion.fraction(coded).flatten().tolist() == [0, 1, 0, 1]
        assert diffusion.fraction(coded - 0.25).min() == 0
        x, t = torch.zeros_like(m), torch.tensor([3])
        assert diffusion.loss(coded, coded, x, x, t) == 0
        assert diffusion.loss(torch.full_like(m, outside), coded, x, x, t) > 0.5 * 0.5
