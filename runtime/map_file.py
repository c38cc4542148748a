"""Writes a map of a scan as a NIfTI file, volume by volume, and cheaply where most of a long scan was not computed."""

from __future__ import annotations

import math
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.host import physical_cores
from cdiff.runtime.scans.grid import Grid

BLOCK = 2**20
"""Bytes of a block; each is deflated independently."""
MOST_THREADS = 8
"""Limits memory, as each thread holds a few blocks; and a single thread supplies the blocks."""
LEVEL = 1
"""Deflate's level for blocks with content: level 6 makes maps 1 to 10 % smaller and takes up to twice as long."""
# RFC 1952: deflate, no name and no time (so that equal maps give equal bytes), fastest, unknown system; RFC 1951: an empty last block.
GZIP_HEADER, LAST = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff", b"\x03\x00"


class Maps(Protocol):
    """An array [n,h,w] or [n,K,h,w], or an object that computes any part of one when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, part: slice, /) -> NDArray[Any]: ...


def write_map(path: Path, grid: Grid, slices: range, maps: Maps, intent: str) -> None:
    """Write one map [n,h,w] of `slices`, or K of them [n,K,h,w] along a fourth axis, as a compressed NIfTI file of the whole grid.

    Slices outside `slices` are NaN, or 0 for integer maps. intent: what the header says the maps are. Besides `maps` itself, only a
    few slices are in memory at a time, or one volume where slices are cut along another axis than the last.
    """
    with path.open("wb") as file:
        write_gzip(file, _parts(grid, slices, maps, intent))


def _parts(grid: Grid, slices: range, maps: Maps, intent: str) -> Iterator[NDArray[Any]]:
    """The file's contents before compression: the header, then each volume, its first axis varying fastest as in NIfTI."""
    volumes = range(maps.shape[1]) if len(maps.shape) == 4 else (None,)
    yield _header(grid, grid.shape if None in volumes else (*grid.spatial, len(volumes)), maps.dtype, intent)
    outside = np.nan if maps.dtype.kind == "f" else 0

    def taken(held: range, k: int | None) -> NDArray[Any]:
        """The slices numbered `held` of volume k, [m,h,w]."""
        part = maps[held.start - slices.start : held.stop - slices.start]
        return part if k is None else part[:, k]

    step = max(1, BLOCK // (math.prod(maps.shape[-2:]) * maps.dtype.itemsize))
    if grid.slice_axis == 2:  # the file then holds one slice after another
        count, plane = grid.spatial[2], grid.spatial[1::-1]
        blank = np.full((min(step, count), *plane), outside, maps.dtype)
        for k in volumes:
            for first in range(0, count, step):
                part = blank[: count - first]
                held = range(max(first, slices.start), min(first + step, slices.stop))
                if held:
                    part = part.copy()
                    part[held.start - first : held.stop - first] = taken(held, k).swapaxes(1, 2)
                yield part
        return
    volume = np.full(grid.spatial[::-1], outside, maps.dtype)
    planes = volume.T[None] if grid.slice_axis is None else np.moveaxis(volume.T, grid.slice_axis, 0)
    for k in volumes:
        for first in range(slices.start, slices.stop, step):  # the other slices keep the fill value
            held = range(first, min(first + step, slices.stop))
            planes[held.start : held.stop] = taken(held, k)
        yield volume


def _header(grid: Grid, shape: tuple[int, ...], dtype: np.dtype[Any], intent: str) -> NDArray[np.uint8]:
    image = grid.image(np.broadcast_to(dtype.type(0), shape), intent)
    image.header.set_slope_inter(1, 0)
    written = BytesIO()
    image.header.write_to(written)
    return np.frombuffer(written.getvalue(), np.uint8)


def write_gzip(file: BinaryIO, parts: Iterable[NDArray[Any]]) -> None:
    """Write arrays, each in C order, one after another as one gzip stream (RFC 1952, a single member).

    Each block is deflated independently and ends on a whole byte. So blocks are deflated in parallel, one thread per core, and blocks
    of a single value, such as those of slices that were not computed, are deflated and their CRC computed only once for each length.
    """
    threads = min(physical_cores(), MOST_THREADS)
    crc = size = 0
    known: dict[tuple[int, int, str], Future[tuple[bytes, int]]] = {}
    waiting: deque[tuple[Future[tuple[bytes, int]], int]] = deque()
    file.write(GZIP_HEADER)
    with ThreadPoolExecutor(threads, "cdiff-deflate") as pool:

        def write(most: int) -> None:
            """Write finished blocks in order until at most `most` are waiting."""
            nonlocal crc, size
            while len(waiting) > most:
                done, length = waiting.popleft()
                deflated, own = done.result()
                file.write(deflated)
                crc, size = _times(crc, _zeros_after(length)) ^ own, size + length

        for part in parts:
            # Compared as integers, because NaN does not equal itself.
            values = np.ascontiguousarray(part).reshape(-1).view(f"u{part.itemsize}")
            step = BLOCK // values.itemsize
            for start in range(0, len(values), step):
                block = values[start : start + step]
                if block[0] == block[-1] and block.min() == block.max():
                    key = (int(block[0]), len(block), block.dtype.str)
                    if key not in known:
                        known[key] = pool.submit(_deflated, block.copy(), 9)
                    done = known[key]
                else:
                    done = pool.submit(_deflated, block.copy(), LEVEL)  # a copy: the caller may reuse the array
                waiting.append((done, block.nbytes))
                write(2 * threads)
        write(0)
    file.write(LAST + struct.pack("<LL", crc, size % 2**32))


def _deflated(block: NDArray[Any], level: int) -> tuple[bytes, int]:
    """Raw deflate blocks that refer to nothing before them, padded to a whole byte; and the CRC of `block`."""
    deflate = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflate.compress(block.data) + deflate.flush(zlib.Z_FULL_FLUSH), zlib.crc32(block.data)


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2) modulo that of CRC-32 (RFC 1952, section 8); bit 31 is the constant term, bit 0 that of x^31.

    The CRC of two strings in sequence is the CRC of the first times `_zeros_after(length of the second)`, plus (XOR) that of the second.
    """
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a, b = a << 1 & 0xFFFFFFFF, b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


@lru_cache(maxsize=16)
def _zeros_after(length: int) -> int:
    """x^(8 length): the factor by which `length` further bytes multiply the CRC of what comes before them."""
    power, square = 1 << 31, 1 << 23
    while length:
        if length & 1:
            power = _times(power, square)
        square, length = _times(square, square), length >> 1
    return power
