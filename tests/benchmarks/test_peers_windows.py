"""What a U-Net peer learns from and how its steps go: the windows' ranges, the learning rate, the average, and what validation scores."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cdiff.benchmarks.peers import training as module
from cdiff.benchmarks.peers.draws import mixed
from cdiff.benchmarks.peers.slices import INTENSITY, Batch, Slices, augmented_batch
from cdiff.benchmarks.peers.training import Budget, Training
from cdiff.benchmarks.peers.unets import UNETS
from cdiff.runtime.scoring.metrics import FIVE, soft_dice
from cdiff.train.presets import preset


def slices_of(images: np.ndarray[Any, Any], masks: np.ndarray[Any, Any]) -> Slices:
    return Slices(images[:, None].astype(np.float32), masks.astype(np.uint8))


def whole(n: int = 1, size: int = 32, readers: int = 3) -> np.ndarray[Any, Any]:
    return np.ones((n, readers, size, size))


def maps(size: int, jitter: int, n: int = 400) -> tuple[Tensor, Tensor]:
    """Of n windows of a slice of 64 pixels: the matrix [n, 2, 2] from a window's (x, y) to the slice's, and where its middle lies."""
    y, x = np.mgrid[:64, :64]
    found = []
    for ramp in (x, y):  # the same windows twice: the images say from where each pixel came
        seen = augmented_batch(slices_of(ramp[None], whole(size=64)), 3, n, size, jitter, seed=1).image[:, 0].double()
        h = size // 2
        part = seen[:, h - 6 : h + 6, h - 6 : h + 6]
        right, down = (part.diff(dim=axis).mean((1, 2)) for axis in (2, 1))
        found.append((torch.stack([right, down], -1), part.mean((1, 2)) - 31.5))
    return torch.stack([found[0][0], found[1][0]], 1), torch.stack([found[0][1], found[1][1]], -1)


@pytest.mark.parametrize(("size", "jitter", "reach"), [(64, 9, 6.4), (32, 9, 3.2 + 9)])
def test_windows_are_turned_scaled_flipped_and_shifted_over_the_whole_ranges(
    size: int, jitter: int, reach: float
) -> None:
    matrix, middle = maps(size, jitter)
    scale = 1 / torch.linalg.det(matrix).abs().sqrt()
    assert 0.899 < scale.min() < 0.905
    assert 1.095 < scale.max() < 1.101
    cosine, sine = matrix[:, 0, 0] * scale, matrix[:, 1, 0] * scale
    angle = torch.rad2deg(torch.atan(sine / cosine))
    assert -15.1 < angle.min() < -14.5
    assert 14.5 < angle.max() < 15.1
    flips = torch.stack([matrix[:, 0, 0] < 0, matrix[:, 1, 1] < 0], -1)
    assert all((flips == torch.tensor([a, b])).all(1).sum() > 60 for a in (False, True) for b in (False, True))
    assert (middle.abs().amax(0) < reach + 0.1).all()
    assert (middle.abs().amax(0) > 0.85 * reach).all(), "jitter is of crops, in pixels of the slice"


def test_beyond_the_slice_the_image_is_mirrored_and_nothing_is_drawn() -> None:
    y, x = np.mgrid[:32, :32]
    batch = augmented_batch(slices_of((1 + (x + y) / 62)[None], whole()), 0, 16, 32, 0, seed=0)
    assert batch.image.min() >= 1
    assert set(batch.masks.unique().tolist()) == {0, 1}, "outside, and masks are never mixed"


def test_epochs_have_orders_of_their_own_and_slices_are_scaled_as_the_diffusion_peers_are() -> None:
    slices = slices_of(np.ones((12, 16, 16)) * np.arange(12)[:, None, None], whole(12, 16))
    batches = [augmented_batch(slices, step, 12, 16, 0, seed=0) for step in range(3)]
    orders = {tuple(batch.image[:, 0, 8, 8].round().int().tolist()) for batch in batches}
    assert len(orders | {tuple(range(12))}) == 4
    assert len({tuple(batch.reader.tolist()) for batch in batches}) == 3
    assert preset("lidc").data.intensity == INTENSITY


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image)  # type: ignore[no-any-return]


def training(out: Path, budget: Budget, loss: Any = UNETS["unet-soft"].loss, masks: Any = None) -> Training:
    peer = replace(UNETS["unet-soft"], build=lambda C: Line(), loss=loss)
    images = np.random.default_rng(0).uniform(-1, 1, (9, 32, 32))
    slices = slices_of(images, whole(9) if masks is None else masks)
    return Training(peer, slices, slices, out, budget)


BUDGET = Budget(steps=400, batch=8, crop=16, jitter=5, seed=3, weight_decay=0.125)


def test_a_step_is_of_its_windows_rate_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    seeds: list[tuple[bool, int]] = []
    plain = module.augmented_batch

    def windows(slices: Slices, *rest: int) -> Batch:
        asked.append(rest)
        return plain(slices, *rest)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        seeds.append((network.training, torch.initial_seed()))
        return 1e6 * network(batch.image).square().mean()

    monkeypatch.setattr(module, "augmented_batch", windows)
    run = training(tmp_path, BUDGET, loss)
    rates = []
    for done in (0, 49, 200, 299, 300):
        run.done = done
        run.network.eval()
        size, rate, _ = run.step()
        assert {group["lr"] for group in run.optimiser.param_groups} == {rate}
        assert torch.cat([p.grad.flatten() for p in run.network.parameters() if p.grad is not None]).norm() < 1.001
        rates.append(rate)
        assert size == (16 if done < 300 else 32)
    # step, windows, their size, jitter, seed: the last quarter of the steps is on whole slices, with as many pixels in a step.
    assert asked == [(d, 8 if d < 300 else 2, 16 if d < 300 else 32, 5, 3) for d in (0, 49, 200, 299, 300)]
    assert seeds == [(True, mixed(3, d)) for d in (0, 49, 200, 299, 300)]
    turn = [0.505 + 0.495 * math.cos(math.pi * d / 400) for d in (0, 49, 200, 299, 300)]
    assert rates == pytest.approx([1e-3 * min(1, (d + 1) / 100) * t for d, t in zip((0, 49, 200, 299, 300), turn, strict=True)])  # fmt: skip
    assert {group["weight_decay"] for group in run.optimiser.param_groups} == {0.125}


def test_the_average_follows_the_network(tmp_path: Path) -> None:
    run, again, other = (training(tmp_path, replace(BUDGET, seed=seed)) for seed in (3, 3, 4))
    state = {name: value.clone() for name, value in run.network.state_dict().items()}
    for name, value in state.items():
        assert torch.equal(run.average.state_dict()[name], value)
        assert torch.equal(again.network.state_dict()[name], value)
        assert not torch.equal(other.network.state_dict()[name], value)
    for done, keep in ((0, 2 / 11), (89, 91 / 100), (99_999, 0.999)):
        run.done = done
        run.average.load_state_dict(state)
        with torch.no_grad():
            for p in run.network.parameters():
                p.fill_(2.0)
        run.step()
        for name, value in run.network.state_dict().items():
            torch.testing.assert_close(run.average.state_dict()[name], keep * state[name] + (1 - keep) * value)


def test_validation_scores_the_average_on_marked_slices_and_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = whole(9)
    masks[:, :, :, 16:] = 0
    masks[:, 0, :8] = 0
    masks[[0, 4]] = 0  # nothing drawn
    run = training(tmp_path, replace(BUDGET, val_slices=3), masks=masks)
    assert np.array_equal(run.val_images, run.slices.images[[1, 5, 8]]), "evenly among those that are marked"
    maps, seen = [np.full((1, 1, 32, 32), 0.9, np.float32)] * 3, []
    maps[1] = np.asarray(run.val_label[1][None, None])

    def drawn(peer: Any, network: nn.Module, image: Any, **asked: Any) -> Any:
        seen.append((network is run.average, asked))
        return maps[(len(seen) - 1) % 3]

    monkeypatch.setattr(module, "draw_runs", drawn)
    with torch.no_grad():
        for p in run.average.parameters():
            p.fill_(2.0)
    wanted = np.mean([soft_dice(one[0, 0], run.val_label[0], FIVE) for one in maps])
    assert run.validate() == run.best == pytest.approx(wanted)
    run.done = 40
    kept = load_file(tmp_path / "best.safetensors")
    assert all((value == 2).all() for value in kept.values())
    with torch.no_grad():
        for p in run.average.parameters():
            p.fill_(1.0)
    maps[1] = np.zeros((1, 1, 32, 32), np.float32)
    assert run.validate() < run.best == pytest.approx(wanted)
    assert all((value == 2).all() for value in load_file(tmp_path / "best.safetensors").values())
    seeds = [mixed(3, 3, i) for i in range(3)] * 2
    assert seen == [(True, {"runs": 1, "mirror": False, "seed": seed}) for seed in seeds]


def test_time_goes_on_from_the_last_save_on_its_own_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdiff.benchmarks.peers.training.time.monotonic", lambda: 1000.0)
    monkeypatch.setattr("cdiff.benchmarks.peers.training.time.process_time", lambda: 500.0)
    for clock, share in (("cpu", 0.25), ("wall", 0.75)):
        budget = replace(BUDGET, steps=0, minutes=2.0, clock=clock)
        run = training(tmp_path, budget)
        run.clock = module.Clock(wall=90.0, cpu=30.0)
        assert run.progress == share
        run.step()
        run.save()
        resumed = training(tmp_path, budget)
        resumed.restore()
        assert resumed.progress == share
        assert resumed.optimiser.state_dict()["state"].keys() == run.optimiser.state_dict()["state"].keys() != set()
