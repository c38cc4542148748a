"""Whether DICOM files hold the pixels that their headers promise: dcm2niix takes what is there, and never ends on some streams that end early."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.dicom_planes import frames_of, functional_groups, values_asked
from cdiff.runtime.scans.sources import optional

SCALE = ("RescaleSlope", "RescaleIntercept")
TAGS = ("BitsAllocated", "BitsStored", "PixelRepresentation", *SCALE)
PIXELS = 0x7FE00010
UNDEFINED = 0xFFFFFFFF
"""The length that stands for pixels in fragments (PS3.5, A.4)."""
SHORT = 1024
"""Most bytes of a value that pydicom may copy; of longer ones only the place in the file is wanted."""
RLE = "1.2.840.10008.1.2.5"
RLE_HEADER = struct.Struct("<16I")
"""The number of segments, and where each begins (PS3.5, G.5)."""
JPEG, JPEG2000, END = b"\xff\xd8", b"\xff\x4f\xff\x51", b"\xff\xd9"
"""What streams begin and end with; JPEG 2000's beginning includes the marker of its size."""
JPEG2000_SIZE = struct.Struct(">4x2x2x4I4I2xB")
"""Right and lower edge, left and upper edge, four numbers about tiles, and bits less one (ISO 15444-1, A.5.1)."""
FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""The markers of segments that give bits, rows and columns, JPEG's (ITU T.81, B.2.2) and JPEG-LS'."""


@values_asked()
def must_agree(files: Sequence[Path], headers: Sequence[Any]) -> None:
    """Raise CdiffError where files of a series store values in several ways (dcm2niix goes by the first), or scale them in part or by no number."""
    kinds, scaled = set(), set()
    for file, header in zip(files, headers, strict=True):
        signed = header.get("PixelRepresentation")
        kinds.add((header.get("BitsAllocated"), signed, header.get("BitsStored") if signed else None))
        for scale in _scales(header):
            given = [scale.get(keyword) for keyword in SCALE]
            if given[0] == 0 or not all(map(_is_number, given)):
                raise CdiffError(
                    f"{file.name} scales its values by {given[0]} and {given[1]} (RescaleSlope, RescaleIntercept); it is damaged: copy it again"
                )
            scaled.add(tuple(one is None for one in given))
    differ = ["are stored in different ways (BitsAllocated, BitsStored, PixelRepresentation)"] * (len(kinds) > 1)
    differ += ["are scaled in part (RescaleSlope, RescaleIntercept)"] * (len(scaled) > 1)
    if differ:
        raise CdiffError(
            f"its images {' and '.join(differ)}; one may be damaged: copy them again, or give each part a folder"
        )


@values_asked()
def must_hold_pixels(file: Path, header: Any, data: bytes) -> None:
    """Raise CdiffError unless a file, whose bytes are `data`, holds as many pixels as its header promises; if compressed, in whole streams
    of that size.
    """
    pydicom = optional("pydicom", "pydicom", file, "DICOM")
    found = pydicom.dcmread(io.BytesIO(data), specific_tags=["PixelData"], defer_size=SHORT)
    pixels = found._dict.get(PIXELS)  # as stored: access by name would read it again, from a file
    if pixels is None:
        raise CdiffError(f"{file.name} ends before its pixels do; it is truncated or damaged: copy it again")
    rows, columns, bits = (int(header.get(keyword) or 0) for keyword in ("Rows", "Columns", "BitsAllocated"))
    frames, syntax = frames_of(header), found.file_meta.get("TransferSyntaxUID")
    if not syntax or not syntax.is_encapsulated:
        promised = -(-frames * rows * columns * bits // 8)
        held = min(pixels.length, len(data) - pixels.value_tell)
        # Some writers pad; a whole row or column more than the header says would be longer than that.
        padded = 0 <= held - promised < max(min(rows, columns) * bits // 8, 2)
        if pixels.length == UNDEFINED or held != pixels.length or not padded:
            raise CdiffError(
                f"{file.name} holds {held} bytes of pixels where its header promises {promised}; it is truncated or damaged: copy it again, "
                "or save it anew if viewers show it whole"
            )
        return
    try:
        streams = list(pydicom.encaps.generate_frames(_fragments(data, pixels), number_of_frames=frames))
        whole = len(streams) == frames and all(
            _is_whole_rle(stream, rows * columns, bits) if syntax == RLE else _size(stream) == (rows, columns, bits)
            for stream in streams
        )
    except (ValueError, EOFError, IndexError, struct.error):
        whole = False
    if not whole:
        raise CdiffError(
            f"{file.name} does not hold {frames} whole compressed image{'s' if frames > 1 else ''} of {rows} x {columns} pixels "
            f"of {bits} bits; it is damaged: copy it again, or decompress it (dcmdjpeg, gdcmconv) if viewers show it"
        )


def _scales(header: Any) -> Iterator[Any]:
    """The data sets that hold slope and intercept: the header's own, or one for each of its frames."""
    groups = functional_groups(header, "PixelValueTransformationSequence")
    yield from groups or [header]


def _is_number(value: Any) -> bool:
    """Whether a value is missing or a finite number; pydicom keeps as text what is no number."""
    return value is None or (isinstance(value, int | float | Decimal) and math.isfinite(value))


def _fragments(data: bytes, pixels: Any) -> bytes:
    """The bytes of pixels in fragments. Raises EOFError where a length is given, as for pixels that are not in fragments."""
    if pixels.length != UNDEFINED:
        raise EOFError
    return data[pixels.value_tell :] if pixels.value is None else pixels.value  # the delimiter was found


def _is_whole_rle(stream: bytes, pixels: int, bits: int) -> bool:
    """Whether each segment, one for each byte of a value, unpacks to a byte for each pixel (PS3.5, G.3)."""
    count, *starts = RLE_HEADER.unpack_from(stream)
    starts = [*starts[:count], len(stream)]
    if count != bits // 8 or starts[0] < RLE_HEADER.size or sorted(starts) != starts:
        return False
    return all(_unpacks(stream[start:end], pixels) for start, end in pairwise(starts))


def _unpacks(segment: bytes, wanted: int) -> bool:
    """Whether a segment's runs make `wanted` bytes, and nothing but padding follows."""
    at = held = 0
    while at < len(segment) and held < wanted:
        run = segment[at]
        if run < 128:  # run + 1 bytes as they are
            held += run + 1
            at += run + 2
        elif run > 128:  # one byte, 257 - run times
            held += 257 - run
            at += 2
        else:
            at += 1
    return held == wanted and at <= len(segment) and not segment[at:].strip(b"\0\x80")


def _size(stream: bytes) -> tuple[int, int, int]:
    """Rows, columns and bits per value, rounded up to whole bytes, of a JPEG, JPEG-LS or JPEG 2000 stream. Raises ValueError without an end."""
    if not stream.rstrip(b"\0\xff").endswith(END):  # padded to an even length
        raise ValueError
    if stream.startswith(JPEG2000):
        right, low, left, top, _, _, _, _, depth = JPEG2000_SIZE.unpack_from(stream)
        return low - top, right - left, _whole_bytes((depth & 127) + 1)
    at = len(JPEG)
    while stream.startswith(JPEG) and at < len(stream):
        mark, kind, length = struct.unpack_from(">BBH", stream, at)
        if mark != 0xFF:
            break
        if kind in FRAME:
            bits, rows, columns = struct.unpack_from(">BHH", stream, at + 4)
            return rows, columns, _whole_bytes(bits)
        at += 2 + length
    raise ValueError


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8) * 8
