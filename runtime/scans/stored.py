"""Compares what a file holds with what its header promises: readers stop once they have all voxels, before any check sum at the end."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from cdiff.runtime.errors import CdiffError

ZLIB_OR_GZIP = 47
"""zlib's wbits for a stream of either kind, told by its beginning."""
CHUNK = 2**20


def unpacked_size(stored: bytes | memoryview, most: int) -> int:
    """How many bytes a zlib or gzip stream unpacks to, none of which is kept; most + 1 where they are more than `most`.

    Raises zlib.error where the stream is damaged or fails its check sum, EOFError where it has no end.
    """
    inflate, held = zlib.decompressobj(ZLIB_OR_GZIP), 0
    for start in range(0, len(stored), CHUNK):
        rest: bytes | memoryview = stored[start : start + CHUNK]
        while not inflate.eof:
            made = inflate.decompress(rest, CHUNK)
            held, rest = held + len(made), inflate.unconsumed_tail
            if held > most:
                return most + 1
            if not made and not rest:
                break
    if not inflate.eof:
        raise EOFError("the packed data ends early")
    return held


def must_not_hold_more(held: int, promised: int, shape: Sequence[int], file: Path) -> None:
    """Raise CdiffError where a file holds a whole plane of voxels more than its header promises: one of the header's numbers is wrong, and
    the voxels would be cut at the wrong places. Fewer bytes beyond the promise are padding.

    held, promised: in bytes. shape: of the voxels that are promised.
    """
    if held - promised >= promised // max(shape):
        raise CdiffError(
            f"{file} holds {held} bytes of voxels where its header promises {promised}; the header is wrong or damaged: copy it again, "
            "or correct it"
        )
