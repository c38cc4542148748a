"""Masks in DICOM whose numbers would have a small file take gigabytes, or many outlines minutes: refused, or read as quickly as others."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.data.contours import SHIFTS, Contours, _cross, _odd, lay
from cdiff.runtime.data.dicom_mask import read_dicom_mask
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid
from tests.runtime.dicom_files import orthogonal

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

from tests.runtime.data.test_dicom_mask import drawn, series, write_seg  # noqa: E402  # which needs highdicom


@pytest.fixture
def seg(tmp_path: Path) -> Path:
    """Two slices of six, as far apart as there are."""
    marked = drawn((0, 5))
    return write_seg(tmp_path / "seg.dcm", series(tmp_path / "s", marked, orthogonal()), marked)


def refused(path: Path) -> str:
    with pytest.raises(CdiffError) as caught:
        read_dicom_mask(path, None, {})
    return str(caught.value)


@pytest.mark.parametrize(("apart", "slices"), [(2.5e-3, 5001), (2.5e-7, 50_000_001)])
def test_slices_that_are_far_closer_than_frames_are_not_made_up(apart: float, slices: int, seg: Path) -> None:
    """The distance of slices, mistyped or damaged, says how many lie between two frames."""
    file = pydicom.dcmread(seg)
    file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = apart
    file.save_as(seg)
    if slices > 2**15:
        assert f"whose positions span a volume of {slices} x " in refused(seg)
    else:  # a few megabytes
        assert len(read_dicom_mask(seg, None, {})[0]) == slices


def test_frames_that_a_segmentation_promises_and_has_not_take_no_memory(seg: Path) -> None:
    file = pydicom.dcmread(seg)
    file.NumberOfFrames = 99_999_999
    file.save_as(seg)
    assert "it describes 2 frames, but its header promises 99999999" in refused(seg)


@pytest.mark.filterwarnings("ignore:The value length")
def test_a_message_does_not_hold_a_whole_file(seg: Path) -> None:
    file = pydicom.dcmread(seg)
    file.SOPClassUID, file.Modality = "1.2.3", "M" * 5000
    file.save_as(seg)
    assert len(refused(seg)) < 1000


def squares(count: int, side: int) -> list[Any]:
    corners = np.random.default_rng(0).uniform(-5, side + 2, (count, 2))
    return [np.array([[0, 0], [3.3, 0], [3.3, 3.3], [0, 3.3]]) + corner for corner in corners]


@pytest.mark.parametrize("side", [20, 60, 300])
def test_outlines_that_cross_are_found_as_pixel_by_pixel(side: int) -> None:
    for start in range(0, 60, 6):
        loops = squares(60, side)[start : start + 6]
        marked = [_odd([loop], (side, side)) for loop in loops]
        crossing = any((a & b).any() and (a & ~b).any() and (b & ~a).any() for a, b in combinations(marked, 2))
        assert _cross(loops, (side, side)) == crossing


@pytest.mark.parametrize(("apart", "crossing"), [(2, False), (-4, True)])
def test_boxes_that_meet_are_no_outlines_that_do(apart: int, crossing: bool) -> None:
    """Two halves of a square, cut from corner to corner."""
    low = np.array([[0.0, 0], [12, 0], [0, 12]])
    assert _cross([low, 12.0 + apart - low], (30, 30)) is crossing


def test_hundreds_of_islands_in_a_slice_are_looked_at_each_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair was compared over the whole slice: a minute a slice, as of vessels that a threshold drew."""
    looked_at: list[int] = []

    def counted(loops: list[Any], shape: tuple[int, ...]) -> Any:
        looked_at.append(math.prod(shape))
        return _odd(loops, shape)

    monkeypatch.setattr("cdiff.runtime.data.contours._odd", counted)
    image: Any = nib.Nifti1Image(np.zeros((512, 512, 2), np.uint8), np.diag([-0.7, -0.7, 2, 1]))
    image.header.set_xyzt_units("mm")
    voxels = [np.column_stack([square, np.ones(4), np.ones(4)]) for square in squares(1500, 512)]
    loops = tuple((one @ image.affine.T)[:, :3] for one in voxels)
    marked, _ = lay(Contours(loops, "", frozenset()), Grid((512, 512, 2), 2, image.header))
    assert sum(looked_at) < len(SHIFTS) * 512 * 512 + 1500 * 6 * 6, (
        "the slice to fill it, and of each island its own box"
    )
    assert marked.sum() > 9 * 1000
