"""The comparison of a bundle's graphs with PyTorch sees every output and every input of the denoiser."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cdiff.export.reference import TorchEngine, load_network
from cdiff.export.verify import BOUNDS, Chain, _calls, _maps
from cdiff.runtime.bundle import open_bundle, shipped_bundle
from cdiff.runtime.sampling.schedule import NoiseSchedule
from tests.export.networks import BASE, random_network

CONFIG = replace(BASE, target="x0", variance="learned")
SCHEDULE = NoiseSchedule(CONFIG.T)
NETWORK = random_network(CONFIG)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 1, 16, 16)).astype(np.float32)


def errors(engine: Any) -> dict[str, float]:
    return _calls(engine, TorchEngine(NETWORK, SCHEDULE), IMAGES, SCHEDULE, CONFIG.levels, CONFIG.target)[0]


def test_the_same_network_has_no_error() -> None:
    assert errors(TorchEngine(copy.deepcopy(NETWORK), SCHEDULE)) == {"encoder": 0, "denoiser": 0}


@pytest.mark.parametrize(("channel", "expected"), [(0, 0.02), (1, 0.01)])
def test_x0_and_the_variance_are_both_compared(channel: int, expected: float) -> None:
    """Of -1 to 1 the network's second channel becomes 0 to 1."""
    other = copy.deepcopy(NETWORK)
    other.denoiser.last.bias[channel] += 0.02
    assert errors(TorchEngine(other, SCHEDULE)) == {"encoder": 0, "denoiser": pytest.approx(expected, rel=1e-3)}
    other.denoiser.last.bias[channel] = math.nan
    assert math.isnan(errors(TorchEngine(other, SCHEDULE))["denoiser"])


def test_the_features_error_is_a_share_of_the_largest() -> None:
    other = copy.deepcopy(NETWORK)
    for parameter in other.encoder.last.parameters():
        parameter *= 1.01
    assert errors(TorchEngine(other, SCHEDULE))["encoder"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("place", [2, 3, 4])
def test_a_graph_that_is_deaf_to_one_of_its_inputs_is_found(place: int) -> None:
    """Which slice a row is of, its timestep, its level: each the first row's for all."""

    class Deaf(TorchEngine):
        def denoise(self, *given: Any) -> Any:
            heard = list(given)
            heard[place] = np.full_like(given[place], given[place][0])
            return super().denoise(*heard)

    assert errors(Deaf(NETWORK, SCHEDULE))["denoiser"] > BOUNDS["float32"]["denoiser"]


def test_maps_are_compared_pixel_by_pixel() -> None:
    """Too much on one half and as much too little on the other is no error on average."""
    network = copy.deepcopy(NETWORK)
    # x0 is nearly the same whatever x is, so that errors do not grow along the chain.
    network.denoiser.last.weight *= 1e-3
    network.denoiser.last.bias.fill_(0)

    class Uneven(TorchEngine):
        def denoise(self, *given: Any) -> Any:
            x0, mix = super().denoise(*given)
            x0[..., :8] += 0.02
            x0[..., 8:] -= 0.02
            return x0, mix

    engine, reference = Uneven(network, SCHEDULE), TorchEngine(network, SCHEDULE)
    found = _maps(engine, reference, IMAGES, Chain(2, CONFIG.levels, 1, 3), SCHEDULE, outside=-1)
    assert found["maps"] == pytest.approx(0.01, rel=0.05)
    assert found["maps_largest"] == pytest.approx(0.01, rel=0.2)


def test_the_reference_is_the_network_as_it_is_used() -> None:
    """Also where it is handed over as in training: no dropout, which would differ from call to call, and no gradients."""
    network = random_network(replace(BASE, dropout=0.5)).train().requires_grad_(True)
    engine, one = TorchEngine(network, SCHEDULE), np.ones(1, np.int64)
    features = engine.encode(IMAGES[:1])
    first, second = (engine.denoise(IMAGES[:1], features, one - 1, one, one)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_bundle_s_network_is_ready_to_run() -> None:
    network = load_network(open_bundle(shipped_bundle()))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
