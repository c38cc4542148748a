"""What a run reports: a CSV and TensorBoard log, and a progress bar on a terminal (sparse lines elsewhere)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_text

STEP = re.compile("[0-9]{1,18}")
FIELDS = ("step", "seconds", "loss", "lr", "grad_norm", "window", "mfu", "val_soft_dice_5")


def say(console: Console, line: str) -> None:
    """Print one line as it is: never wrapped, so that a log can be searched for it, and brackets in a case's name are not markup."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class NoLog:
    """The log of a process that reports nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, completed: int, total: int) -> None:
        pass

    def row(self, row: dict[str, Any]) -> None:
        pass


class Log:
    """Rows go to RUN/log.csv and RUN/tensorboard. A resumed run first drops the rows after the step that it resumes from."""

    def __init__(self, run: Path, console: Console, start: int, total: int, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.path = run / "log.csv"
        begin_log(self.path, FIELDS, start)
        with _room(run):
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=total, completed=start)

    def __enter__(self) -> Log:
        self.progress.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.progress.stop()
        # Where an error ended the training, that one is reported, not the log's.
        with suppress(CdiffError) if error is not None else nullcontext(), _room(self.path.parent):
            self.board.close()

    def step(self, completed: int, total: int) -> None:
        self.progress.update(self.task, completed=completed, total=total)

    def row(self, row: dict[str, Any]) -> None:
        """Write one line of the log; a missing field stays empty. Raises CdiffError where it cannot be written."""
        with _room(self.path.parent):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, FIELDS).writerow(row)
            for key in FIELDS[2:]:
                if key in row:
                    self.board.add_scalar(key, row[key], row["step"])
            self.board.flush()
        said = "  ".join(f"{key} {row[key]:.4g}" for key in FIELDS[1:] if key in row)
        self.progress.update(self.task, description=f"loss {row.get('loss', float('nan')):.4f}")
        if not self.quiet and (not self.console.is_terminal or "val_soft_dice_5" in row):
            say(self.console, f"step {row['step']}  {said}")


@contextmanager
def _room(run: Path) -> Iterator[None]:
    """Within the block a log that cannot be written is a CdiffError."""
    try:
        yield
    except OSError as error:
        raise CdiffError(
            f"cannot write the log in {run}: {error.strerror or error}; make room there, then --resume goes on from the last checkpoint"
        ) from None


def begin_log(path: Path, fields: Sequence[str], step: int) -> None:
    """Write the log anew: its header and the old rows up to `step`, since a resumed run takes the later steps again."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(row for row in read_log(path) if int(row["step"]) <= step)
    write_text(path, text.getvalue())


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv, oldest first; none when there is no file. A line cut short by a kill, or damaged, is left out.

    Raises CdiffError where the file cannot be read as CSV at all.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            return [
                row
                for row in csv.DictReader(file)
                if STEP.fullmatch(row.get("step") or "") and None not in row.values()
            ]
    except (OSError, csv.Error) as error:
        raise CdiffError(f"{path} cannot be read as a log ({error}); move it away, and a new one is begun") from None
