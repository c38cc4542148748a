"""Validation by sampling: what it scores, in bounded memory."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.train import validate
from cdiff.train.config import Config
from cdiff.train.data import Batch
from cdiff.train.diffusion import Diffusion
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset
from cdiff.train.validate import sample_soft_maps, score


def random_network(config: Config) -> ConsensusNet:
    torch.manual_seed(0)
    network = ConsensusNet(config.network).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return network


@pytest.mark.parametrize("slices", [1, 3])
def test_no_call_has_more_rows_than_are_allowed(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one slice's levels and runs are more: the maps are those of one call a slice."""
    config: Config = preset("tiny").with_values({"levels": 5, "rrdbs": 0})
    network, diffusion = random_network(config), Diffusion(config.schedule, "x0")
    images = torch.randn(slices, 1, 32, 32)
    calls: list[int] = []
    network.denoiser.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))

    def sampled() -> torch.Tensor:
        calls.clear()
        return sample_soft_maps(network, diffusion, images, steps=2, runs=4, seed=0)

    whole = sampled()
    assert max(calls) >= 20
    monkeypatch.setattr(validate, "ROWS", 8)
    torch.testing.assert_close(sampled(), whole, rtol=0, atol=1e-5)
    assert max(calls) == 8
    assert whole.std() > 0.01


def test_the_network_is_asked_for_every_level_at_the_chain_s_timesteps() -> None:
    config: Config = preset("tiny").with_values({"levels": 3, "rrdbs": 0})
    network, diffusion, image = random_network(config), Diffusion(config.schedule, "x0"), torch.randn(2, 1, 32, 32)
    asked: list[tuple[list[int], list[int]]] = []
    hook = network.denoiser.register_forward_pre_hook(
        lambda _, given: asked.append((given[2].tolist(), given[3].tolist()))
    )
    first = sample_soft_maps(network, diffusion, image, steps=4, runs=2, seed=0)
    assert [set(t) for t, _ in asked] == [{int(t)} for t in sampler_table("ddim", config.schedule, 4).t]
    for _, levels in asked:
        assert [sorted(levels[:6]), sorted(levels[6:])] == [[1, 1, 2, 2, 3, 3]] * 2, "of each slice"
    hook.remove()
    other = sample_soft_maps(network, diffusion, image, steps=4, runs=2, seed=1)
    assert (other - first).abs().max() > 0.01, "the seed draws the noise"


def test_processes_share_the_calls_and_have_the_maps_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Config = preset("tiny").with_values({"levels": 3, "rrdbs": 0})
    network, diffusion, images = random_network(config), Diffusion(config.schedule, "x0"), torch.randn(5, 1, 32, 32)
    monkeypatch.setattr(validate, "ROWS", 6)  # two slices a call
    monkeypatch.setattr(validate, "summed", lambda fabric, total: 2 * total)  # as if the other had the same
    options: dict[str, Any] = {"steps": 2, "runs": 1, "seed": 0}
    parts = [
        sample_soft_maps(
            network, diffusion, images, **options, fabric=cast(Any, SimpleNamespace(world_size=2, global_rank=rank))
        )
        for rank in (0, 1)
    ]
    assert [[bool(one.any()) for one in part] for part in parts] == [
        [True, True, False, False, True],
        [False, False, True, True, False],
    ]
    torch.testing.assert_close(sum(parts) / 2, sample_soft_maps(network, diffusion, images, **options))


def test_a_score_is_of_as_many_steps_and_runs_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def sampled(network: Any, diffusion: Any, image: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.update(options)
        return torch.zeros(len(image), 32, 32)

    monkeypatch.setattr(validate, "sample_soft_maps", sampled)
    config: Config = preset("tiny")
    network = ConsensusNet(config.network)
    levels = config.network.levels
    batch = Batch(torch.zeros(1, 1, 32, 32), torch.zeros(1, levels, 32, 32, dtype=torch.bool), torch.tensor([levels]))
    options: dict[str, Any] = {"steps": 4, "runs": 3, "seed": 7, "fabric": None}
    score(network, Diffusion(config.schedule, "x0"), batch, **options)
    assert asked == options


@pytest.mark.parametrize(
    ("variant", "answer", "wanted"),
    [
        ("consensus", 1.0, 0.6),  # two of four agree: the map of 1 is right at the thresholds up to a half
        ("no-annotator", 1.0, 1.0),  # both of those who drew do
        ("consensus", math.nan, math.nan),
    ],
)
def test_who_did_not_draw_agrees_to_nothing_but_takes_no_share(variant: str, answer: float, wanted: float) -> None:
    config: Config = preset("tiny").with_values({"variant": variant, "levels": 4, "rrdbs": 0})
    network = ConsensusNet(config.network).eval()
    network.denoiser.forward = lambda x, *_: torch.full_like(x, answer)  # type: ignore[method-assign]
    masks = torch.zeros(2, 4, 32, 32, dtype=torch.bool)
    masks[:, :2] = True
    batch = Batch(torch.zeros(2, 1, 32, 32), masks, torch.tensor([2, 2]))
    steps = config.network.T + 1  # more than there are
    found = score(network, Diffusion(config.schedule, "x0"), batch, steps=steps, runs=1, seed=0)
    assert found == pytest.approx(wanted, abs=1e-4, nan_ok=True)


def test_runs_are_averaged_before_what_is_below_0_is_cut_off() -> None:
    """As the runtime does with masks of 0 and 1: a level that two runs draw as -1 and 0.6 is empty."""
    config: Config = preset("tiny").with_values({"levels": 2, "rrdbs": 0, "outside": 0})
    network = ConsensusNet(config.network).eval()
    answers = torch.tensor([-1.0, 0.2, 0.6, 1.0])[:, None, None, None]  # run 1's levels, then run 2's
    network.denoiser.forward = lambda x, *_: answers.expand_as(x)  # type: ignore[method-assign]
    diffusion = Diffusion(config.schedule, "x0", outside=0)
    soft = sample_soft_maps(network, diffusion, torch.zeros(1, 1, 32, 32), steps=1, runs=2, seed=0)
    torch.testing.assert_close(soft, torch.full((1, 32, 32), (0 + 0.6) / 2))
