"""What each variant learns to draw, on masks made by hand; and that a run keeps to its variant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.variants import VARIANTS
from cdiff.train.checkpoint import checkpoint_folder, read_tensors
from cdiff.train.config import Config
from cdiff.train.data import Batch, Slices, read_data
from cdiff.train.diffusion import Diffusion
from cdiff.train.fabric import fabric_on
from cdiff.train.learner import Learner
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset
from cdiff.train.rows import draw_rows
from cdiff.train.sections import NetworkConfig
from cdiff.train.targets import TARGETS
from cdiff.train.trainer import train
from cdiff.train.validate import score
from tests.synthetic import write_synthetic_dataset

# Four pixels; annotator 1 drew the first, 2 the first two, 3 the first and the last. The last pixel of row 2 is nobody's.
MASKS = torch.tensor([[[[1, 0, 0, 0]], [[1, 1, 0, 0]], [[1, 0, 0, 1]]]], dtype=torch.bool)


def target(name: str, condition: int, u: float = 0.0, masks: torch.Tensor = MASKS, raters: int = 3) -> list[float]:
    m = TARGETS[name](masks, torch.tensor([raters]), torch.tensor([condition]), torch.tensor([u]))
    assert m.shape == (1, 1, 1, 4)
    assert m.dtype == torch.float32
    return [round(value, 5) for value in m.flatten().tolist()]


def test_consensus_is_what_at_least_c_drew() -> None:
    assert target("consensus", 1) == [1, 1, -1, 1]
    assert target("consensus", 2) == [1, -1, -1, -1]
    assert target("consensus", 3) == [1, -1, -1, -1]


def test_annotator_is_the_one_who_is_named() -> None:
    assert [target("annotator", i, u=0.9) for i in (1, 2, 3)] == [[1, -1, -1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


def test_no_annotator_is_whom_chance_names() -> None:
    assert [target("no-annotator", 1, u) for u in (0.0, 0.33, 0.34, 0.67, 0.9999999)] == [
        [1, -1, -1, -1], [1, -1, -1, -1], [1, 1, -1, -1], [1, -1, -1, 1], [1, -1, -1, 1]
    ]  # fmt: skip


def test_soft_label_is_the_fraction() -> None:
    assert target("soft-label", 1) == [1, round(-1 / 3, 5), -1, round(-1 / 3, 5)]


def test_implicit_ensemble_is_the_one_mask_or_what_half_of_them_drew() -> None:
    assert target("implicit-ensemble", 1) == [1, -1, -1, -1]
    assert target("implicit-ensemble", 1, masks=MASKS[:, 1:], raters=2) == [1, 1, -1, 1]
    assert target("implicit-ensemble", 1, masks=MASKS[:, 2:], raters=1) == [1, -1, -1, 1]


def test_a_missing_annotator_is_no_opinion_except_to_a_count() -> None:
    """Two drew; the third mask only fills the tensor."""
    padded = MASKS.clone()
    padded[0, 2] = False
    assert target("soft-label", 1, masks=padded, raters=2) == [1, 0, -1, -1]
    assert target("implicit-ensemble", 1, masks=padded, raters=2) == [1, 1, -1, -1]
    assert {tuple(target("no-annotator", 1, u, padded, 2)) for u in (0.0, 0.5, 0.9999)} == {
        (1, -1, -1, -1),
        (1, 1, -1, -1),
    }
    assert target("consensus", 3, masks=padded, raters=2) == [-1, -1, -1, -1]
    for raters in range(1, 100):  # nor is the largest u, rounded, one annotator too far
        drawn = torch.ones(1, raters, 1, 4, dtype=torch.bool)
        assert target("no-annotator", 1, 1 - 2**-24, drawn, raters) == [1, 1, 1, 1]


def test_a_batch_knows_how_many_drew(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "d", {"train": 2, "val": 1}, raters=3, shape=(32, 32))
    (root / "train" / "case01" / "task01_seg03.nii.gz").unlink()
    data = read_data(root, preset("tiny").with_values({"missing_raters": "as-is", "variant": "no-annotator"}))
    assert data.train.raters == [2, 3]
    with pytest.raises(CdiffError, match="variant=annotator must know"):
        preset("tiny").with_values({"missing_raters": "as-is", "variant": "annotator"})


@pytest.mark.parametrize("outside", [-1, 0])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_draws_every_condition_and_learns_its_target(
    name: str, outside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step's loss is that of the target, the condition, t and noise drawn as the page says, written out once more."""
    config = preset("tiny").with_values({"variant": name, "rrdbs": 0, "batch": 2, "outside": outside})
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, image_size=4, channel_mult=(1, 1)))
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((2, 3, 4, 4)) < 0.5)
    batch = Batch(torch.from_numpy(rng.normal(size=(2, 1, 4, 4)).astype(np.float32)), masks, torch.tensor([3, 3]))
    learner = Learner(config, fabric_on(torch.device("cpu")))
    torch.nn.init.normal_(learner.network.denoiser.last.weight)
    before = ConsensusNet(config.network)
    before.load_state_dict(learner.network.state_dict())
    monkeypatch.setattr("cdiff.train.rows.training_batch", lambda *_: batch)
    loss, _ = learner.step(5, draw_rows(Slices(), config, 5, 4), 1e-3)

    rows, T = 2 * config.training.rows_per_image, config.network.T
    generator = torch.Generator().manual_seed(config.training.seed * 1_000_003 + 5)
    t = 1 + (T * torch.rand(rows, generator=generator)).long().clamp(max=T - 1)
    condition = torch.randint(1, config.network.conditions + 1, (rows,), generator=generator)
    noise = torch.randn(rows, 1, 4, 4, generator=generator)
    u = torch.rand(rows, generator=generator)
    losses = []
    for row in range(rows):
        drawn = masks[row // config.training.rows_per_image]
        m = torch.empty(1, 1, 4, 4)
        for y in range(4):
            for x in range(4):
                votes = [bool(drawn[i, y, x]) for i in range(3)]
                m[0, 0, y, x] = {
                    "consensus": 1.0 if sum(votes) >= int(condition[row]) else -1.0,
                    "annotator": 1.0 if votes[int(condition[row]) - 1] else -1.0,
                    "no-annotator": 1.0 if votes[int(u[row] * 3)] else -1.0,
                    "soft-label": 2 * sum(votes) / 3 - 1,
                    "implicit-ensemble": 1.0 if sum(votes) >= 1.5 else -1.0,
                }[name]
        m = m if outside == -1 else (m + 1) / 2
        abar = config.schedule.abar[int(t[row])]
        x_t = np.sqrt(abar) * m + np.sqrt(1 - abar) * noise[row : row + 1]
        image = batch.image[row // config.training.rows_per_image][None]
        with torch.no_grad():
            x0 = before(x_t.float(), image, t[row : row + 1], condition[row : row + 1])
        losses.append(float(((x0 - m) ** 2).mean()))
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("outside", [-1, 0])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_perfect_network_scores_one(name: str, outside: int) -> None:
    """Validation asks for as many maps as the variant draws, and compares their mean with the fraction of annotators."""
    nested = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    nested[0, 0, 2:5] = nested[0, 1, 2:5] = True  # both drew the same, so that a majority is the fraction too
    config = NetworkConfig(
        variant=name, levels=2, T=40, image_size=8, base_channels=8, channel_mult=(1,), attention_depths=(), groups=4, heads=1,
        rrdbs=0, residual_blocks=1, target="x0", outside=outside,
    )  # fmt: skip
    asked: list[int] = []

    class Perfect(ConsensusNet):
        def __init__(self) -> None:
            super().__init__(config)
            self.denoiser.forward = self.answer  # type: ignore[method-assign]

        def answer(self, x: torch.Tensor, features: torch.Tensor, t: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            asked.extend(level.tolist())
            m = TARGETS[name](nested.expand(len(x), -1, -1, -1), torch.full((len(x),), 2), level, torch.zeros(len(x)))
            return m if outside == -1 else (m + 1) / 2

    network, batch = Perfect(), Batch(torch.zeros(1, 1, 8, 8), nested, torch.tensor([2]))
    diffusion = Diffusion(Config(network=config, data=preset("tiny").data).schedule, "x0", outside=outside)
    assert score(network, diffusion, batch, steps=2, runs=2, seed=0) == 1
    assert set(asked) == ({1, 2} if VARIANTS[name].told else {1})
    assert len(asked) == 2 * 2 * (2 if VARIANTS[name].told else 1)


def test_a_run_keeps_to_its_variant(tiny_run: Path, tiny_data: Path) -> None:
    other = preset("tiny").with_values({"variant": "annotator"})
    with pytest.raises(CdiffError, match="variant: consensus there, annotator now"):
        train(other, tiny_data, tiny_run, resume=True, quiet=True)


@pytest.mark.parametrize("name", ["no-annotator", "annotator"])
def test_a_variant_resumes_to_the_same_weights(tiny_data: Path, tmp_path: Path, name: str) -> None:
    config = preset("tiny").with_values({"variant": name, "steps": 4, "val_every": 2})
    train(config, tiny_data, tmp_path / "whole", quiet=True)
    train(config, tiny_data, tmp_path / "parts", max_steps=2, quiet=True)
    train(config, tiny_data, tmp_path / "parts", resume=True, quiet=True)
    folders = [checkpoint_folder(tmp_path / run, "last") for run in ("whole", "parts")]
    whole, parts = (read_tensors(folder / "model.safetensors") for folder in folders if folder)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert len(whole["denoiser.level_table.weight"]) == (3 if name == "annotator" else 1)


def test_settings_of_a_variant() -> None:
    brought = preset("tiny").with_settings(["variant=implicit-ensemble"]).network
    assert (brought.rrdbs, brought.conditions, brought.levels) == (0, 1, 3)
    with pytest.raises(CdiffError, match="set rrdbs=0, not 2"):
        preset("tiny").with_settings(["variant=implicit-ensemble", "rrdbs=2"])
    old = preset("tiny").to_json()
    del old["network"]["variant"]  # a run from before there were variants
    assert Config.from_json(old) == preset("tiny")
    published = preset("implicit-ensemble").network
    assert (published.T, published.variance, published.rrdbs, published.conditions) == (1000, "learned", 0, 1)
    assert published.outside == 0, "its masks are 0 and 1"
