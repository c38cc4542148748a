"""Reading scans: what comes in whole, what the grid gives back, and one line for every bad input of promise 6."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.cases import find_cases, read_case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.grid import Grid
from cdiff.runtime.scan import parse_slices, read_scan

AFFINE = np.array([[-0.7, 0, 0, 10], [0, 0.8, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])
PIXDIM, DIM, SROW_X, QUATERN_B, DATATYPE, VOX_OFFSET, SCL_SLOPE, XYZT_UNITS = 76, 40, 280, 256, 70, 108, 112, 123
"""Where the fields of a NIfTI-1 header begin, from the format's own definition."""


def voxels(*shape: int) -> Any:
    return np.random.default_rng(1).integers(0, 200, shape).astype(np.int16)


def nifti(path: Path, array: Any, affine: Any = AFFINE, units: str | None = "mm") -> Path:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units(units)
    nib.save(image, path)
    return path


def patched(path: Path, offset: int, fmt: str, *values: float) -> Path:
    """Overwrite part of the header, past every check that a writer would make."""
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    struct.pack_into(fmt, raw, offset, *values)
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


# What comes in


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_is_cut_along_the_axis_and_put_back(tmp_path: Path, axis: int) -> None:
    array = voxels(5, 6, 7)
    scan = read_scan(nifti(tmp_path / "a.nii.gz", array), slice_axis=axis)
    assert scan.slices.dtype == np.float32
    for index in range(array.shape[axis]):
        np.testing.assert_array_equal(scan.slices[index, 0], array.take(index, axis))
    np.testing.assert_array_equal(scan.grid.restore(scan.slices)[..., 0], array)
    assert scan.name == "a"
    assert scan.sha256 == hashlib.sha256((tmp_path / "a.nii.gz").read_bytes()).hexdigest()


@pytest.mark.parametrize(("shape", "slices"), [((5, 6), 1), ((5, 6, 1), 1), ((5, 6, 3, 1), 3)])
def test_the_shape_stays_what_it_is(tmp_path: Path, shape: tuple[int, ...], slices: int) -> None:
    scan = read_scan(nifti(tmp_path / "a.nii", voxels(*shape)))
    assert scan.slices.shape == (slices, 1, 5, 6)
    assert scan.grid.shape == shape


