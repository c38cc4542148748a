"""Augmentation moves image and masks together, in the paper's ranges, and leaves what it should alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cdiff.train.augment import Window, cut, random_window, recoloured
from cdiff.train.ranges import PUBLISHED, Ranges


def disc(size: int = 64, centre: tuple[float, float] = (30, 34), radius: float = 9) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return (((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) < radius**2).float()


def test_image_and_masks_stay_registered() -> None:
    mask = disc()
    for seed in range(20):
        window = random_window(48, (32, 32), np.random.default_rng(seed), PUBLISHED)
        picture, drawn = cut(mask[None], mask[None].to(torch.uint8), window)
        # The image is the mask itself: linear interpolation of both must agree where it is decisive.
        assert torch.equal(drawn[0], picture[0] >= 0.5)
        assert 0.75 * mask.sum() < drawn.sum() < 1.3 * mask.sum()


def test_ranges_are_the_papers() -> None:
    windows = [random_window(100, (50, 80), np.random.default_rng(s), PUBLISHED) for s in range(400)]
    matrices = np.array([w.matrix for w in windows])
    scales = 1 / np.sqrt(np.abs(np.linalg.det(matrices)))
    assert 0.9 <= scales.min() < 0.92
    assert 1.08 < scales.max() <= 1.1
    angles = np.degrees(np.arctan2(np.abs(matrices[:, 1, 0]), np.abs(matrices[:, 0, 0])))
    assert 13 < angles.max() <= 15
    assert 150 < (matrices[:, 1, 0] * matrices[:, 0, 0] > 0).sum() < 250, "either way round"
    shifts = np.array([w.centre for w in windows]) - (50, 80)
    assert (shifts.max(axis=0) > 9).all()
    assert (shifts.min(axis=0) < -9).all()
    assert np.abs(shifts).max() <= 10
    assert np.abs(np.corrcoef(shifts.T)[0, 1]) < 0.2
    # Each flip in half of the windows: within five standard deviations of 400 throws.
    for column in (0, 1):
        assert 150 < (matrices[:, column, column] < 0).sum() < 250


def test_plain_windows_are_exact_copies() -> None:
    image, masks = torch.randn(2, 20, 30), (torch.rand(3, 20, 30) > 0.5).to(torch.uint8)
    picture, drawn = cut(image, masks, Window(8, (10, 15)))
    assert torch.equal(picture, image[:, 6:14, 11:19])
    assert torch.equal(drawn, masks[:, 6:14, 11:19] > 0)


@pytest.mark.parametrize("centre", [(2, 15), (10, 3), (18, 15), (10, 27)])
def test_a_window_over_one_edge_is_as_large_as_any(centre: tuple[int, int]) -> None:
    image, masks = torch.randn(2, 20, 30), (torch.rand(3, 20, 30) > 0.5).to(torch.uint8)
    picture, drawn = cut(image, masks, Window(8, centre))
    part = np.s_[:, centre[0] + 4 : centre[0] + 12, centre[1] + 4 : centre[1] + 12]  # with 8 pixels around
    around = [(0, 0), (8, 8), (8, 8)]
    np.testing.assert_allclose(picture, np.pad(image.numpy(), around, "edge")[part], atol=1e-5)
    np.testing.assert_array_equal(drawn, np.pad(masks.numpy(), around)[part] > 0)


def test_an_identity_map_through_interpolation_is_the_same_window() -> None:
    image, masks = torch.randn(1, 20, 30), (torch.rand(1, 20, 30) > 0.5).to(torch.uint8)
    turned = Window(8, (10, 15), ((1.0, 1e-9), (0.0, 1.0)))  # not the plain matrix, so it is interpolated
    picture, drawn = cut(image, masks, turned)
    torch.testing.assert_close(picture, image[:, 6:14, 11:19], rtol=0, atol=1e-5)
    assert torch.equal(drawn, masks[:, 6:14, 11:19] > 0)


def test_a_turned_window_lies_where_its_matrix_says() -> None:
    """The image's channels are its pixels' own rows and columns, which linear interpolation keeps."""
    places = torch.stack(torch.meshgrid(torch.arange(40) + 0.5, torch.arange(60) + 0.5, indexing="ij"))
    matrix = ((0.9, -0.3), (0.2, -1.1))
    picture, _ = cut(places, torch.zeros(1, 40, 60, dtype=torch.uint8), Window(8, (20, 31), matrix))
    offsets = torch.stack(torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij"))
    wanted = torch.einsum("ij,jrc->irc", torch.tensor(matrix), offsets) + torch.tensor([20, 31])[:, None, None]
    torch.testing.assert_close(picture, wanted, rtol=0, atol=1e-4)


def test_outside_the_slice_the_image_repeats_its_edge_and_masks_are_empty() -> None:
    image, masks = torch.full((1, 8, 8), 0.7), torch.ones(1, 8, 8, dtype=torch.uint8)
    picture, drawn = cut(image, masks, Window(16, (4, 4)))
    torch.testing.assert_close(picture, torch.full((1, 16, 16), 0.7))
    assert drawn[0, 4:12, 4:12].all()
    assert drawn.sum() == 64


def test_other_ranges_are_kept_to() -> None:
    wide = Ranges(rotation=180, zoom=0.3, shift=0.0)
    windows = [random_window(100, (50, 50), np.random.default_rng(s), wide) for s in range(400)]
    matrices = np.array([w.matrix for w in windows])
    scales = 1 / np.sqrt(np.abs(np.linalg.det(matrices)))
    assert 0.7 <= scales.min() < 0.72
    assert 1.28 < scales.max() <= 1.3
    assert {w.centre for w in windows} == {(50.0, 50.0)}
    # All directions: the turned first axis lies in each quarter of the circle about as often.
    quarters = np.floor(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]) / (np.pi / 2)).astype(int)
    assert (np.bincount(quarters + 2, minlength=4) > 60).all()


def test_intensities_change_a_channel_at_a_time_and_by_no_more_than_asked() -> None:
    picture = torch.linspace(-1, 1, 64).reshape(1, 8, 8).repeat(2, 1, 1)
    ranges = Ranges(contrast=0.2, brightness=0.1)
    lines = [np.polyfit(picture[0].flatten(), channel.flatten(), 1) for channel in recoloured_many(picture, ranges)]
    slopes, offsets = np.array(lines).T
    assert 0.8 <= slopes.min() < 0.82
    assert 1.18 < slopes.max() <= 1.2
    assert np.abs(offsets).max() == pytest.approx(0.1, abs=0.01)
    assert len(set(np.round(slopes, 6))) == len(slopes)  # the two channels' as well
    brighter = recoloured_many(picture, Ranges(brightness=0.1)) - picture.repeat(200, 1, 1)
    assert brighter.abs().max() == pytest.approx(0.1, abs=0.01)
    assert brighter.std(dim=(1, 2)).max() < 1e-6


def test_noise_lies_on_every_pixel_and_is_never_stronger_than_asked() -> None:
    picture = torch.zeros(1, 32, 32)
    stds = [float(drawn.std()) for drawn in recoloured_many(picture, Ranges(pixel_noise=0.1))]
    assert 0.09 < max(stds) < 0.107
    assert min(stds) < 0.01
    assert torch.equal(recoloured(picture, np.random.default_rng(0), PUBLISHED), picture)
    everything = Ranges(contrast=0.2, brightness=0.1, pixel_noise=0.1)
    assert recoloured(picture, np.random.default_rng(0), everything).dtype == torch.float32  # what the network takes


def recoloured_many(picture: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    return torch.cat([recoloured(picture, np.random.default_rng(s), ranges) for s in range(200)])
