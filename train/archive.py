"""A file of torch.save's before PyTorch unpickles it: whether it is what was written, and nothing that could take all memory or all day."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

PICKLES = 5
"""Pickles that a file of PyTorch's before 1.6 begins with; those of later ones have a file of their own in a ZIP archive."""
BYTES = ("builtins bytearray", "__builtin__ bytearray")
"""What PyTorch, asked for tensors alone, makes of any number: so many bytes, however short the file is."""
MOST_AGAIN = 32
"""How often a pickle may take a tuple that it has made before. An optimiser's groups share theirs; tuples of twice the same, of those twice and
so on, take hours to be looked up once they are a dictionary's key."""


def must_be_as_written(path: Path) -> None:
    """Raise OSError where a file of torch.save's is not what was written, by its archive's check sums, which PyTorch does not compare, or
    has packed parts, which torch.save writes none of and which may unpack to a thousand times their size; UnpicklingError as `_must_be_tame` does.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            for _ in range(PICKLES):
                _must_be_tame(file)
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
        if packed or sum(part.file_size for part in parts) > path.stat().st_size:
            raise OSError("its parts are packed, and torch.save packs nothing")
        if (broken := archive.testzip()) is not None:
            raise OSError(f"{broken} is not what was written")
        for part in parts:
            if part.filename.lower().endswith(".pkl"):
                _must_be_tame(io.BytesIO(archive.read(part)))


def _must_be_tame(file: IO[bytes]) -> None:
    """Raise UnpicklingError for a pickle that asks for BYTES, or takes tuples again more than MOST_AGAIN times. What is no pickle is left to PyTorch."""
    tuples: set[Any] = set()
    top, again = "", 0
    try:
        for code, value, _ in pickletools.genops(file):
            if code.name == "GLOBAL" and value in BYTES:
                raise pickle.UnpicklingError(f"the global {value} is no tensor's")
            if code.name in ("BINPUT", "LONG_BINPUT"):
                (tuples.add if top.startswith("TUPLE") else tuples.discard)(value)
                continue
            if code.name in ("BINGET", "LONG_BINGET") and value in tuples:
                again += 1
                top = "TUPLE"  # it may be kept under another number
            elif code.name != "PROTO":
                top = code.name
            if again > MOST_AGAIN:
                raise pickle.UnpicklingError("its tuples are of one another")
    except (ValueError, OverflowError, MemoryError):
        pass
