"""Where the volume lies that a series becomes: where its headers say, image for image, or it is refused; what the reader is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.dicom import _must_be_one
from cdiff.runtime.scans.dicom_planes import Plane, Planes, frames_of, functional_groups, laid, planes_of, taken_from
from cdiff.runtime.scans.scan import Scan, read_scan
from tests.runtime.dicom_files import converter, moved, orthogonal, upright, write_multiframe, write_series
from tests.runtime.scan_files import restored

AXIAL = np.array([[0.7, 0.0, 0.0, -90.0], [0.0, 0.8, 0.0, -120.0], [0.0, 0.0, 0.625, 40.0]])


def scan_voxels(slices: int = 5) -> Any:
    return np.random.default_rng(8).integers(-1000, 1500, (24, 20, slices)).astype(np.int16)


def furthest(scan: Scan, voxels: Any, lps: Any) -> float:
    """How many mm the voxels (all different) lie from where `lps` has them; the values must be the same."""
    assert scan.grid.header is not None
    affine, stored = scan.grid.header.get_best_affine(), restored(scan.grid, scan.slices)[..., 0]
    assert sorted(stored.ravel()) == sorted(voxels.ravel())
    found, wanted = ({value: ijk for ijk, value in np.ndenumerate(array)} for array in (stored, voxels))
    values = list(wanted)
    here = np.array([found[value] for value in values]) @ affine[:3, :3].T + affine[:3, 3]
    there = np.array([wanted[value] for value in values]) @ lps[:, :3].T + lps[:, 3]
    return float(np.linalg.norm(here * [-1, -1, 1] - there, axis=1).max())


def different(slices: int, columns: int = 6, rows: int = 5) -> Any:
    """[columns, rows, slices] that are all different."""
    count = columns * rows * slices
    return np.random.default_rng(9).permutation(count).reshape(columns, rows, slices).astype(np.int16)


def test_rounded_positions_do_not_add_up(tmp_path: Path) -> None:
    """Slices 0.625 mm apart whose headers say 0.6 and 0.7 in turn: by the first distance alone the last would lie 2.5 mm off and more."""
    voxels = different(100)

    def rounded(k: int, file: FileDataset) -> None:
        file.ImagePositionPatient = [-90, -120, round(40 + 0.625 * k, 1)]

    scan = read_scan(write_series(tmp_path / "a", voxels, AXIAL, change=rounded))
    assert furthest(scan, voxels, AXIAL) < 0.06
    assert scan.grid.spacing == pytest.approx((0.7, 0.8, 0.625), rel=1e-3)
    assert any("slices are taken to be 0.625 mm apart (the mean)" in note for note in scan.warnings)


def test_even_slices_stay_as_dcm2niix_has_them(tmp_path: Path) -> None:
    voxels = different(9)
    scan = read_scan(write_series(tmp_path / "a", voxels, orthogonal()))
    assert furthest(scan, voxels, orthogonal()) < 1e-3
    assert scan.warnings == ()


@pytest.mark.parametrize("sense", [1, -1])
def test_a_series_that_dcm2niix_turns_upright_is_where_it_was(sense: int, tmp_path: Path) -> None:
    voxels = different(4)
    lps = np.array([[0, 0, 2.5 * sense, 10], [0.7, 0, 0, 20], [0, -0.8, 0, 30]], dtype=float)
    scan = read_scan(write_series(tmp_path / "a", voxels, lps, change=lambda _, file: upright(file)))
    assert scan.grid.shape == (4, 6, 5), "it is no longer turned: then this tests nothing"
    assert furthest(scan, voxels, lps) < 1e-3


@pytest.mark.parametrize("order", [None, (3, 0, 4, 1, 2)])
def test_frames_are_images(order: tuple[int, ...] | None, tmp_path: Path) -> None:
    voxels = different(5)
    scan = read_scan(write_multiframe(tmp_path / "a", voxels, orthogonal(), order=order))
    assert furthest(scan, voxels, orthogonal()) < 1e-3


def test_frames_without_indices_go_by_their_number_in_the_stack(tmp_path: Path) -> None:
    voxels = different(5)
    bare = write_multiframe(
        tmp_path / "a", voxels, orthogonal(), change=lambda _, content: content.pop("DimensionIndexValues")
    )
    assert furthest(read_scan(bare), voxels, orthogonal()) < 1e-3


def test_directions_that_a_header_rounds_are_directions(tmp_path: Path) -> None:
    """To three digits: neither quite 1 long nor quite at right angles."""

    def rounded(_: int, file: FileDataset) -> None:
        file.ImageOrientationPatient = [round(float(value), 3) for value in file.ImageOrientationPatient]

    voxels = different(5)
    scan = read_scan(write_series(tmp_path / "a", voxels, orthogonal(), change=rounded))
    assert scan.grid.has_orientation
    assert furthest(scan, voxels, orthogonal()) < 0.02


def test_frames_that_are_numbered_as_they_do_not_lie(tmp_path: Path) -> None:
    """dcm2niix goes by the numbers: a slice would lie where another is."""

    def by_time(number: int, content: Any) -> None:
        content.DimensionIndexValues = [1, content.InStackPositionNumber, number]

    def in_another_order(number: int, content: Any) -> None:
        content.InStackPositionNumber, content.DimensionIndexValues = number, [1, number]

    def all_alike(_: int, content: Any) -> None:
        content.DimensionIndexValues = [1, 1]

    for name, change in (("time", by_time), ("order", in_another_order), ("alike", all_alike)):
        folder = write_multiframe(tmp_path / name, scan_voxels(), orthogonal(), order=(3, 0, 4, 1, 2), change=change)
        with pytest.raises(CdiffError, match="its frames are not numbered in the order in which they lie"):
            read_scan(folder)


def test_a_value_deep_in_a_header_that_is_none(tmp_path: Path) -> None:
    """pydicom reads it when it is asked for, long after the file."""
    for old, new in (
        (b"\x20\x00\x57\x90UL\x04", b"\x20\x00\x57\x90UL\x03"),
        (b"\x20\x00\x57\x90UL", b"\x20\x00\x57\x90KL"),
    ):
        folder = write_multiframe(tmp_path / f"{new[-1]}", scan_voxels(), orthogonal())
        data = (folder / "IM0000").read_bytes()
        assert old in data
        (folder / "IM0000").write_bytes(data.replace(old, new))
        with pytest.raises(CdiffError):
            read_scan(folder)


def test_copies_of_an_image_are_left_out(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a", scan_voxels(), orthogonal())
    alone = read_scan(folder)
    shutil.copy(folder / "IM0014", folder / "IM0014 (1)")
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.slices, alone.slices)
    assert scan.sha256 == alone.sha256
    assert len(scan.dicom) == 5
    assert scan.warnings == ("1 of 6 DICOM files are copies of others: left out",)


def bad_spacing(folder: Path) -> None:
    """Half of the images are of another field of view."""

    def other(k: int, file: FileDataset) -> None:
        file.PixelSpacing = [0.8, 0.7] if k < 3 else [0.4, 0.35]

    write_series(folder, scan_voxels(), orthogonal(), change=other)


def bad_step(folder: Path) -> None:
    """So little that dcm2niix says nothing: 4 %."""
    up = AXIAL[:, 2]
    write_series(folder, scan_voxels(60), AXIAL, change=lambda k, file: moved(file, 0.04 * max(k - 30, 0) * up))


def bad_one_nowhere(folder: Path) -> None:
    write_series(
        folder, scan_voxels(), orthogonal(), change=lambda k, file: k == 2 and file.pop("ImagePositionPatient")
    )


def bad_frame_lost(folder: Path) -> None:
    write_multiframe(folder, scan_voxels(), orthogonal(), order=(0, 1, 3, 4))


def bad_frame_twice(folder: Path) -> None:
    write_multiframe(folder, scan_voxels(), orthogonal(), order=(0, 1, 2, 2, 3, 4))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "another pixel spacing": (bad_spacing, r"series 3 \(chest, 5 images\): its images do not lie on one grid"),
    "another distance": (bad_step, "the distance between slices varies"),
    "an image without a position": (bad_one_nowhere, "1 of 5 images do not say where they lie"),
    "a frame is missing": (bad_frame_lost, "the distance between slices varies"),
    "a frame is there twice": (bad_frame_twice, "the distance between slices varies"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_lie_on_one_grid_is_refused(what: str, tmp_path: Path) -> None:
    make, message = BAD[what]
    make(tmp_path / "bad")
    with pytest.raises(CdiffError, match=message) as error:
        read_scan(tmp_path / "bad")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ("ImagePositionPatient", ""),
        ("ImageOrientationPatient", ""),
        ("PixelSpacing", ""),
        ("ImagePositionPatient", "a\\b\\c "),
    ],
)
def test_what_the_headers_do_not_say_is_not_made_up(keyword: str, text: str, tmp_path: Path) -> None:
    """dcm2niix takes an image without an orientation for an axial one."""

    def broken(_: int, file: FileDataset) -> None:
        tag = pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(keyword))
        file[tag] = pydicom.dataelem.RawDataElement(tag, "DS", len(text), text.encode(), 0, False, True)

    scan = read_scan(write_series(tmp_path / "a", scan_voxels(), orthogonal(), change=broken))
    assert len(scan.slices) == 5
    assert not scan.grid.has_orientation
    assert any("do not say where the images lie: their order" in note for note in scan.warnings)
    assert scan.grid.spacing == pytest.approx((1, 1, 2.5) if keyword == "PixelSpacing" else (0.7, 0.8, 2.5))


def test_low_values_that_are_bright_are_told(tmp_path: Path) -> None:
    def inverted(_: int, file: FileDataset) -> None:
        file.PhotometricInterpretation = "MONOCHROME1"

    scan = read_scan(write_series(tmp_path / "a", scan_voxels(), orthogonal(), change=inverted))
    assert [note for note in scan.warnings if "MONOCHROME1 (low values are bright)" in note]


def test_what_dcm2niix_misses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_series(tmp_path / "a", scan_voxels(), orthogonal())
    converter(tmp_path, 'echo "Warning: Missing images? Expected 10"', monkeypatch)
    assert read_scan(folder).warnings == ("dcm2niix says: Missing images? Expected 10",)


def test_one_volume_is_made_or_it_is_said_why_not() -> None:
    said = "Warning: Unable to determine manufacturer\n  Error: Unsupported transfer syntax\nError: no valid DICOM\n"
    for made, text, message in (
        ((), said, r"here: it cannot be converted \(Error: Unsupported transfer syntax\)"),
        ((), "Found 5 DICOM file(s)", "here: it cannot be converted .dcm2niix does not say why"),
        (("a_e1", "a_e2"), "", "here: dcm2niix makes 2 images of it, as it does with several echoes"),
    ):
        with pytest.raises(CdiffError, match=message):
            _must_be_one([Path(f"{name}.nii") for name in made], text, "here:")


def test_marks_drawn_on_the_images_are_no_second_scan(tmp_path: Path) -> None:
    """dcm2niix makes a volume of them (60xx,3000)."""

    def drawn(_: int, file: FileDataset) -> None:
        for tag, value in ((0x60000010, 20), (0x60000011, 24), (0x60000100, 1), (0x60000102, 0)):
            file.add_new(tag, "US", value)
        file.add_new(0x60000040, "CS", "G")
        file.add_new(0x60000050, "SS", [1, 1])
        file.add_new(0x60003000, "OW", b"\x0f\xf0" * 30)

    voxels = scan_voxels(1)
    scan = read_scan(write_series(tmp_path / "a", voxels, orthogonal(), change=drawn))
    np.testing.assert_array_equal(np.sort(scan.slices.ravel()), np.sort(voxels.ravel()))


def test_a_description_is_shown_as_text(tmp_path: Path) -> None:
    """Two series are listed on a terminal, which escapes would paint."""
    folder = write_series(tmp_path / "a", scan_voxels(2), orthogonal(), description="\x1b[31mred\x07")
    for file in write_series(tmp_path / "b", scan_voxels(2), orthogonal(), number=4).iterdir():
        shutil.copy(file, folder / f"B{file.name}")
    with pytest.raises(CdiffError, match=r"3 \(\[31mred, 2 images\)"):
        read_scan(folder)


def test_a_volume_of_fewer_slices_than_images_is_refused_where_these_lie_nowhere() -> None:
    with pytest.raises(CdiffError, match="dcm2niix makes 4 slices of 5 images; look for damaged files"):
        laid(nib.Nifti1Image(different(4), np.eye(4)), Planes((), 5), "here:")


ACROSS, DOWN = np.array([0.7, 0.0, 0.0]), np.array([0.0, 0.8, 0.0])


@pytest.mark.parametrize(
    ("plane", "message"),
    [
        # From the second column on, as many as the volume has, and so with the rows; then one that begins before the first.
        (Plane(np.array([0.7, 0, 0]), ACROSS, DOWN, 5, 6), "reach beyond the volume"),
        (Plane(np.array([0, 0.8, 0]), ACROSS, DOWN, 5, 6), "reach beyond the volume"),
        (Plane(np.array([-0.7, 0, 0]), ACROSS, DOWN, 5, 6), "reach beyond the volume"),
        (Plane(np.array([0, 0, 4 * 2.5]), ACROSS, DOWN, 5, 6), "reach beyond the volume"),
        # The other way: one that ends before the first column, and one that begins beyond the last.
        (Plane(np.array([3 * 0.7, 0, 0]), -ACROSS, DOWN, 5, 6), "reach beyond the volume"),
        (Plane(np.array([6 * 0.7, 0, 0]), -ACROSS, DOWN, 5, 6), "reach beyond the volume"),
        (Plane(np.zeros(3), 2 * ACROSS, DOWN, 5, 3), "rows and columns are not the volume's"),
        (Plane(np.zeros(3), ACROSS, ACROSS, 5, 6), "rows and columns are not the volume's"),
        (Plane(np.zeros(3), ACROSS + DOWN, DOWN, 5, 6), "rows and columns are not the volume's"),
    ],
)
def test_a_plane_that_is_none_of_the_volume_s_is_not_taken_from_it(plane: Plane, message: str) -> None:
    with pytest.raises(CdiffError, match=message):
        taken_from(different(4), np.diag([0.7, 0.8, 2.5, 1.0]), plane)


def test_a_plane_is_taken_as_its_pixels_lie() -> None:
    """From its last pixel to its first, columns before rows, and less than the whole."""
    voxels = different(4)
    plane = Plane(np.array([5 * 0.7, 4 * 0.8, 2 * 2.5]), -DOWN, -ACROSS, 6, 4)
    taken = taken_from(voxels, np.diag([0.7, 0.8, 2.5, 1.0]), plane)
    np.testing.assert_array_equal(taken, voxels[::-1, 4:0:-1, 2])


def placed(
    at: Any, aside: tuple[float, ...] = (), leaning: float = 0
) -> tuple[nib.Nifti1Image, nib.Nifti1Image, tuple[str, ...]]:
    """A volume, and what is made of it where its images lie `at` these places in voxels along its third axis.

    aside: how far they lie from their places along the first. leaning: how much farther up each pixel lies than the one before it.
    """
    affine = np.vstack([AXIAL * [[-1], [-1], [1]], [0, 0, 0, 1]])
    across, down, up, corner = AXIAL.T
    planes = [
        Plane(corner + k * up + beside * across, across + leaning * up, down, 5, 6)
        for k, beside in zip(at, aside or np.zeros(len(at)), strict=True)
    ]
    image = nib.Nifti1Image(different(len(at)), affine)
    return image, *laid(nib.Nifti1Image(different(len(at)), affine), Planes(tuple(planes), len(planes)), "here:")


def test_a_volume_is_moved_to_where_its_images_lie() -> None:
    """All of them by a tenth of a slice, and farther apart: both of its affines and its spacing, and neither is uneven."""
    for first, step in ((0.1, 1.0), (0.0, 1.05)):
        image, made, told = placed(first + step * np.arange(5))
        wanted = image.affine @ nib.affines.from_matvec(np.diag([1, 1, step]), [0, 0, first])
        for found in (made.get_sform(), made.get_qform()):
            np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert made.header["pixdim"][3] == pytest.approx(0.625 * step)
        codes = [int(one.header[code]) for one in (image, made) for code in ("sform_code", "qform_code")]
        assert codes == [2, 0, 2, 2]  # what the sform had, for both
        assert told == ()
    image, made, told = placed([0.1])  # of a single image nothing says how far apart they lie
    np.testing.assert_allclose(made.affine, image.affine @ nib.affines.from_matvec(np.eye(3), [0, 0, 0.1]), atol=1e-4)
    assert (made.header["pixdim"][3], told) == (pytest.approx(0.625), ())


@pytest.mark.parametrize("header", [{"ImageType": ["ORIGINAL", "PRIMARY", "MOSAIC"]}, {"NumberOfFrames": "3"}])
def test_what_holds_several_slices_and_says_where_none_lies_is_as_dcm2niix_has_it(header: dict[str, Any]) -> None:
    """A mosaic's position, and that of frames without groups of their own, is none of its slices'."""
    one = {"ImagePositionPatient": [9, 9, 9], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "Rows": 5, "Columns": 6}
    planes = planes_of([one | {"PixelSpacing": [0.7, 0.7]} | header])
    assert (planes.checked, planes.count) == (False, int(header.get("NumberOfFrames", 1)))
    image = nib.Nifti1Image(different(3), np.diag([0.7, 0.7, 2.5, 1.0]))
    made, told = laid(image, planes, "here:")
    np.testing.assert_array_equal(made.affine, np.diag([0.7, 0.7, 2.5, 1.0]))
    assert (int(made.header["sform_code"]), told) == (2, ())


@pytest.mark.parametrize(
    ("said", "frames"), [(None, 1), ("", 1), ("0", 1), ("-2", 1), ("x", 1), ([2, 3], 1), ("12", 12)]
)
def test_how_many_images_a_file_promises(said: object, frames: int) -> None:
    assert frames_of({"NumberOfFrames": said}) == frames


def test_an_image_beside_the_grid_or_leaning_on_it_is_refused() -> None:
    for beside, leaning in ((0.4, 0), (0, 0.09)):
        image, made, _ = placed(range(3), (0, beside, 0), leaning)
        np.testing.assert_array_equal(made.affine, image.affine)
    for beside, leaning in ((0.6, 0), (0, 0.11), (0, -0.11)):
        with pytest.raises(CdiffError, match="do not lie on one grid"):
            placed(range(3), (0, beside, 0), leaning)


def test_thin_frames_out_of_order_are_seen_and_directions_that_are_none_are_not_taken() -> None:
    def header(numbers: tuple[int, ...], turned: float = 0) -> dict[str, Any]:
        groups = [
            {
                "PlanePositionSequence": [{"ImagePositionPatient": [0, 0, 0.4 * k]}],
                "PlaneOrientationSequence": [{"ImageOrientationPatient": [1, 0, 0, turned, 1, 0]}],
                "PixelMeasuresSequence": [{"PixelSpacing": [0.7, 0.7]}],
                "FrameContentSequence": [{"DimensionIndexValues": [1, number], "InStackPositionNumber": number}],
            }
            for k, number in enumerate(numbers)
        ]
        return {"NumberOfFrames": 3, "PerFrameFunctionalGroupsSequence": groups, "Rows": 5, "Columns": 6}

    assert planes_of([header((1, 2, 3))]).mixed is planes_of([header((3, 2, 1))]).mixed is False
    assert planes_of([header((1, 3, 2)), header((1, 2, 3))]).mixed
    alone = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "Rows": 5, "Columns": 6}
    spaced = alone | {"PixelSpacing": [0.7, 0.7]}
    for spacing in ([0.7, 0], [0, 0.7]):
        assert planes_of([alone | {"PixelSpacing": spacing}, spaced]).unspaced
    assert len(planes_of([spaced, spaced | {"ImagePositionPatient": [0, "nan", 0]}]).known) == 1
    # Frames may lack a group, and so may what is said of all.
    assert functional_groups({"PerFrameFunctionalGroupsSequence": [{}, {}]}, "PlanePositionSequence") == [{}, {}]
    assert len(planes_of([header((1, 2, 3), 0.009)]).known) == 3
    assert planes_of([header((1, 2, 3), 0.02)]).known == ()
