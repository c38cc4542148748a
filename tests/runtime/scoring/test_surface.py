"""HD95 by hand, against all pairs of pixels and MONAI; the region in and near what annotators marked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cdiff.runtime.scoring.surface import bounding_box, hd95, hd95_px_and_mm, near, outline


def _box(top: int, left: int, height: int, width: int, shape: tuple[int, int] = (20, 24)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def _every_pair(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float]) -> float:
    """The definition: outline pixels by their 4 neighbours, the nearest of all distances, percentile, the larger of the two."""

    def edge(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        return np.argwhere(mask & ~inner) * spacing

    first, second = edge(a), edge(b)
    all_pairs = np.linalg.norm(first[:, None] - second[None], axis=-1)
    return max(np.percentile(all_pairs.min(axis=1), 95), np.percentile(all_pairs.min(axis=0), 95))


def _blobs(count: int) -> list[np.ndarray]:
    """Random shapes, some at the picture's edge, some in several parts."""
    rng = np.random.default_rng(0)
    rows, columns = np.indices((20, 24))
    return [
        np.hypot(rows - rng.uniform(0, 20), (columns - rng.uniform(0, 24)) / 1.5) + rng.random((20, 24))
        < rng.uniform(2, 6)
        for _ in range(count)
    ]


def test_distances_by_hand() -> None:
    assert hd95(_box(5, 5, 4, 4), _box(5, 5, 4, 4)) == 0
    assert hd95(_box(5, 5, 1, 1), _box(8, 9, 1, 1)) == 5  # 3 down, 4 across
    assert hd95(_box(5, 5, 1, 1), _box(8, 9, 1, 1), (2.0, 0.5)) == pytest.approx(np.hypot(6, 2))
    # A line of 20 pixels against its first 19: one of 20 distances is 1, the 95th percentile is 0.05 of the way to it.
    assert hd95(_box(3, 2, 1, 20), _box(3, 2, 1, 19)) == pytest.approx(0.05)


def test_the_inside_of_a_mask_does_not_count() -> None:
    """A filled square and its outline have the same outline."""
    filled = _box(4, 4, 7, 7)
    hollow = filled & ~_box(5, 5, 5, 5)
    assert outline(filled).sum() == 24
    np.testing.assert_array_equal(outline(filled), hollow)
    # The hollow's inner border is its own outline pixels' neighbour: nothing to walk.
    assert hd95(filled, hollow) == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 0.7), (0.5, 1.25)])
def test_every_pair_of_pixels_agrees(spacing: tuple[float, float]) -> None:
    for a, b in itertools.combinations(_blobs(5), 2):
        assert hd95(a, b, spacing) == pytest.approx(_every_pair(a, b, spacing), abs=1e-9)
        assert hd95(a, b, spacing) == hd95(b, a, spacing)


def test_monai_agrees() -> None:
    monai = pytest.importorskip("monai.metrics", reason="MONAI is in the extra `bench`")
    torch = pytest.importorskip("torch")
    for a, b in itertools.combinations(_blobs(4), 2):
        pair = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (a, b)]
        theirs = monai.compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=[0.5, 1.25])
        assert hd95(a, b, (0.5, 1.25)) == pytest.approx(theirs.item(), abs=1e-5)


def test_an_empty_mask_has_no_outline() -> None:
    nothing, something = np.zeros((20, 24), bool), _box(5, 5, 2, 2)
    assert np.isnan(hd95(nothing, something))
    assert np.isnan(hd95(something, nothing))
    assert np.isnan(hd95(nothing, nothing))
    assert np.isnan(hd95_px_and_mm(nothing, something, (0.5, 0.5))).all()
    with pytest.raises(ValueError, match="one shape"):
        hd95(nothing, np.zeros((3, 3), bool))


def test_pixels_and_millimetres() -> None:
    a, b = _box(5, 5, 1, 1), _box(8, 9, 1, 1)
    assert hd95_px_and_mm(a, b, (0.5, 0.5)) == (5, 2.5)
    assert hd95_px_and_mm(a, b, (2.0, 0.5)) == (5, pytest.approx(np.hypot(6, 2)))
    pixels, mm = hd95_px_and_mm(a, b, None)
    assert pixels == 5
    assert np.isnan(mm)


def test_bounding_box() -> None:
    assert bounding_box(_box(5, 6, 2, 3)) == (slice(5, 7), slice(6, 9))
    assert _box(0, 22, 2, 2)[bounding_box(_box(0, 22, 2, 2), 3)].shape == (5, 5)


def test_near_is_four_times_a_disc_at_any_resolution() -> None:
    for size in (64, 192):
        rows, columns = np.indices((size, size)) - size / 2
        disc = np.hypot(rows, columns) < size / 8
        region = near(np.stack([disc, np.zeros_like(disc)]))
        # Distances count from the centre of the last pixel inside, half a pixel short of the disc's edge.
        assert 4 * (1 - 0.5 / (size / 4)) ** 2 < region.sum() / disc.sum() < 4
        assert region[disc].all()


def test_near_follows_the_union_and_has_a_smallest_reach() -> None:
    masks = np.stack([_box(10, 10, 1, 1), _box(10, 12, 1, 1)])
    region = near(masks)
    assert region[10, 8:15].all()  # 2 pixels to either side
    assert not region[10, 7]
    assert not region[7, 10]
    assert not near(np.zeros((2, 20, 24), bool)).any()
    corner = near(_box(0, 0, 2, 2)[None])  # beyond the picture there is nothing
    assert corner[:4, :2].all()
    assert corner.sum() == 4 + 4 + 4 + 1  # the square, two strips of 2 x 2, and the pixel at the diagonal
