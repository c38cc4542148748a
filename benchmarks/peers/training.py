"""One trainer for all U-Net peers: a budget of time, saved as it goes, resumed after any kill.

RUN/last.pt            network, its average, optimiser, step, best score and clocks: what a resumed run needs
RUN/best.safetensors   the averaged weights that scored best on Validation
RUN/log.csv            a row every 20 steps and for each validation
RUN/run.json           written at the end: a run that has one is finished
"""

from __future__ import annotations

import csv
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from cdiff.benchmarks.peers.draws import draw_runs, mixed
from cdiff.benchmarks.peers.networks import DIVISOR
from cdiff.benchmarks.peers.slices import Slices, augmented_batch, read_slices
from cdiff.benchmarks.peers.unets import UNetPeer
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import atomic_path, make_folder, write_json
from cdiff.runtime.scoring.metrics import FIVE, soft_dice
from cdiff.train.checkpoint import load_weights
from cdiff.train.interrupt import Interrupt
from cdiff.train.log import begin_log
from cdiff.train.machine import describe_machine

LOG_FIELDS = ("step", "seconds", "cpu_seconds", "size", "lr", "loss", "val_soft_dice_5")
STATE = ("network", "average", "optimiser", "step", "best", "validated", "wall", "cpu", "budget")
"""What last.pt holds."""
SUMMARY = "run.json"
WEIGHTS = "best.safetensors"
VAL_RUNS = 1
"""Draws per slice when a peer that samples is validated: more would cost training time, and the other peers validate with one too."""
SAY_EVERY = 30.0
"""Seconds between two lines about the progress."""


