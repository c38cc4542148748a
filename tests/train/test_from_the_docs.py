"""A training recomputed from docs/learning.md alone: of `cdiff` only the network, what a step drew, and what came out are used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from cdiff.train.data import Data, Slices, training_batch
from cdiff.train.fabric import fabric_on
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset
from cdiff.train.rows import Rows, draw_rows
from cdiff.train.run import Run

NETWORK: dict[str, Any] = {"image_size": 16, "levels": 3, "batch": 3, "rows_per_image": 2, "steps": 5, "warmup": 3}
CASES: dict[str, dict[str, Any]] = {
    "consensus": {"target": "x0", "dice_weight": 0.3, "decay": "cosine", "accumulate": 2, "weight_decay": 0.5},
    "annotator": {"target": "eps", "schedule": "cosine", "variance": "learned", "clip": 0.05},
    "no-annotator": {"target": "v", "outside": 0, "dice_weight": 1.0, "t_power": 2.0, "ema": 0.15},
    "soft-label": {"target": "x0", "T": 2, "scaled": False, "variance": "learned", "dice_weight": 0.5, "t_power": 3.0},
    "implicit-ensemble": {"target": "eps", "rrdbs": 0, "outside": 0, "T": 3, "scaled": False, "variance": "learned"},
}


def slices(size: tuple[int, int] = (16, 16), number: int = 4, radius: tuple[float, float] = (0.15, 0.3)) -> Slices:
    """Ellipses by three annotators, of whom the third is missing on every other slice. radius: from and to, in sizes."""
    rng = np.random.default_rng(0)
    out = Slices()
    rows, columns = np.indices(size)
    for i in range(number):
        middle, side = rng.uniform(0.4, 0.6, 2) * size, rng.uniform(*radius, 2) * size
        distance = np.hypot((rows - middle[0]) / side[0], (columns - middle[1]) / side[1])
        masks = np.stack([distance < 0.7 + 0.3 * k for k in range(3)])
        masks[2] &= i % 2 == 0
        out.images.append(torch.from_numpy(rng.normal(0, 0.3, (1, *size)) + masks[0]).float())
        out.masks.append(torch.from_numpy(masks.astype(np.uint8)))
        out.raters.append(3 if i % 2 == 0 else 2)
        out.names.append(str(i))
    return out


class ByTheDocs:
    """Sections 3 to 5: a network's weights and their averages, step by step."""

    def __init__(self, network: ConsensusNet, settings: dict[str, Any]) -> None:
        self.network, self.settings = network, settings
        self.weights = [weight for _, weight in sorted(network.named_parameters())]
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in self.weights]
        T = settings["T"]
        if settings["schedule"] == "cosine":
            g = np.cos(np.pi / 2 * (np.arange(T + 1) / T + 0.008) / 1.008) ** 2
            self.beta = np.minimum(1 - g[1:] / g[:-1], 0.999)
        else:
            scale = 1000 / T if settings["scaled"] else 1
            self.beta = scale * np.linspace(settings["beta_start"], settings["beta_end"], T)
        self.beta = np.array([0, *self.beta])
        self.abar = np.cumprod(1 - self.beta)

    def step(self, k: int, rows: Rows) -> float:
        s = self.settings
        images, masks, raters = (
            part.repeat_interleave(s["rows_per_image"], 0) for part in (rows.image, rows.masks, rows.raters)
        )
        fractions = [self.target(*row) for row in zip(masks, raters, rows.level, rows.u, strict=True)]
        y = torch.stack(fractions)[:, None].double()
        m = y if s["outside"] == 0 else 2 * y - 1
        a = torch.from_numpy(self.abar[rows.t])[:, None, None, None]
        x = (a.sqrt() * m + (1 - a).sqrt() * rows.noise).float()
        out = self.network(x, images, rows.t, rows.level).double()
        loss = self.loss(out, m, y, rows.noise.double(), x.double(), a, rows.t.tolist()).mean()
        gradients = torch.autograd.grad(loss, self.weights)
        norm = math.sqrt(sum(float((one.double() ** 2).sum()) for one in gradients))
        shrink = min(1.0, s["clip"] / norm)
        rate = s["lr"] * min(1, (k + 1) / s["warmup"])
        if s["decay"] == "cosine":
            rate *= (1 + math.cos(math.pi * k / s["steps"])) / 2
        keep = min(s["ema"], (1 + k) / (10 + k))
        with torch.no_grad():
            for weight, average, g, (first, second) in zip(
                self.weights, self.averages, gradients, self.moments, strict=True
            ):
                first.mul_(0.9).add_(shrink * g, alpha=0.1)
                second.mul_(0.99).add_((shrink * g) ** 2, alpha=0.01)
                weight.mul_(1 - rate * s["weight_decay"])
                weight -= rate * first / (1 - 0.9 ** (k + 1)) / ((second / (1 - 0.99 ** (k + 1))).sqrt() + 1e-8)
                average.mul_(keep).add_(weight, alpha=1 - keep)
        return float(loss.detach())

    def target(self, masks: Tensor, n: Tensor, c: Tensor, u: Tensor) -> Tensor:
        votes = masks.sum(0)
        return {
            "consensus": (votes >= c).float(),
            "annotator": masks[c - 1 if self.settings["variant"] == "annotator" else 0].float(),
            "no-annotator": masks[int(u * n)].float(),
            "soft-label": votes / n,
            "implicit-ensemble": (2 * votes >= n).float(),
        }[self.settings["variant"]]

    def loss(self, out: Tensor, m: Tensor, y: Tensor, eps: Tensor, x: Tensor, a: Tensor, t: list[int]) -> Tensor:
        s, f = self.settings, out[:, :1]
        aim, x0 = {
            "eps": (eps, (x - (1 - a).sqrt() * f) / a.sqrt()),
            "x0": (m, f),
            "v": (a.sqrt() * eps - (1 - a).sqrt() * m, a.sqrt() * x - (1 - a).sqrt() * f),
        }[s["target"]]
        loss = ((f - aim) ** 2).mean((1, 2, 3))
        p = x0.clamp(0, 1) if s["outside"] == 0 else (x0.clamp(-1, 1) + 1) / 2
        overlap = (2 * (p * y).sum((1, 2, 3)) + 1) / ((p**2).sum((1, 2, 3)) + (y**2).sum((1, 2, 3)) + 1)
        loss = loss + s["dice_weight"] * (1 - overlap)
        if s["variance"] == "learned":
            x0 = x0.detach().clamp(-1, 1)
            bound = [self.bound(*row) for row in zip(out[:, 1], x0[:, 0], m[:, 0], x[:, 0], t, strict=True)]
            loss = loss + s["T"] / 1000 * torch.stack(bound)
        return loss

    def bound(self, second: Tensor, x0: Tensor, m: Tensor, x: Tensor, t: int) -> Tensor:
        def posterior(z: Tensor) -> Tensor:
            before, now = self.abar[t - 1], self.abar[t]
            return (math.sqrt(before) * self.beta[t] * z + math.sqrt(1 - self.beta[t]) * (1 - before) * x) / (1 - now)

        at = max(t, 2)
        tilde = self.beta[at] * (1 - self.abar[at - 1]) / (1 - self.abar[at])
        mix = (second + 1) / 2
        deviation = torch.exp((mix * math.log(self.beta[t]) + (1 - mix) * math.log(tilde)) / 2)
        step = torch.distributions.Normal(posterior(x0), deviation)
        if t > 1:
            true = torch.distributions.Normal(posterior(m), math.sqrt(tilde))
            return torch.distributions.kl_divergence(true, step).mean() / math.log(2)

        def below(edge: Tensor) -> Tensor:
            z = (edge - step.mean) / deviation
            return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

        low = torch.where(m < -0.999, 0, below(m - 1 / 255))
        high = torch.where(m > 0.999, 1, below(m + 1 / 255))
        return -torch.log2((high - low).clamp(min=1e-12)).mean()


