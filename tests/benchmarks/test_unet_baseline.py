"""The U-Net baseline: image and label stay together under augmentation, batches repeat, a killed run goes on, scores are evaluate's."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from cdiff.benchmarks.unet_baseline import (
    Budget,
    Slices,
    augmented_batch,
    build_network,
    loss_of,
    read_slices,
    score_run,
    train,
)
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.metrics import FIVE, soft_dice


def disc_slices(n: int = 6, size: int = 64) -> Slices:
    """Slices whose image says exactly where the readers drew: 1 inside a lopsided figure, -1 outside."""
    y, x = np.mgrid[:size, :size] - size / 2
    inside = ((x / 9) ** 2 + ((y - 3) / 5) ** 2 < 1) | ((abs(x - 6) < 4) & (abs(y + 4) < 6))
    image = np.where(inside, 1.0, -1.0).astype(np.float32)
    masks = np.stack([inside, inside, inside]).astype(np.uint8)
    return Slices(np.stack([image[None]] * n), np.stack([masks] * n), np.arange(n))


@pytest.mark.parametrize("size", [32, 64])
def test_image_and_label_go_through_one_map(size: int) -> None:
    image, label = augmented_batch(disc_slices(), 3, 8, size, 4, seed=0)
    assert image.shape == label.shape == (8, 1, size, size)
    # The image is interpolated linearly, the masks to the nearest pixel: they part only along the border.
    assert ((image > 0) == (label > 0.5)).float().mean() > 0.98
    assert all(not torch.equal(label[0], label[i]) for i in range(1, 8))


def test_scale_shift_and_rotation_stay_within_the_papers_ranges() -> None:
    """Over many draws the area stays within 0.9^2 .. 1.1^2 of the figure's, and the centre within the shift."""
    slices = disc_slices()
    area, y0, x0 = moments(torch.from_numpy(slices.label[:1])[:, None])
    _, label = augmented_batch(slices, 0, 200, 64, 0, seed=1)
    areas, y, x = moments(label)
    assert areas.min() > 0.9**2 * area[0] * 0.93
    assert areas.max() < 1.1**2 * area[0] * 1.07
    assert areas.max() / areas.min() > 1.2
    # 0.1 of 64 pixels, and the figure's own distance from the middle, which rotates and flips with it.
    reach = 6.4 * 1.1 + 1.1 * float(torch.hypot(y0[0] - 31.5, x0[0] - 31.5)) + 1
    assert max((y - 31.5).abs().max(), (x - 31.5).abs().max()) < reach


def moments(label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grid = torch.arange(label.shape[-1]).float()
    area = label.sum((1, 2, 3))
    return area, (label.sum((1, 3)) * grid).sum(1) / area, (label.sum((1, 2)) * grid).sum(1) / area


def test_a_batch_is_a_function_of_seed_and_step_and_an_epoch_sees_each_slice_once() -> None:
    slices = disc_slices(6)
    for i in range(6):
        slices.images[i] = i  # the number of the slice, whatever the map does to it
    first, again = (augmented_batch(slices, 2, 4, 64, 0, seed=5)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, augmented_batch(slices, 2, 4, 64, 0, seed=6)[0])
    seen = torch.cat([augmented_batch(slices, step, 4, 64, 0, seed=5)[0][:, 0, 32, 32] for step in range(3)])
    assert sorted(seen[:6].round().int().tolist()) == list(range(6))
    assert sorted(seen[6:].round().int().tolist()) == list(range(6))


def test_the_loss_is_least_at_the_fraction_itself() -> None:
    label = torch.rand(2, 1, 8, 8) * 0.9 + 0.05
    best = loss_of(torch.logit(label), label)
    for shift in (-0.5, 0.5):
        assert loss_of(torch.logit(label) + shift, label) > best


def test_network_has_about_two_million_parameters_and_takes_any_size_divisible_by_16() -> None:
    pytest.importorskip("monai", reason="the baseline's network is MONAI's: pip install --no-deps monai")
    network = build_network()
    assert 1.8e6 < sum(p.numel() for p in network.parameters()) < 2.2e6
    assert network(torch.zeros(1, 1, 48, 32)).shape == (1, 1, 48, 32)


@pytest.mark.slow
def test_trains_saves_resumes_and_scores(tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("monai", reason="the baseline's network is MONAI's: pip install --no-deps monai")
    run = tmp_path / "unet"
    short = Budget(minutes=0.05, batch=2, crop=16, jitter=2, validations=2)
    first = train(tiny_data, run, short)
    with pytest.raises(CdiffError, match="--resume"):
        train(tiny_data, run, short)
    second = train(tiny_data, run, Budget(minutes=0.1, batch=2, crop=16, jitter=2, validations=2), resume=True)
    assert second["steps"] > first["steps"] > 0
    assert second["wall_seconds"] > first["wall_seconds"]
    with (run / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)), "a resumed run goes on counting"
    assert {row["size"] for row in rows} == {"16", "32"}

    slices = read_slices(tiny_data, "val")
    marked, all_marked = score_run(run, tiny_data, "val"), score_run(run, tiny_data, "val", all_raters=True)
    assert marked["n_slices"] == slices.masks.any((1, 2, 3)).sum()
    assert all_marked["n_slices"] == slices.masks.any((2, 3)).all(1).sum() < marked["n_slices"]
    assert marked["soft_dice_5"]["low"] <= marked["soft_dice_5"]["mean"] <= marked["soft_dice_5"]["high"]
    assert [row["level"] for row in marked["dice_per_level"]] == [1, 2, 3]


def test_slices_are_read_as_training_reads_them(tiny_data: Path) -> None:
    slices = read_slices(tiny_data, "train")
    assert slices.images.dtype == np.float32
    assert slices.images.min() == -1
    assert slices.images.max() == 1
    assert len(slices.images) == 4 * 4
    assert soft_dice(slices.label[0], slices.masks[0].mean(0), FIVE) == 1
    with pytest.raises(CdiffError, match="no split 'test'"):
        read_slices(tiny_data, "test")
