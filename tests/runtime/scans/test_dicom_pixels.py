"""DICOM files with other pixels than their headers promise, and what of them is lost, sheared or scaled wrongly without a word otherwise."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.dicom_pixels import _size, must_hold_pixels
from cdiff.runtime.scans.scan import read_scan
from tests.runtime.dicom_files import orthogonal, write_multiframe, write_series
from tests.runtime.scan_files import restored

pytest.importorskip("dcm2niix")
COLUMNS, ROWS, SLICES = 24, 20, 4
VOXELS = np.random.default_rng(3).integers(-1000, 1500, (COLUMNS, ROWS, SLICES)).astype(np.int16)
FIRST, LAST = "IM0000", "IM0021"


def written(folder: Path, change: Callable[[int, Any], None] | None = None) -> Path:
    return write_series(folder, VOXELS, orthogonal(), change=change)


def packed(syntax: Any, **header: Any) -> Callable[[int, Any], None]:
    """Compress each file, and then say something else of it."""

    def change(_: int, file: Any) -> None:
        if syntax == JPEG2000Lossless:
            stream = io.BytesIO()
            stored = file.pixel_array.astype(np.uint16)
            Image.fromarray(stored).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
            file.PixelRepresentation, file.PixelData = 0, encapsulate([stream.getvalue()])
            file["PixelData"].VR, file["PixelData"].is_undefined_length = "OB", True
            file.file_meta.TransferSyntaxUID = JPEG2000Lossless
        else:
            file.compress(syntax, generate_instance_uid=False)
        for keyword, value in header.items():
            setattr(file, keyword, value)

    return change


def said(which: Callable[[int], bool], **header: Any) -> Callable[[int, Any], None]:
    def change(k: int, file: Any) -> None:
        for keyword, value in header.items() if which(k) else ():
            if value is None:
                del file[keyword]
            else:
                setattr(file, keyword, value)

    return change


def all_of(_: int) -> bool:
    return True


def only_the_first(k: int) -> bool:
    return k == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Each pixel would lie beside its place, more so in each row.
        (said(all_of, Columns=COLUMNS - 1), "holds 960 bytes of pixels where its header promises 920"),
        (said(all_of, Rows=ROWS - 1), "holds 960 bytes of pixels where its header promises 912"),
        (said(all_of, BitsAllocated=12, BitsStored=12), "holds 960 bytes of pixels where its header promises 720"),
        # dcm2niix leaves such a file out, and the volume is one slice shorter.
        (said(only_the_first, NumberOfFrames=2), "IM0000 holds 960 bytes of pixels where its header promises 1920"),
        (said(only_the_first, BitsStored=12), "its images are stored in different ways"),
        (said(only_the_first, PixelRepresentation=0), "its images are stored in different ways"),
        (said(all_of, RescaleSlope="0"), "IM0000 scales its values by 0 and -1000"),
        (said(only_the_first, RescaleSlope="nan"), "IM0000 scales its values by nan and -1000"),
        (said(only_the_first, RescaleIntercept=None), "its images are scaled in part"),
    ],
)
def test_a_header_that_contradicts_its_pixels_is_refused(
    change: Callable[[int, Any], None], message: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(action="ignore"):  # pydicom warns of what is written here
        folder = written(tmp_path / "x", change)
    with pytest.raises(CdiffError, match=message):
        read_scan(folder)


def of_12_bits(_: int, file: Any) -> None:
    """Unsigned, as scanners of other makes store it."""
    stored = np.clip(np.frombuffer(file.PixelData, np.int16), 0, 4095)
    file.PixelRepresentation, file.BitsStored, file.HighBit, file.PixelData = 0, 12, 11, stored.tobytes()


def test_images_that_each_have_their_own_scale_or_bits_are_read(tmp_path: Path) -> None:
    """As those of PET have, and as unsigned values may be stored: in as few bits as an image's largest takes."""

    def own(k: int, file: Any) -> None:
        of_12_bits(k, file)
        file.RescaleSlope, file.RescaleIntercept = str(1 + k / 4), str(10 * k)
        file.BitsStored, file.HighBit = 12 + k, 11 + k

    scan = read_scan(written(tmp_path / "x", own))
    wanted = np.clip(VOXELS + 1000, 0, 4095) * (1 + np.arange(SLICES) / 4) + 10 * np.arange(SLICES)
    found = restored(scan.grid, scan.slices)
    assert [one.sum() for one in np.moveaxis(found, 2, 0)] == wanted.sum(axis=(0, 1)).tolist()


def test_bytes_among_images_of_16_bits_are_refused(tmp_path: Path) -> None:
    def one_of_bytes(k: int, file: Any) -> None:
        of_12_bits(k, file)
        if k == 1:
            file.BitsAllocated, file.BitsStored, file.HighBit = 8, 8, 7
            file.PixelData = bytes(ROWS * COLUMNS)

    with pytest.raises(CdiffError, match="its images are stored in different ways"):
        read_scan(written(tmp_path / "x", one_of_bytes))


