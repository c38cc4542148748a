"""The Typer application: registers the commands and turns a CdiffError into one red line and an exit code."""

from __future__ import annotations

import codecs
import errno
import io
import itertools
import logging
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated, Any

import typer

import cdiff
from cdiff.cli import benchmark, data, doctor, evaluate, export, importing, info, segment, train
from cdiff.cli.base import Command, Group
from cdiff.cli.console import INTERRUPTED, USER_ERROR, Notes, fail, for_eyes
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import one_line

EPILOG = (
    "Exit codes: 0 done · 1 a crash that should not have happened · 2 a problem that you can fix, told in one line · "
    "3 some of several scans failed, the others are done · 130 interrupted."
)


ENVIRONMENT = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
    errno.ENAMETOOLONG,
)
"""Refusals of the system that may come anywhere: permissions, disks that are full, failing or gone, names that are too long."""
NO_MEMORY = "can't allocate memory"
"""What PyTorch, whose error is a RuntimeError, says where a processor's memory is not enough."""
NO_THREAD = "can't start new thread"
"""Python's words, and all that it says, where a limit of processes or of memory is reached, or a container's of tasks."""


class Commands(Group):
    """The group of all commands; the one place where errors that a user can mend end."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Typer does, but for what is empty: a path would be the current folder, and other values as if they were not given."""
        for before, one in itertools.pairwise(["cdiff", *args]):
            if not one or (one.startswith("--") and one.find("=") == len(one) - 1):
                fail(f"what follows {one or before} is empty; give a value (is a variable of the shell not set?)")
                raise typer.Exit(USER_ERROR)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CdiffError as error:
            fail(str(error))
            raise typer.Exit(USER_ERROR) from None
        except OSError as error:
            if error.errno not in ENVIRONMENT:
                raise
            where = os.fsdecode(error.filename or "stdout or a temporary file")  # what is printed has no name
            advice = (
                "give a shorter one"
                if error.errno == errno.ENAMETOOLONG
                else "check the space and the permissions there"
            )
            fail(f"{where}: {os.strerror(error.errno).lower()}; {advice}")
            _drop_unprinted()
            raise typer.Exit(USER_ERROR) from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or NO_MEMORY in str(error):
                fail(f"the memory is not enough ({one_line(error)}); end what else uses it, or ask for less")
            elif NO_THREAD in str(error):
                fail(
                    "no more threads can be started: a limit of processes (ulimit -u) or of memory (ulimit -v) is reached; raise it, or "
                    "end what else runs"
                )
            else:
                raise
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            fail("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    name="cdiff",
    help="Map how many experts would agree: train, export and run consensus-diffusion segmentation.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cdiff {cdiff.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, metavar="", help="Print the version and leave."),
    ] = False,
) -> None:
    """Options that come before a command."""


app.command("segment", cls=Command, rich_help_panel="Use a model")(segment.segment)
app.command("evaluate", cls=Command, rich_help_panel="Use a model")(evaluate.evaluate)
app.command("info", cls=Command, rich_help_panel="Use a model")(info.info)
app.add_typer(data.app, name="data", rich_help_panel="Make a model")
app.command("train", cls=Command, rich_help_panel="Make a model")(train.train)
app.command("import", cls=Command, rich_help_panel="Make a model")(importing.import_)
app.command("export", cls=Command, rich_help_panel="Make a model")(export.export)
app.command("doctor", cls=Command, rich_help_panel="This machine")(doctor.doctor)
app.command("benchmark", cls=Command, rich_help_panel="This machine")(benchmark.benchmark)


def _drop_unprinted() -> None:
    """Where stdout takes no more, let go of what waits for it: from 3.14 on Python tries again as it ends, and ends in a code and words of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C does. Once: timeout(1) and batch systems send the same signal twice, and the second would cut the cleaning up short."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _as_it_is(error: UnicodeError) -> tuple[str | bytes, int]:
    """For stdout: a path that is not UTF-8 as the bytes that it is, and what stdout's encoding has no sign for as its number."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


def main(name: str | None = None) -> None:
    """The entry point of the `cdiff` command. name: what the help calls it, unless it is the file that was started."""
    # Batch systems, containers and a terminal that is closed end a process so; by default unfinished files would stay, and as a
    # container's first process it would not even end. What is ignored already (nohup) stays ignored.
    for ending in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, ending) and signal.getsignal(number := getattr(signal, ending)) == signal.SIG_DFL:
            signal.signal(number, _interrupt)
    sys.stderr = for_eyes(sys.stderr)
    if sys.stdout is not None and sys.stdout.isatty():  # a program that reads results must not miss any
        sys.stdout = for_eyes(sys.stdout)
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("cdiff", _as_it_is)
        sys.stdout.reconfigure(errors="cdiff")
    logging.getLogger("cdiff").addHandler(Notes())
    # What it says of its home, where that cannot be written to, is not the user's business.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # Nor what nibabel mends in a header; what a map hangs on is refused before that.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    # Nor what Pillow makes of a tag that no pixel hangs on.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # Nor, four times a name, that its font has no sign for it (Chinese, say): a box stands there.
    warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
    app(prog_name=name)
