"""NRRD and MetaImage files that cannot be read faithfully, each refused in one line of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.scan import read_scan
from tests.runtime.scans.test_itk import edited, image, made, voxels, written


def cut(path: Path, end: int = -50) -> Path:
    path.write_bytes(path.read_bytes()[:end])
    return path


def bad_lost(folder: Path) -> Path:
    path = made(folder, "mhd")
    (folder / "x.raw").unlink()
    return path


def bad_text(folder: Path) -> Path:
    (folder / "x.nrrd").write_text("this is no scan" * 100)
    return folder / "x.nrrd"


def bad_nan(folder: Path) -> Path:
    array = voxels(8, 9, 3).astype(np.float32)
    array[1, 2, 0] = np.nan
    return written(folder / "x.mha", image(array))


def bad_spacing(folder: Path) -> Path:
    path = written(folder / "x.mha", image(voxels(8, 9, 3)))
    return edited(path, b"ElementSpacing = 1 1 1", b"ElementSpacing = 0 1 1")


def bad_unit(folder: Path) -> Path:
    return edited(made(folder, "nrrd"), b"kinds:", b'space units: "cm" "cm" "cm"\nkinds:')


def bad_complex(folder: Path) -> Path:
    parts = [sitk.Cast(image(voxels(8, 9, 3)), sitk.sitkFloat32)] * 2
    return written(folder / "x.nrrd", sitk.RealAndImaginaryToComplex(*parts))


def bad_packed(folder: Path) -> Path:
    """ITK says so on the terminal and returns what came of it."""
    path = written(folder / "x.mha", image(voxels(8, 9, 3)), packed=True)
    data = bytearray(path.read_bytes())
    data[-60] ^= 0xFF
    path.write_bytes(data)
    return path


def bad_length(folder: Path) -> Path:
    path = written(folder / "x.mha", image(voxels(8, 9, 3)), packed=True)
    path.write_bytes(re.sub(rb"CompressedDataSize = \d+\n", b"", path.read_bytes()))
    return path


def bad_file(folder: Path) -> Path:
    path = made(folder, "mhd")
    cut(folder / "x.raw", -2)
    return path


def bad_list(folder: Path) -> Path:
    path = made(folder, "mhd")
    for n in range(2):
        (folder / f"{n}.raw").write_bytes(bytes(144))
    return edited(path, b"ElementDataFile = x.raw", b"ElementDataFile = LIST\n0.raw\n1.raw")


def bad_pipe(folder: Path) -> Path:
    path = made(folder, "mhd")
    os.mkfifo(folder / "pipe")
    return edited(path, b"ElementDataFile = x.raw", b"ElementDataFile = pipe")


def bad_nrrd_pipe(folder: Path) -> Path:
    path = written(folder / "x.nhdr", image(voxels(8, 9, 3)))
    os.mkfifo(folder / "pipe")
    return edited(path, b"data file: x.raw", b"data file: pipe")


def naming(kind: str, named: bytes) -> Callable[[Path], Path]:
    """A file whose header names its voxels' file otherwise."""

    def bad(folder: Path) -> Path:
        path = made(folder, kind)
        return edited(path, b"x.raw", named)

    return bad


def bad_twice(folder: Path) -> Path:
    """ITK takes the last, which a look at the first would not see."""
    return edited(made(folder, "mhd"), b"NDims", b"Comment = ElementDataFile = x.raw\nNDims")


def bad_axes(folder: Path) -> Path:
    """ITK ends the process over it."""
    path = folder / "x.nrrd"
    path.write_bytes(
        b"NRRD0004\ntype: uint8\ndimension: 16\nsizes: 4 4" + b" 1" * 14 + b"\nencoding: raw\n\n" + bytes(16)
    )
    return path


def bad_long_header(folder: Path) -> Path:
    return edited(made(folder, "nrrd"), b"type:", b"# " + b"x" * 2**20 + b"\ntype:")


def bad_words(folder: Path) -> Path:
    """Of which ITK would look for every one of 4 thousand million numbers."""
    path = edited(made(folder, "mha"), b"BinaryData = True", b"BinaryData = False")
    return edited(path, b"DimSize = 8 9 3", b"DimSize = 1290 1290 1290")


def bad_meta_unit(folder: Path) -> Path:
    return edited(made(folder, "mha"), b"ElementSpacing", b"DistanceUnits = cm\nElementSpacing")


