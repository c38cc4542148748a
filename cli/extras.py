"""Turns what hinders PyTorch from being imported into one line that says what to do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from cdiff.runtime.errors import CdiffError


@contextmanager
def needs(what: str) -> Iterator[None]:
    """Around lazy imports of PyTorch and what goes with it: a package that is not installed is a CdiffError naming the extra `train`.

    So is a current folder that was deleted: there the library that PyTorch computes with ends the process. And that no folder can take
    temporary files: PyTorch asks for one as it is imported.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise CdiffError(f"{what} cannot start in a folder that was deleted; change to one that exists (cd)") from None
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise CdiffError(
            f"{what} needs a folder for PyTorch's temporary files, and none can be written to; set TMPDIR to one that can"
        ) from None
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "cdiff"):
            raise
        raise CdiffError(
            f"{what} needs {package}, which is not installed; try: pip install '.[train]' in cdiff's clone"
        ) from None
