"""A mask that is one structure of a file, FILE#NAME in a table: DICOM segmentations and structure sets hold those of all annotators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cdiff.runtime.data.case import Case, listed
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.itk import detached
from cdiff.runtime.scans.sources import is_there

SIGN = "#"
MOST = 20
"""Most structures that a message names."""
Structures = Sequence[tuple[int, str]]
"""The number and name of each structure in a file."""


def parted(path: Path) -> tuple[Path, str]:
    """The file that a mask's path leads to, and the structure in it; "" where the file as a whole is meant.

    Files may have the sign in their names too: the longest beginning of the path that is a file is taken.
    """
    if is_there(path):
        return path, ""
    text = str(path)
    at = text.rfind(SIGN)
    while at > 0:
        if (file := Path(text[:at])).is_file():
            return file, text[at + 1 :]
        at = text.rfind(SIGN, 0, at)
    return path, ""


def files_read(case: Case) -> Iterator[Path]:
    """Every file that is read for a case: those of `files_of_image`, for a structure those of the file that holds it."""
    for path in case.files:
        yield from files_of_image(parted(path)[0])


def files_of_image(path: Path) -> Iterator[Path]:
    """Every file that is read for an image: those of a folder (a DICOM series), or the file and those that its header names for voxels."""
    yield from filter(Path.is_file, path.iterdir()) if path.is_dir() else [path, *detached(path)]


def number_of(name: str, path: Path, there: Structures) -> int:
    """The number of the structure called `name`, or, where none is, of the one whose number is `name`.

    path: as the table has it, for messages. Raises CdiffError where no structure fits, or several do.
    """
    # Compared as paths, since `name` came through one: of two slashes in a row it keeps one.
    meant = [number for number, called in there if called and Path(SIGN + called) == Path(SIGN + name)]
    meant = meant or [number for number, _ in there if str(number) == name]
    if len(meant) == 1:
        return meant[0]
    if meant:
        numbers = ", ".join(map(str, meant))
        raise CdiffError(f"{path} is the name of several structures; name one by its number ({numbers})")
    raise CdiffError(f"{path} does not exist: the file holds {_called(there) or 'no structure'}")


def one_must_be_named(file: Path, there: Structures, why: str) -> CdiffError:
    """The error that a file cannot be read as one mask, with the names of its structures. why: such as "has segments that overlap"."""
    number, called = there[0]
    example = called if _are_told_apart(there) else number
    return CdiffError(f"{file} {why}: {_called(there)}; name the one that is meant, such as {file.name}{SIGN}{example}")


def _called(there: Structures) -> str:
    apart = _are_told_apart(there)
    return listed([called if apart else f"{number} ({called})" for number, called in there], MOST)


def _are_told_apart(there: Structures) -> bool:
    """Whether all structures have names, and no two the same."""
    names = [called for _, called in there]
    return all(names) and len(set(names)) == len(names)
