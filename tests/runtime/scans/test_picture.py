"""Pictures of 16 bits: grey ones are read to the last bit, colours are refused and never read with 8."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.data.masks import read_mask
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.picture import read_picture
from cdiff.runtime.scans.scan import read_scan

GREY, COLOURS, GREY_ALPHA, COLOURS_ALPHA = 0, 2, 4, 6
"""PNG's colour types."""
CHANNELS = {GREY: 1, COLOURS: 3, GREY_ALPHA: 2, COLOURS_ALPHA: 4}


def pixels(channels: int) -> Any:
    shape = (5, 6) if channels == 1 else (5, 6, channels)
    return np.random.default_rng(0).integers(0, 2**16, shape).astype(np.uint16)


def write_png(path: Path, array: Any, kind: int) -> Path:
    """A PNG of 16 bits as its specification has it; Pillow writes none in colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )
    return path


def write_tiff(path: Path, array: Any, order: str = "<") -> Path:
    """An uncompressed TIFF of 16 bits and one or three channels."""
    channels = 1 if array.ndim == 2 else array.shape[2]
    pixel_data = array.astype(f"{order}u2").tobytes()
    after = 8 + len(pixel_data)  # where the bits of each channel are listed, then the directory
    bits = struct.pack(f"{order}{channels}H", *[16] * channels) if channels > 1 else b""
    SHORT, LONG = 3, 4
    tags = [
        (256, LONG, 1, array.shape[1]), (257, LONG, 1, array.shape[0]),
        (258, SHORT, channels, after if channels > 1 else 16), (259, SHORT, 1, 1), (262, SHORT, 1, 2 if channels > 1 else 1),
        (273, LONG, 1, 8), (277, SHORT, 1, channels), (278, LONG, 1, array.shape[0]), (279, LONG, 1, len(pixel_data)),
    ]  # fmt: skip

    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        head = struct.pack(f"{order}HHI", tag, kind, count)
        short = kind == SHORT and count == 1
        return head + (struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value))

    directory = struct.pack(f"{order}H", len(tags)) + b"".join(entry(*tag) for tag in tags) + bytes(4)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(mark + struct.pack(f"{order}I", after + len(bits)) + pixel_data + bits + directory)
    return path


def write_tags(path: Path, tags: list[tuple[int, int, list[int]]], stored: bytes) -> None:
    """A TIFF of these tags, each with its kind (3: 16 bits, 4: 32) and values; what is stored begins at byte 8."""
    after, lists, entries = 8 + len(stored), b"", b""
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        entries += struct.pack("<HHI", tag, kind, len(values))
        entries += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", after + len(lists))
        lists += packed if len(packed) > 4 else b""
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", after + len(lists)) + stored + lists + directory)


def test_grey_of_16_bits_keeps_every_bit(tmp_path: Path) -> None:
    array = pixels(1)
    Image.fromarray(array).save(tmp_path / "pillow.png")
    Image.fromarray(array).save(tmp_path / "pillow.tif")
    files = [
        tmp_path / "pillow.png", tmp_path / "pillow.tif", write_png(tmp_path / "a.png", array, GREY),
        write_tiff(tmp_path / "little.tif", array), write_tiff(tmp_path / "big.tif", array, ">"),
    ]  # fmt: skip
    for path in files:
        np.testing.assert_array_equal(read_scan(path).slices[0, 0], array, str(path))
        np.testing.assert_array_equal(read_scan(path, channels=3).slices[0, 1], array, str(path))
        np.testing.assert_array_equal(read_mask(path).values, array, str(path))


@pytest.mark.parametrize("kind", [COLOURS, GREY_ALPHA, COLOURS_ALPHA, "little", "big"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colours_of_16_bits_are_refused_in_one_line(tmp_path: Path, kind: Any, channels: int) -> None:
    if isinstance(kind, str):
        path = write_tiff(tmp_path / "a.tif", pixels(3), "<" if kind == "little" else ">")
    else:
        path = write_png(tmp_path / "a.png", pixels(CHANNELS[kind]), kind)
    for read in (lambda: read_scan(path, channels=channels), lambda: read_mask(path)):
        with pytest.raises(CdiffError, match=r"several channels of 16 bits.*save it in 16-bit grey") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_colours_of_8_bits_are_read_as_before(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    for suffix in ("png", "tif"):
        Image.fromarray(array).save(tmp_path / f"a.{suffix}")
        np.testing.assert_array_equal(
            read_scan(tmp_path / f"a.{suffix}", channels=3).slices[0], np.moveaxis(array, 2, 0)
        )


def test_a_colour_is_the_same_grey_wherever_it_lies(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    Image.fromarray(array[:, 5:]).save(tmp_path / "b.png")
    grey, cut = (read_scan(tmp_path / f"{name}.png").slices[0, 0] for name in "ab")
    np.testing.assert_allclose(grey, array.astype(float) @ [0.299, 0.587, 0.114], rtol=1e-6)
    np.testing.assert_array_equal(grey[:, 5:], cut)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_picture_is_turned_as_viewers_show_it(tmp_path: Path, suffix: str) -> None:
    """A camera held upright stores the picture lying and says so; an annotator draws on it as it is shown."""
    stored = np.zeros((16, 24), np.uint8)
    stored[:8] = 255  # its upper half is to the right once it is turned by 6
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=exif)
    scan = read_scan(tmp_path / f"x.{suffix}")
    np.testing.assert_allclose(scan.slices[0, 0], np.rot90(stored, -1), atol=2)
    np.testing.assert_allclose(read_mask(tmp_path / f"x.{suffix}").values, np.rot90(stored, -1), atol=2)
    assert any("EXIF" in warning for warning in scan.warnings)
    Image.fromarray(stored).save(tmp_path / f"y.{suffix}")
    assert not any("EXIF" in warning for warning in read_scan(tmp_path / f"y.{suffix}").warnings)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_the_one_of_the_standard(orientation: int, tmp_path: Path) -> None:
    """Which edges the first row and the first column lie at (EXIF 2.3, 4.6.4, Orientation)."""
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    shown = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.T, 6: np.rot90(stored, -1), 7: stored.T[::-1, ::-1], 8: np.rot90(stored),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("png", "tif"):
        Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=exif)
        np.testing.assert_array_equal(read_mask(tmp_path / f"x.{suffix}").values, shown)


def test_two_pictures_in_one_file_are_refused(tmp_path: Path) -> None:
    two = [Image.fromarray(np.full((4, 6), value, np.uint8)) for value in (0, 1)]
    two[0].save(tmp_path / "x.tif", save_all=True, append_images=two[1:])
    with pytest.raises(CdiffError, match="holds 2 pictures"):
        read_scan(tmp_path / "x.tif")


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "x.jpg", exif=b"Exif\0\0not a directory")
    assert read_scan(tmp_path / "x.jpg").slices.shape == (1, 1, 4, 6)
    cut = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\0\0\0\xff\0\0\0"
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "x.jpg", exif=cut)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's remarks, which are no lines of ours
        assert read_scan(tmp_path / "x.jpg").slices.shape == (1, 1, 4, 6)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("read", [lambda path: read_scan(path), read_mask], ids=["image", "mask"])
def test_a_jpeg_of_fewer_pixels_than_it_promises_is_refused(tmp_path: Path, read: Any, progressive: bool) -> None:
    """libjpeg makes up what is missing; of nothing but one grey a picture as large as it can be is whole."""
    path = tmp_path / "x.jpg"
    Image.fromarray(np.full((800, 1200), 77, np.uint8)).save(path, progressive=progressive, optimize=True)
    read(path)
    data = bytearray(path.read_bytes())
    size = data.index(struct.pack(">HH", 800, 1200))
    data[size + 2 : size + 4] = struct.pack(">H", 65400)
    path.write_bytes(data)
    with pytest.raises(CdiffError, match=r"fewer pixels than its header promises \(65400 x 800\)"):
        read(path)
    blocks = 65400 // 8 * 800 // 8
    path.write_bytes(data.ljust(blocks // 8 - 2, b"\0"))
    with pytest.raises(CdiffError, match="fewer pixels"):  # a block takes a bit at least
        read(path)


@pytest.mark.parametrize("summed", [False, True], ids=["stale sum", "chunk's sum right"])
def test_a_png_whose_pixels_are_damaged_is_refused(tmp_path: Path, summed: bool) -> None:
    """Its check sums, of each chunk and of what it unpacks to, are there to notice it by; Pillow makes a picture of many of these."""
    path = write_png(tmp_path / "x.png", np.tile(pixels(1), (4, 4)) // 4096, GREY)
    whole, wanted, refused = path.read_bytes(), read_scan(path).slices, 0
    first = whole.index(b"IDAT") + 4
    end = first + int.from_bytes(whole[first - 8 : first - 4])
    for place in range(first, end):
        chunk = bytearray(whole[first - 4 : end])
        chunk[place - first + 4] ^= 1 + place % 255
        crc = struct.pack(">I", zlib.crc32(chunk)) if summed else whole[end : end + 4]
        path.write_bytes(whole[: first - 4] + chunk + crc + whole[end + 4 :])
        for read in (lambda: read_scan(path).slices, lambda: read_mask(path).values[None, None]):
            try:
                np.testing.assert_array_equal(read(), wanted)  # a bit of zlib's header says nothing of the pixels
            except CdiffError:
                refused += 1
    assert refused >= 2 * (end - first - 1)


def test_a_png_that_does_not_begin_with_its_header_is_refused(tmp_path: Path) -> None:
    whole = write_png(tmp_path / "x.png", pixels(1), GREY).read_bytes()
    text = b"tEXtx\0y"
    early = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (tmp_path / "x.png").write_bytes(whole[:8] + early + whole[8:])
    with pytest.raises(CdiffError, match="is damaged"):
        read_scan(tmp_path / "x.png")


def test_a_packed_tiff_that_is_damaged_is_refused(tmp_path: Path) -> None:
    """By zlib's check sum, at which libtiff does not look: it unpacks most of these to other pixels."""
    path = tmp_path / "x.tif"
    Image.fromarray(np.tile(pixels(1), (4, 4)) // 4096).save(path, compression="tiff_adobe_deflate")
    assert read_scan(path).slices.max() == 15
    whole = path.read_bytes()
    first, length = (Image.open(path).tag_v2[tag][0] for tag in (273, 279))  # type: ignore[attr-defined]
    for place in range(first, first + length):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 + place % 255)]) + whole[place + 1 :])
        with pytest.raises(CdiffError, match="cannot be read as a picture"):
            read_scan(path)


