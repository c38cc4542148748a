"""A PNG, TIFF or JPEG as the pixels that a model takes: grey for one channel, colours for three."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.stored import unpacked_size
from cdiff.runtime.switches import without_warnings
from cdiff.runtime.words import by, one_line

BITS_PER_SAMPLE = 258
"""TIFF's tag (TIFF 6.0, section 8): one number per channel."""
SIZE = 256, 257
"""TIFF's tags of width and height."""
PHOTOMETRIC = 262
"""TIFF's tag that says whether 0 is black or white, or that there are colours."""
WHITE_IS_ZERO = 0
"""That tag's value where 0 is white, as in scanned films."""
COMPRESSION, DEFLATE = 259, (8, 32946)
"""TIFF's tag of how pixels are packed, and its values for zlib's streams."""
STORED = (273, 279), (324, 325)
"""TIFF's tags of where each strip, or each tile, begins and how long it is."""
PLANAR, SEPARATE = 284, 2
"""TIFF's tag of how channels are stored, and its value for one after another."""
ORIENTATION = 274
"""EXIF's tag, and TIFF's: 1 as stored, 2 to 8 mirrored or turned."""
FORMATS = ("PNG", "TIFF", "JPEG")
"""What is read, whatever a file's suffix: by itself Pillow would take a PostScript file too, and run Ghostscript on it."""
PNG_DEPTH = 24
"""Where the bit depth stands in a PNG file: after the signature, the chunk's length and name, width and height (PNG 1.2, 11.2.2)."""
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Values per pixel, by PNG's colour type (PNG 1.2, 4.1.1)."""
WHOLE = ((0, 0, 1, 1),)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""The parts that a PNG is stored in, plain or interlaced: first column and row, steps between columns and rows (PNG 1.2, 8.2)."""
JPEG_BLOCK = 8
"""Pixels along the edge of a block of a JPEG."""
CONVERTED = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}
"""Pillow's modes that are neither grey nor RGB, and what they become."""
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's modes of more than 8 bits; all are grey."""


