"""Pictures as masks: what was drawn is read whatever it was drawn in, or refused; never taken for nothing, or for everything."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.data.masks import _must_be_of, inside, read_mask
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid
from tests.layouts import disc, noisy, save

DRAWN = disc((12, 16))


def picture(ground: tuple[int, ...], ink: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.where(DRAWN[..., None], np.uint8(ink), np.uint8(ground))


@pytest.mark.parametrize(
    ("mode", "ground", "ink"),
    [
        ("RGB", (0, 0, 0), (200, 0, 0)),
        ("RGBA", (0, 0, 0, 0), (0, 200, 0, 255)),
        ("LA", (0, 0), (255, 255)),
        ("LA", (0, 255), (255, 255)),
        ("PA", (0, 255), (1, 255)),
        ("YCbCr", (0, 128, 128), (255, 128, 128)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 255, 255, 0)),
    ],
)
def test_a_mask_in_colours_is_what_was_drawn_on_black(
    tmp_path: Path, mode: str, ground: tuple[int, ...], ink: tuple[int, ...]
) -> None:
    path = tmp_path / "mask.tif"
    Image.fromarray(picture(ground, ink), mode).save(path)
    np.testing.assert_array_equal(inside(read_mask(path).values), DRAWN)


@pytest.mark.parametrize(
    ("mode", "ground", "ink"),
    [
        ("RGB", (255, 255, 255), (255, 0, 0)),
        ("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)),
        ("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)),
        ("LA", (0, 0), (0, 255)),
    ],
)
def test_a_mask_of_which_the_colours_leave_nothing_is_refused(
    tmp_path: Path, mode: str, ground: tuple[int, ...], ink: tuple[int, ...]
) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(picture(ground, ink), mode).save(path)
    with pytest.raises(CdiffError, match=r"mask.png is read by .* everywhere: .*; save it in white on black"):
        read_mask(path)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_mask_of_one_colour_throughout_is_read(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "mask.png"
    for value in (0, 255):
        Image.fromarray(np.full((12, 16, channels), value, np.uint8)).save(path)
        assert np.unique(read_mask(path).values).tolist() == [value]


def test_values_near_a_label_are_it_and_rounding_beside_zero_is_nothing() -> None:
    """As programs write them that laid a mask on another grid."""
    assert inside(np.array([1e-7, 0.9999, 2.0001, 3]), (1, 2)).tolist() == [False, True, True, False]
    assert not inside(np.array([0, -1e-9, 1e-9, 4e-7])).any()


def grid(*shape: int, edges: tuple[float, ...] = (0.7, 0.8, 2.5)) -> Grid:
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), np.diag([*edges, 1])).header
    return Grid(shape, 2 if len(shape) == 3 else None, header)


@pytest.mark.parametrize(
    ("mask", "image", "fits"),
    [
        (grid(6, 20, 24, edges=(2.5, 0.8, 0.7)), grid(24, 20, 6), True),
        (grid(24, 20, 6, edges=(0.7001, 0.7999, 2.5)), grid(24, 20, 6), True),  # two programs' rounding
        (grid(24, 20, 6, edges=(0.7, 0.8, 2.6)), grid(24, 20, 6), False),
        # The thickness of a lone slice counts where the other file has several.
        (grid(24, 20, 1, edges=(0.7, 0.8, 5)), grid(24, 20, 1), True),
        (grid(24, 20, 1, edges=(0.7, 0.8, 5)), grid(24, 20), True),
        (grid(24, 20, 1, edges=(0.7, 0.8, 5)), grid(24, 20, 6), False),
        (grid(24, 20, 6, edges=(0.7, 0.8, 5)), grid(24, 20, 1), False),
        (grid(24, 20, 6), grid(24, 20, 1), True),
    ],
)
def test_a_segmentations_voxels_are_as_large_as_its_images(mask: Grid, image: Grid, fits: bool) -> None:
    if fits:
        _must_be_of(mask, image, Path("seg.dcm"), Path("image"))
        return
    with pytest.raises(CdiffError, match=r"seg.dcm has voxels of 0.7 x 0.8 x .* mm and its image image of 0.7 x"):
        _must_be_of(mask, image, Path("seg.dcm"), Path("image"))


def test_a_picture_that_holds_nan_is_no_mask(tmp_path: Path) -> None:
    values = DRAWN.astype(np.float32)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "mask.tif")
    with pytest.raises(CdiffError, match=r"mask.tif holds NaN"):
        read_mask(tmp_path / "mask.tif")


def test_two_who_marked_nothing_did_not_copy_each_other(tmp_path: Path) -> None:
    save(tmp_path / "case1" / "image.nii.gz", noisy(DRAWN[..., None]))
    for k in range(4):
        save(tmp_path / "case1" / f"task01_seg0{k + 1}.nii.gz", np.uint8(DRAWN[..., None] * (k > 1)))
    kinds = {finding["kind"]: finding["text"] for finding in check_data(tmp_path).report["findings"]}
    assert kinds["duplicated"] == "identical masks: seg03 and seg04"
    assert kinds["empty"] == "seg01, seg02 marked nothing"
