"""Masks laid by their headers: however a mask is stored, the pixels that training sees are those that were drawn."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cdiff.runtime.data.cases import find_cases, read_case
from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.data.oddities import Oddities
from cdiff.runtime.data.placing import outside_share, place
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scoring.evaluate import case_sha256
from cdiff.train.data import fit_to_data, read_data
from cdiff.train.presets import preset
from tests.layouts import noisy

SHAPE = (12, 10, 6)
TURN, TILT = 0.3, 0.2
ABOUT = np.array([[np.cos(TURN), -np.sin(TURN), 0], [np.sin(TURN), np.cos(TURN), 0], [0, 0, 1]])
OVER = np.array([[1, 0, 0], [0, np.cos(TILT), -np.sin(TILT)], [0, np.sin(TILT), np.cos(TILT)]])
AFFINE = np.eye(4)
AFFINE[:3, :3] = ABOUT @ OVER @ np.diag([0.7, 0.9, 2.5])
AFFINE[:3, 3] = (-31.7, 12.4, -80.2)
"""Oblique on all axes, so that every number of a header counts."""


def drawn(seed: int = 0) -> NDArray[np.bool_]:
    """Marks at random, up to every edge: no turn of it looks like another."""
    return np.random.default_rng(seed).random(SHAPE) < 0.3


def write(path: Path, voxels: NDArray[np.generic], affine: NDArray[np.float64], unit: str = "mm") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels.astype(np.uint8) if voxels.dtype == bool else voxels, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


@pytest.fixture
def case01(tmp_path: Path) -> Path:
    """A case with an image and one annotator's mask on the image's grid."""
    folder = tmp_path / "Training/case01"
    write(folder / "image.nii.gz", noisy(drawn()), AFFINE)
    write(folder / "task01_seg01.nii.gz", drawn(), AFFINE)
    return folder


def read(case01: Path, odd: Oddities | None = None) -> NDArray[np.bool_]:
    """What training sees of the masks, back on the volume's axes: [annotators, *SHAPE]."""
    (case,) = find_cases(case01.parent.parent, masks_by="header")["train"]
    return np.moveaxis(read_case(case, odd=odd)[1], 0, -1)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("flips", [(1, -1, 1), (-1, -1, -1), (-1, 1, -1)])
