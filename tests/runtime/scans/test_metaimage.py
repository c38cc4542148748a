"""What a MetaImage's header promises its files must hold, by the header alone: ITK is not asked."""

from __future__ import annotations

import zlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.detached import must_be_own, voxel_files
from cdiff.runtime.scans.metaimage import check_metaimage, must_be_whole

VALUES = 4 * 3 * 2


def meta(path: Path, stored: bytes = b"", **fields: Any) -> bytes:
    """A header of 4 x 3 x 2 values of 16 bits, unless `fields` say otherwise, and what follows it."""
    head = {"NDims": 3, "DimSize": "4 3 2", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL", **fields}
    head["ElementDataFile"] = head.pop("ElementDataFile")  # it stands last
    data = "".join(f"{name} = {value}\n" for name, value in head.items()).encode() + stored
    must_be_whole(data, path)
    return data


def raised(fits: bool, message: str = "promises") -> AbstractContextManager[Any]:
    return nullcontext() if fits else pytest.raises(CdiffError, match=message)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 2 * VALUES),
        ({"ElementNumberOfChannels": 3}, 6 * VALUES),
        ({"ElementType": "MET_UCHAR"}, VALUES),
        ({"ElementType": "MET_LONG_LONG"}, 8 * VALUES),
        ({"ElementType": "MET_DOUBLE"}, 8 * VALUES),
        ({"DistanceUnits": "???"}, 2 * VALUES),
    ],
)
def test_voxels_are_as_many_bytes_as_promised(fields: dict[str, Any], size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.mha"
    for held, fits in ((size, True), (size - 1, False), (size + size // 4, False)):
        with raised(fits):
            check_metaimage(meta(path, bytes(held), **fields), path)


def test_values_in_words_take_a_digit_and_a_space_each(tmp_path: Path) -> None:
    """And may take more; whether they are packed is then not asked."""
    path = tmp_path / "x.mha"
    for stored, fits in ((b"7 " * VALUES, True), (b"7 " * VALUES + b"7", True), (b"-1234 " * VALUES, True)):
        for more in ({}, {"CompressedData": "True"}):
            for words in ("False", "0"):
                check_metaimage(meta(path, stored.strip(), BinaryData=words, **more), path)
        with raised(not fits):
            check_metaimage(meta(path, (b"7 " * VALUES)[:-2], BinaryData="False"), path)


def test_of_packed_voxels_as_many_bytes_count_as_the_header_says(tmp_path: Path) -> None:
    """What cannot be packed is longer than what it unpacks to."""
    path, packed = tmp_path / "x.mha", zlib.compress(bytes(range(2 * VALUES)), 0) + bytes(40)
    for length, fits in ((len(packed), True), (len(packed) - 40, True), (len(packed) - 45, False)):
        with raised(fits, "truncated or damaged"):
            check_metaimage(meta(path, packed, CompressedData="True", CompressedDataSize=length), path)
    own = tmp_path / "x.zraw"
    for stored, fits in ((packed, True), (packed[:-45], False)):
        own.write_bytes(stored)
        with raised(fits, "truncated or damaged"):
            check_metaimage(meta(path, CompressedData="True", ElementDataFile=own.name), path)


def test_what_a_header_skips_of_a_file_is_no_voxel(tmp_path: Path) -> None:
    """Below 0 the voxels are the file's end, however long it is."""
    path, own = tmp_path / "x.mhd", tmp_path / "x.raw"
    for skipped, held, fits in (
        (0, 48, True),
        (30, 78, True),
        (30, 77, False),
        (30, 102, False),
        (-1, 48, True),
        (-1, 500, True),
    ):
        own.write_bytes(bytes(held))
        with raised(fits):
            check_metaimage(meta(path, HeaderSize=skipped, ElementDataFile=own.name), path)


@pytest.mark.parametrize(
    ("named", "sizes", "files"),
    [
        ("LIST", "4 3 2 2", 2),
        ("LIST 3", "4 3 2 2", 2),
        ("LIST 2D", "4 3 2 2", 4),
        ("LIST 2", "4 3 2 2", 4),
        ("s%d.raw 1 {} 1", "4 3 2", 2),
        ("s%d.raw 1 {}", "4 3 2", 2),
    ],
)
def test_parts_are_as_many_files_as_the_axes_say(named: str, sizes: str, files: int, tmp_path: Path) -> None:
    path = tmp_path / "x.mhd"
    voxels = 2 * VALUES * (1 + (sizes.count(" ") > 2))
    for count in (files - 1, files, files + 1):
        names = [f"s{k + 1}.raw" for k in range(count)]
        for name in names:
            (tmp_path / name).write_bytes(bytes(voxels // files))
        lines = "\n".join(names).encode() if named.startswith("LIST") else b""
        data = meta(path, lines, NDims=len(sizes.split()), DimSize=sizes, ElementDataFile=named.format(count))
        with raised(count == files, "files for its voxels, but its sizes need"):
            check_metaimage(data, path)


def test_more_numbers_than_axes_are_refused(tmp_path: Path) -> None:
    for name, words in (
        ("ElementSpacing", "1 1 1 1"),
        ("ElementSpacing", "1 1"),
        ("TransformMatrix", "1 0 0 0 1 0 0 0 1 0"),
    ):
        with pytest.raises(CdiffError, match=f"its header: {name} = "):
            meta(tmp_path / "x.mha", **{name: words})


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("s%02d.raw 1 4 1", ["01", "02", "03", "04"]),
        ("s%d.raw 1 7 3", ["1", "4", "7"]),
        ("s%d.raw 1 8 3", ["1", "4", "7"]),
        ("s%d.raw 3 1 -1", ["3", "2", "1"]),
        ("s%d.raw 0 2", ["0", "1", "2"]),
        ("s%d.raw 1", None),
        ("s%d.raw 1 4 0", None),
    ],
)
def test_a_pattern_names_the_files_from_its_first_number_to_its_last(
    pattern: str, numbers: list[str] | None, tmp_path: Path
) -> None:
    if numbers is None:
        with pytest.raises(CdiffError, match="but such a name needs a place for one number"):
            voxel_files(pattern, [], tmp_path / "x.mhd")
        return
    assert voxel_files(pattern, [], tmp_path / "x.mhd") == [tmp_path / f"s{number}.raw" for number in numbers]


def test_a_folder_whose_name_begins_alike_is_another(tmp_path: Path) -> None:
    for name in ("data", "data2", "data/below"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.raw").touch()
    must_be_own([tmp_path / "data/x.raw", tmp_path / "data/below/x.raw"], tmp_path / "data/x.mhd")
    with pytest.raises(CdiffError, match="outside its own folder"):
        must_be_own([tmp_path / "data/../data2/x.raw"], tmp_path / "data/x.mhd")