def test_a_slope_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "x")
    data = (folder / FIRST).read_bytes()
    at = data.index(b"\x28\x00\x53\x10DS") + 8
    (folder / FIRST).write_bytes(data[:at] + b"x" + data[at + 1 :])
    with pytest.raises(CdiffError, match=r"IM0000 scales its values by x\.0 and -1000"):
        read_scan(folder)


@pytest.mark.parametrize("own", [True, False])
def test_a_frame_that_is_scaled_by_what_is_no_number_is_refused(own: bool, tmp_path: Path) -> None:
    """In a group of its own, or in that of all frames."""
    folder = write_multiframe(tmp_path / "x", VOXELS, orthogonal())
    file = pydicom.dcmread(folder / FIRST)
    (group,) = file.SharedFunctionalGroupsSequence
    if own:
        values = pydicom.Dataset()
        values.RescaleIntercept, values.RescaleSlope, values.RescaleType = -1000, 1, "HU"
        group = file.PerFrameFunctionalGroupsSequence[2]
        group.PixelValueTransformationSequence = [values]
    group.PixelValueTransformationSequence[0].RescaleSlope = 0
    file.save_as(folder / FIRST)
    with pytest.raises(CdiffError, match=r"IM0000 scales its values by 0\.0 and -1000\.0"):
        read_scan(folder)


def test_frames_of_which_some_are_scaled_are_refused(tmp_path: Path) -> None:
    folder = write_multiframe(tmp_path / "x", VOXELS, orthogonal())
    file = pydicom.dcmread(folder / FIRST)
    values = file.SharedFunctionalGroupsSequence[0].pop("PixelValueTransformationSequence")
    file.PerFrameFunctionalGroupsSequence[0].add(values)
    file.save_as(folder / FIRST)
    with pytest.raises(CdiffError, match="its images are scaled in part"):
        read_scan(folder)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize(
    "header", [{"Rows": ROWS + 1}, {"Rows": ROWS - 1}, {"Columns": COLUMNS + 1}, {"NumberOfFrames": 2}]
)
def test_compressed_images_of_another_size_are_refused(syntax: Any, header: dict[str, int], tmp_path: Path) -> None:
    folder = written(tmp_path / "x", packed(syntax, **header))
    with pytest.raises(CdiffError, match=r"IM0000 does not hold \d whole compressed images? of"):
        read_scan(folder)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_whole_compressed_images_are_read(syntax: Any, tmp_path: Path) -> None:
    plain = read_scan(written(tmp_path / "plain"))
    assert (read_scan(written(tmp_path / "packed", packed(syntax))).slices == plain.slices).all()


def rle(*segments: bytes, first: int = 64) -> bytes:
    """A stream of segments (PS3.5, G.5), the first of which is said to begin at a byte."""
    starts = [first]
    for segment in segments[:-1]:
        starts.append(max(starts[-1], 64) + len(segment))
    return struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(starts))) + b"".join(segments)


def unpacked(count: int) -> bytes:
    """A segment of so many bytes as they are, 120 at a time."""
    return (b"\x77" + bytes(range(1, 121))) * (count // 120) + (
        bytes([count % 120 - 1]) + b"\x01" * (count % 120) if count % 120 else b""
    )


ROW = bytes([257 - COLUMNS, 5])
"""A byte for each pixel of a row, as a run of one value."""


@pytest.mark.parametrize(
    ("stream", "whole"),
    [
        (rle(unpacked(480), unpacked(480)), True),
        (rle(unpacked(480), ROW * ROWS), True),
        (rle(ROW * 3 + b"\x80" + ROW * 17, ROW * ROWS + b"\0"), True),  # a byte that stands for none; one of padding
        (rle(ROW * 20, ROW * 19), False),
        (rle(ROW * 19, ROW * 20), False),
        (rle(ROW * 20, ROW * 21), False),
        (rle(ROW * 20, ROW * 19 + bytes([256 - COLUMNS, 5])), False),  # its last run is a byte too long
        (rle(ROW * 20, ROW * 19 + b"\x17" + bytes(23)), False),  # ends a byte before its last run does
        (rle(ROW * 20), False),
        (rle(ROW * 20, ROW * 20, ROW * 20), False),
        (rle(unpacked(478), ROW * 20, first=60), False),  # its first two bytes are the header's
    ],
)
def test_every_segment_of_an_rle_image_is_whole(stream: bytes, whole: bool, tmp_path: Path) -> None:
    def changed(_: int, file: Any) -> None:
        file.PixelData, file.file_meta.TransferSyntaxUID = encapsulate([stream]), RLELossless
        file["PixelData"].VR, file["PixelData"].is_undefined_length = "OB", True

    file = written(tmp_path / "x", changed) / FIRST
    header = pydicom.dcmread(file, stop_before_pixels=True)
    with nullcontext() if whole else pytest.raises(CdiffError, match="does not hold 1 whole compressed image"):
        must_hold_pixels(file, header, file.read_bytes())


