"""Checks that a case's files do not change while it is scored: they are read several times, perhaps hours apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cdiff.runtime.data.cases import Case
from cdiff.runtime.data.structures import files_read, parted
from cdiff.runtime.errors import CdiffError

Stamps = Mapping[Path, tuple[int, int]]
"""For each file, its size in bytes and the time of its last change in ns."""


def stamps_of(case: Case) -> Stamps:
    """The stamps of a case's files, and of each file of a folder (a DICOM series)."""
    found: dict[Path, tuple[int, int]] = {}
    for file in files_read(case):
        with suppress(OSError):  # reading the file will raise, and say why
            now = file.stat()
            found[file] = now.st_size, now.st_mtime_ns
    return found


@contextmanager
def unchanged(case: Case, stamps: Stamps) -> Iterator[None]:
    """Raise CdiffError after the block if a file of `case` no longer has its stamp.

    This replaces any exception of the block, because reading old and new contents together may fail in any way."""

    def check() -> None:
        now, named = stamps_of(case), {parted(path)[0] for path in case.files}
        # The stamps may be of more files than those of `case`: of modalities that the model does not take.
        both = [path for path in {**stamps, **now} if path in now or path in named or path.parent in named]
        if changed := [path for path in both if stamps.get(path) != now.get(path)]:
            raise CdiffError(
                f"{case.name}: {changed[0]} has changed since the evaluation began; run the same command again"
            )

    try:
        yield
    except Exception:
        check()
        raise
    check()