@pytest.mark.parametrize("variant", CASES)
def test_steps_of_every_variant_are_those_of_the_page(variant: str, tmp_path: Path) -> None:
    config = preset("tiny").with_values({"variant": variant, **NETWORK, **CASES[variant]})
    data = slices()
    run = Run(config, Data(data, data, {}, []), fabric_on(torch.device("cpu")), tmp_path)
    started = run.learner.network.state_dict()
    with torch.no_grad():  # a fresh network has layers of zeros, behind which nothing else has a gradient
        generator = torch.Generator().manual_seed(1)
        for name, weight in started.items():
            if weight.ndim > 1 and not weight.any():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
                run.learner.ema[name].copy_(weight)
    network = ConsensusNet(config.network)
    network.load_state_dict(started)
    before = {name: weight.clone() for name, weight in started.items()}
    docs = ByTheDocs(network, config.values())
    whole = config.with_values({"accumulate": 1})
    for k in range(config.training.steps):
        (rows,) = draw_rows(data, whole, k, 16)
        loss, _ = run.step(k)
        run.done += 1
        assert docs.step(k, rows) == pytest.approx(loss, rel=1e-4)
    for found, state in ((docs.weights, run.learner.network.state_dict()), (docs.averages, run.learner.ema)):
        for (name, _), mine in zip(sorted(network.named_parameters()), found, strict=True):
            moved = (mine - before[name]).norm()
            # AdamW enlarges what is rounding alone, such as the gradient of the bias of an attention's keys.
            assert (state[name] - mine).norm() < 0.01 * moved, name


