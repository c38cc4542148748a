"""Checks a torch.save file before PyTorch unpickles it: that it is what was written, and holds nothing that could take all memory or all day."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Any

ZIP = b"PK\x03\x04"
SCRIPT = "it is a TorchScript archive"
"""Recognised by a part that torch.save does not write; its code is compressed."""
PICKLES = 5
"""Pickles that a file of PyTorch before 1.6 begins with; later versions put each into a file of its own in a ZIP archive."""
UTILS = "torch._utils _rebuild_"
TYPED = "torch._tensor _rebuild_from_type_v2"
"""Calls its first argument; written for a tensor of a subclass or with attributes."""
CONTAINERS = ("collections OrderedDict", "torch Size")
WRITTEN = re.compile(
    rf"{UTILS}(tensor(_v[23])?|meta_tensor_no_storage|parameter(_with_state)?)|{TYPED}|{'|'.join(CONTAINERS)}"
    r"|torch\.nn\.parameter Parameter|torch\.storage UntypedStorage|torch (Tensor|\w+Storage|b?float\d+\w*|u?int\d+|complex\d+|bool)"
    r"|(__torch__|torch\.jit)\b.*"  # in a TorchScript archive, which PyTorch refuses in its own words
)
"""The globals that torch.save writes for plain tensors. Even with weights_only PyTorch accepts others that can take all memory: bytearray
makes as many bytes as a number says, encode doubles bytes, set and Counter go through a tensor that stores one number and repeats it."""
MOST, A_STEP = 2**20, 4
"""How many things the arguments of a pickle's calls and its keys may hold in all, nested ones counted each time they are reached: MOST, and A_STEP
more for each opcode. A tuple that holds one tuple twice, which holds another twice, and so on, takes hours to hash, and a list that is copied anew
by every six bytes takes all memory; an optimiser's groups share little."""
DEEPEST = 100
"""How deep they may be nested: hashing tuples that are nested far deeper crashes the process."""
KEPT, AGAIN = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NUMBERS = ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1")
PLAIN = (*NUMBERS, "BINUNICODE", "SHORT_BINSTRING", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_SET")
MARK = object()
LONG = 2**10
"""How many things a whole number of more than 64 bits counts for: as a dictionary's keys, such numbers of one hash are compared each with each."""


class Tensors(list[Any]):
    """Stands for a tensor or its storage: going through one takes time for each of its rows, whose number its call need not show."""


class Named(list[Any]):
    """Stands for a dictionary: keys and values, in turn."""


def must_be_as_written(path: Path) -> None:
    """Raise OSError where a torch.save file is not what was written, and UnpicklingError as `_is_tame` does.

    Not as written: its archive's checksums, which PyTorch does not compare, do not match; it has compressed parts, which torch.save never
    writes and which may unpack to a thousand times their size; or PyTorch may find other parts in it than are looked at here.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:  # PyTorch tells the two formats apart in the same way
            file.seek(0)
            all(_is_tame(file) for _ in range(PICKLES))  # up to the first that PyTorch would not read
            return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.filename.endswith("/constants.pkl") for part in parts):
            raise OSError(SCRIPT)
        packed = any(part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size for part in parts)
        if packed or sum(part.file_size for part in parts) > path.stat().st_size:
            raise OSError("its parts are compressed, which torch.save never does")
        if min((part.header_offset for part in parts), default=0) or not _of_one_directory(path):
            raise OSError("its directory is not where torch.save writes it")
        if (broken := archive.testzip()) is not None:
            raise OSError(f"{broken} is not what was written")
        for part in parts:
            name = part.orig_filename  # newer Pythons may take `filename` from the part's extra fields
            if name.lower().endswith(".pkl"):
                _is_tame(io.BytesIO(archive.read(part)))


def _of_one_directory(path: Path) -> bool:
    """Whether Python and PyTorch, which search for a directory's end in different ways, find the same one in an archive that starts at byte 0."""
    with path.open("rb") as file:
        # 56 bytes that end a large archive's directory, 20 that say where those lie, 22 that end any archive.
        at = file.seek(-98, io.SEEK_END)
        tail = file.read()
    large = tail[56:60] == b"PK\x06\x07"
    return tail[76:80] == b"PK\x05\x06" and (not large or int.from_bytes(tail[64:72], "little") == at)


def _is_tame(file: IO[bytes]) -> bool:
    """Whether the file goes on with a pickle that PyTorch reads; anything else is left to PyTorch, which reads no further either.

    Raises UnpicklingError when the pickle asks for a global that is not WRITTEN, has a container go through a tensor, or when its calls and
    keys hold more things than MOST and A_STEP allow, or one nested deeper than DEEPEST.

    It executes the pickle as PyTorch would, with None for whatever holds nothing and a list for whatever may grow.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    left = MOST
    try:
        for code, value, _ in pickletools.genops(file):
            name = code.name
            used: Any = ()
            if name == "GLOBAL":
                if not WRITTEN.fullmatch(str(value)):
                    raise pickle.UnpicklingError(f"the global {value} is no tensor's")
                stack.append(value)
            elif name in KEPT:
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
                called, used = _last(stack, 2)
                stack.append(_called(called, used))
            elif name == "BUILD":
                used = stack.pop()
                if type(used) is not Named:
                    raise pickle.UnpicklingError("an object's own are no names")
                stack[-1].append(used)
            elif name == "BINPERSID":
                used = stack.pop()
                stack.append(Tensors())
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "EMPTY_DICT":
                stack.append(Named())
            elif name in PLAIN:
                stack.append(None)
            elif name not in ("PROTO", "STOP"):
                raise pickle.UnpicklingError(f"Unsupported operand {ord(code.code)}")  # as PyTorch says it
            if name == "LONG1" and int(value or 0).bit_length() > 64:
                left -= LONG
            left = _looked_at(used, left + A_STEP)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError):
        return False
    return True


def _last(stack: list[Any], number: int) -> list[Any]:
    """The last items of the stack, taken from it. Raises LookupError where there are not so many."""
    return [stack.pop() for _ in range(number)][::-1]


def _to_mark(stack: list[Any]) -> list[Any]:
    """The items after the last mark, taken from the stack with it."""
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return items[::-1]


def _called(called: Any, used: Any) -> list[Any]:
    """Stands for what a call returns. Raises UnpicklingError for arguments that torch.save does not write."""
    if called == TYPED and type(used) is tuple:
        called, _, used = used[:3]
    if type(used) is not tuple or not isinstance(called, str):
        raise pickle.UnpicklingError("a call's arguments are no tuple")
    if called.startswith(UTILS):
        return Tensors([used])
    # Python 2 gives an OrderedDict a list of pairs: tensors in the pairs are not gone through, a tensor in place of a pair is.
    gone_through = [used, *used, *(inner for item in used if isinstance(item, (list, tuple)) for inner in item)]
    if called not in CONTAINERS or any(isinstance(item, Tensors) for item in gone_through):
        raise pickle.UnpicklingError("it would go through a tensor")
    return [used]


def _looked_at(used: Any, left: int) -> int:
    """`left` less the number of things in `used`. Raises UnpicklingError where that is below 0, or they are nested too deep."""
    todo = [(used, 0)] if used else []
    while todo:
        item, depth = todo.pop()
        left -= len(item)
        if left < 0 or depth > DEEPEST:
            raise pickle.UnpicklingError("it would take long to look at what its calls and keys hold")
        todo += [(inner, depth + 1) for inner in item if inner and isinstance(inner, (list, tuple))]
    return left
