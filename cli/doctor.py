"""`cdiff doctor`: what this machine has, and what is missing for each engine."""

from __future__ import annotations

import typer
from rich.text import Text

from cdiff.cli.console import USER_ERROR, facts


def doctor() -> None:
    """Say what this machine has and what is missing for each engine.

    It only looks: it imports no PyTorch and changes nothing. The exit code is 0
    when at least one engine besides PyTorch can run a model here, else 2.
    """
    from cdiff.runtime.doctor import diagnose

    found = diagnose()
    marks = {True: Text("yes", "green"), False: Text("no", "yellow"), None: Text("")}
    for section, checks in found.sections.items():
        rows = [(c.name, marks[c.ok], "; ".join(word for word in (c.found, c.remedy) if word)) for c in checks]
        facts(section, rows)
    if not found.usable:
        raise typer.Exit(USER_ERROR)
