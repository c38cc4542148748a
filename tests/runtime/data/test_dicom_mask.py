"""DICOM segmentations as masks of DICOM images: what is bright in the image is what was marked, wherever and however the frames lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.uid import RTStructureSetStorage

from cdiff.runtime.data.case import Case
from cdiff.runtime.data.cases import find_cases, read_case
from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.data.masks import inside, mask_slices, read_mask
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.scan import read_scan
from tests.runtime.dicom_files import orthogonal, upright, write_series

hd = pytest.importorskip("highdicom")

BRIGHT = 500
SHAPE = (24, 20, 6)
SAGITTAL = np.array([[0, 0, 2.5, 10], [0.7, 0, 0, 20], [0, -0.8, 0, 30]], dtype=float)


def drawn(slices: Sequence[int] = range(6), seed: int = 0) -> NDArray[np.uint8]:
    """Marks at random in these slices: [columns, rows, slices]."""
    marked = np.zeros(SHAPE, np.uint8)
    marked[..., list(slices)] = np.random.default_rng(seed).random((*SHAPE[:2], len(slices))) < 0.3
    return marked


def series(folder: Path, marked: NDArray[np.uint8], lps: Any, **more: Any) -> Path:
    """A series that is bright where something is marked, so that its pixels say which they are."""
    return write_series(folder, np.where(marked, BRIGHT, -BRIGHT).astype(np.int16), lps, **more)


def write_seg(
    path: Path, images: Path, pixels: NDArray[Any], *, kind: str = "BINARY", numbers: Sequence[int] = (1,)
) -> Path:
    """A segmentation by highdicom of `pixels` [columns, rows, slices] (segments on a last axis, where they overlap)."""
    sources = sorted((pydicom.dcmread(file) for file in images.iterdir()), key=lambda file: int(file.InstanceNumber))
    for source in sources:
        for keyword in ("AccessionNumber", "PatientBirthDate", "PatientSex", "ReferringPhysicianName", "StudyID", "PositionReferenceIndicator"):  # fmt: skip
            source.setdefault(keyword, "")
    code = hd.sr.CodedConcept("1", "99TEST", "structure")
    hd.seg.Segmentation(
        source_images=sources,
        pixel_array=np.moveaxis(pixels, 2, 0).swapaxes(1, 2),
        segmentation_type=kind,
        segment_descriptions=[
            hd.seg.SegmentDescription(number, f"segment {number}", code, code, "MANUAL") for number in numbers
        ],
        series_instance_uid=hd.UID(),
        series_number=9,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="test",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
    ).save_as(path)
    return path


def changed(path: Path, **values: Any) -> pydicom.Dataset:
    """Change a file's attributes; returns what is in it."""
    file = pydicom.dcmread(path)
    for keyword, value in values.items():
        setattr(file, keyword, value)
    file.save_as(path)
    return file


def on(folder: Path, mask: Path, labels: tuple[int, ...] = ()) -> NDArray[np.bool_]:
    """The mask on the grid of the image that dcm2niix makes of the series."""
    case = Case("case", folder, (mask,), labels=labels)
    return mask_slices(read_mask(mask), read_scan(folder).grid, case, mask)


@pytest.mark.parametrize("turned", [False, True])
def test_a_table_of_series_and_segmentations_is_read_as_drawn(turned: bool, tmp_path: Path) -> None:
    """Also where dcm2niix turns the series, as it does with 3-D series of the head."""
    lps, more = (SAGITTAL, {"change": lambda _, file: upright(file)}) if turned else (orthogonal(), {})
    rows = ["case,split,image,mask_anna,mask_ben"]
    for number, split in enumerate(("train", "val")):
        marked = drawn(seed=number)
        images = series(tmp_path / f"images{number}", marked, lps, **more)
        write_seg(tmp_path / f"anna{number}.dcm", images, marked)
        write_seg(tmp_path / f"ben{number}.dcm", images, marked * drawn(range(1, 4), 9))
        rows.append(f"p{number},{split},images{number},anna{number}.dcm,ben{number}.dcm")
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    for (case,) in find_cases(tmp_path / "cases.csv").values():
        image, masks = read_case(case)
        assert (image.shape[0] != SHAPE[2]) == turned, "it is no longer turned: then this tests nothing"
        np.testing.assert_array_equal(masks[:, 0], image[:, 0] > 0)
        assert 0 < masks[:, 1].sum() < masks[:, 0].sum() / 4
        assert not (masks[:, 1] & ~masks[:, 0]).any()
    found = {finding["kind"] for finding in check_data(tmp_path / "cases.csv").report["findings"]}
    assert found == ({"slices"} if turned else set())  # those of so few images are strips when they are turned


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("slices", [[2], [1, 4], [0, 5], [0, 2, 5], [0, 2, 4]])
def test_frames_that_are_left_out_stay_empty(slices: list[int], told: bool, tmp_path: Path) -> None:
    """Frames without a pixel need not be in the file, nor the distance of the slices, which the frames that are there then belie."""
    images = series(tmp_path / "images", drawn(slices), orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, drawn(slices))
    file = pydicom.dcmread(mask)
    assert file.NumberOfFrames == len(slices)
    if not told:
        del file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
        file.save_as(mask)
    np.testing.assert_array_equal(on(images, mask), read_scan(images).slices[:, 0] > 0)