def test_a_mask_stored_in_another_order_of_its_axes_is_turned_to_its_image(
    case01: Path, order: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    """As of two converters of one DICOM series, of which one turns the rows."""
    stored = nib.Nifti1Image(drawn(1).astype(np.uint8), AFFINE)
    turned = stored.as_reoriented(np.stack([order, flips], axis=1).astype(float))
    write(case01 / "task01_seg02.nii.gz", np.asarray(turned.dataobj), turned.affine)
    np.testing.assert_array_equal(read(case01), [drawn(), drawn(1)])


@pytest.mark.parametrize("start", [(2, 1, 3), (0, 0, 0), (-2, -1, -3)])
def test_a_mask_cropped_or_padded_is_laid_where_it_was_drawn(case01: Path, start: tuple[int, int, int]) -> None:
    """As annotation tools save the part that was drawn on."""
    first = np.maximum(start, 0)
    around = np.maximum(-np.array(start), 0)
    part = np.pad(drawn(1)[first[0] : 9, first[1] : 8, first[2] : 5], [(int(n), 1) for n in around])
    write(case01 / "task01_seg02.nii.gz", part, AFFINE @ nib.affines.from_matvec(np.eye(3), start))
    expected = np.zeros(SHAPE, bool)
    expected[first[0] : 9, first[1] : 8, first[2] : 5] = drawn(1)[first[0] : 9, first[1] : 8, first[2] : 5]
    odd = Oddities()
    np.testing.assert_array_equal(read(case01, odd)[1], expected)
    assert odd.told() == []


def test_a_mask_of_finer_or_coarser_voxels_gives_each_centre_the_voxel_that_it_lies_in(case01: Path) -> None:
    fine = drawn(1).repeat(3, axis=0).repeat(3, axis=1)
    write(
        case01 / "task01_seg02.nii.gz",
        fine,
        AFFINE @ nib.affines.from_matvec(np.diag([1 / 3, 1 / 3, 1]), [-1 / 3, -1 / 3, 0]),
    )
    coarse = drawn(2)[::3, :, ::3]
    write(case01 / "task01_seg03.nii.gz", coarse, AFFINE @ nib.affines.from_matvec(np.diag([3, 1, 3]), [1, 0, 1]))
    np.testing.assert_array_equal(read(case01)[1:], [drawn(1), coarse.repeat(3, axis=0).repeat(3, axis=2)])


def test_masks_on_any_grid_are_laid_as_simpleitk_resamples_them(case01: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(5)
    affine = nib.affines.from_matvec(OVER @ ABOUT @ np.diag([0.9, 0.6, 2.1]), AFFINE[:3, 3] + [1.1, -0.8, 1.3])
    write(case01 / "task01_seg02.nii.gz", rng.random((11, 17, 9)) < 0.5, affine)
    image, mask = (sitk.ReadImage(str(case01 / name)) for name in ("image.nii.gz", "task01_seg02.nii.gz"))
    theirs = sitk.GetArrayFromImage(sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)).T
    assert 0.1 < theirs.mean() < 0.6
    np.testing.assert_array_equal(read(case01)[1], theirs.astype(bool))


def test_a_header_in_microns_is_the_same_place(case01: Path) -> None:
    affine = AFFINE.copy()
    affine[:3] *= 1000
    write(
        case01 / "task01_seg02.nii.gz",
        drawn(1)[::-1],
        affine @ nib.affines.from_matvec(np.diag([-1, 1, 1]), [11, 0, 0]),
        "micron",
    )
    np.testing.assert_array_equal(read(case01)[1], drawn(1))


def test_nrrd_is_laid_by_its_header_too(case01: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    whole = sitk.ReadImage(str(write(case01.parent.parent / "whole.nii.gz", drawn(1), AFFINE)))
    sitk.WriteImage(whole[9:1:-1, 2:9, 1:5], str(case01 / "task01_seg02.nrrd"))
    expected = np.zeros(SHAPE, bool)
    expected[2:10, 2:9, 1:5] = drawn(1)[2:10, 2:9, 1:5]
    np.testing.assert_array_equal(read(case01)[1], expected)


def test_a_two_dimensional_mask_is_turned_in_its_plane(tmp_path: Path) -> None:
    folder = tmp_path / "Training/case01"
    flat = drawn()[..., 0]
    write(folder / "image.nii.gz", noisy(flat), AFFINE)
    write(
        folder / "task01_seg01.nii.gz", flat[:, ::-1], AFFINE @ nib.affines.from_matvec(np.diag([1, -1, 1]), [0, 9, 0])
    )
    write(folder / "task01_seg02.nii.gz", flat[2:, :, None], AFFINE @ nib.affines.from_matvec(np.eye(3), [2, 0, 0]))
    seen = read(folder)[..., 0]
    flat[:2] &= False
    np.testing.assert_array_equal(seen[1], flat)
    np.testing.assert_array_equal(seen[0], drawn()[..., 0])


def test_channels_are_found_where_masks_are_of_another_shape(case01: Path) -> None:
    write(case01 / "image.nii.gz", noisy(drawn(), channels=3), AFFINE)
    write(case01 / "task01_seg01.nii.gz", drawn()[2:], AFFINE @ nib.affines.from_matvec(np.eye(3), [2, 0, 0]))
    assert check_data(case01.parent.parent, masks_by="header").channels == 3


def test_a_mask_that_reaches_out_of_its_image_is_told_with_its_share(case01: Path) -> None:
    marked = np.zeros(SHAPE, bool)
    marked[:8, 3, 3] = True
    write(case01 / "task01_seg02.nii.gz", marked, AFFINE @ nib.affines.from_matvec(np.eye(3), [-2, 0, 0]))
    odd = Oddities()
    assert read(case01, odd)[1].sum() == 6
    (line,) = odd.told()
    assert "in 1 case (case01): case01: 25.0% of what task01_seg02.nii.gz marks" in line
    found = [
        f["text"] for f in check_data(case01.parent.parent, masks_by="header").report["findings"] if f["kind"] == "grid"
    ]
    assert found == ["25.0% of what task01_seg02.nii.gz marks lies outside its image, by their headers"]


def test_what_lies_wholly_outside_or_says_nothing_is_refused(case01: Path) -> None:
    path = case01 / "task01_seg02.nii.gz"
    write(path, drawn(), AFFINE @ nib.affines.from_matvec(np.eye(3), [0, 0, 6]))
    with pytest.raises(CdiffError, match=r"task01_seg02.nii.gz cannot be laid on its image .*image.nii.gz: .* outside"):
        read(case01)
    write(path, drawn()[1:], np.eye(4))
    with pytest.raises(CdiffError, match="does not say where its voxels lie"):
        read(case01)
    path.unlink()
    Image.fromarray(drawn()[..., 0]).save(path.with_name("task01_seg02.png"))
    with pytest.raises(
        CdiffError, match=r"task01_seg02.png is a picture, and a picture's file does not say where it lies"
    ):
        read(case01)


def test_of_two_slices_too_the_order_counts_and_a_bare_image_is_refused() -> None:
    """The second slice of a mask whose slices run the other way lies below the image's first."""
    marked = np.ones((3, 4, 2), bool)
    image, own = (
        Grid(marked.shape, 2, nib.Nifti1Image(np.zeros(marked.shape, np.uint8), np.diag([1, 1, step, 1])).header)
        for step in (3.0, -3.0)
    )
    np.testing.assert_array_equal(place(marked, own, image), marked & [True, False])
    with pytest.raises(CdiffError, match="does not say where its voxels lie"):
        place(marked, own, Grid(marked.shape, 2))
    # What is so small that it lies between the image's centres is not outside.
    speck = np.zeros((9, 12, 2), bool)
    speck[4, 3, 1] = True
    fine = Grid(speck.shape, 2, nib.Nifti1Image(speck.astype(np.uint8), np.diag([1 / 3, 1 / 3, 3, 1])).header)
    assert not place(speck, fine, image).any()


def test_an_empty_mask_is_an_opinion_wherever_it_lies(case01: Path) -> None:
    write(
        case01 / "task01_seg02.nii.gz",
        np.zeros((3, 3, 3), bool),
        AFFINE @ nib.affines.from_matvec(np.eye(3), [90, 0, 0]),
    )
    assert not read(case01)[1].any()


def test_files_that_lost_their_headers_are_read_as_they_are(case01: Path) -> None:
    write(case01 / "image.nii.gz", noisy(drawn()), np.eye(4))
    write(case01 / "task01_seg01.nii.gz", drawn(), np.eye(4))
    np.testing.assert_array_equal(read(case01), [drawn()])


@pytest.mark.parametrize("axes", [2, 3])
def test_a_slice_without_a_place_is_read_as_it_is_with_a_third_axis_or_without(tmp_path: Path, axes: int) -> None:
    folder, flat = tmp_path / "Training/case01", drawn()[..., 0]
    write(folder / "image.nii.gz", noisy(flat) if axes == 3 else noisy(flat)[..., None], np.eye(4))
    write(folder / "task01_seg01.nii.gz", flat[..., None] if axes == 3 else flat, np.eye(4))
    np.testing.assert_array_equal(read(folder)[0, ..., 0], flat)


def test_without_the_option_nothing_is_moved_and_it_is_named(case01: Path) -> None:
    turned = AFFINE @ nib.affines.from_matvec(np.diag([-1, 1, 1]), [11, 0, 0])
    write(case01 / "task01_seg01.nii.gz", drawn()[::-1], turned)
    (case,) = find_cases(case01.parent.parent)["train"]
    odd = Oddities()
    np.testing.assert_array_equal(np.moveaxis(read_case(case, odd=odd)[1][:, 0], 0, -1), drawn()[::-1])
    assert "--masks-by header" in odd.told()[0]
    write(case01 / "task01_seg01.nii.gz", drawn()[1:], AFFINE)
    with pytest.raises(CdiffError, match=r"must be on one grid, or be laid by their headers \(--masks-by header\)"):
        read_case(case)
    write(case01 / "task01_seg01.nii.gz", drawn()[1:], np.eye(4))  # which says nothing of its place
    with pytest.raises(CdiffError, match=r"must be on one grid$"):
        read_case(case)
    write(case01 / "task01_seg01.nii.gz", np.moveaxis(drawn(), 0, -1).swapaxes(0, 1), np.eye(4))
    with pytest.raises(CdiffError, match=r"must be on one grid; its axes are the image's in the opposite order"):
        read_case(case)
    with pytest.raises(CdiffError, match="masks_by=heads is not known; use array or header"):
        find_cases(case01.parent.parent, masks_by="heads")


@pytest.mark.parametrize(("shift", "share"), [(0.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (0.6, 1 / 12), (-0.6, 1 / 12)])
def test_a_voxel_is_outside_whose_centre_is(shift: float, share: float) -> None:
    """Along the first axis, by so many voxels; a mask that marks nothing has nothing outside."""
    there = AFFINE.copy()
    there[:3, 3] += shift * AFFINE[:3, 0]
    image, own = (Grid(SHAPE, 2, nib.Nifti1Image(np.zeros(SHAPE, np.uint8), at).header) for at in (AFFINE, there))
    assert outside_share(np.ones(SHAPE, bool), own, image) == pytest.approx(share)
    assert outside_share(np.zeros(SHAPE, bool), own, image) == 0


def test_training_lays_masks_as_it_is_told_and_keeps_it(case01: Path) -> None:
    (case01.parent.parent / "Validation").mkdir()
    shutil.copytree(case01, case01.parent.parent / "Validation/case02")
    turned = AFFINE @ nib.affines.from_matvec(np.diag([-1, 1, 1]), [11, 0, 0])
    write(case01 / "task01_seg01.nii.gz", drawn()[::-1], turned)
    root = case01.parent.parent
    for masks_by, stored in (("header", drawn()), ("array", drawn()[::-1])):
        settings = ["framing=tile", "image_size=16", f"masks_by={masks_by}"]
        read = read_data(root, fit_to_data(preset("tiny"), root, settings))
        np.testing.assert_array_equal(np.stack([mask[0] for mask in read.train.masks], axis=-1), stored)
        assert read.summary.get("masks_by") == ("header" if masks_by == "header" else None)


def test_a_case_whose_masks_are_laid_otherwise_is_another(case01: Path) -> None:
    """So that an evaluation that goes on does not take over its scores."""
    (case,) = find_cases(case01.parent.parent)["train"]
    assert case_sha256(case) != case_sha256(replace(case, masks_by="header"))
