"""What the scripts of this folder share: a parser that names the script as it is started, and errors in one line."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from cdiff.runtime.errors import CdiffError

P = ParamSpec("P")


def parser_of(name: str, text: str | None) -> argparse.ArgumentParser:
    """A parser for the script cdiff.benchmarks.`name`, whose help begins with the first line of its module's `text`."""
    return argparse.ArgumentParser(prog=f"python -m cdiff.benchmarks.{name}", description=(text or "").split("\n")[0])


def script(work: Callable[P, None]) -> Callable[P, int]:
    """The command line `work` with an exit code: 0, or 2 after one line on stderr for a CdiffError, which a user can mend."""

    @functools.wraps(work)
    def main(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            work(*args, **kwargs)
        except CdiffError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return main
