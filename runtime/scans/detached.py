"""The files that a NRRD's or MetaImage's header names for its voxels, checked before ITK opens them.

ITK hands a pattern to C's printf as it is, which writes where the pattern says; it waits for a pipe that nobody writes to; and a header
that came from elsewhere must not turn just any file that this user can read into a picture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.sources import is_there

NUMBERED = re.compile(r"[^%\s]*%0?[0-9]?d[^%\s]*")
"""A file's name with a place for one number."""
NUMBER = re.compile(r"-?[0-9]{1,9}")
MOST_FILES = 100_000


def voxel_files(named: str, below: Sequence[str], path: Path) -> list[Path]:
    """The files that the header at `path` names.

    named: a name, LIST (the names are the lines `below`), or a pattern with its first number, its last and the step (s%03d.raw 1 100 1;
    the step may be left out). Raises CdiffError for any other pattern, and for more than MOST_FILES numbers.
    """
    words = named.split()
    if words[:1] == ["LIST"]:
        names: Iterable[str] = (line.strip() for line in below if line.strip())
    elif "%" not in named:
        names = [named]
    else:
        numbers = words[1:]
        fits = NUMBERED.fullmatch(words[0]) and len(numbers) >= 2 and all(map(NUMBER.fullmatch, numbers))
        step = int(numbers[2]) if fits and len(numbers) > 2 else 1
        if not fits or not step:
            raise CdiffError(
                f"{path} has its voxels in files called {named[:200]!r}, but such a name needs a place for one number and its range (s%03d.raw 1 100 1); "
                "correct it, or list the files' names"
            )
        count = range(int(numbers[0]), int(numbers[1]) + (1 if step > 0 else -1), step)
        if len(count) > MOST_FILES:
            raise CdiffError(
                f"{path} has its voxels in {len(count)} files, but at most {MOST_FILES} are read; save it as one file"
            )
        names = (words[0] % number for number in count)
    return [path.parent / name for name in names]


def must_be_own(files: Iterable[Path], path: Path) -> None:
    """Raise CdiffError unless each of `files`, which hold the voxels of `path`, is a file in the folder of `path` or below it."""
    folder = os.path.abspath(path.parent)
    for file in files:
        if os.path.commonpath([folder, os.path.abspath(file)]) != folder:
            raise CdiffError(
                f"{path} has its voxels in {file}, outside its own folder; copy that file there, and correct its name in the header"
            )
        if not is_there(file):
            raise CdiffError(f"{path} has its voxels in {file}, which does not exist; copy it too")
        if not file.is_file():
            raise CdiffError(f"{path} has its voxels in {file}, which is not a regular file; copy the voxels into one")
