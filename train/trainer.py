"""Training from a folder of cases to a folder of checkpoints: what `cdiff train` calls."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder, write_json
from cdiff.train.checkpoint import read_config
from cdiff.train.config import Config
from cdiff.train.data import read_data
from cdiff.train.run import Run, TrainResult


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
        run.learner.start_from(init)
    if not quiet:
        for note in run.data.notes:
            console.print(f"note: {note}", highlight=False)
        found, learner = run.data.summary, run.learner
        console.print(
            f"training on {found['train']['slices']} slices of {found['train']['cases']} cases, validating on {len(run.val_chosen)} of"
            f" {found['val']['slices']}; {learner.parameters / 1e6:.2f} M parameters; {learner.device}, {learner.precision}",
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
