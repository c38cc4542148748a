"""Says in one line why torch.compile cannot compile: it needs a C++ compiler, and a folder for what it compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import first_line


@contextmanager
def compiling(remedy: str) -> Iterator[None]:
    """For a block in which torch.compile may compile: a network's first call, and its first call with other shapes.

    Raises CdiffError, one line that ends in `remedy`, where the compiler is missing or fails, or its files cannot be written. Every other
    error is passed on as it is; torch.OutOfMemoryError also where PyTorch has wrapped it.
    """
    try:
        yield
    except RuntimeError as error:
        # torch._dynamo is imported only now: whoever compiles nothing never waits for it.
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        inner = getattr(error, "inner_exception", error)
        if isinstance(inner, torch.OutOfMemoryError):  # raised while it tried kernels on the GPU to find the fastest
            raise inner from None
        # Of a compiler's long output, the line on what is wrong; the command stands before it.
        why = next((line for line in str(inner).splitlines() if "error: " in line), first_line(inner)).strip()
        raise CdiffError(f"PyTorch cannot compile the network ({why}); {remedy}") from None
