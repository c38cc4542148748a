"""Pictures as masks: what was drawn is read whatever it was drawn in, or refused; never taken for nothing, or for everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.data.masks import inside, read_mask
from cdiff.runtime.errors import CdiffError
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
