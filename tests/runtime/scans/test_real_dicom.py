"""DICOM as scanners write it: the series of two examinations that pydicom brings along, each image cut to 16 x 16 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.inputs import scans_at
from cdiff.runtime.scans.scan import read_scan
from tests.runtime.scan_files import restored

SERIES = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests"


def test_every_voxel_of_a_ct_lies_where_its_header_says() -> None:
    scan = read_scan(SERIES / "98892001" / "CT5N")
    assert scan.grid.header is not None
    to_voxel = np.linalg.inv(scan.grid.header.get_best_affine())
    stored = restored(scan.grid, scan.slices)[..., 0]
    seen = np.zeros(stored.shape, int)
    for file in sorted((SERIES / "98892001" / "CT5N").iterdir()):
        image = pydicom.dcmread(file)
        hounsfield = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        down, across = (float(length) for length in image.PixelSpacing)
        right, below = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
        for row, column in np.ndindex(hounsfield.shape):
            lps = np.array(image.ImagePositionPatient, float) + column * across * right + row * down * below
            found = to_voxel @ [-lps[0], -lps[1], lps[2], 1]
            voxel = tuple(np.rint(found[:3]).astype(int))
            np.testing.assert_allclose(found[:3], voxel, atol=1e-3)
            assert stored[voxel] == hounsfield[row, column]
            seen[voxel] += 1
    assert (seen == 1).all()
    assert hounsfield.max() > hounsfield.min(), "or any order of its pixels would do"


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("77654033/CT2", "the distance between slices varies: one may be missing"),  # 161 of its slices are not there
        ("98892003/MR700", "7 images"),  # a projection turned around the head
        ("98892003/MR1", "holds several series with the same number: 1 (FAST LOCALIZER, 1 image)"),  # in three planes
    ],
)
def test_what_is_no_volume_is_refused_by_its_reason(folder: str, words: str) -> None:
    with pytest.raises(CdiffError) as told:
        read_scan(SERIES / folder)
    assert words in str(told.value)


def test_a_patients_folder_is_its_series_one_a_folder() -> None:
    assert [scan.name for scan in scans_at(SERIES / "98892001")] == ["CT2N", "CT5N"]