@pytest.mark.parametrize(("depth", "bits"), [(7, 8), (8, 16), (15, 16), (0x80 | 11, 16), (0x80 | 7, 8)])
def test_a_jpeg_2000_image_is_as_large_as_its_grid_beside_the_offset(depth: int, bits: int) -> None:
    """The highest bit of the depth is the sign (ISO 15444-1, A.5.1)."""
    size = struct.pack(">2H8IHB", 41, 0, 30, 50, 6, 10, 24, 40, 0, 0, 1, depth)
    assert _size(b"\xff\x4f\xff\x51" + size + b"\xff\xd9") == (40, 24, bits)


def test_a_jpegs_tables_before_its_frame_are_no_frame() -> None:
    tables = b"".join(bytes([0xFF, kind, 0, 7, 1, 2, 3, 4, 5]) for kind in (0xC4, 0xC8, 0xCC, 0xDB))
    frame = b"\xff\xc3" + struct.pack(">HBHHB", 8, 12, 40, 24, 0)
    assert _size(b"\xff\xd8" + tables + frame + b"\xff\xd9") == (40, 24, 16)
    with pytest.raises(ValueError):  # noqa: PT011  # its beginning is another's
        _size(b"\xff\x4f" + tables + frame + b"\xff\xd9")


def test_pixels_that_a_writer_padded_are_read(tmp_path: Path) -> None:
    def pad(_: int, file: Any) -> None:
        file.PixelData += bytes(16)

    plain = read_scan(written(tmp_path / "plain"))
    with warnings.catch_warnings(action="ignore"):  # pydicom warns of what is written here
        folder = written(tmp_path / "padded", pad)
    assert (read_scan(folder).slices == plain.slices).all()


def test_frames_that_end_early_are_refused(tmp_path: Path) -> None:
    """CharLS leaves what is missing 0, and says nothing."""
    folder = write_multiframe(tmp_path / "x", VOXELS, orthogonal())
    file = pydicom.dcmread(folder / FIRST)
    file.compress(JPEGLSLossless, generate_instance_uid=False)
    file.save_as(folder / FIRST)
    data = (folder / FIRST).read_bytes()
    at = data.index(b"\xe0\x7f\x10\x00")
    for part in (4, 2):
        (folder / FIRST).write_bytes(data[: at + (len(data) - at) // part])
        with pytest.raises(CdiffError, match="IM0000 ends before its pixels do"):
            read_scan(folder)


def test_a_file_that_ends_in_a_jpegs_header_does_not_run_for_ever(tmp_path: Path) -> None:
    """dcm2niix asks for more and more memory where a lossless JPEG ends before its Huffman tables do."""
    begins, tables = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01" + bytes(7), b"\xff\xc4\x00\x1d" + bytes(16)
    stream = begins + b"\xff\xc3\x00\x0b\x10" + bytes([0, ROWS, 0, COLUMNS, 1, 1, 0x11, 0]) + tables

    def lossless(_: int, file: Any) -> None:
        file.PixelRepresentation, file.file_meta.TransferSyntaxUID = 0, pydicom.uid.JPEGLosslessSV1
        file.PixelData = encapsulate([stream])
        file["PixelData"].VR, file["PixelData"].is_undefined_length = "OB", True

    folder = written(tmp_path / "whole", lossless)
    with pytest.raises(CdiffError, match="IM0000 does not hold 1 whole compressed image of 20 x 24 pixels"):
        read_scan(folder)
    for file in folder.iterdir():
        data = file.read_bytes()
        file.write_bytes(data[: data.index(stream) + len(stream)])
    with pytest.raises(CdiffError, match="IM0000 ends before its pixels do"):
        read_scan(folder)


@pytest.mark.parametrize("name", [FIRST, LAST])
def test_no_slice_is_lost_wherever_its_file_ends(name: str, tmp_path: Path) -> None:
    """At an end of the volume no gap shows that one is missing."""
    folder = written(tmp_path / "x")
    data = (folder / name).read_bytes()
    # Before the mark, and within what says that it is an image.
    ends = [1, 100, 131, *range(150, 200), *range(330, 400), 800]
    for end in ends:
        (folder / name).write_bytes(data[:end])
        with warnings.catch_warnings(action="error"), pytest.raises(CdiffError, match=name):  # pydicom's remarks too
            read_scan(folder)


def test_a_slice_that_has_lost_its_mark_is_missed(tmp_path: Path) -> None:
    """Of the first or the last nothing else would show that it is not there."""
    series = write_series(tmp_path / "s", np.arange(480, dtype=np.int16).reshape(12, 10, 4), orthogonal())
    read_scan(series)
    (series / "README").write_text("of a scanner")
    (series / "IM0001.txt").write_text("of a scanner")
    (series / "notes").symlink_to("README")
    read_scan(series)
    first = series / "IM0000"
    first.write_bytes(b"\1" * 132 + first.read_bytes()[132:])
    with pytest.raises(
        CdiffError, match=r"IM0000 is named like the images beside it but is not a DICOM file; it is damaged"
    ):
        read_scan(series)
