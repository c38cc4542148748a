"""The comparison of a bundle's graphs with PyTorch sees every output and every input of the denoiser."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from cdiff.export import verify as comparison
from cdiff.export.reference import TorchEngine, load_network
from cdiff.export.verify import BOUNDS, Chain, _affordable, _calls, _framed, _maps, _spread
from cdiff.runtime.bundle import open_bundle, shipped_bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.schedule import NoiseSchedule
from tests.export.networks import BASE, random_network
from tests.runtime.test_manifest import example

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


def test_what_the_estimate_of_x0_magnifies_of_a_predicted_noise_is_no_error() -> None:
    config = replace(BASE, target="eps")
    network = random_network(config)
    other = copy.deepcopy(network)
    other.denoiser.last.bias[0] += 0.002
    engine, reference = TorchEngine(other, SCHEDULE), TorchEngine(network, SCHEDULE)
    found = _calls(engine, reference, IMAGES, SCHEDULE, config.levels, config.target)[0]
    assert found["denoiser"] == pytest.approx(0.002, rel=1e-2)


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
    network.denoiser.last.bias.fill_(0.5)

    class Uneven(TorchEngine):
        def denoise(self, *given: Any) -> Any:
            x0, mix = super().denoise(*given)
            x0[..., :8] += 0.02
            x0[..., 8:] -= 0.02
            return x0, mix

    engine, reference = Uneven(network, SCHEDULE), TorchEngine(network, SCHEDULE)
    for outside, error in ((-1, 0.01), (0, 0.02)):  # what lies between 0 and 1 is half of what lies between -1 and 1
        found = _maps(engine, reference, IMAGES, Chain(2, CONFIG.levels, 1, 3), SCHEDULE, outside)
        assert found["maps"] == pytest.approx(error, rel=0.05)
        assert found["maps_largest"] == pytest.approx(error, rel=0.2)


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


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("key", ["encoder", "denoiser", "maps"])
def test_the_largest_error_of_all_images_decides(key: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the random ones, which come first, too; and what is no number is above every bound."""
    bundle: Any = SimpleNamespace(manifest=example(precision=precision))
    slices = np.zeros((5, bundle.manifest.image_channels, *bundle.manifest.image_size), np.float32)

    def verified(random: float, real: float) -> dict[str, Any]:
        found = [dict.fromkeys(("encoder", "denoiser", "maps"), 0.0) | {key: error} for error in (random, real)]
        of = {part: iter(found) for part in ("calls", "maps")}
        monkeypatch.setattr(comparison, "open_engine", lambda *_: SimpleNamespace(version="1"))
        monkeypatch.setattr(comparison, "_calls", lambda *_: (next(of["calls"]), 1.0))
        monkeypatch.setattr(comparison, "_maps", lambda *_: {"maps": next(of["maps"])["maps"]})
        return comparison.verify(bundle, cast(TorchEngine, SimpleNamespace(version="2")), slices)

    bound = BOUNDS[precision][key]
    for errors_ in ((bound, 0.0), (0.0, bound)):
        assert verified(*errors_)["largest"][key] == bound
    for errors_ in ((1.01 * bound, 0.0), (0.0, 1.01 * bound), (math.nan, 0.0), (0.0, math.nan)):
        with pytest.raises(CdiffError, match=f"differ from PyTorch: {key} error"):
            verified(*errors_)


def test_as_much_of_a_chain_is_compared_as_there_is_time_for() -> None:
    assert _affordable(1e-3, 4, 100) == Chain(2, 4, 2, 10)
    assert _affordable(1.0, 4, 100) == Chain(1, 4, 1, 10)
    assert _affordable(100.0, 4, 100) == _affordable(2.0, 4, 100) == Chain(1, 1, 1, 4)
    assert _affordable(1e-3, 4, 3).steps == 3


def test_real_slices_from_all_over_the_validation_are_compared_in_their_middle() -> None:
    """The first slices, and the corners of large ones, are often empty: a network's errors would hardly show there."""
    assert [_spread(total, 4).tolist() for total in (4, 2, 1)] == [[0, 1, 2, 3], [0, 1], [0]]
    slices = np.random.default_rng(1).uniform(-1, 1, (10, 1, 40, 40)).astype(np.float32)
    found = _framed(slices, Framing("tile", (16, 16), 0.25))
    np.testing.assert_array_equal(found, slices[[0, 3, 6, 9], :, 12:28, 12:28])
