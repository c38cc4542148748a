"""One line for every bad scan, and nothing half-written."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.data.case import Case
from cdiff.runtime.data.partition import count_channels
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.scan import read_scan
from tests.runtime.scan_files import (
    AFFINE,
    DATATYPE,
    DIM,
    MAGIC,
    PIXDIM,
    QFORM_CODE,
    QUATERN_B,
    SCL_SLOPE,
    SFORM_CODE,
    SROW_X,
    SROW_X_OF_TWO,
    VOX_OFFSET,
    nifti,
    patched,
    voxels,
)
from tests.strict import every_warning_is_an_error


def bad_truncated(folder: Path) -> Path:
    path = nifti(folder / "x.nii.gz", voxels(20, 20, 20))
    path.write_bytes(path.read_bytes()[:4000])
    return path


def bad_truncated_plain(folder: Path) -> Path:
    path = nifti(folder / "x.nii", voxels(20, 20, 20))
    path.write_bytes(path.read_bytes()[:-500])
    return path


def bad_flipped_bit(folder: Path) -> Path:
    path = folder / "x.nii.gz"
    raw = nifti(folder / "y.nii", voxels(8, 8, 8)).read_bytes()
    data = bytearray(gzip.compress(raw, compresslevel=0))  # stored: the damage reaches the voxels, only the sum tells
    data[900] ^= 1
    path.write_bytes(data)
    return path


def bad_text(folder: Path) -> Path:
    (folder / "x.nii.gz").write_text("this is no scan" * 100)
    return folder / "x.nii.gz"


def bad_empty(folder: Path) -> Path:
    (folder / "x.nii.gz").write_bytes(b"")
    return folder / "x.nii.gz"


def bad_pointer(folder: Path) -> Path:
    (folder / "x.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    return folder / "x.nii.gz"


def bad_annexed(folder: Path) -> Path:
    (folder / "x.png").write_text("/annex/objects/MD5E-s12345--4d7a2146.png\n")
    return folder / "x.png"


def bad_short(folder: Path) -> Path:
    (folder / "x.nii").write_bytes(nifti(folder / "y.nii", voxels(4, 4, 4)).read_bytes()[:200])
    return folder / "x.nii"


def bad_short_two(folder: Path) -> Path:
    nib.save(nib.Nifti2Image(voxels(4, 4, 4), AFFINE), folder / "y.nii")
    (folder / "x.nii").write_bytes((folder / "y.nii").read_bytes()[:200])
    return folder / "x.nii"


def bad_value(value: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        array = voxels(4, 5, 6).astype(np.float32)
        array[1, 2, 3] = value
        return nifti(folder / "x.nii.gz", array)

    return make


def bad_header(offset: int, fmt: str, *values: float, suffix: str = ".nii.gz") -> Callable[[Path], Path]:
    return lambda folder: patched(nifti(folder / f"x{suffix}", voxels(4, 5, 6)), offset, fmt, *values)


def bad_two(offset: int, fmt: str, *values: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        nib.save(nib.Nifti2Image(voxels(4, 4, 4), AFFINE), folder / "x.nii")
        return patched(folder / "x.nii", offset, fmt, *values)

    return make


def bad_far(folder: Path) -> Path:
    """A few MB that unpack to more than 2 GiB, which nobody should hold in memory to find a handful of voxels behind them."""
    raw = patched(nifti(folder / "y.nii", voxels(4, 5, 6)), VOX_OFFSET, "<f", 2.0**31).read_bytes()
    packer, zeros = zlib.compressobj(1, zlib.DEFLATED, 31), bytes(2**20)
    once = packer.compress(raw) + packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    (folder / "x.nii.gz").write_bytes(once + again * 2048)  # without the sum at the end, which is not reached
    return folder / "x.nii.gz"


def bad_device(folder: Path) -> Path:
    (folder / "x.nii").symlink_to("/dev/zero")
    return folder / "x.nii"


def bad_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "x.nii.gz")
    return folder / "x.nii.gz"


def bad_complex(folder: Path) -> Path:
    return nifti(folder / "x.nii", voxels(4, 4, 4).astype(np.complex64))


def bad_qform(folder: Path) -> Path:
    image = nib.Nifti1Image(voxels(4, 5, 6), AFFINE)
    image.set_qform(AFFINE, code=1)
    nib.save(image, folder / "x.nii")
    return patched(folder / "x.nii", QUATERN_B, "<3f", 2, 2, 2)


def bad_picture(folder: Path) -> Path:
    Image.fromarray(voxels(200, 200).astype(np.uint8)).save(folder / "x.png")
    (folder / "x.png").write_bytes((folder / "x.png").read_bytes()[:5000])
    return folder / "x.png"


def bad_picture_text(folder: Path) -> Path:
    (folder / "x.png").write_text("no picture")
    return folder / "x.png"


def bad_size(folder: Path) -> Path:
    """A TIFF that says where a next picture is, of which there is nothing, as damage to the four bytes behind the first one's tags makes it."""
    Image.fromarray(voxels(9, 8).astype(np.uint8)).save(folder / "x.tif")
    data = bytearray((folder / "x.tif").read_bytes())
    tags = int.from_bytes(data[4:8], "little")
    end = tags + 2 + 12 * int.from_bytes(data[tags : tags + 2], "little")
    data[end : end + 4] = len(data).to_bytes(4, "little")
    (folder / "x.tif").write_bytes(data + bytes(6))
    return folder / "x.tif"


