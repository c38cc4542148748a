"""The training loop: AdamW on the diffusion loss, EMA, warm-up, clipping, validation by sampling, exact resume (promise 5).

Everything random at step k is drawn from generators seeded by (seed, k), so a run that was killed and resumed takes the same
steps as one that was not.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import atomic_path, make_folder, write_json
from cdiff.train.checkpoint import (
    checkpoint_folder,
    checkpoint_name,
    load_weights,
    read_config,
    read_json,
    read_tensors,
    save_checkpoint,
)
from cdiff.train.config import Config
from cdiff.train.data import Batch, Data, centre_windows, read_data, training_batch
from cdiff.train.diffusion import Diffusion
from cdiff.train.interrupt import Interrupt
from cdiff.train.log import Log
from cdiff.train.machine import describe_machine
from cdiff.train.network import ConsensusNet
from cdiff.train.validate import score


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: the step it reached, its last loss, the best validation score (None before the first) and seconds of training."""

    step: int
    loss: float
    best: float | None
    seconds: float
    out: Path
    parameters: int
    data: dict[str, Any]
    interrupted: bool = False


def train(
    config: Config,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    max_steps: int | None = None,
    dry_run: bool = False,
    init: Path | None = None,
    device: str = "auto",
    quiet: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Train `config` on the case folders in `data`, writing to the folder `out`.

    init is a run, or a bundle, whose averaged weights this one starts from (fine-tuning); its network must have the same tensors.
    max_steps ends this call after step `max_steps` without changing the schedule, as if it had been stopped there. dry_run reads
    the data, takes one step and writes nothing. Raises CdiffError for unusable data, an `out` that holds another run, or a loss
    that is not finite.
    """
    console = console or Console(stderr=True)
    if not dry_run:
        _check_out(out, config, resume)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    run = Run(config, read_data(data, config), _device(device), out)
    if init is not None:
        run.start_from(init)
    if not quiet:
        for note in run.data.notes:
            console.print(f"note: {note}", highlight=False)
        found = run.data.summary
        console.print(
            f"training on {found['train']['slices']} slices of {found['train']['cases']} cases, validating on {len(run.val_chosen)} of"
            f" {found['val']['slices']}; {run.parameters / 1e6:.2f} M parameters; {run.device}, {run.precision}",
            highlight=False,
        )
    if dry_run:
        loss, _ = run.step(0)
        return run.result(loss)
    if resume:
        run.restore()
    else:  # only now, when data and settings have proved usable, is there a run
        make_folder(out)
        write_json(out / "config.json", config.to_json())
    return run.loop(max_steps, console, quiet)


def _check_out(out: Path, config: Config, resume: bool) -> None:
    """Raise CdiffError unless `out` holds no run, or is to be resumed and holds this very one."""
    if (out / "config.json").exists():
        if not resume:
            raise CdiffError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
        if (there := read_config(out)) != config:
            old, new = there.to_json(), config.to_json()
            differ = [f"{k}: {old[s][k]} there, {new[s][k]} now" for s in old for k in old[s] if old[s][k] != new[s][k]]
            raise CdiffError(f"{out} holds a run with other settings ({'; '.join(differ)}); resume with its own")
        return
    if resume:
        raise CdiffError(f"{out} holds no run to resume; start it without --resume")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CdiffError(
            f"--device {name}: PyTorch sees no CUDA device here; use --device cpu or install a CUDA build of torch"
        )
    return torch.device(name)


class Run:
    """The state of a training run and its steps."""

    def __init__(self, config: Config, data: Data, device: torch.device, out: Path) -> None:
        self.config, self.data, self.device, self.out = config, data, device, out
        settings = config.training
        torch.manual_seed(settings.seed)
        self.network = ConsensusNet(config.network).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.diffusion = Diffusion(config.schedule, config.network.target, device, settings.dice_weight)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
        )
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.amp = _amp(settings.amp, device)
        # Half precision's gradients underflow; bf16 has float32's range and needs no scaling.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.done, self.seconds, self.best = 0, 0.0, -math.inf
        self.best_window = 0
        marked = [i for i, masks in enumerate(data.val.masks) if masks.any()]
        count = min(settings.val_slices, len(marked))
        self.val_chosen = [marked[i] for i in np.linspace(0, len(marked) - 1, count).round().astype(int)]
        if not self.val_chosen:
            raise CdiffError("no validation slice has anything drawn on it; validation would score nothing")
        self.val_batches: dict[int, Batch] = {}

    def start_from(self, init: Path) -> None:
        """Take the averaged weights of the last checkpoint of the run `init`, or those of the bundle `init`, as the first ones."""
        folder = checkpoint_folder(init, "last")
        path = init / "model.safetensors" if folder is None else folder / "ema.safetensors"
        if not path.exists():
            raise CdiffError(f"{init} holds no weights to start from; give the folder of a training run or of a bundle")
        load_weights(self.network, read_tensors(path), path)
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    @property
    def precision(self) -> str:
        return {None: "float32", torch.bfloat16: "mixed bf16", torch.float16: "mixed fp16"}[self.amp]

    def progress(self) -> float:
        """How much of the run is over, 0..1: by steps, or by the clock when `minutes` is set."""
        settings = self.config.training
        share = self.done / settings.steps
        return max(share, self.seconds / (60 * settings.minutes)) if settings.minutes else share

    def window(self) -> int:
        """The side of this step's windows: `crop`, then image_size for the last `late` share of the run."""
        late = self.progress() >= 1 - self.config.data.late
        return self.config.network.image_size if late else self.config.crop

    def lr(self) -> float:
        settings = self.config.training
        warm = min(1.0, (self.done + 1) / max(1, settings.warmup))
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress()))) if settings.decay == "cosine" else 1.0
        return settings.lr * warm * decay

    def step(self, k: int) -> tuple[float, float]:
        """Optimiser step k (from 0). Returns the loss and the gradient's norm before clipping. Raises CdiffError if not finite."""
        settings, window = self.config.training, self.window()
        size = settings.late_batch or settings.batch if window == self.config.network.image_size else settings.batch
        batch = training_batch(self.data.train, self.config, k, size, window)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + k)
        rows = size * settings.rows_per_image
        T = self.config.network.T
        u = torch.rand(rows, generator=generator) ** (1 / settings.t_power)
        t = (1 + (T * u).long().clamp(max=T - 1)).to(self.device)
        level = torch.randint(1, self.config.network.levels + 1, (rows,), generator=generator).to(self.device)
        noise = torch.randn(rows, 1, window, window, generator=generator).to(self.device)
        image = batch.image.to(self.device, memory_format=torch.channels_last)
        votes = batch.votes.to(self.device).repeat_interleave(settings.rows_per_image, 0)
        m = (votes >= level[:, None, None, None]).float() * 2 - 1
        x = self.diffusion.noised(m, noise, t)
        self.network.train()
        torch.manual_seed(settings.seed * 1_000_003 + k)  # dropout draws from the global generator
        with self._autocast():
            features = self.network.encoder(image).repeat_interleave(settings.rows_per_image, 0)
            output = self.network.denoiser(x, features, t, level)
        loss = self.diffusion.loss(output, m, noise, x, t)
        if not torch.isfinite(loss):
            raise CdiffError(
                f"the loss became {loss.item()} at step {k + 1}; lower lr (now {self.lr():.3g}) and resume"
            )
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr()
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self._average()
        return loss.item(), norm.item()

    def _average(self) -> None:
        # The average starts short, or it would hold the random initial weights for thousands of steps.
        keep = min(self.config.training.ema, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                self.ema[name].lerp_(value, 1 - keep)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def validate(self) -> float:
        """Soft Dice of the averaged weights on central windows of the size that training sees now."""
        settings, window = self.config.training, self.window()
        if window not in self.val_batches:
            batch = centre_windows(self.data.val, self.val_chosen, window)
            self.val_batches[window] = Batch(batch.image.to(self.device), batch.votes)
        network = ConsensusNet(self.config.network).to(self.device)
        network.load_state_dict(self.ema)
        network = network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        batch = self.val_batches[window]
        return score(
            network, self.diffusion, batch, steps=settings.val_steps, runs=settings.val_runs, seed=settings.seed
        )

    def loop(self, max_steps: int | None, console: Console, quiet: bool) -> TrainResult:
        """Steps until the end, an interrupt, or `max_steps`; saves as it goes. Returns how it ended."""
        settings = self.config.training
        end = min(settings.steps, max_steps or settings.steps)
        loss, saved = math.nan, time.monotonic()
        if not (self.out / "samples.npz").exists():
            self._save_samples()
        with Interrupt() as interrupt, Log(self.out, console, self.done, settings.steps, quiet) as log:
            while self.done < end and self.progress() < 1 and not interrupt.asked:
                began = time.monotonic()
                loss, norm = self.step(self.done)
                self.done += 1
                self.seconds += time.monotonic() - began
                log.step(self.done, settings.steps)
                finished = self.done == settings.steps or self.progress() >= 1
                row: dict[str, Any] = {"step": self.done, "seconds": round(self.seconds, 1)}
                row |= {"loss": loss, "lr": self.lr(), "grad_norm": norm, "window": self.window()}
                if self.done % settings.val_every == 0 or finished:
                    began = time.monotonic()
                    row["val_soft_dice_5"] = value = self.validate()
                    self.seconds += time.monotonic() - began
                    log.row(row)
                    self._save(value)
                    saved = time.monotonic()
                elif self.done % settings.log_every == 0:
                    log.row(row)
                if time.monotonic() - saved > settings.save_every_s:
                    self._save(None)
                    saved = time.monotonic()
            if not self._is_saved():
                self._save(None)
        return self.result(loss, interrupt.asked)

    def result(self, loss: float, interrupted: bool = False) -> TrainResult:
        best = self.best if math.isfinite(self.best) else None
        return TrainResult(
            self.done, loss, best, self.seconds, self.out, self.parameters, self.data.summary, interrupted
        )

    def _save(self, value: float | None) -> None:
        """Write a checkpoint. Scores of small windows and of whole ones do not compare: the best starts anew with the larger."""
        window = self.window()
        is_best = value is not None and math.isfinite(value) and (window != self.best_window or value > self.best)
        if is_best and value is not None:
            self.best, self.best_window = value, window
        info = {
            "step": self.done,
            "seconds": self.seconds,
            "best": self.best if math.isfinite(self.best) else None,
            "best_window": self.best_window,
            "is_best": is_best,
            "val_soft_dice_5": value,
            "val_protocol": {
                "sampler": "ddim",
                "steps": self.config.training.val_steps,
                "runs": self.config.training.val_runs,
                "slices": len(self.val_chosen),
                "window": window,
            },
            "parameters": self.parameters,
            "precision": self.precision,
            "data": self.data.summary,
            "machine": describe_machine(self.device),
        }
        network = {name: value.detach().contiguous() for name, value in self.network.state_dict().items()}
        ema = {name: value.contiguous() for name, value in self.ema.items()}
        state = {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}
        save_checkpoint(self.out, network=network, ema=ema, optimiser=state, info=info)

    def _is_saved(self) -> bool:
        folder = checkpoint_folder(self.out, "last")
        return folder is not None and folder.name == checkpoint_name(self.done)

    def restore(self) -> None:
        """Take up the last checkpoint; a run that was killed before its first starts from step 0."""
        folder = checkpoint_folder(self.out, "last")
        if folder is None:
            return
        info = read_json(folder / "checkpoint.json")
        load_weights(self.network, read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
        self.ema = {k: v.to(self.device) for k, v in read_tensors(folder / "ema.safetensors").items()}
        state = torch.load(folder / "optimiser.pt", map_location=self.device, weights_only=True)
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.done, self.seconds, self.best_window = int(info["step"]), float(info["seconds"]), int(info["best_window"])
        self.best = -math.inf if info["best"] is None else float(info["best"])

    def _save_samples(self) -> None:
        """A few validation slices as the network sees them, for checking exported graphs on real input."""
        size = self.config.network.image_size
        batch = centre_windows(self.data.val, self.val_chosen[:4], size)
        with atomic_path(self.out / "samples.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, images=batch.image.numpy(), votes=batch.votes.numpy())


def _amp(name: str, device: torch.device) -> torch.dtype | None:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
