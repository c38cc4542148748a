"""The U-Net peers: what each learns from, the losses' minima, the probabilistic U-Net against its equations, and what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdiff.benchmarks.peers.draws import draw_runs
from cdiff.benchmarks.peers.networks import LATENT, Gaussian, ProbabilisticUNet
from cdiff.benchmarks.peers.slices import Batch, Slices, augmented_batch, read_slices
from cdiff.benchmarks.peers.unets import (
    UNETS,
    cross_entropy_and_dice,
    heads_loss,
    majority_loss,
    probabilistic_loss,
    soft_loss,
)
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.framing import resize
from cdiff.runtime.sampling.mirror import view_of
from cdiff.runtime.scoring.metrics import FIVE, soft_dice
from cdiff.runtime.variants import ANNOTATOR, IMPLICIT_ENSEMBLE, NO_ANNOTATOR
from cdiff.train import targets


def disc_slices(n: int = 6, size: int = 64, annotators: int = 3) -> Slices:
    """Slices whose image says exactly where the annotators drew: 1 inside a lopsided figure, -1 outside."""
    y, x = np.mgrid[:size, :size] - size / 2
    inside = ((x / 9) ** 2 + ((y - 3) / 5) ** 2 < 1) | ((abs(x - 6) < 4) & (abs(y + 4) < 6))
    image = np.where(inside, 1.0, -1.0).astype(np.float32)
    masks = np.stack([inside] * annotators).astype(np.uint8)
    return Slices(np.stack([image[None]] * n), np.stack([masks] * n))


def random_batch(annotators: int = 4, n: int = 3, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(n, annotators, size, size, generator=generator) < 0.4).float()
    return Batch(torch.randn(n, 1, size, size, generator=generator), masks, torch.arange(n) % annotators)


class Says(nn.Module):
    """A network that returns the same logits for every image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("size", [32, 64])
def test_image_and_masks_go_through_one_map(size: int) -> None:
    batch = augmented_batch(disc_slices(), 3, 8, size, 4, seed=0)
    assert batch.image.shape == batch.fraction.shape == (8, 1, size, size)
    # The image is interpolated linearly, the masks to the nearest pixel: they part only along the border.
    assert ((batch.image > 0) == (batch.fraction > 0.5)).float().mean() > 0.98
    assert all(not torch.equal(batch.masks[0], batch.masks[i]) for i in range(1, 8))


def test_scale_shift_and_rotation_stay_within_the_papers_ranges() -> None:
    """Over many draws the area stays within 0.9^2 .. 1.1^2 of the figure's, and the centre within the shift."""
    slices = disc_slices()
    area, y0, x0 = moments(torch.from_numpy(slices.label[:1])[:, None])
    areas, y, x = moments(augmented_batch(slices, 0, 200, 64, 0, seed=1).fraction)
    assert areas.min() > 0.9**2 * area[0] * 0.93
    assert areas.max() < 1.1**2 * area[0] * 1.07
    assert areas.max() / areas.min() > 1.2
    # 0.1 of 64 pixels, and the figure's own distance from the middle, which rotates and flips with it.
    reach = 6.4 * 1.1 + 1.1 * float(torch.hypot(y0[0] - 31.5, x0[0] - 31.5)) + 1
    assert max((y - 31.5).abs().max(), (x - 31.5).abs().max()) < reach


def moments(label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grid = torch.arange(label.shape[-1]).float()
    area = label.sum((1, 2, 3))
    return area, (label.sum((1, 3)) * grid).sum(1) / area, (label.sum((1, 2)) * grid).sum(1) / area


def test_a_batch_is_a_function_of_seed_and_step_and_an_epoch_sees_each_slice_once() -> None:
    slices = disc_slices(6)
    for i in range(6):
        slices.images[i] = i  # the number of the slice, whatever the map does to it
    first, again = (augmented_batch(slices, 2, 4, 64, 0, seed=5) for _ in range(2))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.reader, again.reader)
    assert not torch.equal(first.image, augmented_batch(slices, 2, 4, 64, 0, seed=6).image)
    seen = torch.cat([augmented_batch(slices, step, 4, 64, 0, seed=5).image[:, 0, 32, 32] for step in range(3)])
    assert sorted(seen[:6].round().int().tolist()) == list(range(6))
    assert sorted(seen[6:].round().int().tolist()) == list(range(6))


def test_slices_are_read_as_training_reads_them(tiny_data: Path) -> None:
    slices = read_slices(tiny_data, "train")
    assert slices.images.dtype == np.float32
    assert slices.images.min() == -1
    assert slices.images.max() == 1
    assert len(slices.images) == 4 * 4
    assert soft_dice(slices.label[0], slices.masks[0].mean(0), FIVE) == 1
    with pytest.raises(CdiffError, match="no split 'test'"):
        read_slices(tiny_data, "test")