@pytest.mark.parametrize("tiled", [False, True])
def test_a_packed_tiff_that_is_damaged_at_its_very_end_is_refused(tmp_path: Path, tiled: bool) -> None:
    """Beyond the first MiB, in a strip or a tile."""
    side, packed = 1088, zlib.compress(bytes([7]) * 1088**2)
    tags = [(256, 3, [side]), (257, 3, [side]), (258, 3, [8]), (259, 3, [8]), (262, 3, [1])]
    where = [(322, 3, [side]), (323, 3, [side]), (324, 4, [8]), (325, 4, [len(packed)])]
    tags += where if tiled else [(273, 4, [8]), (278, 3, [side]), (279, 4, [len(packed)])]
    write_tags(tmp_path / "x.tif", tags, packed)
    assert read_scan(tmp_path / "x.tif").slices.min() == 7
    for damaged in (packed[:-1] + bytes([packed[-1] ^ 1]), packed[:-4]):
        write_tags(tmp_path / "x.tif", [*tags[:-1], (tags[-1][0], 4, [len(damaged)])], damaged)
        with pytest.raises(CdiffError, match="cannot be read as a picture"):
            read_scan(tmp_path / "x.tif")


def test_a_tiff_that_does_not_say_what_black_is_is_refused(tmp_path: Path) -> None:
    """Pillow would turn it round, and a dark structure would be a bright one."""
    tags = [(256, 3, [8]), (257, 3, [8]), (258, 3, [8]), (259, 3, [1]), (273, 4, [8]), (278, 3, [8]), (279, 4, [64])]
    write_tags(tmp_path / "x.tif", tags, bytes(range(64)))
    with pytest.raises(CdiffError, match="does not say whether 0 is black or white"):
        read_scan(tmp_path / "x.tif")