def bad_pages(folder: Path) -> Path:
    pages = [Image.fromarray(voxels(8, 8).astype(np.uint8)) for _ in range(3)]
    pages[0].save(folder / "x.tif", save_all=True, append_images=pages[1:])
    return folder / "x.tif"


def bad_kind(folder: Path) -> Path:
    (folder / "x.bmp").write_bytes(b"BM")
    return folder / "x.bmp"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "x.nii.gz", "does not exist"),
    "a folder": (lambda folder: folder, "is a folder, but holds no DICOM series"),
    "another kind": (bad_kind, "not a kind of file that is read here"),
    "a device": (bad_device, "is a device or a pipe, not a file"),
    "a pipe": (bad_pipe, "is a device or a pipe, not a file"),
    "empty": (bad_empty, "empty"),
    "text": (bad_text, "not a NIfTI file"),
    "in Git LFS": (bad_pointer, "is a placeholder for a file that its repository keeps elsewhere; fetch it with: git lfs pull"),
    "in git-annex": (bad_annexed, "is a placeholder for a file that its repository keeps elsewhere; fetch it with: git annex get ."),
    "short": (bad_short, "not a NIfTI file"),
    "short, of the second kind": (bad_short_two, "truncated"),
    "truncated gzip": (bad_truncated, "truncated"),
    "truncated": (bad_truncated_plain, "truncated"),
    "flipped bit": (bad_flipped_bit, "damaged"),
    "NaN": (bad_value(np.nan), r"1 value not finite in float32 \(NaN, infinite or too large; the first at \(1, 2, 3\)\)"),
    "infinite": (bad_value(np.inf), "NaN, infinite or too large"),
    "complex": (bad_complex, "complex64"),
    "unknown data type": (bad_header(DATATYPE, "<h", 999), "data type 999"),
    "4-D": (lambda folder: nifti(folder / "x.nii.gz", voxels(4, 5, 6, 3)), "4-D"),
    "1-D": (lambda folder: nifti(folder / "x.nii.gz", voxels(40)), "1-D"),
    "zero spacing": (bad_header(PIXDIM + 8, "<f", 0), "spacing 0.7 x 0 x 2.5"),
    "negative spacing": (bad_header(PIXDIM + 12, "<f", -1), "spacing"),
    "NaN spacing": (bad_header(PIXDIM + 4, "<f", np.nan), "spacing"),
    "spacing of an atom": (bad_header(PIXDIM + 4, "<f", 1e-20), "spacing 1e-20 x 0.8 x 2.5 in its header, which no scan has"),
    "spacing of a planet": (bad_header(PIXDIM + 4, "<f", 1e20), "spacing 1e.20 x 0.8 x 2.5 in its header, which no scan has"),
    "an axis of an atom": (bad_two(SROW_X_OF_TWO, "<3d", 1e-300, 0, 0), "singular or non-finite sform"),
    "singular affine": (bad_header(SROW_X, "<12f", *[1, 2, 3, 0] * 3), "singular"),
    "singular but for rounding": (bad_header(SROW_X, "<12f", 0.7, 0.3, 0.39, 0, 0.1, 0.8, 0.51, 0, 0.2, 0.1, 0.12, 0), "singular"),
    "NaN affine": (bad_header(SROW_X, "<f", np.nan), "sform"),
    "impossible quaternion": (bad_qform, "qform"),
    "absurd size": (bad_header(DIM, "<4h", 3, 30000, 30000, 30000), "2\\^31"),
    "lying size": (bad_header(DIM, "<4h", 3, 1000, 1000, 1000), "less than its header promises"),
    "lying size, plain": (bad_header(DIM, "<4h", 3, 4, 5, 7, suffix=".nii"), "truncated|less than"),
    "fewer voxels than it holds": (bad_header(DIM, "<4h", 3, 4, 5, 5), "holds 240 bytes of voxels where its header promises 200"),
    "smaller voxels than it holds": (bad_header(DATATYPE, "<h", 2, suffix=".nii"), "holds 240 bytes of voxels where its header promises 120"),
    "zero size": (bad_header(DIM, "<4h", 3, 4, 0, 6), "no voxel|not a valid"),
    "negative size": (bad_header(DIM, "<4h", 3, 4, -5, 6), "no voxel|not a valid"),
    "voxels from the start": (bad_header(VOX_OFFSET, "<f", 0), "has 0.0 as vox_offset in its header; it is damaged"),
    "voxels within the header": (bad_header(VOX_OFFSET, "<f", 22), "has 22.0 as vox_offset in its header; it is damaged"),
    "voxels before the file": (bad_header(VOX_OFFSET, "<f", -16), "has -16.0 as vox_offset"),
    "voxels at no place": (bad_header(VOX_OFFSET, "<f", np.nan), "has nan as vox_offset"),
    "damaged size of the header": (bad_header(0, "<i", 349), "has 349 as sizeof_hdr"),
    "damaged mark": (bad_header(MAGIC + 3, "B", 7), r"as magic in its header; it is damaged"),
    "damaged mark of NIfTI-2": (bad_two(7, "B", 7), r"as magic in its header; it is damaged"),
    "line ends changed": (bad_two(8, "4B", 10, 26, 10, 0), r"has \[10 26 10  0\] as eol_check in its header; it is damaged"),
    "unknown sform": (bad_header(SFORM_CODE, "<h", 9), "has the sform_code 9, which NIfTI does not know"),
    "unknown qform": (bad_header(QFORM_CODE, "<h", -2), "has the qform_code -2, which NIfTI does not know"),
    "values beyond all numbers": (bad_header(SCL_SLOPE, "<2f", 3e38, 0), "NaN, infinite or too large"),
    "an axis beyond all numbers": (bad_two(SROW_X_OF_TWO, "<3d", 1e300, 0, 0), "singular or non-finite sform"),
    "voxels far away": (bad_header(VOX_OFFSET, "<f", 1e9), "less than its header promises"),
    "voxels far away, and zeros up to there": (bad_far, "less than its header promises"),
    "truncated picture": (bad_picture, "fewer pixels than its header promises"),
    "text for a picture": (bad_picture_text, r"is not a PNG, TIFF or JPEG that can be read; save"),
    "a picture without a width": (bad_size, "cannot be read as a picture"),
    "several pictures": (bad_pages, "3 pictures"),
}  # fmt: skip


