"""Turns a missing optional dependency into one line that says what to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cdiff.runtime.errors import CdiffError


@contextmanager
def needs(what: str) -> Iterator[None]:
    """Around lazy imports of PyTorch and what goes with it: a package that is not installed is a CdiffError naming the extra `train`."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "cdiff"):
            raise
        raise CdiffError(
            f"{what} needs {package}, which is not installed; try: pip install '.[train]' in cdiff's clone"
        ) from None