def even(values: Any, low: float, high: float) -> bool:
    """Whether the values may be even from `low` to `high`; one such set in a thousand would not."""
    return bool(stats.kstest(np.ravel(values), stats.uniform(low, high - low).cdf).pvalue > 1e-3)


def unrelated(columns: Any) -> bool:
    """Whether no column tells another, nor another's next row, within five standard errors."""
    values = np.asarray(columns, float)
    both = np.concatenate([values[:-1], values[1:]], axis=1)
    found = np.corrcoef(both.T) - np.eye(both.shape[1])
    return bool(np.abs(found).max() < 5 / math.sqrt(len(both)))


def test_what_a_row_draws() -> None:
    config = preset("tiny").with_values({**NETWORK, "T": 25, "t_power": 2.0})
    data = slices()
    steps = [draw_rows(data, config, k, 8)[0] for k in range(600)]
    t, level = (np.stack([vars(rows)[name].numpy() for rows in steps]) for name in ("t", "level"))
    u, noise = (
        np.stack([rows.u.numpy() for rows in steps]),
        np.stack([rows.noise[:, 0, 3, 3].numpy() for rows in steps]),
    )
    wanted = np.diff((np.arange(26) / 25) ** 2)
    assert stats.chisquare(np.bincount(t.ravel(), minlength=26)[1:], wanted * t.size).pvalue > 1e-3
    assert stats.chisquare(np.bincount(level.ravel(), minlength=4)[1:]).pvalue > 1e-3
    assert even(u, 0, 1)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert unrelated(np.concatenate([t, level, u, noise], axis=1))


def test_a_window_that_is_too_small_for_all_that_was_drawn_lies_around_a_pixel_of_it() -> None:
    side, n = 64, 16
    ramp = torch.stack(torch.meshgrid(*[torch.arange(side) + 0.5] * 2, indexing="ij"))
    masks = torch.zeros(2, side, side, dtype=torch.uint8)
    masks[0, 10:14, 20:24] = masks[1, 40:48, 50:54] = masks[1, 12:14, 20:28] = 1
    data = Slices([ramp] * 4, [masks] * 4, [2] * 4, list("abcd"))
    still = {"rotation": 0.0, "zoom": 1e-6, "shift": 0.0, "jitter": 0}  # magnified by nothing, but interpolated
    config = preset("tiny").with_values({"framing": "tile", "image_size": n, **still})
    shown = torch.cat([training_batch(data, config, step, 6, n).image for step in range(200)])
    middles = shown.mean((2, 3)).numpy()  # the flips leave it where it is
    drawn = masks.numpy().any(0)
    rows, columns = np.round(middles - 0.5).astype(int).T
    on = (np.abs(middles - 0.5 - np.stack([rows, columns], axis=1)) < 1e-3).all(1) & drawn[rows, columns]
    assert 0.87 < on.mean() < 0.94, "all but the tenth that lies anywhere"
    often = np.zeros((side, side), int)
    np.add.at(often, (rows[on], columns[on]), 1)
    assert stats.chisquare(often[drawn]).pvalue > 1e-3, "each pixel as often"
    centred = training_batch(data, config.with_values({"framing": "centre"}), 0, 60, n).image.mean((2, 3)).numpy()
    assert (np.abs(centred - [29, 37]) < 1e-3).all(1).mean() > 0.8, "with centre around the middle of all"


