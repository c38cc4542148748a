"""What a MetaImage's header promises, and whether its files hold that: ITK reads on past packed voxels that are damaged, and files too few."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.sources import any_bytes

TEXT_ENDS = 2**16
"""A header lies within so many bytes, but for the names of its files."""
LAST = "ElementDataFile"
"""The field that ends a header."""
BYTES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "FLOAT": 4, "DOUBLE": 8, "LONG_LONG": 8, "ULONG_LONG": 8,
}  # fmt: skip
"""A value's bytes by ElementType, without its MET_; that of MET_LONG hangs on who wrote it."""
ZLIB_OR_GZIP = 47
"""What MetaImage's own reader takes."""
CHUNK = 2**20


def check_metaimage(data: bytes, path: Path) -> None:
    """Raise CdiffError where the file at `path` does not hold the voxels that its header promises, or has no millimetres.

    data: its bytes. What the header does not say, or says as nobody could read it, is left to ITK.
    """
    head, named, rest = data[:TEXT_ENDS].partition(LAST.encode())
    lines = head.decode("latin-1").splitlines()
    fields = {name.strip(): value.strip() for name, equals, value in (line.partition("=") for line in lines) if equals}
    unit = fields.get("DistanceUnits", "mm").lower()
    if unit not in ("mm", "", "?", "???"):
        raise CdiffError(f"{path} gives its lengths in {unit}; save it in millimetres")
    if not named or fields.get("BinaryData", "True").lower() in ("false", "0"):
        return
    line = rest.partition(b"\n")[0]
    where = line.partition(b"=")[2].decode("utf-8", "replace").strip()
    begins = len(head) + len(named) + len(line) + 1
    try:
        sizes = [int(n) for n in fields["DimSize"].split()]
        share = BYTES[fields["ElementType"].removeprefix("MET_")] * int(fields.get("ElementNumberOfChannels", 1))
        skipped, packed_size = int(fields.get("HeaderSize", 0)), int(fields.get("CompressedDataSize", 0))
    except (KeyError, ValueError):
        return
    promised = math.prod(sizes) * share
    packed = fields.get("CompressedData", "False").lower() in ("true", "1")
    if where.upper() == "LOCAL":
        if packed and not packed_size:  # which ITK then takes the wrong way
            raise CdiffError(f"{path} does not say how long its packed voxels are (CompressedDataSize); save it again")
        stored = memoryview(data)[begins:]
        _must_hold(promised, stored[:packed_size] if packed else stored, packed, path, path)
        return
    files = _files(where, data[begins:], sizes, path)
    for file in files:
        if not file.exists():
            raise CdiffError(f"{path} has its voxels in {file}, which does not exist; copy it too")
        held = any_bytes(file)
        if not packed or len(files) == 1:  # of several that are packed nothing says how long each is
            _must_hold(promised // len(files) + max(skipped, 0) * (not packed), held, packed, file, path)


def _files(where: str, rest: bytes, sizes: list[int], path: Path) -> list[Path]:
    """The files with the voxels. Raises CdiffError where a list of them is not as long as the image.

    where: a name, LIST with how many axes a file has, or a pattern with numbers (s%03d.raw 1 100 1).
    """
    words = where.split()
    try:
        if words[:1] == ["LIST"]:
            axes = int(words[1].rstrip("D")) if len(words) > 1 else len(sizes) - 1
            names = [line.strip() for line in rest.decode("utf-8", "replace").splitlines() if line.strip()]
        elif "%" in where and len(words) >= 3:
            axes, step = len(sizes) - 1, int(words[3]) if len(words) > 3 else 1
            names = [words[0] % n for n in range(int(words[1]), int(words[2]) + 1, step)]
        else:
            return [path.parent / where]
    except (ValueError, TypeError):
        return [path.parent / where]
    if len(names) != math.prod(sizes[axes:]) or not names:
        raise CdiffError(
            f"{path} names {len(names)} files for the voxels of {math.prod(sizes[axes:])}; correct the list"
        )
    return [path.parent / name for name in names]


def _must_hold(promised: int, stored: bytes | memoryview, packed: bool, file: Path, path: Path) -> None:
    """Raise CdiffError where `stored` has less than `promised` bytes, once unpacked, or its check sum is another's."""
    held = len(stored)
    if packed:
        held, inflate = 0, zlib.decompressobj(ZLIB_OR_GZIP)
        try:
            for start in range(0, len(stored), CHUNK):
                rest: bytes | memoryview = stored[start : start + CHUNK]
                while rest and held <= promised and not inflate.eof:
                    held += len(inflate.decompress(rest, CHUNK))
                    rest = inflate.unconsumed_tail
        except zlib.error as error:
            raise CdiffError(f"{file} is truncated or damaged ({error}); copy it again") from None
        if held == promised and not inflate.eof:
            held = 0  # its end, with the check sum, is missing
    if held < promised:
        raise CdiffError(
            f"{file} holds less than the header of {path.name} promises ({promised} bytes of voxels); it is truncated or damaged: "
            "copy it again"
        )
