"""Training from a folder of cases to a folder of checkpoints: what `cdiff train` calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder, write_json
from cdiff.train.checkpoint import read_config
from cdiff.train.config import HOW, Config
from cdiff.train.data import read_data
from cdiff.train.machine import arithmetic
from cdiff.train.ranks import ALONE, Ranks, joined
from cdiff.train.run import Run, TrainResult


def train(
    config: Config | Callable[[], Config],
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
    """Train `config`, or what it returns, on the case folders in `data`, writing to the folder `out`.

    init is a run, or a bundle, whose averaged weights this one starts from (fine-tuning); its network must have the same tensors.
    resume goes on with the run in `out`; only the settings that say how it is computed (config.HOW) may be others.
    max_steps ends this call after step `max_steps` without changing the schedule, as if it had been stopped there. dry_run reads
    the data, takes one step and writes nothing. Raises CdiffError for unusable data, an `out` that holds another run, or a loss
    that is not finite.

    Started by torchrun, each process calls this alike and they train together; only the first writes and prints. When one fails, it
    raises its error and the others FailedElsewhere.
    """
    with joined(device != "cpu" and torch.cuda.is_available()) as ranks:
        with ranks.together():
            chosen = config if isinstance(config, Config) else config()
            if not dry_run:
                _check_out(out, chosen, resume)
        with arithmetic(chosen.training.deterministic):
            run = _start(chosen, data, out, init, device, ranks)
            if resume and not dry_run:
                with ranks.together():
                    run.restore()
                ranks.check_same({"the step to go on from": run.done})
            return _train(run, resume, max_steps, dry_run, quiet or not ranks.first, console or Console(stderr=True))


def _start(config: Config, data: Path, out: Path, init: Path | None, device: str, ranks: Ranks) -> Run:
    """The run before its first step, the same in every process."""
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    with ranks.together():
        found, where = read_data(data, config), _device(device, ranks)
    settings = {key: value for section in config.to_json().values() for key, value in section.items()}
    ranks.check_same(settings | {"the data": found.summary, "the device": where.type, "PyTorch": torch.__version__})
    with ranks.together():
        run = Run(config, found, where, out, ranks)
        if init is not None:
            run.learner.start_from(init)
    return run


def _train(run: Run, resume: bool, max_steps: int | None, dry_run: bool, quiet: bool, console: Console) -> TrainResult:
    if not quiet:
        for note in run.data.notes:
            console.print(f"note: {note}", highlight=False)
        found, learner = run.data.summary, run.learner
        console.print(
            f"training on {found['train']['slices']} slices of {found['train']['cases']} cases, validating on {len(run.val_chosen)} of"
            f" {found['val']['slices']}; {learner.parameters / 1e6:.2f} M parameters; {learner.device}, {learner.precision}"
            + (f"; {run.ranks.world} processes" if run.ranks.world > 1 else ""),
            highlight=False,
        )
    if dry_run:
        loss, _ = run.step(0)
        return run.result(loss)
    if run.ranks.first:  # only now, when data and settings have proved usable, is there a run
        make_folder(run.out)
        write_json(run.out / "config.json", run.config.to_json())
    return run.loop(max_steps, console, quiet)


def _check_out(out: Path, config: Config, resume: bool) -> None:
    """Raise CdiffError unless `out` holds no run, or is to be resumed and holds this very one (but for how it is computed)."""
    if (out / "config.json").exists():
        if not resume:
            raise CdiffError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
        if (there := read_config(out)) != config:
            old, new = there.to_json(), config.to_json()
            keys = [(s, k) for s in old for k in old[s] if old[s][k] != new[s][k] and k not in HOW]
            differ = "; ".join(f"{k}: {old[s][k]} there, {new[s][k]} now" for s, k in keys)
            if differ:
                raise CdiffError(f"{out} holds a run with other settings ({differ}); resume with its own")
        return
    if resume:
        raise CdiffError(f"{out} holds no run to resume; start it without --resume")


def _device(name: str, ranks: Ranks = ALONE) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CdiffError(
            f"--device {name}: PyTorch sees no CUDA device here; use --device cpu or install a CUDA build of torch"
        )
    if name.startswith("cuda") and ranks.world > 1:
        if name != "cuda":
            raise CdiffError(f"--device {name}: each process takes the GPU of its own number; use --device cuda")
        if ranks.local >= torch.cuda.device_count():
            raise CdiffError(
                f"{ranks.name} is number {ranks.local} there and PyTorch sees {torch.cuda.device_count()} GPUs; start one process a "
                "GPU (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(ranks.local)
        return torch.device("cuda", ranks.local)
    return torch.device(name)
