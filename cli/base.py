"""Typer's command and group as all of ours are: `--help` is shown as the flag that it is, an option with one value is given once, and of the
processes that torchrun started on a machine with the same words one says what is wrong with them."""

from __future__ import annotations

import os
from collections import Counter
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


class _Once:
    """An option that takes one value is an error where it is given twice: Typer would take the last, as if `--labels 1 --labels 4` were 4."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        command: Any = self  # of the class that this is mixed into
        _, _, given = command.make_parser(ctx).parse_args(args=list(args))
        for option, times in Counter(given).items():
            one = option.param_type_name == "option" and not option.multiple
            if one and times > 1 and (not option.is_flag or option.secondary_opts):
                ctx.fail(f"{'/'.join([*option.opts[:1], *option.secondary_opts])} is given twice; give it once.")
        return super().parse_args(ctx, args)  # type: ignore[misc, no-any-return]


class Command(_PlainHelp, _OneVoice, _Once, TyperCommand):
    """A command."""


class Group(_PlainHelp, _OneVoice, TyperGroup):
    """A group of commands."""
