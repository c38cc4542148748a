"""The noise is a function: golden against a plain Philox, windows of a canvas, moments, shape, independence across keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.noise import INITIAL, Noise, normal

MASK = 2**64 - 1


def philox4x64(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Ten rounds as Salmon et al. 2011, section 3.3, print them, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & MASK, (p0 >> 64) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def plain_normal(seed: int, slice_: int, level: int, run: int, step: int, y: int, x: int, width: int) -> float:
    """One pixel from the module's text, in float64."""
    word = y * math.ceil(width / 2) + x // 2
    block = philox4x64((word // 4 + 1, step + 1, (level << 32) + run, slice_), (seed, 0))
    low, high = block[word % 4] & 0xFFFFFFFF, block[word % 4] >> 32
    high -= (high >> 31) << 32
    r, theta = math.sqrt(-2 * math.log(low / 2**32 + 2**-33)), 2 * math.pi * high / 2**32
    return r * (math.sin(theta) if x % 2 else math.cos(theta))


def test_the_plain_philox_has_the_published_answer() -> None:
    # Random123's known answer for philox4x64-10 with counter and key all zero.
    assert philox4x64((0, 0, 0, 0), (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize(
    ("seed", "slice_", "level", "run", "step", "shape"),
    [(0, 0, 1, 0, INITIAL, (3, 6)), (7, 41, 4, 24, 99, (5, 7)), (2**64 - 1, 2**40, 2**32 - 1, 2**32 - 1, 0, (2, 9))],
)
def test_every_pixel_is_the_documented_function(
    seed: int, slice_: int, level: int, run: int, step: int, shape: tuple[int, int]
) -> None:
    got = normal(seed, slice_, level, run, step, shape)
    want = [
        [plain_normal(seed, slice_, level, run, step, y, x, shape[1]) for x in range(shape[1])] for y in range(shape[0])
    ]
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)  # float32's angle of up to pi, times |z| up to about 5


@pytest.mark.parametrize("canvas", [(20, 32), (21, 33)])
@pytest.mark.parametrize("origin", [(0, 0), (3, 4), (5, 7), (12, 19)])
@pytest.mark.parametrize("shape", [(8, 12), (7, 13), (1, 1)])
def test_a_window_has_the_canvas_s_noise(
    canvas: tuple[int, int], origin: tuple[int, int], shape: tuple[int, int]
) -> None:
    whole = normal(5, 2, 3, 1, 4, canvas)
    window = np.empty(shape, np.float32)
    Noise(5).fill(window, slice_=2, level=3, run=1, step=4, origin=origin, canvas=canvas)
    y, x = origin
    assert np.array_equal(window, whole[y : y + shape[0], x : x + shape[1]])


def test_calls_leave_nothing_behind() -> None:
    noise = Noise(3)
    first, between, again = (np.empty((9, 11), np.float32) for _ in range(3))
    noise.fill(first, slice_=1, level=2, run=3, step=4)
    noise.fill(between, slice_=9, level=1, run=0, step=INITIAL)
    noise.fill(again, slice_=1, level=2, run=3, step=4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, between)


def test_it_is_a_standard_normal_far_into_the_tail() -> None:
    z = normal(11, 0, 1, 0, 0, (1500, 1500)).astype(np.float64).ravel()
    n = z.size
    # Five standard errors of the moments of n independent normals.
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(z)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(z)) < 5 * math.sqrt(24 / n)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    expected = n * 2 * stats.norm.sf(4)
    assert abs((abs(z) > 4).sum() - expected) < 5 * math.sqrt(expected)
    assert np.isfinite(z).all()


@pytest.mark.parametrize(("low", "radius"), [(0, math.sqrt(66 * math.log(2))), (2**32 - 1, 0)])
def test_the_ends_of_the_logarithm_are_numbers(monkeypatch: pytest.MonkeyPatch, low: int, radius: float) -> None:
    """One word in 2^32 has either: no other test draws it, and eight slices by the paper's protocol do."""
    monkeypatch.setattr(Noise, "_words", lambda self, block, count, *key: np.full(count, low, np.uint64))
    np.testing.assert_allclose(normal(0, 0, 1, 0, 0, (1, 2)), [[radius, 0]], atol=1e-6)


def test_pixels_of_one_word_are_independent() -> None:
    z = normal(1, 0, 1, 0, 0, (1000, 1000))
    even, odd = z[:, 0::2].ravel(), z[:, 1::2].ravel()
    bound = 5 / math.sqrt(even.size)
    assert abs(np.corrcoef(even, odd)[0, 1]) < bound
    assert abs(np.corrcoef(even**2, odd**2)[0, 1]) < bound


def test_every_part_of_the_key_matters() -> None:
    base = {"seed": 4, "slice_": 3, "level": 2, "run": 1, "step": 0}
    shape = (256, 256)
    keys = [base, *({**base, part: base[part] + 1} for part in base), {**base, "level": 1, "run": 2}]
    samples = np.stack([normal(**key, shape=shape).ravel() for key in keys])
    correlation = np.corrcoef(samples) - np.eye(len(keys))
    assert abs(correlation).max() < 5 / math.sqrt(shape[0] * shape[1])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(CdiffError, match="seed"):
        Noise(seed)
