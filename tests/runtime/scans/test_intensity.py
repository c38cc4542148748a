"""Intensities: what goes in, what comes out, and that the record of it comes back the same."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.intensity import Intensity, Normalised

IMAGE = np.random.default_rng(0).gamma(2, 30, (3, 2, 16, 12))  # [S, channels, H, W]


def test_percentiles_go_to_minus_and_plus_one() -> None:
    found = Intensity("volume", 10, 90).apply(IMAGE)
    assert found.dtype == np.float32
    for channel in range(2):
        assert np.mean(found[:, channel] <= -1) == pytest.approx(0.1, abs=0.01)
        assert np.mean(found[:, channel] >= 1) == pytest.approx(0.1, abs=0.01)
    assert np.abs(found).max() == 1


def test_a_long_scan_is_normalised_without_a_heap_of_copies() -> None:
    scan = np.random.default_rng(0).normal(size=(20, 1, 128, 128)).astype(np.float32)
    before = scan.copy()
    tracemalloc.start()
    Intensity().apply(scan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * scan.nbytes
    np.testing.assert_array_equal(scan, before)


@pytest.mark.parametrize("method", ["percentile", "standard"])
@pytest.mark.parametrize("scope", ["slice", "volume"])
def test_slices_that_are_normalised_when_asked_for_are_those_of_the_whole(scope: str, method: str) -> None:
    """Bit for bit, also those of a part of the scan, and where the numbers are taken of a part of each slice."""
    intensity, raw = Intensity(scope, method=method), IMAGE.astype(np.float32)
    for over in (raw, raw[..., 2:9, 3:11]):
        limits = intensity.limits(over) if scope == "volume" else None
        lazily, whole = Normalised(intensity, raw, over, limits), intensity.scaled(raw, intensity.limits(over))
        np.testing.assert_array_equal([lazily[k] for k in (0, 2, 1, 1)], whole[[0, 2, 1, 1]])
        np.testing.assert_array_equal(lazily[1:][1], whole[2])


def test_an_image_s_own_mean_and_deviation() -> None:
    slices = Intensity("slice", method="standard").apply(IMAGE)
    np.testing.assert_allclose(slices.mean(axis=(2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(slices.std(axis=(2, 3)), 1, atol=1e-6)
    volume = Intensity("volume", method="standard").apply(IMAGE)
    np.testing.assert_allclose(volume.std(axis=(0, 2, 3)), 1, atol=1e-6)
    assert np.abs(volume.mean(axis=(2, 3))).max() > 1e-3


@pytest.mark.parametrize("method", ["percentile", "standard"])
def test_a_constant_slice_becomes_zeros_and_the_others_do_not(method: str) -> None:
    image = IMAGE.copy()
    image[1, 0] = 7
    found, plain = (Intensity(method=method).apply(one) for one in (image, IMAGE))
    assert not found[1, 0].any()
    np.testing.assert_array_equal(np.delete(found.reshape(6, -1), 2, 0), np.delete(plain.reshape(6, -1), 2, 0))


@pytest.mark.parametrize("scope", ["slice", "volume"])
@pytest.mark.parametrize("method", ["percentile", "standard"])
def test_a_part_of_one_value_makes_all_of_it_zeros(method: str, scope: str) -> None:
    """What lies around the part has no scale then; 0.1 has no exact sum in float32, whose deviation would not be 0."""
    part = np.full((3, 2, 64, 63), 0.1, np.float32)
    intensity = Intensity(scope, method=method)
    assert not intensity.scaled(IMAGE, intensity.limits(part)).any()
    assert not intensity.apply(part).any()


@pytest.mark.parametrize("method", ["percentile", "standard"])
def test_the_unit_of_the_values_does_not_count(method: str) -> None:
    """An image of values from 0 to 1, as many NIfTI files hold, is no constant one."""
    found, small = (Intensity(method=method).apply(one) for one in (IMAGE, IMAGE / 1024))
    np.testing.assert_allclose(small, found, rtol=1e-5, atol=1e-5)


def test_given_numbers_do_not_depend_on_the_image() -> None:
    intensity = Intensity(method="standard", mean=(60.0, 50.0), std=(10.0, 20.0))
    wanted = (IMAGE - np.array([60, 50])[:, None, None]) / np.array([10, 20])[:, None, None]
    np.testing.assert_allclose(intensity.apply(IMAGE), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(intensity.apply(IMAGE[:1]), intensity.apply(IMAGE)[:1])
    as_stored = Intensity(method="standard", mean=(0.0,), std=(1.0,))
    np.testing.assert_array_equal(as_stored.apply(IMAGE), IMAGE.astype(np.float32))
    with pytest.raises(CdiffError, match="2 means, but the image has 1 channel"):
        intensity.apply(IMAGE[:, :1])
    for mean, std in ((0.0, 1e-40), (0.0, 1e-300), (1e300, 1.0)):  # the last two are 0 and infinite as float32
        with pytest.raises(CdiffError, match=r"are beyond float32; correct the intensity's mean and std"):
            Intensity(method="standard", mean=(mean,), std=(std,)).apply(IMAGE)


@pytest.mark.parametrize(
    ("intensity", "says"),
    [
        (Intensity("volume", 0, 100), "percentiles 0 and 100 of each volume to -1 and 1"),
        (Intensity(method="standard"), "mean and standard deviation of each slice to 0 and 1"),
        (Intensity(method="standard", mean=(3.5,), std=(2.0,)), "minus 3.5, divided by 2"),
        (Intensity(method="standard", mean=(0.0,), std=(1.0,)), "none: values as stored"),
    ],
)
def test_the_record_comes_back_and_reads_well(intensity: Intensity, says: str) -> None:
    assert Intensity.from_json(json.loads(json.dumps(intensity.to_json()))) == intensity
    assert intensity.describe() == says


def test_the_record_of_percentiles_is_what_older_bundles_hold() -> None:
    assert Intensity("slice", 1.0, 99.0).to_json() == {"scope": "slice", "lower": 1.0, "upper": 99.0}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"method": "histogram"}, "'percentile' or 'standard'"),
        ({"method": "standard", "mean": (1.0,)}, "as many numbers"),
        ({"method": "standard", "mean": (1.0,), "std": (0.0,)}, "each std positive"),
        ({"method": "standard", "mean": (float("nan"),), "std": (1.0,)}, "as many numbers"),
        ({"mean": (1.0,), "std": (1.0,)}, "need the method 'standard'"),
        ({"scope": "patient"}, "'slice' or 'volume'"),
        ({"lower": 90, "upper": 10}, "0 <= lower < upper"),
        ({"lower": 50, "upper": 50}, "0 <= lower < upper"),
    ],
)
def test_impossible_intensities_are_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(CdiffError, match=says):
        Intensity(**values)  # type: ignore[arg-type]