def bad_axis_unit(folder: Path) -> Path:
    path = written(folder / "x.nrrd", image(voxels(8, 9, 3)))
    data = re.sub(
        rb"space directions:.*\nkinds:.*\n", b'spacings: .1 .1 .2\nunits: "cm" "cm" "cm"\n', path.read_bytes()
    )
    path.write_bytes(re.sub(rb"space( origin)?: .*\n", b"", data))
    return path


def bad_path(folder: Path) -> Path:
    deep = folder / ("d" * 200) / ("e" * 200) / ("f" * 200)
    deep.mkdir(parents=True)
    return made(folder, "nrrd").rename(deep / "x.nrrd")


def changed(old: bytes, new: bytes) -> Callable[[Path], Path]:
    """A MetaImage with other words in its header."""
    return lambda folder: edited(written(folder / "x.mha", image(voxels(8, 9, 3))), old, new)


def zeroed(kind: str) -> Callable[[Path], Path]:
    """A packed file that ends in zeros: it unpacks to more than there was, without a sum at the end."""

    def bad(folder: Path) -> Path:
        path = written(folder / f"x.{kind}", image(voxels(8, 9, 3)), packed=True)
        data = path.read_bytes()
        path.write_bytes(data[:-200] + bytes(200))
        return path

    return bad


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "NRRD that ends early": (lambda folder: cut(made(folder, "nrrd")), "is truncated or damaged"),
    "MetaImage that ends early": (lambda folder: cut(made(folder, "mha")), "is truncated or damaged"),
    "packed that ends early": (
        lambda folder: cut(written(folder / "x.nrrd", image(voxels(8, 9, 3)), packed=True)),
        "is truncated or damaged",
    ),
    "no voxels' file": (bad_lost, r"has its voxels in .*x\.raw, which does not exist; copy it too"),
    "packed that is damaged": (bad_packed, r"is truncated or damaged \(Error -3 while decompressing"),
    "packed, and its end zeros": (zeroed("mha"), "holds more than the header of x.mha promises"),
    "packed, its length no number": (
        lambda folder: edited(written(folder / "x.mha", image(voxels(8, 9, 3)), packed=True), b"CompressedDataSize = ", b"CompressedDataSize = 0x"),
        "as CompressedDataSize in its header; it is damaged",
    ),
    "MetaImage of fewer rows than it holds": (changed(b"DimSize = 8 9 3", b"DimSize = 8 8 3"), "holds 432 bytes of voxels where its header promises 384"),
    "the same in a file of its own, detached": (
        lambda folder: edited(made(folder, "mhd"), b"DimSize = 8 9 3", b"DimSize = 8 9 2"), r"x\.raw holds 432 bytes of voxels where its header promises 288",
    ),
    "NRRD of fewer rows than it holds": (
        lambda folder: edited(made(folder, "nrrd"), b"sizes: 8 9 3", b"sizes: 8 8 3"), "holds 432 bytes of voxels where its header promises 384",
    ),
    "MetaImage at no place": (changed(b"Offset = 0 0 0", b"Offset = 0 0 1e999"), "its header: Offset = 0 0 1e999"),
    "MetaImage of axes too few": (changed(b"TransformMatrix = 1 0 0 ", b"TransformMatrix = 1 0 "), "its header: TransformMatrix = 1 0"),
    "NRRD of one line": (lambda folder: edited(made(folder, "nrrd"), b"\ntype", b"\rtype"), "end in a carriage return alone"),
    "packed, its length unknown": (bad_length, "does not say how many bytes its compressed voxels take"),
    "a file that ends early": (bad_file, r"x\.raw holds less than the header of x\.mhd promises \(432 bytes of voxels\)"),
    "fewer files than slices": (bad_list, "names 2 files for its voxels, but its sizes need 3; correct the list"),
    "a pipe": (bad_pipe, "has its voxels in .*pipe, which is not a regular file"),
    "a pipe for NRRD": (bad_nrrd_pipe, "has its voxels in .*pipe, which is not a regular file"),
    "a pattern for C's printf": (naming("nhdr", b"%d%n%s 0 2 1"), "but such a name needs a place for one number"),
    "another one": (naming("mhd", b"%s 0 2 1"), "but such a name needs a place for one number"),
    "a wide one": (naming("nhdr", b"%999999999d 0 2 1"), "but such a name needs a place for one number"),
    "files without end": (naming("mhd", b"%d 1 900000000 1"), "in 900000000 files, but at most 100000 are read"),
    "another folder's file": (naming("nhdr", b"/etc/passwd"), "has its voxels in /etc/passwd, outside its own folder"),
    "the same by another way": (naming("mhd", b"../x.raw"), r"has its voxels in .*\.\./x\.raw, outside its own folder"),
    "a list with another folder's file": (naming("nhdr", b"LIST\nx.raw\n/dev/zero"), "in /dev/zero, outside its own folder"),
    "a name that no file can have": (naming("mhd", b"x" * 5000), "which does not exist"),
    "voxels named twice": (bad_twice, "does not name its voxels exactly once"),
    "MetaImage of axes without end": (changed(b"NDims = 3", b"NDims = 18446744073709551619"), "18446744073709551619 axes of 8 9 3 voxels"),
    "MetaImage without a size": (changed(b"DimSize = 8 9 3\n", b""), "its header: DimSize does not occur exactly once"),
    "MetaImage of two sizes": (changed(b"DimSize = 8 9 3\n", b"DimSize = 8 9 3\n" * 2), "DimSize does not occur exactly once"),
    "MetaImage of a size of zero": (changed(b"DimSize = 8 9 3", b"DimSize = 8 0 3"), "its header: 8 0 3 voxels"),
    "MetaImage of a size too few": (changed(b"DimSize = 8 9 3", b"DimSize = 8 9"), "3 axes of 8 9 voxels"),
    "MetaImage in another order": (
        changed(b"NDims = 3\n", b"Offset = 1 2 3\nNDims = 3\n"), "Offset stands before NDims, which says how long it is",
    ),
    "MetaImage whose last line is cut": (changed(b"= LOCAL\n", b"= LOCAL\0\1"), r"the voxels are in .LOCAL\\x00\\x01"),
    "a NRRD's line without end": (lambda folder: edited(made(folder, "nrrd"), b"endian", b"x" * 2000), "has a line of more than 500 bytes in its header"),
    "a NRRD at a path without end": (bad_path, "has a path of more than 500 bytes; move it"),
    "axes without end": (bad_axes, "has 16 axes where 2-D or 3-D is meant"),
    "a header without end": (bad_long_header, "has a header of more than 1048576 bytes"),
    "fewer numbers in words": (bad_words, "holds less than the header of x.mha promises"),
    "MetaImage in centimetres": (bad_meta_unit, "gives its lengths in cm; save it in millimetres"),
    "centimetres without a space": (bad_axis_unit, "gives its lengths in cm; save it in millimetres"),
    "text": (bad_text, "is not a NRRD or MetaImage file that can be read"),
    "not a number": (bad_nan, r"holds 1 value not finite in float32 \(NaN, infinite or too large; the first at \(1, 2, 0\)\)"),
    "no spacing": (bad_spacing, "spacing"),
    "centimetres": (bad_unit, "gives its lengths in cm; save it in millimetres"),
    "complex numbers": (bad_complex, "real numbers are needed"),
    "too large": (
        changed(b"DimSize = 8 9 3", b"DimSize = 90000 90000 3"),
        "claims 90000 x 90000 x 3 voxels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_in_one_line(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, message = BAD[what]
    with pytest.raises(CdiffError, match=message) as error:
        read_scan(make(tmp_path))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", ""), "ITK says nothing of its own"


@pytest.mark.parametrize("kind", ["nrrd", "nhdr", "mha"])
def test_a_packed_file_that_is_damaged_is_refused_wherever_that_is(kind: str, tmp_path: Path) -> None:
    """By its check sum, at which the libraries do not look where the damage makes the stream longer: they return other voxels."""
    path = written(tmp_path / f"x.{kind}", image(voxels(8, 9, 3) // 300), packed=True)
    file = tmp_path / "x.raw.gz" if kind == "nhdr" else path
    whole, wanted, refused = file.read_bytes(), read_scan(path).slices, 0
    for place in range(len(whole) - 200, len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 + place % 255)]) + whole[place + 1 :])
        try:
            np.testing.assert_array_equal(read_scan(path).slices, wanted)  # some bits of a packed stream say nothing
        except CdiffError:
            refused += 1
    assert refused > 180
