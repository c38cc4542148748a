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
MOST, A_STEP = 2**20, 4
"""Things, one in another counted as often as it is met, that all of a pickle's calls and keys together may hold: so many, and for each of its steps
so many more. A tuple of twice the same, of those twice and so on takes hours to be looked up, and a list that is copied with every six bytes takes
all memory; what an optimiser's groups share is little."""
DEEPEST = 100
"""How deep they may lie in one another: a hash of tuples of tuples that are deeper by far ends the process."""
KEPT, AGAIN = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()


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
    """Raise UnpicklingError for a pickle that asks for BYTES, or gives its calls, and has in its keys, more things than MOST and
    A_STEP allow, or one deeper than DEEPEST. What is no pickle, or not one of those that PyTorch reads, is left to PyTorch.

    It does what PyTorch would, with None for whatever holds nothing and a list for whatever may grow.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    left = MOST
    try:
        for code, value, _ in pickletools.genops(file):
            name = code.name
            used: Any = ()
            if name == "GLOBAL" and value in BYTES:
                raise pickle.UnpicklingError(f"the global {value} is no tensor's")
            if name in KEPT:
                memo[value] = stack[-1]
            elif name in AGAIN:
                stack.append(memo[value])
            elif name == "MARK":
                stack.append(MARK)
            elif name == "TUPLE":
                stack.append(tuple(_to_mark(stack)))
            elif name in TUPLES:
                stack.append(tuple(_last(stack, TUPLES[name])))
            elif name in ("APPEND", "APPENDS"):
                items = _last(stack, 1) if name == "APPEND" else _to_mark(stack)
                stack[-1].extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = _last(stack, 2) if name == "SETITEM" else _to_mark(stack)
                stack[-1].extend(items)
                used = items[::2]
            elif name in ("REDUCE", "NEWOBJ"):
                _, used = _last(stack, 2)
                stack.append([used])
            elif name == "BUILD":
                used = stack.pop()
                stack[-1].append(used)
            elif name == "BINPERSID":
                used = stack.pop()
                stack.append([])
            elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "GLOBAL"):
                stack.append([])
            elif name != "PROTO":
                stack.append(None)
            left = _looked_at(used, left + A_STEP)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError):
        pass


def _last(stack: list[Any], number: int) -> list[Any]:
    """The last items of the stack, taken from it. Raises LookupError where there are not so many."""
    return [stack.pop() for _ in range(number)][::-1]


def _to_mark(stack: list[Any]) -> list[Any]:
    """The items after the last mark, taken from the stack with it."""
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return items[::-1]


def _looked_at(used: Any, left: int) -> int:
    """How many of the `left` things are left after those in `used`. Raises UnpicklingError where they are not so many, or lie too deep."""
    todo = [(used, 0)] if used else []
    while todo:
        item, depth = todo.pop()
        left -= len(item)
        if left < 0 or depth > DEEPEST:
            raise pickle.UnpicklingError("it would take long to look at what its calls and keys hold")
        todo += [(inner, depth + 1) for inner in item if inner]
    return left
