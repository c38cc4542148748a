"""Reading scans: what comes in whole, and what the grid gives back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.data.cases import find_cases, read_case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.nifti import TOGETHER
from cdiff.runtime.scans.scan import parse_slices, read_scan
from tests.runtime.scan_files import (
    AFFINE,
    PIXDIM,
    SCL_SLOPE,
    XYZT_UNITS,
    nifti,
    patched,
    restored,
    voxels,
)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_is_cut_along_the_axis_and_put_back(tmp_path: Path, axis: int) -> None:
    array = voxels(5, 6, 2 * TOGETHER + 3)  # read in several parts
    scan = read_scan(nifti(tmp_path / "a.nii.gz", array), slice_axis=axis)
    assert scan.slices.dtype == np.float32
    for index in range(array.shape[axis]):
        np.testing.assert_array_equal(scan.slices[index, 0], array.take(index, axis))
    np.testing.assert_array_equal(restored(scan.grid, scan.slices)[..., 0], array)
    assert scan.name == "a"
    assert scan.sha256 == hashlib.sha256((tmp_path / "a.nii.gz").read_bytes()).hexdigest()


@pytest.mark.parametrize(("shape", "slices"), [((5, 6), 1), ((5, 6, 1), 1), ((5, 6, 3, 1), 3), ((5, 6, 3, 1, 1), 3)])
def test_the_shape_stays_what_it_is(tmp_path: Path, shape: tuple[int, ...], slices: int) -> None:
    scan = read_scan(nifti(tmp_path / "a.nii", voxels(*shape)))
    assert scan.slices.shape == (slices, 1, 5, 6)
    assert scan.grid.shape == scan.grid.image(np.zeros(shape, np.uint8), "mask").shape == shape


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
    np.testing.assert_array_equal(restored(scan.grid, scan.slices)[..., 0], voxels(2, 3, 4) * 0.5 - 3)


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


@pytest.mark.parametrize(
    "wrong", ["5", "a:b", "5:5", "4:2", "0:10", "-3:4", "", slice(0, 8, 2), (3, 3), 4, (2.0, 5), (1, 2, 3)]
)
def test_slices_that_are_not_there_are_refused(wrong: Any) -> None:
    with pytest.raises(CdiffError, match="0 <= A < B <= 9"):
        parse_slices(wrong, 9)


# What the header says of space


def test_spacing_in_millimetres_whatever_the_unit(tmp_path: Path) -> None:
    for unit, scale in (("mm", 1.0), ("micron", 0.001), ("meter", 1000.0)):
        grid = read_scan(nifti(tmp_path / "a.nii", voxels(3, 4, 5), units=unit)).grid
        np.testing.assert_allclose(grid.spacing, np.array([0.7, 0.8, 2.5]) * scale, rtol=1e-6)
        assert grid.voxel_ml == pytest.approx(0.7 * 0.8 * 2.5 / 1000 * scale**3)
        assert grid.image(np.zeros(grid.shape, np.uint8), "mask").header.get_xyzt_units()[0] == unit


def test_what_a_caller_does_to_an_image_afterwards_is_none_of_the_scans() -> None:
    image = nib.Nifti1Image(voxels(3, 4, 5).astype(np.float32), AFFINE)
    image.header.set_xyzt_units("mm")
    scan = read_scan(image)
    before = scan.slices.copy(), scan.grid.spacing
    image.get_fdata(dtype=np.float32)[:] = 0
    image.header.set_zooms((9, 9, 9))
    np.testing.assert_array_equal(scan.slices, before[0])
    assert scan.grid.spacing == before[1]
    array = voxels(3, 4, 5).astype(np.float32)
    scan, stored = read_scan(array, slice_axis=0), array.copy()  # whose slices lie one after another already
    array[:] = 0
    np.testing.assert_array_equal(scan.slices[:, 0], stored)


def test_what_a_scan_is_known_by_tells_its_geometry_type_and_shape_too() -> None:
    array = voxels(3, 4, 5).astype(np.int16)
    images = [nib.Nifti1Image(array, affine) for affine in (AFFINE, 2 * AFFINE)]
    arrays = [array, array.reshape(4, 3, 5), array.view(np.uint16)]
    assert len({read_scan(scan).sha256 for scan in (*images, *arrays)}) == 5


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
    slightly = read_scan(nifti(tmp_path / "a.nii", voxels(3, 4, 5), np.diag([0.7, 0.7, 2.2, 1]) + np.eye(4, k=1) * [0, 0, 0.15, 0]))  # fmt: skip
    assert slightly.grid.voxel_ml == pytest.approx(0.7 * 0.7 * 2.2 / 1000)
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
    assert note(nifti(tmp_path / "a.nii", voxels(3, 4, 5), units=None)).startswith("the header names no unit")
    assert "disagree" not in note(nifti(tmp_path / "a.nii", voxels(3, 4, 5), units=None))
    assert "no unit" in note(patched(nifti(tmp_path / "a.nii", voxels(3, 4, 5)), XYZT_UNITS, "<B", 7))
    assert "no spacing" in note(voxels(3, 4, 5))
    assert "disagree" in note(patched(nifti(tmp_path / "a.nii", voxels(3, 4, 5)), PIXDIM + 4, "<f", 0.72))
    both = note(patched(nifti(tmp_path / "a.nii", voxels(3, 4, 5), units=None), PIXDIM + 4, "<f", 1.4))
    assert "no unit" in both
    assert "disagree" in both, "one doubt does not hide another"


def test_in_what_two_grids_differ() -> None:
    def grid(*edges: float, shape: tuple[int, ...] = (4, 5, 6), at: float = 0) -> Grid:
        affine = np.diag([*edges, 1.0])
        affine[0, 3] = at
        return Grid(shape, 2, nib.Nifti1Image(np.zeros(shape, np.uint8), affine).header)

    one, unplaced = grid(0.5, 1.5, 2), nib.Nifti1Header()
    unplaced.set_data_shape((4, 5, 6))
    unplaced.set_zooms((0.5, 1.5, 2))
    bare, unsaid = Grid((4, 5, 6), 2), Grid((4, 5, 6), 2, unplaced)
    ones = grid(1, 1, 1)
    for other in (one, grid(0.5, 1.5, 2, at=0.004), grid(0.5004, 1.5, 2), bare, unsaid, ones, grid(1, 1, 1, at=-40)):
        assert one.differs_from(other) is None
        assert other.differs_from(one, ones_count=True) is None
    assert one.differs_from(grid(0.5, 1.5, 2, shape=(4, 5, 7))) == "have different shapes (4 x 5 x 6 and 4 x 5 x 7)"
    assert one.differs_from(grid(0.5, 1.5, 2.1)) == "have different spacings (0.5 x 1.5 x 2 and 0.5 x 1.5 x 2.1 mm)"
    assert str(one.differs_from(grid(0.503, 1.5, 2))).startswith("have different spacings")
    assert str(one.differs_from(grid(0.5, 1.5, 2, at=0.01))).startswith("have different affines")
    microns = grid(500, 1500, 2000, at=-40000)
    assert microns.header is not None
    microns.header.set_xyzt_units("micron")
    assert microns.differs_from(grid(0.5, 1.5, 2, at=-40)) is None
    # Ones that are meant: both scans lie somewhere.
    here, there = grid(1, 1, 1, at=-40), grid(1, 1, 1, at=-50)
    assert str(here.differs_from(there, ones_count=True)).startswith("have different affines")
    assert here.differs_from(there) is here.differs_from(grid(-1, 1, 1), ones_count=True) is None


@pytest.mark.parametrize("codes", ["LAS", "RAS", "LPS", "SRA", "PIR", "ASL"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pictures_follow_the_radiological_convention(codes: str, axis: int) -> None:
    """A volume whose values are the patient's own coordinates: they must run the right way in the picture."""
    towards = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine, shape, edges = np.zeros((4, 4)), (4, 5, 6), (0.5, 1.5, 2.0)
    affine[3, 3] = 1
    for column, code in enumerate(codes):
        row, sign = towards[code]
        affine[row, column] = sign * edges[column]
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_zooms(edges)
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
    assert grid.view.spacing == (down[0, 0] - down[1, 0], across[0, 0] - across[0, 1])


def test_a_picture_without_orientation_is_shown_as_stored() -> None:
    image = voxels(3, 4)
    np.testing.assert_array_equal(read_scan(image).grid.view(image), image)
    assert read_scan(image).grid.view.edges == ("", "", "", "")
    header = nib.Nifti1Header()
    header.set_data_shape((3, 4, 5))
    header.set_zooms((0.5, 1.5, 2.0))
    assert Grid((3, 4, 5), 1, header).view.spacing == (0.5, 2.0)
    assert Grid((3, 4), None, header).view.spacing == (0.5, 1.5)


def test_a_constant_image_is_read_and_said() -> None:
    assert any("same value" in note for note in read_scan(np.ones((4, 5))).warnings)


def test_a_file_that_is_padded_is_read(tmp_path: Path) -> None:
    """Some copies end in a block's rest; a whole plane more would be another matter."""
    path = nifti(tmp_path / "x.nii", voxels(16, 16, 4))
    wanted = read_scan(path).slices
    path.write_bytes(path.read_bytes() + bytes(16 * 4 * 2 - 1))
    np.testing.assert_array_equal(read_scan(path).slices, wanted)