def test_every_annotator_is_drawn_equally_often() -> None:
    slices = disc_slices(5, 16, annotators=4)
    readers = torch.cat([augmented_batch(slices, step, 32, 16, 0, seed=0).reader for step in range(100)])
    counts = torch.bincount(readers, minlength=4)
    assert len(counts) == 4
    assert (counts - 800).abs().max() < 100  # four standard deviations


def test_the_annotator_drawn_is_the_one_whose_mask_is_learned() -> None:
    masks = torch.zeros(4, 4, 2, 4)
    masks[:, torch.arange(4), :, torch.arange(4)] = 1  # annotator k drew column k
    drawn = Batch(torch.zeros(4, 1, 2, 4), masks, torch.tensor([2, 0, 3, 3])).drawn
    assert drawn.shape == (4, 1, 2, 4)
    assert drawn[:, 0, 0].argmax(1).tolist() == [2, 0, 3, 3]
    assert drawn.sum() == 8


def test_majority_is_at_least_half_of_the_annotators() -> None:
    votes = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).float()
    batch = Batch(torch.zeros(4, 1, 1, 1), votes[:, :, None, None], torch.zeros(4, dtype=torch.int64))
    assert batch.majority.flatten().tolist() == [1, 0, 1, 0]
    three = Batch(batch.image, batch.masks[:, :3], batch.reader)
    assert three.majority.flatten().tolist() == [1, 0, 1, 0]
    some = random_batch()
    raters = torch.full((3,), 4)
    learned = targets.majority(some.masks.bool(), raters, torch.ones(3), torch.zeros(3))  # the implicit ensemble's
    assert torch.equal(some.majority * 2 - 1, learned)


@pytest.mark.parametrize(
    ("loss", "best"), [(majority_loss, "majority"), (soft_loss, "fraction"), (heads_loss, "masks")]
)
def test_a_loss_is_least_at_its_label(loss: type, best: str) -> None:
    batch = random_batch()
    label = getattr(batch, best)
    p = label * 0.98 + 0.01
    least = loss(Says(torch.logit(p)), batch)
    assert least < 0.12 + (loss is soft_loss)  # the entropy of a fraction is what no map avoids
    for other in (torch.logit(p) + 0.5, torch.logit(p) - 0.5, torch.logit(p).roll(1, -1)):
        assert loss(Says(other), batch) > least


def test_cross_entropy_and_dice_are_both_least_at_a_fraction() -> None:
    label = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
    best = cross_entropy_and_dice(torch.logit(label), label)
    for shift in (-0.3, 0.3):
        assert cross_entropy_and_dice(torch.logit(label) + shift, label) > best


def test_each_head_learns_its_own_annotator() -> None:
    batch = random_batch()
    right = 20 * (batch.masks - 0.5)
    assert heads_loss(Says(right), batch) < 1e-3
    assert heads_loss(Says(right[:, [1, 0, 2, 3]]), batch) > 1


def test_a_random_annotators_loss_is_on_average_least_at_the_fraction() -> None:
    """Cross-entropy alone does that; with a Dice term the best map lies above the fraction."""
    batch = random_batch()
    p = batch.fraction * 0.98 + 0.01

    def mean(logits: Tensor, with_dice: bool = False) -> float:
        def of(one: Batch) -> Tensor:
            return UNETS[f"unet-random{'-dice' * with_dice}"].loss(Says(logits), one)

        return float(np.mean([of(replace(batch, reader=torch.full((3,), k))) for k in range(4)]))

    for shift in (-0.2, 0.2):
        assert mean(torch.logit(p) + shift) > mean(torch.logit(p))
    assert mean(torch.logit(p) + 0.2, with_dice=True) < mean(torch.logit(p), with_dice=True)


@pytest.mark.parametrize(
    ("name", "label"), [("unet-random", "drawn"), ("unet-heads", "masks"), ("unet-dropout", "drawn")]
)
def test_with_dice_a_peer_differs_by_the_dice_term_alone(name: str, label: str) -> None:
    plain, with_dice, batch = UNETS[name], UNETS[f"{name}-dice"], random_batch()
    assert (with_dice.build, with_dice.draw, with_dice.variant) == (plain.build, plain.draw, plain.variant)
    assert with_dice.samples == plain.samples
    target = getattr(batch, label)
    p = torch.rand(target.shape, generator=torch.Generator().manual_seed(4))
    more = with_dice.loss(Says(torch.logit(p)), batch) - plain.loss(Says(torch.logit(p)), batch)
    overlap = 2 * sum(a * b for a, b in zip(p.flatten().tolist(), target.flatten().tolist(), strict=True))
    squares = sum(a * a for a in [*p.flatten().tolist(), *target.flatten().tolist()])
    assert float(more) == pytest.approx(1 - (overlap + 1) / (squares + 1), abs=1e-5)