def test_slices_that_are_thicker_than_they_are_apart_are_refused_where_the_file_does_not_say_so(tmp_path: Path) -> None:
    """Taken for 5 mm apart, two slices with one between them would be a volume without a gap."""
    images = series(tmp_path / "images", drawn(), orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, drawn([0, 2]))
    file = pydicom.dcmread(mask)
    measures = file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    del measures.SpacingBetweenSlices
    measures.SliceThickness = 5
    file.save_as(mask)
    with pytest.raises(
        CdiffError, match=r"seg.dcm has voxels of 0.7 x 0.8 x 5 mm and its image .*images of 0.7 x 0.8 x 2.5 mm"
    ):
        on(images, mask)


def test_the_thickness_of_a_lone_slice_is_not_asked(tmp_path: Path) -> None:
    """highdicom says 1 mm where a series has one slice and no distance."""
    images = series(tmp_path / "images", drawn()[..., :1], orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, drawn()[..., :1])
    np.testing.assert_array_equal(on(images, mask), read_scan(images).slices[:, 0] > 0)


def test_labels_are_the_segments_numbers(tmp_path: Path) -> None:
    images = series(tmp_path / "images", drawn(), orthogonal())
    both = np.where(drawn(), 2, drawn(seed=1))
    mask = write_seg(tmp_path / "seg.dcm", images, both.astype(np.uint8), numbers=(1, 2))
    np.testing.assert_array_equal(on(images, mask, (2,)), read_scan(images).slices[:, 0] > 0)
    assert on(images, mask, (1,)).sum() == (both == 1).sum() > 0


@pytest.mark.parametrize("numbers", [(3, 5), (5,), (1, 2)])
def test_a_label_map_holds_its_segments_numbers(numbers: tuple[int, ...], tmp_path: Path) -> None:
    """highdicom 0.28 counts one segment too few in its own, which have an entry for the background."""
    images = series(tmp_path / "images", drawn(), orthogonal())
    both = np.where(drawn(), numbers[-1], drawn(seed=1) * (numbers[0] if len(numbers) > 1 else 0))
    mask = write_seg(tmp_path / "seg.dcm", images, both.astype(np.uint8), kind="LABELMAP", numbers=numbers)
    np.testing.assert_array_equal(on(images, mask, numbers[-1:]), read_scan(images).slices[:, 0] > 0)
    assert on(images, mask, numbers[:1]).sum() == (both == numbers[0]).sum()


def test_a_fraction_of_one_half_and_less_is_outside(tmp_path: Path) -> None:
    images = series(tmp_path / "images", drawn(), orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, drawn() * 0.6 + 0.4 * drawn(seed=1), kind="FRACTIONAL")
    np.testing.assert_array_equal(on(images, mask), read_scan(images).slices[:, 0] > 0)


def test_an_empty_segmentation_is_an_opinion(tmp_path: Path) -> None:
    images = series(tmp_path / "images", drawn(), orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, np.zeros(SHAPE, np.uint8))
    assert not on(images, mask).any()


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    images = series(tmp_path / "images", drawn(), orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, np.stack([drawn(), drawn()], axis=-1), numbers=(1, 2))
    with pytest.raises(
        CdiffError, match=r"seg.dcm cannot be read as a DICOM segmentation .*; save each segment as a file"
    ):
        read_mask(mask)
    fractions = np.stack([drawn() * 0.6, (1 - drawn()) * 0.4], axis=-1)
    write_seg(mask, images, fractions, kind="FRACTIONAL", numbers=(1, 2))
    with pytest.raises(CdiffError, match=r"seg.dcm holds the fractions of 2 segments; save each segment as a file"):
        read_mask(mask)
    with pytest.raises(CdiffError, match=r"is DICOM \(CT\) and no segmentation"):
        read_mask(next(images.iterdir()))
    mask.write_bytes(mask.read_bytes()[:-400])
    with pytest.raises(CdiffError, match=r"seg.dcm cannot be read as a DICOM segmentation"):
        read_mask(mask)
    mask.write_bytes(b"no DICOM at all")
    with pytest.raises(CdiffError, match=r"seg.dcm cannot be read as a DICOM segmentation"):
        read_mask(mask)
    mask.write_bytes(b"")
    with pytest.raises(CdiffError, match=r"seg.dcm is empty"):
        read_mask(mask)


def test_contours_say_what_to_do_with_them(tmp_path: Path) -> None:
    images = series(tmp_path / "images", drawn(), orthogonal())
    path = next(images.iterdir())
    changed(path, SOPClassUID=RTStructureSetStorage, Modality="RTSTRUCT")
    with pytest.raises(CdiffError, match=r"holds contours \(RTSTRUCT\), .* NIfTI mask .* \(--masks-by header\)"):
        read_mask(path)


def test_a_mask_is_what_another_reader_finds(tmp_path: Path) -> None:
    """By pydicom alone: as many pixels as the frames hold."""
    images = series(tmp_path / "images", drawn(), orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, drawn(seed=3))
    assert inside(read_mask(mask).values).sum() == pydicom.dcmread(mask).pixel_array.sum()


def test_without_highdicom_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = write_seg(tmp_path / "seg.dcm", series(tmp_path / "images", drawn(), orthogonal()), drawn())
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(
        CdiffError, match=r"seg.dcm is a DICOM segmentation, and highdicom, which reads it, is not installed"
    ):
        read_mask(mask)
