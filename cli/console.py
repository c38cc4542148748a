"""What the commands print with: results to stdout, everything about the work to stderr, a bar only on a terminal."""

from __future__ import annotations

import io
import logging
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TextIO

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

USER_ERROR = 2
SOME_FAILED = 3
INTERRUPTED = 130
"""Exit codes; what each means stands under `cdiff --help`."""

SPARSE_SECONDS = 30.0
"""Without a terminal: at most one line in this time, so that a log stays readable."""


class _ForEyes(io.FileIO):
    """What is written to nobody (a closed terminal, a dead `tee`, a log on a full disk) is lost, and no error."""

    def write(self, data: Any, /) -> int:
        left = memoryview(data).cast("B")
        try:
            while left and (taken := super().write(left)):  # none: a pipe that is full and not waited for
                left = left[taken:]
        except OSError:
            pass
        return len(data)


def for_eyes(stream: TextIO | None) -> TextIO | None:
    """The same stream for words that hours of work must not end for; itself where it is no file of the system's."""
    if not isinstance(stream, io.TextIOWrapper):  # None where it was closed from the start
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.FileIO):
        return stream
    told: Any = _ForEyes(raw.fileno(), "w", closefd=False)
    return io.TextIOWrapper(told, stream.encoding, stream.errors, write_through=True)


def visible(text: str) -> str:
    """Text that a terminal shows on one line and does not obey, whatever names of files and bundles hold: all but what is printed is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def written(path: Path | str) -> None:
    """A path on stdout, as it is and unwrapped, for a program to read; a terminal gets it `visible`."""
    print(visible(str(path)) if out.is_terminal else path, file=out.file, flush=True)


def fail(message: str) -> None:
    """One red line on stderr, never wrapped so that it can be searched for in a log."""
    err.print(f"[bold red]error:[/] {_line(message)}", soft_wrap=True)


def warn(message: str) -> None:
    """One yellow line on stderr, printed with -q too: what a user must not miss."""
    err.print(f"[yellow]note:[/] {_line(message)}", soft_wrap=True)


class Notes(logging.Handler):
    """What the runtime logs that a user should know (a batch that was halved) as `warn` has it; Python would print it bare."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def _line(message: str) -> str:
    """The message as one line, whatever a name or a setting that it quotes holds; what it lists below that stands indented."""
    return escape("\n".join(visible(line) for line in re.split(r"\n(?=  )", message)))


def facts(title: str, rows: Iterable[tuple[str | Text, ...]]) -> None:
    """A titled list on stdout: names on the left, what is to say of them wrapped on the right."""
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    for row in rows:
        while len(table.columns) < len(row):
            table.add_column(no_wrap=len(table.columns) < len(row) - 1, overflow="fold")
        table.add_row(*(Text(visible(cell)) if isinstance(cell, str) else cell for cell in row))
    out.print(Text(title, "bold"))
    out.print(Padding(table, (0, 0, 1, 2), expand=False))


def say(message: str, quiet: bool = False) -> None:
    """One line on stderr about the work; nothing with -q."""
    if not quiet:
        err.print(_line(message), soft_wrap=True)


def number(value: float | None, digits: int = 3) -> str:
    """A score as tables have it; - where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


class Meter:
    """A progress bar on a terminal, sparse lines elsewhere, nothing with -q.

    `meter(done, total)` is the callback that the runtime calls; `label` may change on the way. The remaining time is
    that of the whole `total`. One bar at a time; other threads may `show` results meanwhile.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _on_screen: ClassVar[Progress | None] = None

    def __init__(self, label: str, quiet: bool = False) -> None:
        self.label = label
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._sparse = not quiet and not err.is_terminal
        self._started = self._said = time.monotonic()
        if not quiet and err.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=err,
                transient=True,
            )

    def __enter__(self) -> Meter:
        if self._bar is not None:
            with Meter._lock:
                self._bar.start()
                Meter._on_screen = self._bar
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with Meter._lock:
                self._bar.stop()
                Meter._on_screen = None

    @classmethod
    def show(cls, line: str) -> None:
        """A path, as `written` puts it. A bar steps aside, or the path would stand behind it on its line."""
        with cls._lock:
            if cls._on_screen is not None:
                cls._on_screen.stop()
            written(line)
            if cls._on_screen is not None:
                cls._on_screen.start()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(escape(visible(self.label)), total=total)
            self._bar.update(self._task, completed=done, total=total, description=escape(visible(self.label)))
        elif self._sparse and total:
            now = time.monotonic()
            if now - self._said >= SPARSE_SECONDS:
                self._said = now
                left = (now - self._started) * (total - done) / max(done, 1)
                say(f"{self.label}: {done / total:.0%}, about {left:.0f} s left")