def test_a_name_in_another_encoding_gets_one_clear_line(tmp_path: Path) -> None:
    """Neither a JSON report nor a picture can hold what Python makes of such a name."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + "/Müller.nii".encode("latin-1")))
    try:
        os.replace(nifti(tmp_path / "x.nii", voxels(4, 5, 6)), path)
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(CdiffError, match=r"M\\xfcller.nii has a name that is not UTF-8; rename") as caught:
        read_scan(path)
    str(caught.value).encode()
    series = path.with_suffix("")
    series.mkdir()
    (series / "a.dcm").write_bytes(b"x")
    with pytest.raises(CdiffError, match=r"M\\xfcller/a.dcm has a name that is not UTF-8; rename"):
        read_scan(series)


@every_warning_is_an_error
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_scan_gets_one_clear_line(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, said = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(CdiffError, match=said) as caught:
        read_scan(path)
    assert not capfd.readouterr().err, "no library says another line of its own"
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "what to do is said too"
    case = Case("x", path, (nifti(tmp_path / "mask.nii", voxels(2, 2)),))
    assert count_channels([case]) == 1, "reading it for use says what is wrong"


def test_an_image_of_nibabels_whose_voxels_are_at_no_place_gets_one_clear_line(tmp_path: Path) -> None:
    """What nibabel has opened is read, of whatever pair of files."""
    nib.save(nib.Nifti1Pair(voxels(4, 5, 6), AFFINE), tmp_path / "x.hdr")
    patched(tmp_path / "x.hdr", VOX_OFFSET, "<f", 1e30)
    with pytest.raises(CdiffError, match=r"x\.(hdr|img) is truncated or damaged"):
        read_scan(nib.load(tmp_path / "x.hdr"))


@pytest.mark.parametrize(
    ("scan", "channels", "said"),
    [
        (np.zeros((3, 4), complex), 1, "complex128"),
        (np.array(["a"]), 1, "type"),
        (np.zeros((0, 4)), 1, "no voxel"),
        (np.zeros(7), 1, "1-D"),
        (np.full((3, 4), np.nan), 1, "NaN"),
        (np.array([[-3e38, 0], [5, 3e38]]), 1, r"from -3e\+38 to 3e\+38, a range that float32 cannot normalise"),
        (np.zeros((3, 4, 5)), 4, "4 channels"),
        (np.zeros((3, 4)), 3, "3 channels"),
        (np.broadcast_to(np.uint8(0), (2**11, 2**10, 2**11)), 1, "2\\^31"),
        ([[1, 2], [3, 4]], 1, "list"),
        (np.ma.masked_greater(np.arange(6.0).reshape(2, 3), 3), 1, r"masks 2 of its values.*array\.filled"),
    ],
)
def test_a_bad_array_gets_one_clear_line(scan: Any, channels: int, said: str) -> None:
    with pytest.raises(CdiffError, match=said):
        read_scan(scan, channels=channels)