def test_what_a_window_shows() -> None:
    """A picture whose channels are each pixel's own row and column tells where a window lies."""
    side, n, number = 48, 16, 7
    ramp = torch.stack(torch.meshgrid(*[torch.arange(side) + 0.5] * 2, indexing="ij"))
    data = slices((side, side), number, (0.05, 0.12))
    data.images = [torch.cat([ramp, torch.full((1, side, side), float(i))]) for i in range(number)]
    ranges = {"rotation": 20.0, "zoom": 0.2, "shift": 0.2}
    config = preset("tiny").with_values({"framing": "tile", "image_size": n, "jitter": 2, **ranges})
    batches = [training_batch(data, config, step, 6, n) for step in range(210)]
    images, masks = torch.cat([batch.image for batch in batches]).double(), torch.cat([b.masks for b in batches])

    order = images[:, 2].mean((1, 2)).round().long().numpy()
    epochs = order[: len(order) // number * number].reshape(-1, number)
    assert (np.sort(epochs) == np.arange(number)).all(), "an epoch takes each slice once"
    assert all(stats.chisquare(np.bincount(place, minlength=number)).pvalue > 1e-3 for place in epochs.T)

    inside = (
        ((images[:, :2] > 0.5) & (images[:, :2] < side - 0.5)).all(1).flatten(1).all(1)
    )  # the edge was not repeated
    offset = np.indices((n, n)).reshape(2, -1).T - (n - 1) / 2
    points = images[:, :2].flatten(2).permute(0, 2, 1).numpy()
    design = np.column_stack([offset, np.ones(n * n)])
    solved = np.stack([np.linalg.lstsq(design, one, rcond=None)[0] for one in points])[inside]
    matrix, middle = solved[:, :2].transpose(0, 2, 1), solved[:, 2]
    flips = np.sign(np.stack([matrix[:, 0, 0], matrix[:, 1, 1]], axis=1))  # no angle reaches 90 degrees
    zoom = 1 / np.sqrt(np.abs(np.linalg.det(matrix)))
    angle = np.arctan2(matrix[:, 1, 0] * flips[:, 0], matrix[:, 0, 0] * flips[:, 0])
    turned = np.array([[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in angle])
    assert np.abs(turned * flips[:, None] / zoom[:, None, None] - matrix).max() < 1e-4
    assert even(zoom, 0.8, 1.2)
    assert even(np.degrees(angle), -20, 20)
    assert all(abs(share - 0.5) < 0.06 for share in (flips < 0).mean(0))
    drawn_at = [np.argwhere(masks.any(0).numpy()) for masks in data.masks]
    assert max(np.ptp(pixels, axis=0).max() for pixels in drawn_at) < n
    middles = np.array([(pixels.min(0) + pixels.max(0) + 1) / 2 for pixels in drawn_at])
    away = middle - middles[order[inside]]
    near = (np.abs(away) <= 2 + 3.2 + 1e-3).all(1)
    assert 0.85 < near.mean() < 0.97, "all but the share that lies anywhere"
    assert unrelated(np.column_stack([zoom, angle, flips, away])[near])
    all_zooms = np.full(len(images), np.nan)
    all_zooms[inside.numpy()] = zoom
    both = np.stack([all_zooms[:-6], all_zooms[6:]])  # of the same place in the next step
    both = both[:, np.isfinite(both).all(0)]
    assert abs(np.corrcoef(both)[0, 1]) < 5 / math.sqrt(both.shape[1])

    for i in range(0, len(images), 97):  # linear, then 1/2; empty outside
        drawn = data.masks[order[i]].double().numpy()
        padded = np.pad(drawn, [(0, 0), (2, 2), (2, 2)])
        at = np.clip(points[i].T + 1.5, 0, side + 2)
        low = np.floor(at).astype(int)
        part = at - low
        value = sum(
            (part[0] if down else 1 - part[0])
            * (part[1] if across else 1 - part[1])
            * padded[:, low[0] + down, low[1] + across]
            for down in (0, 1)
            for across in (0, 1)
        )
        clear = np.abs(np.asarray(value) - 0.5) > 1e-3
        assert (masks[i].flatten(1).numpy() == (np.asarray(value) >= 0.5))[clear].all()
