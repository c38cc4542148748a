"""Checks that a case's files, and maps that were drawn of it, do not change while it is scored: they are read several times, perhaps hours
apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cdiff.runtime.data.cases import Case
from cdiff.runtime.data.structures import files_read, parted
from cdiff.runtime.errors import CdiffError

Stamps = Mapping[Path, tuple[int, int]]
"""For each file, its size in bytes and the time of its last change in ns."""


def stamped(files: Iterable[Path]) -> Stamps:
    """The stamps of the files that exist."""
    found: dict[Path, tuple[int, int]] = {}
    for file in files:
        with suppress(OSError):  # reading the file will raise, and say why
            now = file.stat()
            found[file] = now.st_size, now.st_mtime_ns
    return found


def stamps_of(case: Case) -> Stamps:
    """The stamps of a case's files, and of each file of a folder (a DICOM series)."""
    return stamped(files_read(case))


@contextmanager
def unchanged(case: Case, stamps: Stamps) -> Iterator[None]:
    """`still` for the files of a case. `stamps` may be of more files than those of `case`: of modalities that the model does not take."""

    def both() -> tuple[Stamps, Stamps]:
        now, named = stamps_of(case), {parted(path)[0] for path in case.files}
        mine = {path: one for path, one in stamps.items() if path in now or path in named or path.parent in named}
        return mine, now

    with still(case.name, both):
        yield


@contextmanager
def still(name: str, both: Callable[[], tuple[Stamps, Stamps]]) -> Iterator[None]:
    """Raise CdiffError after the block if the two stamps of the files of case `name`, those from the beginning and those of now, differ.

    This replaces any exception of the block, because reading old and new contents together may fail in any way."""

    def check() -> None:
        before, now = both()
        if changed := [path for path in {**before, **now} if before.get(path) != now.get(path)]:
            raise CdiffError(f"{name}: {changed[0]} has changed since the evaluation began; run the same command again")

    try:
        yield
    except Exception:
        check()
        raise
    check()