def check_depth(picture: Any, data: bytes, path: Path) -> None:
    """Raise CdiffError for a picture, opened by Pillow, of whose 16 bits it keeps only the upper 8: colours, or grey with transparency."""
    bits = 8
    if picture.format == "PNG":
        bits = data[PNG_DEPTH]
    elif picture.format == "TIFF":
        bits = max(picture.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    if bits > 8 and picture.mode not in DEEP_MODES:
        raise CdiffError(
            f"{path} has several channels of {bits} bits, but with more than 8 only grey pictures are read: save it in 16-bit grey, "
            "one file a channel, or as NIfTI"
        )


def check_png(data: bytes, path: Path) -> None:
    """Raise CdiffError for a PNG whose chunks fail their check sums, or that holds fewer pixels than its header promises: Pillow does not
    look at the pixels' check sums, and takes missing pixels for black.
    """
    if data[12:16] != b"IHDR":  # which the standard puts first
        raise _damaged(path)
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    promised = 0
    for column, row, across, down in ADAM7 if interlaced else WHOLE:
        columns, rows = -(-max(width - column, 0) // across), -(-max(height - row, 0) // down)
        promised += rows * (1 + -(-columns * depth * PNG_SAMPLES[kind] // 8)) if columns else 0
    try:
        held = unpacked_size(b"".join(_pixel_chunks(data, path)), 2 * promised)  # a writer may have added a row
    except EOFError:
        held = 0
    if held < promised:
        raise _fewer(path, (width, height))
    if held > 2 * promised:
        raise _damaged(path)


def _pixel_chunks(data: bytes, path: Path) -> Iterator[bytes]:
    """The chunks of a PNG that hold its pixels. Raises CdiffError for a chunk of any kind that fails its check sum (PNG 1.2, 3.2)."""
    at, name = 8, b""
    while at + 8 <= len(data) and name != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if end + 4 <= len(data) and zlib.crc32(data[at + 4 : end]).to_bytes(4) != data[end : end + 4]:
            raise _damaged(path)
        if name == b"IDAT":
            yield data[at + 8 : end]
        at = end + 4


def check_jpeg(picture: Any, data: bytes, path: Path) -> None:
    """Raise CdiffError for a JPEG, opened by Pillow, with too few bytes for the pixels that its header promises: libjpeg makes up the rest.

    Huffman's codes take at least a bit for each block (ITU T.81, F.1.2.1). A file that lacks less is not noticed.
    """
    width, height = picture.size
    if -(-width // JPEG_BLOCK) * -(-height // JPEG_BLOCK) > 8 * len(data):
        raise _fewer(path, (width, height))


def check_strips(picture: Any, data: bytes, path: Path) -> None:
    """Raise CdiffError for a TIFF, opened by Pillow, whose strips or tiles do not cover it: Pillow takes what is missing for black.

    Also for one that does not say whether 0 is black or white (Pillow takes it for white), whose 0 is white in more than 8 bits (Pillow
    turns round only 8 and fewer), or whose packed strips fail their check sums, at which libtiff does not look.
    """
    width, height = (picture.tag_v2[tag] for tag in SIZE)  # picture.size may be that of the turned picture
    planes = len(picture.getbands()) if picture.tag_v2.get(PLANAR) == SEPARATE else 1
    boxes = [tile[1] for tile in picture.tile]
    held = sum((min(right, width) - left) * (min(low, height) - top) for left, top, right, low in boxes)
    if held < planes * width * height:
        raise _fewer(path, (width, height))
    if PHOTOMETRIC not in picture.tag_v2:
        raise CdiffError(f"{path} does not say whether 0 is black or white (tag {PHOTOMETRIC}); save it again as PNG")
    if picture.tag_v2[PHOTOMETRIC] == WHITE_IS_ZERO and picture.mode in DEEP_MODES:
        raise CdiffError(
            f"{path} stores white as 0, which is read in pictures of up to 8 bits alone; save it with black as 0, as PNG or TIFF"
        )
    if picture.tag_v2.get(COMPRESSION) in DEFLATE:
        most = 8 * width * height * len(picture.getbands())
        for places, lengths in STORED:
            for place, length in zip(_numbers(picture, places), _numbers(picture, lengths), strict=True):
                unpacked_size(memoryview(data)[place : place + length], most)


def _numbers(picture: Any, tag: int) -> tuple[int, ...]:
    found = picture.tag_v2.get(tag, ())
    return found if isinstance(found, tuple) else (found,)


def _damaged(path: Path) -> CdiffError:
    return CdiffError(f"{path} is damaged: its checksums do not match its contents; copy it again")


def _fewer(path: Path, size: tuple[int, int]) -> CdiffError:
    return CdiffError(
        f"{path} holds fewer pixels than its header promises ({by(size)}); it is truncated or damaged: copy it again"
    )


def upright(picture: Any) -> tuple[Any, bool]:
    """The picture, opened by Pillow, turned as its EXIF orientation says, and whether that changed anything.

    Viewers and annotation tools show it so. Pillow itself does it only for TIFF, when the pixels are loaded.
    """
    from PIL import ImageOps

    if picture.format == "PNG":
        picture.load()  # getexif would do it too, and an error in the pixels must not be taken for one in EXIF
    try:
        turned = picture.getexif().get(ORIENTATION, 1) in range(2, 9)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):  # damaged EXIF says nothing
        turned = False
    picture.load()
    return (ImageOps.exif_transpose(picture) if turned and picture.format != "TIFF" else picture), turned


@contextmanager
def opened(data: bytes, path: Path) -> Iterator[tuple[Any, bool]]:
    """The one picture in a file's bytes, opened by Pillow and turned by `upright`, and whether that turned it.

    Raises CdiffError for several pictures, for more bits than Pillow keeps, for a picture without all of its pixels, and for what goes
    wrong in the block.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow warns of EXIF that it cannot use.
        with without_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise CdiffError(f"{path} holds {picture.n_frames} pictures; save one, or convert them to NIfTI")  # type: ignore[attr-defined]
            check_depth(picture, data, path)
            if picture.format == "PNG":
                check_png(data, path)
            elif picture.format == "TIFF":
                check_strips(picture, data, path)
            else:
                check_jpeg(picture, data, path)
            yield upright(picture)
    except UnidentifiedImageError:
        raise CdiffError(f"{path} is not a PNG, TIFF or JPEG that can be read; save it again as PNG") from None
    except (OSError, EOFError, SyntaxError, ValueError, TypeError, zlib.error, Image.DecompressionBombError) as error:
        raise CdiffError(f"{path} cannot be read as a picture ({one_line(error)}); save it again as PNG") from None


def read_picture(data: bytes, path: Path, channels: int) -> tuple[NDArray[np.float32], list[str]]:
    """Pixels, float32 [H, W] where one channel is needed, [H, W, 3] where three are; and notes for the user.

    Raises CdiffError for another number of channels, and as `opened` does.
    """
    if channels not in (1, 3):
        raise CdiffError(
            f"{path} is a picture, of one channel or three, but {channels} are needed; give a NIfTI with the channels on its last axis"
        )
    notes = []
    with opened(data, path) as (picture, turned):
        if turned:
            notes.append("the picture was turned as its EXIF orientation says: the maps lie on it as viewers show it")
        if picture.mode in ("LAB", "HSV"):
            raise CdiffError(f"{path} has {picture.mode} colours; save it again as RGB")
        if picture.mode in CONVERTED:
            see_through = picture.mode == "P" and "transparency" in picture.info
            picture = picture.convert("RGBA" if see_through else CONVERTED[picture.mode])
        pixels = np.asarray(picture, dtype=np.float32)
        mode = picture.mode
    if mode in ("LA", "RGBA"):
        if (pixels[..., -1] != pixels[..., -1].max()).any():
            notes.append("the picture's transparency was ignored")
        pixels = pixels[..., 0] if mode == "LA" else pixels[..., :3]
    if channels == 1 and pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            notes.append("the picture's colours were turned to grey (ITU-R 601 luma): one channel is needed")
            # Not as a matrix product, whose rounding depends on where a pixel lies, and on the machine.
            pixels = 0.299 * pixels[..., 0] + 0.587 * pixels[..., 1] + 0.114 * pixels[..., 2]
        else:
            pixels = pixels[..., 0]
    elif channels == 3 and pixels.ndim == 2:
        notes.append("the grey picture was used for each of the three channels")
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return pixels, notes