def test_kl_of_gaussians_is_torchs_and_zero_for_equal_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    q, p = (Gaussian(*torch.randn(2, 5, LATENT, generator=generator)) for _ in range(2))
    assert torch.equal(q.kl_to(q), torch.zeros(5))
    normal = [torch.distributions.Normal(one.mean, one.log_std.exp()) for one in (q, p)]
    wanted = torch.distributions.kl_divergence(*normal).sum(1)
    assert torch.allclose(q.kl_to(p), wanted, rtol=1e-5)
    assert not torch.allclose(q.kl_to(p), p.kl_to(q))
    noise = torch.randn(20_000, 5, LATENT, generator=generator)
    assert torch.allclose(q.sample(noise).std(0), q.log_std.exp(), rtol=0.05)


@pytest.fixture(scope="module")
def probabilistic() -> ProbabilisticUNet:
    pytest.importorskip("monai", reason="the peers' networks are MONAI's: pip install --no-deps monai")
    torch.manual_seed(0)
    return ProbabilisticUNet()


def test_the_probabilistic_loss_is_reconstruction_plus_kl_over_the_pixels(probabilistic: ProbabilisticUNet) -> None:
    batch = random_batch(n=2)
    torch.manual_seed(7)
    found = probabilistic_loss(probabilistic, batch)
    torch.manual_seed(7)
    noise = torch.randn(2, LATENT)
    posterior, prior = probabilistic.posterior_of(batch.image, batch.drawn), probabilistic.prior(batch.image)
    logits = probabilistic.logits(probabilistic.unet(batch.image), posterior.sample(noise))
    elbo = torch.distributions.Bernoulli(logits=logits).log_prob(batch.drawn).sum((1, 2, 3)) - posterior.kl_to(prior)
    assert torch.allclose(found, -elbo.mean() / 16**2, rtol=1e-5)
    torch.manual_seed(7)
    with_dice = UNETS["unet-probabilistic-dice"].loss(probabilistic, batch)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.drawn)
    assert torch.allclose(with_dice - found, cross_entropy_and_dice(logits, batch.drawn) - cross_entropy, rtol=1e-4)


