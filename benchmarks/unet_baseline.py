"""The baseline beside the shipped model: a plain U-Net that regresses the soft label (the fraction of readers who drew a pixel).

The same slices, intensity normalisation and augmentation as the diffusion network's, a network of about its size, and a budget of time.
Source of the network: MONAI's BasicUNet. Run as `python -m cdiff.benchmarks.unet_baseline --help`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cdiff.runtime.cases import find_cases, read_case
from cdiff.runtime.consensus import consensus_maps
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.intensity import Intensity
from cdiff.runtime.metrics import FIVE, NINE, bootstrap_over_cases, dice, soft_dice
from cdiff.runtime.scores import marked_slices
from cdiff.train.checkpoint import load_weights, read_json, read_tensors
from cdiff.train.machine import describe_machine

INTENSITY = Intensity("slice", 0.5, 99.5)
FEATURES = (32, 32, 64, 128, 256, 32)  # 1.98 M parameters
LOG_FIELDS = ("step", "seconds", "cpu_seconds", "size", "lr", "loss", "val_soft_dice_5")


@dataclass(frozen=True)
class Budget:
    """What one training run may use. `minutes` are of `clock`: "wall", or "cpu" for a machine that others use too."""

    minutes: float
    clock: str = "wall"
    batch: int = 16
    crop: int = 64
    jitter: int = 12  # pixels, of the crop's centre
    full_share: float = 0.25  # the last quarter of the time runs on whole 128 x 128 slices
    lr: float = 1e-3
    weight_decay: float = 1e-4
    ema: float = 0.999
    validations: int = 20
    val_slices: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Slices:
    """Slices of one split: images float32 [N, 1, H, W] in [-1, 1], votes uint8 [N, C, H, W], and each slice's case number [N]."""

    images: NDArray[np.float32]
    masks: NDArray[np.uint8]
    case: NDArray[np.int64]

    @property
    def label(self) -> NDArray[np.float32]:
        """The fraction of readers who drew each pixel, float32 [N, H, W]."""
        return np.asarray(self.masks.mean(1, dtype=np.float32))


def build_network() -> nn.Module:
    """A plain 2-D U-Net of 1.98 M parameters: image [B, 1, H, W] -> logits [B, 1, H, W]; H and W divisible by 16.

    Raises CdiffError when MONAI is not installed.
    """
    try:
        from monai.networks.nets.basic_unet import BasicUNet
    except ImportError as error:
        raise CdiffError("the U-Net baseline needs MONAI; pip install --no-deps monai") from error
    network: nn.Module = BasicUNet(
        spatial_dims=2, in_channels=1, out_channels=1, features=FEATURES, norm=("group", {"num_groups": 8})
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]


def read_slices(data: Path, split: str) -> Slices:
    """Every slice of a split ("train", "val", "test").

    Raises CdiffError when the split or a file is missing, or the slices differ in size or number of readers.
    """
    found = find_cases(data)
    if split not in found:
        raise CdiffError(f"{data} has no split {split!r}, only {', '.join(found)}")
    images, masks, case = [], [], []
    for k, one in enumerate(found[split]):
        image, mask = read_case(one)
        images.append(INTENSITY.apply(image))
        masks.append(mask.astype(np.uint8))
        case += [k] * len(image)
        if images[-1].shape[1:] != images[0].shape[1:] or masks[-1].shape[1:] != masks[0].shape[1:]:
            raise CdiffError(
                f"{one.image.parent}: its size or number of readers is not the first case's; this baseline needs both alike"
            )
    return Slices(np.concatenate(images), np.concatenate(masks), np.array(case))