@dataclass(frozen=True)
class Budget:
    """What one training run may use, the same for every peer. `minutes` are of `clock`: "wall", or "cpu", this process's processor
    time, for a machine that others use too. steps > 0 counts steps instead; only such a run is reproducible to the bit.

    crop: side in pixels of the training windows, which lie up to `jitter` pixels off the slice's centre; for the last `full_share` of the
    budget they are whole slices.
    Raises CdiffError for values out of range.
    """

    minutes: float = 60.0
    clock: str = "wall"
    batch: int = 16
    crop: int = 64
    jitter: int = 12
    full_share: float = 0.25
    lr: float = 1e-3
    weight_decay: float = 1e-4
    ema: float = 0.999
    validations: int = 20
    val_slices: int = 200
    seed: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        if self.clock not in ("wall", "cpu"):
            raise CdiffError(f"clock {self.clock!r} is not known; use wall or cpu")
        if not 0 < self.minutes < math.inf:
            raise CdiffError(f"--minutes {self.minutes} must be a positive number")
        if self.crop < DIVISOR or self.crop % DIVISOR:
            raise CdiffError(f"--crop {self.crop} must be a multiple of {DIVISOR}, which the U-Nets halve four times")
        for name, least in (("batch", 1), ("validations", 1), ("val_slices", 1), ("steps", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise CdiffError(f"--{name} {getattr(self, name)} must be at least {least}")


class Clock:
    """Seconds used by this run, over all its restarts, of wall time and of this process's processor time."""

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


class Training:
    """The state of one peer's training. Raises CdiffError for slices that cannot be trained on."""

    def __init__(self, peer: UNetPeer, training: Slices, validation: Slices, out: Path, budget: Budget) -> None:
        self.peer, self.out, self.budget, self.slices = peer, out, budget, training
        if training.images.shape[1:] != (1, training.images.shape[2], training.images.shape[2]):
            raise CdiffError(f"the U-Net peers need square slices of one channel, not {training.images.shape[1:]}")
        if self.size < budget.crop or self.size % DIVISOR:
            raise CdiffError(
                f"slices of {self.size} pixels do not suit --crop {budget.crop}: no smaller, and a multiple of {DIVISOR}"
            )
        marked = np.flatnonzero(validation.masks.any((1, 2, 3)))
        if not len(marked):
            raise CdiffError("no validation slice has anything drawn on it; validation would score nothing")
        chosen = marked[np.linspace(0, len(marked) - 1, min(budget.val_slices, len(marked))).round().astype(int)]
        self.val_images, self.val_label = validation.images[chosen], validation.label[chosen]
        torch.manual_seed(budget.seed)
        annotators = training.masks.shape[1]
        self.network, self.average = peer.build(annotators), peer.build(annotators)
        self.average.load_state_dict(self.network.state_dict())
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=budget.lr, weight_decay=budget.weight_decay)
        self.done, self.best, self.validated, self.clock = 0, -1.0, 0, Clock()

    @property
    def size(self) -> int:
        return int(self.slices.images.shape[-1])

    @property
    def progress(self) -> float:
        """The share of the budget that is used, 0..1."""
        budget = self.budget
        share = self.done / budget.steps if budget.steps else self.clock.of(budget.clock) / (60 * budget.minutes)
        return min(1.0, share)

    def restore(self) -> None:
        """Take up the last save, where there is one. Raises CdiffError when it is another peer's, or of another budget."""
        last = self.out / "last.pt"
        if not last.exists():
            begin_log(self.out / "log.csv", LOG_FIELDS, 0)
            return
        state = read_state(last)
        there, now = state["budget"], asdict(self.budget)
        if differ := [f"{key}: {there[key]} there, {now[key]} now" for key in now if there.get(key) != now[key]]:
            raise CdiffError(f"{self.out} holds a run of another budget ({'; '.join(differ)}); go on with its own")
        load_weights(self.network, state["network"], last)
        load_weights(self.average, state["average"], last)
        self.optimiser.load_state_dict(state["optimiser"])
        self.done, self.best, self.validated = state["step"], state["best"], state["validated"]
        self.clock = Clock(state["wall"], state["cpu"])
        begin_log(self.out / "log.csv", LOG_FIELDS, self.done)

    def save(self) -> None:
        """Everything that a resumed run needs."""
        state = {
            "network": self.network.state_dict(), "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(), "step": self.done, "best": self.best, "validated": self.validated,
            "wall": self.clock.wall, "cpu": self.clock.cpu, "budget": asdict(self.budget),
        }  # fmt: skip
        with atomic_path(self.out / "last.pt") as part:
            torch.save(state, part)

    def step(self) -> tuple[int, float, float]:
        """Take an optimiser step; returns the windows' size, the learning rate and the loss. Raises CdiffError when that is not finite."""
        budget, progress = self.budget, self.progress
        size, batch = budget.crop, budget.batch
        if progress >= 1 - budget.full_share:
            size = self.size
            batch = max(1, round(budget.batch * (budget.crop / size) ** 2))  # as many pixels per batch as before
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
        lr = budget.lr * min(1, (self.done + 1) / 100) * decay
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.network.train()
        part = augmented_batch(self.slices, self.done, batch, size, budget.jitter, budget.seed)
        torch.manual_seed(mixed(budget.seed, self.done))  # dropout and z
        loss = self.peer.loss(self.network, part)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.done += 1
        keep = min(budget.ema, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.network.parameters(), strict=True):
                a.lerp_(p, 1 - keep)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CdiffError(f"the loss of {self.peer.name} became {value} at step {self.done}; its last save is whole")
        return size, lr, value

    def validate(self) -> float:
        """The averaged weights' soft Dice (five thresholds), a mean over the validation slices; saves the weights if they are best so far."""
        scores = []
        for i, (image, label) in enumerate(zip(self.val_images, self.val_label, strict=True)):
            seed = mixed(self.budget.seed, 3, i)  # the same draws each time: checkpoints compare
            runs = draw_runs(self.peer, self.average, image, runs=VAL_RUNS, mirror=False, seed=seed)
            scores.append(soft_dice(runs.mean((0, 1)), label, FIVE))
        score = float(np.mean(scores))
        if score > self.best:
            self.best = score
            weights = {k: v.contiguous() for k, v in self.average.state_dict().items()}
            with atomic_path(self.out / WEIGHTS) as part:
                save_file(weights, part)
        return score

    def loop(self) -> bool:
        """Train until the budget is spent (returns True) or an interrupt (False), and save at each validation and every minute."""
        saved, said, progress = time.monotonic(), 0.0, self.progress
        with Interrupt() as interrupt:
            while progress < 1 and not interrupt.asked:
                size, lr, loss = self.step()
                progress = self.progress
                score: float | None = None
                if (due := int(progress * self.budget.validations)) > self.validated:
                    self.validated = due
                    score = self.validate()
                if score is not None or self.done % 20 == 0:
                    append_row(
                        self.out / "log.csv", (self.done, self.clock.wall, self.clock.cpu, size, lr, loss, score)
                    )
                if score is not None or time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    found = "" if score is None else f"  validation {score:.4f}"
                    print(
                        f"{self.peer.name} {self.progress:.0%}  step {self.done}  {self.clock.cpu / 60:.1f} CPU min  loss {loss:.4f}{found}",
                        file=sys.stderr,
                        flush=True,
                    )
                if score is not None or time.monotonic() - saved > 60:
                    self.save()
                    saved = time.monotonic()
            if progress >= 1 and self.validated < self.budget.validations:  # killed just before the last one
                self.validated = self.budget.validations
                self.validate()
            self.save()
        return progress >= 1

    def summary(self) -> dict[str, Any]:
        """What `run.json` holds."""
        return {
            "peer": self.peer.name, "budget": asdict(self.budget), "steps": self.done, "wall_seconds": self.clock.wall,
            "cpu_seconds": self.clock.cpu, "best_val_soft_dice_5": self.best,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "machine": describe_machine(torch.device("cpu")),
            "train_slices": len(self.slices.images), "val_slices": len(self.val_images),
        }  # fmt: skip


def train_unet(peer: UNetPeer, data: Path, out: Path, budget: Budget) -> bool:
    """Train in the folder `out`, or go on there, until the budget is spent. Returns False when interrupted; all is saved then.

    Raises CdiffError for unusable data, an `out` of another peer or budget, and a loss that is not finite.
    """
    make_folder(out)
    training = Training(peer, read_slices(data, "train"), read_slices(data, "val"), out, budget)
    training.restore()
    if not training.loop():
        return False
    write_json(out / SUMMARY, training.summary())
    return True


def read_state(last: Path) -> dict[str, Any]:
    """What a run's last.pt holds. Raises CdiffError for a file that is damaged or something else."""
    try:
        state = dict(torch.load(last, weights_only=True))
        return {key: state[key] for key in STATE}
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        raise CdiffError(
            f"{last} cannot be read ({type(error).__name__}); remove {last.parent} to train anew"
        ) from error


def append_row(path: Path, row: tuple[Any, ...]) -> None:
    """Append a line to the log; None is written as an empty cell."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(["" if v is None else round(v, 6) if isinstance(v, float) else v for v in row])