def test_the_probabilistic_loss_falls_and_reaches_every_part(probabilistic: ProbabilisticUNet) -> None:
    batch = random_batch(n=2)
    batch = replace(batch, image=batch.drawn * 2 - 1)
    optimiser = torch.optim.Adam(probabilistic.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        loss = probabilistic_loss(probabilistic, batch)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in probabilistic.posterior.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in probabilistic.prior.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_samples_differ_with_z_and_only_with_z(probabilistic: ProbabilisticUNet) -> None:
    noise = torch.randn(3, LATENT, generator=torch.Generator().manual_seed(0))
    image = random_batch().image[:1]
    with torch.inference_mode():
        drawn, again = (probabilistic.eval().draw(image, noise) for _ in range(2))
    assert drawn.shape == (3, 1, 16, 16)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name", [name for name in UNETS if not name.endswith("-dice")])
def test_draws_have_the_peers_shape_and_repeat_with_the_seed(name: str) -> None:
    pytest.importorskip("monai", reason="the peers' networks are MONAI's: pip install --no-deps monai")
    peer = UNETS[name]
    network = peer.build(3)
    if peer.samples:
        assert 1.8e6 < sum(p.numel() for p in network.parameters()) < 2.7e6
    image = np.random.default_rng(0).normal(size=(1, 48, 32)).astype(np.float32)
    before = torch.get_rng_state()
    first, again, other = (draw_runs(peer, network, image, runs=5, mirror=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before), "drawing leaves the training's random numbers alone"
    K, R = (3 if name == "unet-heads" else 1), (5 if peer.samples else 1)
    assert first.shape == (K, R, 48, 32)
    assert first.min() >= 0
    assert first.max() <= 1
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) != peer.samples
    assert not any(layer.training for layer in peer.build(3).eval().modules())


def test_runs_see_the_mirrored_views_in_turn_and_maps_are_mirrored_back() -> None:
    ramp = torch.linspace(0, 1, 8 * 6).reshape(1, 1, 8, 6)
    blind = replace(UNETS["unet-soft"], draw=lambda network, image, n: ramp.expand(n, -1, -1, -1))
    runs = draw_runs(replace(blind, samples=True), nn.Identity(), np.zeros((1, 8, 6), np.float32), runs=6, mirror=True, seed=0)  # fmt: skip
    for r in range(6):
        assert np.array_equal(runs[0, r], view_of(ramp[0, 0].numpy(), r % 4))
    mean = draw_runs(blind, nn.Identity(), np.zeros((1, 8, 6), np.float32), runs=6, mirror=True, seed=0)
    assert np.allclose(mean, 0.5), "the mean over the four views of a ramp is flat"
    seeing = replace(blind, draw=lambda network, image, n: image)
    image = ramp[0].numpy()
    for mirror in (False, True):
        assert np.allclose(draw_runs(seeing, nn.Identity(), image, runs=1, mirror=mirror, seed=0)[0, 0], image[0])


def test_zooms_are_seen_in_turn_and_maps_come_back_at_the_slices_size() -> None:
    seen: list[tuple[int, ...]] = []

    def draw(network: nn.Module, image: Tensor, n: int) -> Tensor:
        seen.append(tuple(image.shape))
        return image[:1].expand(n, -1, -1, -1) + 0.5 * (
            image.shape[-1] > 64
        )  # as it was seen, and half more when magnified

    image = np.random.default_rng(0).uniform(0, 0.5, (1, 48, 64)).astype(np.float32)
    image = resize(resize(image, (12, 16)), (48, 64))  # smooth, so that a zoom and back changes little
    one = replace(UNETS["unet-soft"], draw=draw)
    mean = draw_runs(one, nn.Identity(), image, runs=1, mirror=False, seed=0, zooms=(1, 1.25))
    assert seen == [(1, 1, 48, 64), (1, 1, 64, 80)]
    assert mean.shape == (1, 1, 48, 64)
    np.testing.assert_allclose(mean[0, 0], image[0] + 0.25, atol=0.02)

    several = replace(one, samples=True)
    runs = draw_runs(several, nn.Identity(), image, runs=5, mirror=True, seed=0, zooms=(1, 1.25))
    assert runs.shape == (1, 5, 48, 64)
    for r in range(5):
        np.testing.assert_allclose(runs[0, r], image[0] + 0.5 * (r % 2), atol=0.04)
    single = draw_runs(several, nn.Identity(), image, runs=1, mirror=True, seed=0, zooms=(1, 1.25))
    np.testing.assert_array_equal(single[0, 0], image[0])


def test_the_draws_of_a_zoom_are_not_those_of_another() -> None:
    peer = replace(
        UNETS["unet-dropout"], draw=lambda network, image, n: torch.rand(n, 1, 1, 1).expand(-1, -1, *image.shape[-2:])
    )
    runs = draw_runs(peer, nn.Identity(), np.zeros((1, 16, 16), np.float32), runs=4, mirror=False, seed=0, zooms=(1, 2))
    assert len({float(run[0, 0]) for run in runs[0]}) == 4


def test_each_peer_learns_and_means_what_its_name_says(probabilistic: ProbabilisticUNet) -> None:
    batch = random_batch()
    meant = {"majority": IMPLICIT_ENSEMBLE, "heads": ANNOTATOR}
    for name, peer in UNETS.items():
        assert peer.variant == meant.get(name.split("-")[1], NO_ANNOTATOR)
    for name, label in (("unet-majority", batch.majority), ("unet-soft", batch.fraction)):
        logits = Says(torch.randn(label.shape, generator=torch.Generator().manual_seed(5)))
        assert UNETS[name].loss(logits, batch) == cross_entropy_and_dice(logits.logits, label)
    rates = {layer.p for layer in UNETS["unet-dropout"].build(4).modules() if isinstance(layer, nn.Dropout)}
    assert rates == {0.1}


def test_the_posterior_sees_masks_about_zero_and_draws_have_the_priors_spread(probabilistic: ProbabilisticUNet) -> None:
    batch, noise = random_batch(n=2), torch.randn(3, LATENT, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        network = probabilistic.eval()
        wanted = network.posterior(torch.cat([batch.image, batch.drawn - 0.5], 1))
        found = network.posterior_of(batch.image, batch.drawn)
        assert torch.equal(found.mean, wanted.mean)
        image = random_batch(size=32).image[:1]
        encoded = network.prior.head(network.prior.encoder(image).mean((2, 3), keepdim=True)).flatten()
        prior = network.prior(image)
        torch.testing.assert_close(torch.cat([prior.mean, prior.log_std], 1).flatten(), encoded)
        z = prior.mean + prior.log_std.exp() * noise
        logits = network.logits(network.unet(image).expand(3, -1, -1, -1), z)
        torch.testing.assert_close(network.draw(image, noise), logits.sigmoid())
    parts = (network.unet, network.prior, network.posterior)
    assert [{one.negative_slope for one in part.modules() if isinstance(one, nn.LeakyReLU)} for part in parts] == [
        {0.1}
    ] * 3


def test_without_monai_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "monai.networks.nets", None)
    with pytest.raises(CdiffError, match="pip install --no-deps monai"):
        UNETS["unet-soft"].build(4)
