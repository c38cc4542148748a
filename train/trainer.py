"""Training from a folder of cases to a folder of checkpoints: what `cdiff train` calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from rich.console import Console

from cdiff.runtime.data.case import listed
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder, write_json
from cdiff.runtime.scans.sources import is_there, must_be_text
from cdiff.runtime.words import several
from cdiff.train import pace
from cdiff.train.checkpoint import checkpoint_folder, point_at_best, read_config
from cdiff.train.config import HOW, Config
from cdiff.train.data import read_data
from cdiff.train.fabric import check_same, fabric_on, find_device, joined, precision_of, together
from cdiff.train.held import held
from cdiff.train.initial import read_initial
from cdiff.train.log import say
from cdiff.train.machine import alone, arithmetic, as_it_starts
from cdiff.train.run import Run, TrainResult
from cdiff.train.seen import NAME as SEEN
from cdiff.train.seen import check_seen, differences, learned_from, seen_before, write_seen


@alone()
@as_it_starts()
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
    """Train with the configuration `config` (or the one that it returns) on the case folders in `data`, writing to the folder `out`.

    init: a run, or a bundle, whose averaged weights this one starts from (fine-tuning); its network must have the same tensors.
    resume: go on with the run in `out`, on the cases that it began with; only the settings that say how it is computed (config.HOW)
    may differ.
    max_steps: end this call after step `max_steps` without changing the schedule, as if it had been stopped there.
    dry_run: read the data, take two steps (of a resumed run the next ones), and two more at the late phase's size if windows are to grow;
    say how long the run would take, judged by the second step at each size, and write nothing.
    device: auto (a GPU if PyTorch sees one), cpu, cuda or cuda:N.
    quiet: print only notes, no progress; console: where both go, by default stderr.

    Raises CdiffError for unusable data, an `out` that holds another run or is being trained now, another training in a thread of this
    program, other data than a resumed run began with, a device that is not there, a GPU's memory that is not enough, or a loss that is not finite.

    Under torchrun each process makes the same call and they train together; only the first writes and prints. When one fails, it
    raises its error and the others FailedElsewhere.
    """
    with joined(device != "cpu" and torch.cuda.is_available()) as meeting:
        # Checked before anything that only some processes would do, waiting there for the others.
        check_same(meeting, {"--resume": resume, "--init": bool(init), "--dry-run": dry_run, "--max-steps": max_steps})
        with together(meeting):
            chosen = config if isinstance(config, Config) else config()
            if resume and init is not None:
                raise CdiffError(
                    "--init starts a new run and --resume goes on with its own weights; leave one of them out"
                )
            if resume or not dry_run:
                check_out(out, chosen, resume)
            where = find_device(device, meeting)
        with arithmetic(chosen.training.deterministic, chosen.training.threads), ExitStack() as stack:
            fabric = fabric_on(where, chosen.training.amp)
            fabric.launch()
            writes = fabric.is_global_zero and not dry_run
            if resume:
                with together(fabric):
                    if writes:
                        stack.enter_context(held(out))
            run = _start(chosen, data, out, init, fabric, resume)
            if resume:
                with together(fabric):
                    run.restore()
                check_same(fabric, {"the step to go on from": run.done, "the checkpoint": run.weights_from})
            elif not dry_run:  # the folder is made only now that data and settings have proved usable
                with together(fabric):
                    if writes:
                        stack.enter_context(held(make_folder(out)))
                        check_out(out, chosen, resume)  # another training may have begun meanwhile
            return _train(run, init is not None, max_steps, dry_run, quiet, console or Console(stderr=True))


def _start(config: Config, data: Path, out: Path, init: Path | None, fabric: Fabric, resume: bool) -> Run:
    """The run before its first step, the same in every process."""
    with together(fabric):
        found = read_data(data, config)
        if resume:
            check_seen(out, found.seen, data)
            found.learned_before(seen_before(out))
        elif init is not None:
            found.learned_before(learned_from(init))
    theirs = fabric.broadcast(found.seen)
    with together(fabric):
        if what := differences(found.seen, theirs):
            raise CdiffError(
                f"the processes have read different data (here, compared with process 0, {what}); give all of them the same"
            )
    facts = {"the data": found.summary, "the device": fabric.device.type, "the precision": precision_of(fabric)}
    check_same(fabric, config.values() | facts | {"PyTorch": torch.__version__})
    with together(fabric):
        run = Run(config, found, fabric, out)
        if init is not None:
            initial = read_initial(init)
            run.learner.start_from(initial)
            run.origin = {"init": initial.origin}
            run.notes += initial.notes(config)
            run.weights_from = initial.origin["sha256"]
    check_same(fabric, {"the weights to start from": run.weights_from})
    return run


def _train(run: Run, started: bool, max_steps: int | None, dry_run: bool, quiet: bool, console: Console) -> TrainResult:
    """Say what was found, and train; started: whether the weights come from elsewhere."""
    first = run.fabric.is_global_zero
    quiet = quiet or not first
    for note in run.notes if first else ():
        say(console, f"note: {note}")
    if not quiet:
        found, learner = run.data.summary, run.learner
        say(
            console,
            f"training on {several(found['train']['slices'], 'slice')} of {several(found['train']['cases'], 'case')}, validating on {len(run.val_chosen)} of"
            f" {found['val']['slices']}; {learner.parameters / 1e6:.2f} M parameters; {learner.device}, {run.precision}"
            + (f"; {run.fabric.world_size} processes" if run.fabric.world_size > 1 else ""),
        )
    if dry_run:
        loss, step = run.try_out(run.window())
        late = step
        if pace.grows(run.config, run.done, run.seconds):  # the larger windows may take more memory than there is
            late = run.try_out(run.config.network.image_size)[1]
        if not quiet:
            say(console, pace.forecast(run.config, run.done, run.seconds, step, late))
        return run.result(loss)
    if first:
        if started:
            run.save(None)  # before the run can be resumed: a resumed run is not told where its weights came from
        write_seen(run.out, run.data.seen)
        write_json(run.out / "config.json", run.config.to_json())
        point_at_best(run.out)
    return run.loop(max_steps, console, quiet)


def check_out(out: Path, config: Config, resume: bool) -> None:
    """Raise CdiffError unless `out` can be used: with `resume` it must hold a run with this configuration (but for config.HOW), otherwise no
    run and no files that a run would replace."""
    must_be_text(out)
    if is_there(out / "config.json"):
        if not resume:
            raise CdiffError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
        if (there := read_config(out)) != config:
            old, new = there.to_json(), config.to_json()
            keys = [(s, k) for s in old for k in old[s] if old[s][k] != new[s][k] and k not in HOW]
            keys = [(s, k) for s, k in keys if k != "task" or old[s][k]]  # an imported run knows of no structure yet
            differ = "; ".join(f"{k}: {old[s][k]} there, {new[s][k]} now" for s, k in keys)
            if differ:
                raise CdiffError(
                    f"{out} holds a run with other settings ({differ}); resume with the same settings, or start a new run from its weights: "
                    f"--init {out} with another --out"
                )
        return
    if resume:
        raise no_run(out)
    if others := _not_of_a_run(out):
        raise CdiffError(f"{out} holds no run, but {listed(others)}, which a run would replace; choose another --out")


def _not_of_a_run(out: Path) -> list[str]:
    """Files in a folder without a run that have names of a run's files, but are not what a run leaves that ended before it wrote config.json."""
    names = [name for name in ("log.csv", "samples.npz", "best.json", "tensorboard") if is_there(out / name)]
    for name, read in ((SEEN, seen_before), ("last.json", partial(checkpoint_folder, which="last"))):
        try:
            read(out)
        except CdiffError:
            names.append(name)
    return names


def no_run(out: Path) -> CdiffError:
    """The error for nothing to resume, also where a run was stopped before it had written anything."""
    return CdiffError(f"{out} holds no run to resume; start it without --resume")
