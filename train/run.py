"""A training run: steps, validation by sampling, checkpoints, and exact resume after a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from rich.console import Console

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import atomic_path
from cdiff.runtime.words import first_line
from cdiff.train import pace
from cdiff.train.checkpoint import checkpoint_folder, checkpoint_name, origin, read_json, save_checkpoint
from cdiff.train.compiled import compiling
from cdiff.train.config import Config
from cdiff.train.data import Batch, Data, validation_windows
from cdiff.train.fabric import precision_of, settle
from cdiff.train.feed import Feed
from cdiff.train.interrupt import Interrupt
from cdiff.train.learner import Learner
from cdiff.train.log import Log, NoLog
from cdiff.train.machine import describe_machine, no_room
from cdiff.train.mfu import Utilisation, peak_flops
from cdiff.train.rows import Rows, check_parts, draw_rows
from cdiff.train.validate import score


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: the step it reached, its last loss (NaN without a step), the best validation score (None before the first) and
    seconds of training, over all calls.

    out: the run folder. parameters: the network's. data: what was found (Data.summary). interrupted: whether Ctrl-C, SIGTERM or SIGHUP ended
    it. finished: whether the run is at its end, not only at `max_steps`. first: whether this is the one of the processes training
    together that should report.
    """

    step: int
    loss: float
    best: float | None
    seconds: float
    out: Path
    parameters: int
    data: dict[str, Any]
    interrupted: bool
    finished: bool
    first: bool


