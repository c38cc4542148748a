"""What keeps torch.compile from compiling, in one line: it needs a C++ compiler, and a folder for what it compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import first_line


@contextmanager
def compiling(remedy: str) -> Iterator[None]:
    """Around what torch.compile compiles, or may: at the first call of a network, and at the first with other shapes.

    Raises CdiffError, one line that ends in `remedy`, where the compiler is missing or fails, or its files cannot be written; every other
    error as it is, also one of the GPU's memory that PyTorch has wrapped.
    """
    try:
        yield
    except RuntimeError as error:
        # Imported only now: whoever compiled nothing never waits for it.
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        inner = getattr(error, "inner_exception", error)
        if isinstance(inner, torch.OutOfMemoryError):  # of what it tries out on the GPU to choose the faster
            raise inner from None
        # Of a compiler's pages the line on what is wrong; before it stands the command.
        why = next((line for line in str(inner).splitlines() if "error: " in line), first_line(inner)).strip()
        raise CdiffError(f"PyTorch cannot compile the network ({why}); {remedy}") from None
