"""Typer's command and group as all of ours are: `--help` is shown as the flag that it is, and of the processes that torchrun started on a
machine with the same words one says what is wrong with them."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_UsageError: Any = typer.BadParameter.__base__  # click's, which later Typers have their own copy of


class _PlainHelp:
    """Typer (0.29, say) names a type beside `--help`, and beside no other flag; a reader would look for its value."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]  # of the class that this is mixed into
        if option is not None:
            option.metavar = ""
        return option


class _OneVoice:
    """Of torchrun's processes on a machine only the first says that its words are wrong; the others end with the same code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc, no-any-return]  # of the class that this is mixed into
        except _UsageError as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                raise
            raise typer.Exit(error.exit_code) from None


class Command(_PlainHelp, _OneVoice, TyperCommand):
    """A command."""


class Group(_PlainHelp, _OneVoice, TyperGroup):
    """A group of commands."""