class Run:
    """The state of a training run: its learner, how far it is, its best score. notes: what a user should know before it begins."""

    def __init__(self, config: Config, data: Data, fabric: Fabric, out: Path) -> None:
        check_parts(config, fabric.world_size)
        self.config, self.data, self.out, self.fabric = config, data, out, fabric
        self.notes = list(data.notes)
        self.learner, device = Learner(config, fabric), fabric.device
        ahead = config.training.prefetch
        self.feed = Feed(self._prepare, (2 if device.type == "cuda" else 0) if ahead < 0 else ahead)
        self.precision = precision_of(fabric)
        peak = peak_flops(config, device, half=self.precision != "float32")
        self.utilisation = Utilisation(config, peak, fabric.world_size)
        self.done, self.seconds, self.best = 0, 0.0, -math.inf
        self.best_window = 0
        # Where the initial weights came from, if they were not random (checkpoint.origin).
        self.origin: dict[str, Any] = {}
        # The SHA-256 of the weights that the run starts or resumes with, where known: it must be the same in all processes.
        self.weights_from = ""
        marked = [i for i, masks in enumerate(data.val.masks) if masks.any()]
        count = min(config.training.val_slices, len(marked))
        self.val_chosen = [marked[i] for i in np.linspace(0, len(marked) - 1, count).round().astype(int)]
        if not self.val_chosen:
            raise CdiffError(
                "no validation slice has anything drawn on it, so validation would score nothing; put a case with a mask into the "
                "validation folder or, where there is none, hold out other cases: --set seed=1, or a larger val_fraction"
            )
        self.val_batches: dict[int, Batch] = {}

    def progress(self) -> float:
        return pace.progress(self.config, self.done, self.seconds)

    def finished(self) -> bool:
        return self.progress() >= 1

    def window(self) -> int:
        return pace.window_size(self.config, self.progress())

    def lr(self) -> float:
        return pace.learning_rate(self.config, self.done, self.progress())

    def step(self, k: int, window: int | None = None) -> tuple[float, float]:
        """Take step k (from 0) on windows of `window` pixels (by default the current size); returns loss and gradient norm before clipping.

        Raises CdiffError when one is not finite, when the GPU's memory is not enough, or when torch.compile cannot compile.
        """
        settings = self.config.training
        more = "" if settings.checkpointing else ", or checkpointing=true"
        remedy = f"set accumulate above {settings.accumulate} (the same result){more}"
        with _enough_memory(f"at step {k + 1}", remedy), self._compiling():
            return self.learner.step(k, self.feed.take(k, window or self.window()), self.lr())

    def try_out(self, window: int) -> tuple[float, float]:
        """Take two steps on windows of `window` pixels; returns the first one's loss and a step's seconds on the budget's clock."""
        loss, _ = self.step(self.done, window)
        began = pace.now(self.config)
        self.step(self.done + 1, window)  # the first step is slower: it sets up what later ones reuse
        took = pace.now(self.config) - began
        if (ahead := self.feed.ahead) and self.config.training.clock == "wall":
            # This step's data were prepared during the slow first one; a run whose data take longer than its steps waits for them.
            began = pace.now(self.config)
            self.feed.prepare(self.done + 1, window)
            took = max(took, (pace.now(self.config) - began) / ahead)
        return loss, took

    def _compiling(self) -> AbstractContextManager[None]:
        if not self.config.training.compile:
            return nullcontext()
        return compiling(
            "it needs a C++ compiler (g++) and room for temporary files; or set compile=false, which also works with --resume"
        )

    def _prepare(self, k: int, window: int) -> list[Rows]:
        parts = draw_rows(self.data.train, self.config, k, window, self.fabric.global_rank, self.fabric.world_size)
        return [part.pinned() for part in parts] if self.learner.device.type == "cuda" else parts

    def validate(self, window: int) -> float:
        """Soft Dice of the averaged weights on windows of `window` pixels, the size that training sees now."""
        settings = self.config.training
        if window not in self.val_batches:
            batch = self._val_windows(self.val_chosen, window)
            self.val_batches[window] = batch.to(self.learner.device)
        remedy = "set val_runs lower in a new run"
        with _enough_memory(f"for the validation after step {self.done}", remedy), self._compiling():
            return score(
                self.learner.averaged(),
                self.learner.diffusion,
                self.val_batches[window],
                steps=settings.val_steps,
                runs=settings.val_runs,
                seed=settings.seed,
                fabric=self.fabric,
            )

    def _val_windows(self, chosen: list[int], size: int) -> Batch:
        return validation_windows(self.data.val, chosen, size, self.config.data.framing)

    def loop(self, max_steps: int | None, console: Console, quiet: bool) -> TrainResult:
        """Train until the end, an interrupt, or `max_steps`, saving on the way. Returns how it ended."""
        settings = self.config.training
        end = settings.steps if max_steps is None else min(settings.steps, max_steps)
        loss, saved = math.nan, time.monotonic()
        stop, first = False, self.fabric.is_global_zero
        if first and not (self.out / "samples.npz").exists():
            self._save_samples()
        to = Log(self.out, console, self.done, settings.steps, quiet) if first else NoLog()
        with Interrupt() as interrupt, self.feed, to as log:
            while self.done < end and self.progress() < 1 and not stop:
                began, window, entered = pace.now(self.config), self.window(), time.monotonic()
                lr = self.lr()
                loss, norm = self.step(self.done)
                self.utilisation.add(window, time.monotonic() - entered)
                self.done += 1
                stop = self._settle(began, interrupt)
                log.step(self.done, settings.steps)
                finished = self.finished()
                row: dict[str, Any] = {"step": self.done, "seconds": round(self.seconds, 1)}
                row |= {"loss": loss, "lr": lr, "grad_norm": norm, "window": self.window()}
                if finished or self.done % settings.val_every == 0 or self.done % settings.log_every == 0:
                    row |= self.utilisation.take()
                if self.done % settings.val_every == 0 or finished:
                    began, window = pace.now(self.config), self.window()
                    row["val_soft_dice_5"] = value = self.validate(window)
                    stop = self._settle(began, interrupt)
                    log.row(row)
                    self.save(value, window)
                    saved = time.monotonic()
                    continue
                if self.done % settings.log_every == 0:
                    log.row(row)
                if time.monotonic() - saved > settings.save_every_s:
                    self.save(None)
                    saved = time.monotonic()
            if first and not self._is_saved():
                self.save(None)
        return self.result(loss, stop)

    def _settle(self, began: float, interrupt: Interrupt) -> bool:
        """Count the time since `began`, on the budget's clock. Returns whether to stop."""
        self.seconds, stop = settle(self.fabric, self.seconds + pace.now(self.config) - began, interrupt.asked)
        return stop

    def result(self, loss: float, interrupted: bool = False) -> TrainResult:
        best = self.best if math.isfinite(self.best) else None
        counted = self.learner.parameters, self.data.summary
        return TrainResult(
            self.done,
            loss,
            best,
            self.seconds,
            self.out,
            *counted,
            interrupted,
            self.finished(),
            self.fabric.is_global_zero,
        )

    def restore(self) -> None:
        """Continue from the last checkpoint; a run that was killed before its first one begins anew."""
        folder = checkpoint_folder(self.out, "last")
        if folder is None:
            return
        info = read_json(folder / "checkpoint.json")
        self.learner.restore(folder)
        self.origin, self.weights_from = origin(info), str(info.get("sha256"))
        if (before := info.get("precision", self.precision)) != self.precision:
            self.notes.append(f"the run was computed in {before} so far, and goes on in {self.precision}")
        try:
            self.done, self.seconds, self.best_window = (
                int(info["step"]),
                float(info["seconds"]),
                int(info["best_window"]),
            )
            self.best = -math.inf if info["best"] is None else float(info["best"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CdiffError(
                f"{folder / 'checkpoint.json'} does not say how far the run is ({error!r}); the checkpoint is damaged"
            ) from error

    def save(self, value: float | None, window: int = 0) -> None:
        """Write a checkpoint, in the first process. value: the score of a validation just made, on windows of `window` pixels (which
        may have grown since).

        Scores on windows of different sizes cannot be compared: when windows grow, the best score starts anew.
        """
        is_best = value is not None and math.isfinite(value) and (window != self.best_window or value > self.best)
        if is_best and value is not None:
            self.best, self.best_window = value, window
        if not self.fabric.is_global_zero:
            return
        info = {
            "step": self.done,
            "seconds": self.seconds,
            "best": self.best if math.isfinite(self.best) else None,
            "best_window": self.best_window,
            "is_best": is_best,
            "val_soft_dice_5": value if value is not None and math.isfinite(value) else None,
            "val_protocol": {
                "sampler": "ddim",
                "steps": self.config.training.val_steps,
                "runs": self.config.training.val_runs,
                "slices": len(self.val_chosen),
                "window": window or self.window(),
            },
            "parameters": self.learner.parameters,
            "precision": self.precision,
            "data": self.data.summary,
            "machine": describe_machine(self.learner.device) | {"processes": self.fabric.world_size},
        } | self.origin
        network, ema = self.learner.weights()
        save_checkpoint(self.out, network=network, ema=ema, optimiser=self.learner.state(), info=info)

    def _is_saved(self) -> bool:
        folder = checkpoint_folder(self.out, "last")
        return folder is not None and folder.name == checkpoint_name(self.done)

    def _save_samples(self) -> None:
        """A few validation slices as the network sees them, for checking exported graphs on real input."""
        batch = self._val_windows(self.val_chosen[:4], self.config.network.image_size)
        with atomic_path(self.out / "samples.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, images=batch.image.numpy())


@contextmanager
def _enough_memory(when: str, remedy: str) -> Iterator[None]:
    """Within the block, raise a CdiffError of one line where the GPU's memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not no_room(error):
            raise
        raise CdiffError(f"the GPU ran out of memory {when} ({first_line(error)}); {remedy}") from None
