"""`cdiff doctor`: what this machine has, and what is missing for each engine."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from cdiff.cli.console import out

NOTHING_CAN_RUN = 2


def doctor() -> None:
    """Tell what this machine has and what is missing for each engine.

    Looks only: imports no PyTorch, changes nothing. Exit code 0 when at least one engine can run a model here, else 2.
    """
    from cdiff.runtime.doctor import diagnose

    found = diagnose()
    for section, checks in found.sections.items():
        table = Table(
            title=section, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 1)
        )
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for check in checks:
            mark = {True: Text("yes", "green"), False: Text("no", "yellow"), None: Text("")}[check.ok]
            words = [check.found] if check.ok is not False else [check.found, check.remedy]
            table.add_row(check.name, mark, Text("; ".join(word for word in words if word)))
        out.print(table)
        out.print()
    if not found.usable:
        raise typer.Exit(NOTHING_CAN_RUN)
