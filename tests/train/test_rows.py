"""What a step draws at random: by its seed and its number, and never beyond what there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cdiff.train.data import Slices, read_data, training_batch
from cdiff.train.presets import preset
from cdiff.train.rows import draw_rows

DRAWN = ("image", "t", "level", "noise", "u")


@pytest.fixture(scope="module")
def slices(tiny_data: Path) -> Slices:
    return read_data(tiny_data, preset("tiny")).train


def test_another_seed_and_another_step_draw_everything_anew(slices: Slices) -> None:
    one = preset("tiny").with_values({"seed": 1, "accumulate": 2, "rows_per_image": 8})
    first = draw_rows(slices, one, 5, 32)
    others = [draw_rows(slices, one.with_values({"seed": 2}), 5, 32), draw_rows(slices, one, 6, 32)]
    for other in others:
        for name in DRAWN:
            assert not torch.equal(getattr(first[0], name), getattr(other[0], name)), name
    seeds = [part.seed for parts in (first, *others) for part in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(isinstance(seed, int) for seed in seeds)
    t = torch.cat([part.t for part in first])
    for part in first:  # the network's dropout begins with a seed of its own
        torch.manual_seed(part.seed)
        assert not torch.equal(1 + (one.network.T * torch.rand(len(t))).long(), t)


def test_another_seed_changes_a_slice_otherwise() -> None:
    """Its window by one generator and its intensities by another: of a ramp without the second, of a flat image whatever the first."""
    ramp, drawn = torch.linspace(-1, 1, 1024).reshape(1, 32, 32), torch.ones(3, 32, 32, dtype=torch.uint8)
    for image, ranges in ((ramp, {}), (torch.zeros_like(ramp), {"brightness": 1.0})):
        slices = Slices([image], [drawn], [3], ["a"])
        first, again, other = (
            training_batch(slices, preset("tiny").with_values({**ranges, "seed": seed}), 0, 4, 32).image
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert len(torch.unique(first.flatten(1), dim=0)) == 4


def test_the_largest_number_that_can_be_drawn_is_still_a_timestep(
    slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its root is 1 in single precision, and there is no step T + 1."""
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 1 - 2**-24))
    config = preset("tiny").with_values({"t_power": 4.0})
    (rows,) = draw_rows(slices, config, 0, 32)
    assert (rows.t == config.network.T).all()