@pytest.mark.parametrize(("kind", "bits"), [(np.uint16, 16), (np.float32, 32)])
def test_a_film_whose_0_is_white_is_read_as_viewers_show_it_or_refused(tmp_path: Path, kind: Any, bits: int) -> None:
    """Pillow turns round those of 8 bits, and hands over the others as their own negatives."""
    path, stored = tmp_path / "film.tif", np.arange(64, dtype=np.uint8).reshape(8, 8)

    def write(bits: int, data: bytes) -> None:
        tags = [(256, 3, [8]), (257, 3, [8]), (258, 3, [bits]), (259, 3, [1]), (262, 3, [0]), (273, 4, [8])]
        write_tags(path, [*tags, (278, 3, [8]), (279, 4, [len(data)]), (339, 3, [3 if bits == 32 else 1])], data)

    write(8, stored.tobytes())
    np.testing.assert_array_equal(read_scan(path).slices[0, 0], 255 - stored)
    write(bits, stored.astype(kind).tobytes())
    for read in (read_scan, read_mask):
        with pytest.raises(CdiffError, match="stores white as 0, which is read in pictures of up to 8 bits alone"):
            read(path)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_png_without_its_last_rows_is_refused(tmp_path: Path, mode: str, interlaced: bool) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bits, kind = {"1": (1, 0), "L": (8, 0), "LA": (8, 4), "P": (8, 3), "RGB": (8, 2), "RGBA": (8, 6), "I;16": (16, 0)}[
        mode
    ]
    width, height = 17, 19
    # Adam7, from the drawing of its passes in the specification: in which pass each pixel of an 8 x 8 square is stored.
    square = [int(n) for n in "1646264677777777565656567777777736463646777777775656565677777777"]
    lines = []
    for part in range(1, 8) if interlaced else [0]:
        counts = [sum(not part or square[8 * (y % 8) + x % 8] == part for x in range(width)) for y in range(height)]
        lines += [1 + -(-count * bits * (CHANNELS.get(kind) or 1) // 8) for count in counts if count]
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, int(interlaced))
    palette = chunk(b"PLTE", bytes(768)) if mode == "P" else b""
    for less, reads in ((0, True), (-sum(lines) - 1, None), (1, False)):
        stored = chunk(b"IDAT", zlib.compress(bytes(sum(lines) - less)))
        (tmp_path / "x.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + stored + chunk(b"IEND", b"")
        )
        if reads:
            assert read_scan(tmp_path / "x.png").grid.shape == (height, width)
            continue
        message = "is damaged" if reads is None else r"fewer pixels than its header promises \(17 x 19\)"
        with pytest.raises(CdiffError, match=message):
            read_scan(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["grey", "colours", "planes", "tiles", "broad tiles", "tall tiles"])
def test_a_tiff_without_its_last_strip_is_refused(tmp_path: Path, kind: str) -> None:
    """Its strips or tiles, uncompressed, the last of them left out of the lists of places and lengths."""
    height, width, channels = 24, 16, 1 if "tiles" in kind or kind == "grey" else 3
    planes = 3 if kind == "planes" else 1
    across = {"broad tiles": 3 * width, "tall tiles": width // 2}.get(kind, width)
    down = 16 if kind == "tall tiles" else 8  # what lies beside the picture, or below, is none of it
    count, length = planes * -(-height // down) * -(-width // across), down * across * channels // planes
    stored = bytes([7]) * (count * length)
    for less in (0, 1):
        places = [8 + length * n for n in range(count - less)]
        tags = [
            (256, 3, [width]),
            (257, 3, [height]),
            (258, 3, [8] * channels),
            (259, 3, [1]),
            (262, 3, [1 if channels == 1 else 2]),
        ]
        lists = [
            (273, 4, places),
            (277, 3, [channels]),
            (278, 4, [8]),
            (279, 4, [length] * len(places)),
            (284, 3, [1 + (planes > 1)]),
        ]
        if "tiles" in kind:
            lists = [
                (277, 3, [1]),
                (322, 3, [across]),
                (323, 3, [down]),
                (324, 4, places),
                (325, 4, [length] * len(places)),
            ]
        write_tags(tmp_path / "x.tif", [*tags, *lists], stored)
        if less:
            with pytest.raises(CdiffError, match=r"fewer pixels than its header promises \(16 x 24\)"):
                read_scan(tmp_path / "x.tif")
        else:
            assert read_scan(tmp_path / "x.tif").slices.min() > 0


@pytest.mark.parametrize("palette", [False, True])
def test_transparency_that_was_ignored_is_said_of_a_palette_too(tmp_path: Path, palette: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 4)).astype(np.uint8)
    pixels[..., 3] = 255
    pixels[:4, :, 3] = 0
    picture = Image.fromarray(pixels, "RGBA")
    path = tmp_path / "x.png"
    (picture.quantize(32) if palette else picture).save(path)
    read, notes = read_picture(path.read_bytes(), path, 3)
    assert read.shape == (8, 8, 3)
    assert notes == ["the picture's transparency was ignored"]


def test_grey_beside_transparency_is_grey(tmp_path: Path) -> None:
    stored = np.stack([np.arange(24), np.full(24, 255)], axis=-1).astype(np.uint8).reshape(4, 6, 2)
    Image.fromarray(stored, "LA").save(tmp_path / "x.png")
    for channels in (1, 3):
        found, notes = read_picture((tmp_path / "x.png").read_bytes(), tmp_path / "x.png", channels)
        np.testing.assert_array_equal(found.reshape(4, 6, -1)[..., 0], stored[..., 0])
        assert found.size == 24 * channels
        assert not any("transparency" in note for note in notes)


def test_colours_that_are_no_screens_are_refused(tmp_path: Path) -> None:
    """Read as red, green and blue they would be another picture."""
    path = tmp_path / "x.tif"
    Image.new("LAB", (8, 8)).save(path)
    with pytest.raises(CdiffError, match="has LAB colours; save it again as RGB"):
        read_picture(path.read_bytes(), path, 3)


def test_postscript_is_no_picture_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow by itself would have Ghostscript run the program that such a file is."""
    run = tmp_path / "run"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{run}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it is looked for once
    path = tmp_path / "x.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(CdiffError, match="is not a PNG, TIFF or JPEG that can be read"):
        read_scan(path)
    assert not run.exists()