def augmented_batch(slices: Slices, step: int, batch: int, size: int, jitter: int, seed: int) -> tuple[Tensor, Tensor]:
    """Batch number `step`: images [B, 1, size, size] and soft labels of the same shape, a function of (seed, step) alone.

    Scale 0.9-1.1, rotation up to 15 degrees, translation up to 0.1 and both flips (Amit et al. 2023, section 4), the same affine for
    image (linear) and masks (nearest, before they are averaged). A crop is cut around the slice's centre, up to `jitter` pixels off.
    Every epoch visits each slice once.
    """
    rng = np.random.default_rng((seed, step))
    n = len(slices.images)
    epochs = range(step * batch // n, ((step + 1) * batch - 1) // n + 1)
    order = np.concatenate([np.random.default_rng((seed, e, 1)).permutation(n) for e in epochs])
    rows = order[step * batch - epochs[0] * n :][:batch]
    image = torch.from_numpy(slices.images[rows])
    masks = torch.from_numpy(slices.masks[rows]).float()
    H = image.shape[-1]
    angle = np.deg2rad(rng.uniform(-15, 15, batch))
    scale = rng.uniform(0.9, 1.1, batch)
    flip = rng.choice([-1.0, 1.0], (2, batch))
    shift = rng.uniform(-0.1, 0.1, (2, batch)) * size / H  # a fraction of the crop, as one of the slice
    if size < H:
        shift += rng.uniform(-jitter, jitter, (2, batch)) / H
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    theta = np.stack(
        [np.stack([cos * flip[0], -sin * flip[1], shift[0] * 2], -1),
         np.stack([sin * flip[0], cos * flip[1], shift[1] * 2], -1)], 1
    )  # fmt: skip
    # The crop is the centre of the slice: the output grid covers only size / H of it.
    theta[:, :, :2] *= size / H
    grid = F.affine_grid(torch.from_numpy(theta).float(), [batch, 1, size, size], align_corners=False)
    image = F.grid_sample(image, grid, "bilinear", "reflection", align_corners=False)
    masks = F.grid_sample(masks, grid, "nearest", "zeros", align_corners=False)
    return image, masks.mean(1, keepdim=True)


def loss_of(logits: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy on the fraction plus a soft Dice loss over the batch; both are least where p = label."""
    p = torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, label)
    dice = (2 * (p * label).sum() + 1) / ((p * p).sum() + (label * label).sum() + 1)
    return cross_entropy + 1 - dice


@torch.inference_mode()
def predict(network: nn.Module, images: NDArray[np.float32], batch: int = 16) -> NDArray[np.float32]:
    """Soft maps float32 [N, H, W] in 0..1 for images [N, 1, H, W]."""
    network.eval()
    maps = [
        torch.sigmoid(network(torch.from_numpy(images[i : i + batch]).contiguous(memory_format=torch.channels_last)))[
            :, 0
        ]
        for i in range(0, len(images), batch)
    ]
    return np.asarray(torch.cat(maps).numpy())


def mean_soft_dice(soft: NDArray[np.float32], label: NDArray[np.float32]) -> float:
    """Mean over slices of soft Dice at five thresholds."""
    return float(np.mean([soft_dice(p, y, FIVE) for p, y in zip(soft, label, strict=True)]))


class Clock:
    """Seconds used by this run, over all its restarts, of wall time and of this process's CPU time."""

    def __init__(self, wall: float = 0.0, cpu: float = 0.0) -> None:
        self._wall = time.monotonic() - wall
        self._cpu = time.process_time() - cpu

    @property
    def wall(self) -> float:
        return time.monotonic() - self._wall

    @property
    def cpu(self) -> float:
        return time.process_time() - self._cpu

    def of(self, kind: str) -> float:
        return self.cpu if kind == "cpu" else self.wall


def train(data: Path, out: Path, budget: Budget, *, resume: bool = False) -> dict[str, Any]:
    """Train until the budget is spent; RUN/best.safetensors is the EMA network that scored best on Validation.

    Saves at every validation and every minute; `resume` goes on from there. Returns the run's summary, which is also RUN/run.json.
    Raises CdiffError when `out` holds a run and `resume` is false, or there is nothing to resume.
    """
    last = out / "last.pt"
    if last.exists() and not resume:
        raise CdiffError(f"{out} already holds a run; pass --resume or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    training, validation = read_slices(data, "train"), read_slices(data, "val")
    marked = np.flatnonzero(validation.masks.any((1, 2, 3)))
    chosen = marked[np.linspace(0, len(marked) - 1, min(budget.val_slices, len(marked))).round().astype(int)]
    val_images, val_label = validation.images[chosen], validation.label[chosen]

    torch.manual_seed(budget.seed)
    network, average = build_network(), build_network()
    average.load_state_dict(network.state_dict())
    optimiser = torch.optim.AdamW(network.parameters(), lr=budget.lr, weight_decay=budget.weight_decay)
    step, best, clock, validated = 0, -1.0, Clock(), 0
    if resume and last.exists():
        state = torch.load(last, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, best, validated = state["step"], state["best"], state["validated"]
        clock = Clock(state["wall"], state["cpu"])

    def save() -> None:
        state = {
            "network": network.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict(),
            "step": step, "best": best, "validated": validated, "wall": clock.wall, "cpu": clock.cpu,
        }  # fmt: skip
        torch.save(state, out / "last.pt.tmp")
        os.replace(out / "last.pt.tmp", last)

    saved, total = clock.wall, 60 * budget.minutes
    while (progress := clock.of(budget.clock) / total) < 1:
        size, batch = budget.crop, budget.batch
        if progress >= 1 - budget.full_share:
            size = training.images.shape[-1]
            batch = max(1, round(budget.batch * (budget.crop / size) ** 2))  # as many pixels a batch as before
        lr = budget.lr * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimiser.param_groups:
            group["lr"] = lr
        network.train()
        image, label = augmented_batch(training, step, batch, size, budget.jitter, budget.seed)
        loss = loss_of(network(image.contiguous(memory_format=torch.channels_last)), label)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(budget.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for a, p in zip(average.parameters(), network.parameters(), strict=True):
                a.lerp_(p, 1 - decay)

        progress = min(1.0, clock.of(budget.clock) / total)
        score: float | None = None
        if int(progress * budget.validations) > validated:
            validated = int(progress * budget.validations)
            score = mean_soft_dice(predict(average, val_images), val_label)
            if score > best:
                best = score
                weights = {k: v.contiguous() for k, v in average.state_dict().items()}
                save_file(weights, out / "best.tmp")
                os.replace(out / "best.tmp", out / "best.safetensors")
        if score is not None or step % 20 == 0:
            row = (step, clock.wall, clock.cpu, size, lr, float(loss.detach()), score)
            append_row(out / "log.csv", row)
            print(
                f"step {step}  {clock.wall:.0f} s  loss {row[5]:.4f}"
                + ("" if score is None else f"  validation {score:.4f}"),
                flush=True,
            )
        if score is not None or clock.wall - saved > 60:
            save()
            saved = clock.wall
    save()
    summary = {
        "budget": asdict(budget), "steps": step, "wall_seconds": clock.wall, "cpu_seconds": clock.cpu,
        "best_val_soft_dice_5": best, "parameters": sum(p.numel() for p in network.parameters()),
        "machine": describe_machine(torch.device("cpu")),
        "train_slices": len(training.images), "val_slices": len(chosen),
    }  # fmt: skip
    write_json(out / "run.json", summary)
    return summary


def append_row(path: Path, row: tuple[Any, ...]) -> None:
    """One line of the log; the header is written with the first."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(LOG_FIELDS)
        writer.writerow(["" if v is None else round(v, 6) if isinstance(v, float) else v for v in row])


def score_run(run: Path, data: Path, split: str, *, all_raters: bool = False) -> dict[str, Any]:
    """Scores of RUN/best.safetensors on whole slices, with the keys and definitions of `cdiff evaluate` (docs/metrics.md).

    Level c of C is the soft map at (c - 1/2) / C, halfway between "c - 1 readers" and "c readers". There are no samples, so no GED.
    Raises CdiffError when the run has no checkpoint or the split has no slice to score.
    """
    network = build_network()
    load_weights(network, read_tensors(run / "best.safetensors"), run / "best.safetensors")
    slices = read_slices(data, split)
    chosen = marked_slices(slices.masks.astype(bool), all_raters)
    if not len(chosen):
        raise CdiffError(f"{data}: no slice of {split!r} was marked by {'all readers' if all_raters else 'a reader'}")
    soft, masks, case = predict(network, slices.images[chosen]), slices.masks[chosen].astype(bool), slices.case[chosen]
    label, C = slices.label[chosen], masks.shape[1]
    truth = consensus_maps(masks.swapaxes(0, 1))  # [C, N, H, W]

    def mean(values: list[float]) -> dict[str, Any]:
        grouped = [[v for v, k in zip(values, case, strict=True) if k == one] for one in np.unique(case)]
        return bootstrap_over_cases(grouped).to_json()

    return {
        "n_slices": len(chosen), "n_cases": len(np.unique(case)), "split": split, "all_raters": all_raters,
        "soft_dice_5": mean([soft_dice(p, y, FIVE) for p, y in zip(soft, label, strict=True)]),
        "soft_dice_9": mean([soft_dice(p, y, NINE) for p, y in zip(soft, label, strict=True)]),
        "dice_per_level": [
            {"level": c, **mean([dice(p >= (c - 0.5) / C, y) for p, y in zip(soft, truth[c - 1], strict=True)])}
            for c in range(1, C + 1)
        ],
        "run": read_json(run / "run.json") if (run / "run.json").exists() else {},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """The command line: train within a budget, or `--score` a finished run."""
    parser = argparse.ArgumentParser(prog="python -m cdiff.benchmarks.unet_baseline", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with Training, Validation and Testing")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    training = parser.add_argument_group("training")
    training.add_argument("--minutes", type=float, default=60.0, help="the budget")
    training.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what the budget counts")
    training.add_argument("--batch", type=int, default=16)
    training.add_argument("--crop", type=int, default=64)
    training.add_argument("--validations", type=int, default=20, help="how often to validate in all")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--resume", action="store_true", help="go on from the last save")
    scoring = parser.add_argument_group("scoring a finished run")
    scoring.add_argument("--score", choices=("val", "test"), help="score the best checkpoint on this split")
    scoring.add_argument("--all-raters", action="store_true", help="only slices that all readers marked")
    scoring.add_argument("--json", type=Path, help="where to write the scores")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.score:
        report = score_run(options.out, options.data, options.score, all_raters=options.all_raters)
        if options.json:
            write_json(options.json, report)
    else:
        budget = Budget(
            options.minutes,
            options.clock,
            options.batch,
            options.crop,
            validations=options.validations,
            seed=options.seed,
        )
        report = train(options.data, options.out, budget, resume=options.resume)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