@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 6, 3, 4), (5, 6, 1, 4)])
def test_channels_lie_on_the_last_axis(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = voxels(*shape)
    scan = read_scan(nifti(tmp_path / "a.nii.gz", array), channels=4)
    stack = array[None] if array.ndim == 3 else np.moveaxis(array, 2, 0)
    np.testing.assert_array_equal(scan.slices, np.moveaxis(stack, -1, 1))
    assert scan.grid.shape == shape[:-1]


def test_every_way_of_giving_a_volume_reads_the_same(tmp_path: Path) -> None:
    array = voxels(5, 6, 3)
    path = nifti(tmp_path / "a.nii.gz", array)
    plain = nifti(tmp_path / "b.nii", array)
    double = tmp_path / "c.nii"
    nib.save(nib.Nifti2Image(array, AFFINE), double)
    misnamed = tmp_path / "d.nii"
    misnamed.write_bytes(path.read_bytes())
    given: list[Any] = [str(path), plain, double, misnamed, array, np.asfortranarray(array), nib.load(path)]
    for scan in given:
        np.testing.assert_array_equal(read_scan(scan).slices, read_scan(path).slices)
    assert read_scan(np.asfortranarray(array)).sha256 == read_scan(array).sha256 != read_scan(array + 1).sha256


def test_scaling_and_byte_order_of_the_file_are_applied(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.dtype(">i2"))
    nib.save(nib.Nifti1Image(voxels(2, 3, 4).astype(">i2"), AFFINE, header), tmp_path / "a.nii")
    scan = read_scan(patched(tmp_path / "a.nii", SCL_SLOPE, ">2f", 0.5, -3))
    np.testing.assert_array_equal(scan.grid.restore(scan.slices)[..., 0], voxels(2, 3, 4) * 0.5 - 3)


def test_it_reads_what_training_reads(lidc: Path) -> None:
    case = find_cases(lidc)["test"][0]
    np.testing.assert_array_equal(read_scan(case.image).slices, read_case(case)[0])


def test_pictures(tmp_path: Path) -> None:
    grey = np.arange(30, dtype=np.uint8).reshape(5, 6)
    colours = np.stack([grey, grey * 2, grey * 3], axis=2)
    for name, pixels in (
        ("grey", grey),
        ("deep", grey.astype(np.uint16) * 1000),
        ("same", np.dstack([grey] * 3)),
        ("rgb", colours),
    ):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    Image.fromarray(np.dstack([colours, 255 - grey])).save(tmp_path / "alpha.png")

    np.testing.assert_array_equal(read_scan(tmp_path / "grey.png").slices[0, 0], grey)
    np.testing.assert_array_equal(read_scan(tmp_path / "deep.png").slices[0, 0], grey * 1000.0)
    np.testing.assert_array_equal(read_scan(tmp_path / "same.png").slices[0, 0], grey)
    np.testing.assert_array_equal(read_scan(tmp_path / "rgb.png", channels=3).slices[0], np.moveaxis(colours, 2, 0))
    assert read_scan(tmp_path / "grey.png", channels=3).slices.shape == (1, 3, 5, 6)
    turned = read_scan(tmp_path / "rgb.png")
    assert any("grey" in note for note in turned.warnings)
    np.testing.assert_allclose(turned.slices[0, 0], np.asarray(Image.open(tmp_path / "rgb.png").convert("L")), atol=1)
    assert any("transparency" in note for note in read_scan(tmp_path / "alpha.png", channels=3).warnings)
    assert turned.grid.spacing is None


def test_slices_are_counted_from_zero_and_the_end_is_left_out() -> None:
    assert [parse_slices(s, 9) for s in (None, "2:5", ":5", "2:", (2, 5), slice(2, None), range(2, 5))] == [
        range(9), range(2, 5), range(5), range(2, 9), range(2, 5), range(2, 9), range(2, 5),
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", ["5", "a:b", "5:5", "4:2", "0:10", "-3:4", "", slice(0, 8, 2), (3, 3)])
def test_slices_that_are_not_there_are_refused(wrong: Any) -> None:
    with pytest.raises(CdiffError, match="0 <= A < B <= 9"):
        parse_slices(wrong, 9)


# What the header says of space


def test_spacing_in_millimetres_whatever_the_unit(tmp_path: Path) -> None:
    for unit, scale in (("mm", 1.0), ("micron", 0.001), ("meter", 1000.0)):
        grid = read_scan(nifti(tmp_path / "a.nii", voxels(3, 4, 5), units=unit)).grid
        np.testing.assert_allclose(grid.spacing, np.array([0.7, 0.8, 2.5]) * scale, rtol=1e-6)
        assert grid.voxel_ml == pytest.approx(0.7 * 0.8 * 2.5 / 1000 * scale**3)


def test_a_qform_without_its_factor_is_read(tmp_path: Path) -> None:
    """NIfTI's pixdim[0] should be 1 or -1; the standard takes a 0 there for 1, and so does every viewer."""
    image = nib.Nifti1Image(voxels(4, 5, 6), AFFINE)
    image.set_sform(None, code=0)
    image.set_qform(AFFINE, code=1)
    nib.save(image, tmp_path / "x.nii")
    grid = read_scan(patched(tmp_path / "x.nii", PIXDIM, "<f", 0)).grid
    written = grid.image(np.zeros(grid.shape, np.uint8), "mask")
    np.testing.assert_allclose(written.header.get_qform(), nib.load(tmp_path / "x.nii").affine)


def test_a_leaning_voxel_is_smaller_than_its_edges_multiplied(tmp_path: Path) -> None:
    """A tilted gantry moves each slice along the one before it: base area times distance of the slices, as of any prism."""
    affine = np.array([[0.7, 0, 0, 0], [0, 0.7, -1.2, 0], [0, 0, 2.2, 0], [0, 0, 0, 1.0]])
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    for place in (
        affine,
        affine @ np.diag([1, -1, 1, 1]),
        np.block([[turn @ affine[:3, :3], np.zeros((3, 1))], [affine[3]]]),
    ):
        tilted = read_scan(nifti(tmp_path / "a.nii", voxels(3, 4, 5), place))
        assert tilted.grid.voxel_ml == pytest.approx(0.7 * 0.7 * 2.2 / 1000)
        assert "12.2% smaller" in " ".join(tilted.warnings)
    oblique = read_scan(
        nifti(tmp_path / "a.nii", voxels(3, 4, 5), np.block([[turn @ AFFINE[:3, :3], np.zeros((3, 1))], [affine[3]]]))
    )
    assert oblique.grid.voxel_ml == pytest.approx(0.7 * 0.8 * 2.5 / 1000)
    assert not oblique.warnings
    flat = read_scan(
        nifti(tmp_path / "a.nii", voxels(3, 4), np.array([[1, 0.6, 0, 0], [0, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    )
    assert flat.grid.voxel_mm == pytest.approx(0.8)


def test_doubtful_spacing_is_said(tmp_path: Path) -> None:
    def note(scan: Any) -> str:
        return " ".join(read_scan(scan).warnings)

    assert note(nifti(tmp_path / "a.nii", voxels(3, 4, 5))) == ""
    assert "placeholder" in note(nifti(tmp_path / "a.nii", voxels(3, 4, 5), np.eye(4)))
    assert "no unit" in note(nifti(tmp_path / "a.nii", voxels(3, 4, 5), units=None))
    assert "no unit" in note(patched(nifti(tmp_path / "a.nii", voxels(3, 4, 5)), XYZT_UNITS, "<B", 7))
    assert "no spacing" in note(voxels(3, 4, 5))
    assert "disagree" in note(patched(nifti(tmp_path / "a.nii", voxels(3, 4, 5)), PIXDIM + 4, "<f", 1.4))
    both = note(patched(nifti(tmp_path / "a.nii", voxels(3, 4, 5), units=None), PIXDIM + 4, "<f", 1.4))
    assert "no unit" in both
    assert "disagree" in both, "one doubt does not hide another"


@pytest.mark.parametrize("codes", ["LAS", "RAS", "LPS", "SRA", "PIR", "ASL"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pictures_follow_the_radiological_convention(codes: str, axis: int) -> None:
    """A volume whose values are the patient's own coordinates: they must run the right way in the picture."""
    towards = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine, shape = np.zeros((4, 4)), (4, 5, 6)
    affine[3, 3] = 1
    for column, code in enumerate(codes):
        row, sign = towards[code]
        affine[row, column] = sign * 1.5
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_sform(affine, code=1)
    grid = Grid(shape, axis, header)
    places = nib.affines.apply_affine(
        affine, np.moveaxis(np.indices(shape), 0, -1)
    )  # [*shape, 3]: x to R, y to A, z to S
    right, front, up = (grid.view(grid.cut(places[..., [k]])[0, 0]) for k in range(3))

    def falls(picture: Any, along: int) -> bool:
        return bool((np.diff(picture, axis=along) < 0).all())

    across, down, letters = {
        "axial": (right, front, "RLAP"), "coronal": (right, up, "RLSI"), "sagittal": (front, up, "APSI"),
    }[grid.view.note.split(",")[0]]  # fmt: skip
    assert falls(across, 1)
    assert falls(down, 0)
    assert "".join(grid.view.edges) == letters


def test_a_picture_without_orientation_is_shown_as_stored() -> None:
    image = voxels(3, 4)
    np.testing.assert_array_equal(read_scan(image).grid.view(image), image)
    assert read_scan(image).grid.view.edges == ("", "", "", "")


# What is refused


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


def bad_short(folder: Path) -> Path:
    (folder / "x.nii").write_bytes(nifti(folder / "y.nii", voxels(4, 4, 4)).read_bytes()[:200])
    return folder / "x.nii"


def bad_value(value: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        array = voxels(4, 5, 6).astype(np.float32)
        array[1, 2, 3] = value
        return nifti(folder / "x.nii.gz", array)

    return make


def bad_header(offset: int, fmt: str, *values: float, suffix: str = ".nii.gz") -> Callable[[Path], Path]:
    return lambda folder: patched(nifti(folder / f"x{suffix}", voxels(4, 5, 6)), offset, fmt, *values)


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


def bad_pages(folder: Path) -> Path:
    pages = [Image.fromarray(voxels(8, 8).astype(np.uint8)) for _ in range(3)]
    pages[0].save(folder / "x.tif", save_all=True, append_images=pages[1:])
    return folder / "x.tif"


def bad_kind(folder: Path) -> Path:
    (folder / "x.dcm").write_bytes(b"DICM")
    return folder / "x.dcm"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "x.nii.gz", "does not exist"),
    "a folder": (lambda folder: folder, "not a kind of file"),
    "another kind": (bad_kind, "dcm2niix"),
    "a device": (bad_device, "no file but a device"),
    "a pipe": (bad_pipe, "no file but a device"),
    "empty": (bad_empty, "empty"),
    "text": (bad_text, "not a NIfTI file"),
    "short": (bad_short, "not a NIfTI file"),
    "truncated gzip": (bad_truncated, "truncated"),
    "truncated": (bad_truncated_plain, "truncated"),
    "flipped bit": (bad_flipped_bit, "damaged"),
    "NaN": (bad_value(np.nan), r"NaN or infinite values \(the first at \(1, 2, 3\)\)"),
    "infinite": (bad_value(np.inf), "NaN or infinite"),
    "complex": (bad_complex, "complex64"),
    "unknown data type": (bad_header(DATATYPE, "<h", 999), "data type 999"),
    "4-D": (lambda folder: nifti(folder / "x.nii.gz", voxels(4, 5, 6, 3)), "4-D"),
    "1-D": (lambda folder: nifti(folder / "x.nii.gz", voxels(40)), "1-D"),
    "zero spacing": (bad_header(PIXDIM + 8, "<f", 0), "spacing 0.7 x 0 x 2.5"),
    "negative spacing": (bad_header(PIXDIM + 12, "<f", -1), "spacing"),
    "NaN spacing": (bad_header(PIXDIM + 4, "<f", np.nan), "spacing"),
    "singular affine": (bad_header(SROW_X, "<12f", *[1, 2, 3, 0] * 3), "singular"),
    "NaN affine": (bad_header(SROW_X, "<f", np.nan), "sform"),
    "impossible quaternion": (bad_qform, "qform"),
    "absurd size": (bad_header(DIM, "<4h", 3, 30000, 30000, 30000), "2\\^31"),
    "lying size": (bad_header(DIM, "<4h", 3, 1000, 1000, 1000), "less than its header promises"),
    "lying size, plain": (bad_header(DIM, "<4h", 3, 4, 5, 7, suffix=".nii"), "truncated|less than"),
    "zero size": (bad_header(DIM, "<4h", 3, 4, 0, 6), "no voxel|not a valid"),
    "negative size": (bad_header(DIM, "<4h", 3, 4, -5, 6), "no voxel|not a valid"),
    "voxels far away": (bad_header(VOX_OFFSET, "<f", 1e9), "less than its header promises"),
    "voxels far away, and zeros up to there": (bad_far, "less than its header promises"),
    "truncated picture": (bad_picture, "picture"),
    "text for a picture": (bad_picture_text, r"is not a picture that can be read; save"),
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


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_scan_gets_one_clear_line(tmp_path: Path, kind: str) -> None:
    make, said = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(CdiffError, match=said) as caught:
        read_scan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "what to do is said too"


@pytest.mark.parametrize(
    ("scan", "channels", "said"),
    [
        (np.zeros((3, 4), complex), 1, "complex128"),
        (np.array(["a"]), 1, "type"),
        (np.zeros((0, 4)), 1, "no voxel"),
        (np.zeros(7), 1, "1-D"),
        (np.full((3, 4), np.nan), 1, "NaN"),
        (np.zeros((3, 4, 5)), 4, "4 channels"),
        (np.zeros((3, 4)), 3, "3 channels"),
        (np.broadcast_to(np.uint8(0), (2**11, 2**10, 2**11)), 1, "2\\^31"),
        ([[1, 2], [3, 4]], 1, "list"),
    ],
)
def test_a_bad_array_gets_one_clear_line(scan: Any, channels: int, said: str) -> None:
    with pytest.raises(CdiffError, match=said):
        read_scan(scan, channels=channels)


def test_a_constant_image_is_read_and_said() -> None:
    assert any("same value" in note for note in read_scan(np.ones((4, 5))).warnings)
