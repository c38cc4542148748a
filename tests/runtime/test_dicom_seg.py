"""The DICOM segmentation: every pixel where the NIfTI map has it, read back by pydicom alone; what it refers to; what is refused."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.runtime.dicom_seg import must_allow_dicom_seg, write_dicom_seg
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.report import NOTICE
from cdiff.runtime.results import Result
from cdiff.runtime.scans.inputs import scans_at
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.segmenter import Segmenter
from cdiff.runtime.stack import Stack
from tests.runtime.dicom_files import moved, orthogonal, upright, write_multiframe, write_series
from tests.runtime.test_segmenter import QUICK, make_bundle
from tests.strict import every_warning_is_an_error

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
ANONYMOUS = ("PatientName", "PatientID", "StudyDate", "StudyTime", "SeriesNumber")
LEVELS = ((1.0, 0.6), (0.5, 0.9), (1.0, 2.0))
"""What each level's map has where it marks, one half among them, and the share of the pixels that it leaves out."""


def voxels(slices: int = 5) -> Any:
    return np.random.default_rng(6).integers(-1000, 1500, (24, 20, slices)).astype(np.int16)


def found_in(folder: Path, *, axis: int = 2, chosen: range | None = None) -> Result:
    """A result of a series whose three levels lie within one another at random, one of them nowhere."""
    scan = read_scan(folder, slice_axis=axis)
    chosen = chosen or range(len(scan.slices))
    draw = np.random.default_rng(7).random((len(chosen), *scan.slices.shape[2:])).astype(np.float32)
    maps = np.stack([level * (draw > share).astype(np.float32) for level, share in LEVELS], axis=1)
    return Result(scan.grid, scan.slices, chosen, Stack(maps, draw), scan.name, {}, dicom=scan.dicom)


def pixels_of(path: Path) -> dict[int, set[tuple[float, ...]]]:
    """For each segment the millimetres (left, back, up) of its pixels, from the standard's equation (PS3.3, C.7.6.2.1.1)."""
    file = pydicom.dcmread(path)
    frames = file.pixel_array.reshape(-1, file.Rows, file.Columns)
    shared = file.SharedFunctionalGroupsSequence[0]
    across, down = np.reshape([float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient], (2, 3))
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    found: dict[int, set[tuple[float, ...]]] = {}
    for frame, group in zip(frames, file.PerFrameFunctionalGroupsSequence, strict=True):
        corner = np.array([float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient])
        places = found.setdefault(int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber), set())
        for row, column in np.argwhere(frame):
            place = corner + column * between_columns * across + row * between_rows * down
            places.add(tuple(np.round(place, 2) + 0.0))
    return found


def places_of(result: Result, level: int) -> set[tuple[float, ...]]:
    """The same of a level's NIfTI map."""
    assert result.grid.header is not None
    affine = result.grid.header.get_best_affine()
    inside = np.argwhere(np.nan_to_num(result.levels[..., level - 1]) >= 0.5)
    return {tuple(np.round(LPS_TO_RAS @ (affine[:3, :3] @ ijk + affine[:3, 3]), 2) + 0.0) for ijk in inside}


def near(one: set[tuple[float, ...]], other: set[tuple[float, ...]]) -> bool:
    """Whether both hold the same places, to a few hundredths of a millimetre."""
    a, b = (np.array(sorted(places)).reshape(-1, 3) for places in (one, other))
    return len(a) == len(b) and all(np.abs(b - place).max(axis=1).min() < 0.05 for place in a)


@pytest.mark.parametrize(("axis", "chosen"), [(2, None), (2, range(1, 3)), (0, range(4, 9))])
def test_every_pixel_lies_where_the_map_has_it(axis: int, chosen: range | None, tmp_path: Path) -> None:
    """Oblique, cut along either axis; levels that mark nothing have no frames, and slices that were not segmented none either."""
    result = found_in(write_series(tmp_path / "a", voxels(), orthogonal()), axis=axis, chosen=chosen)
    write_dicom_seg(result, tmp_path / "seg.dcm")
    found = pixels_of(tmp_path / "seg.dcm")
    assert set(found) == {1, 2}
    for level in (1, 2):
        assert len(places_of(result, level)) > 20
        assert near(found[level], places_of(result, level))


@pytest.mark.parametrize("sense", [1, -1])
def test_images_that_dcm2niix_turns_keep_their_own_frames(sense: int, tmp_path: Path) -> None:
    """A sagittal series of the head becomes an axial volume; its frames must be its images' all the same, or no viewer shows them there."""
    lps = np.array([[0, 0, 2.5 * sense, 10], [0.7, 0, 0, 20], [0, -0.8, 0, 30]], dtype=float)
    folder = write_series(tmp_path / "a", voxels(), lps, change=lambda _, file: upright(file))
    result = found_in(folder)
    assert result.grid.shape == (5, 24, 20), "it is no longer turned: then this tests nothing"
    write_dicom_seg(result, tmp_path / "seg.dcm")
    found = pixels_of(tmp_path / "seg.dcm")
    assert all(near(found[level], places_of(result, level)) for level in (1, 2))
    assert own_frames(tmp_path / "seg.dcm", folder) == 10


@pytest.mark.parametrize("change", ["removed", "cut off", "emptied", "another patient's"])
def test_images_that_change_after_they_were_segmented(change: str, tmp_path: Path) -> None:
    """Headers are read again when the maps are there, which may be hours later."""
    folder = write_series(tmp_path / "a", voxels(), orthogonal())
    result, image = found_in(folder), sorted(folder.iterdir())[1]
    if change == "another patient's":
        write_series(folder, voxels(), orthogonal())
    elif change == "removed":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[: 100 if change == "cut off" else 0])
    says = (
        "would name that series' patient"
        if change == "another patient's"
        else f"{image} has changed since it was segmented"
    )
    with pytest.raises(CdiffError, match=says) as caught:
        write_dicom_seg(result, tmp_path / "seg.dcm")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "seg.dcm").exists()


def test_images_that_lie_elsewhere_than_the_map(tmp_path: Path) -> None:
    """As after a program that moved them and left the series its name."""
    for name, mm in (("a", 0), ("b", 5)):
        write_series(tmp_path / name, voxels(), orthogonal(), change=lambda _, file, mm=mm: moved(file, (mm, 0, 0)))
    result, beside = (found_in(tmp_path / name) for name in "ab")
    result = dataclasses.replace(result, dicom=beside.dicom, grid=dataclasses.replace(result.grid, series=""))
    with pytest.raises(CdiffError, match=r"segmentation cannot be made \(its images reach beyond the volume\)"):
        write_dicom_seg(result, tmp_path / "seg.dcm")


def own_frames(path: Path, folder: Path) -> int:
    """How many frames refer to an image, which must be one that lies at the very same place."""
    images = [pydicom.dcmread(file) for file in folder.iterdir()]
    there = {image.SOPInstanceUID: [float(v) for v in image.ImagePositionPatient] for image in images}
    count = 0
    for frame in pydicom.dcmread(path).PerFrameFunctionalGroupsSequence:
        for derived in frame.get("DerivationImageSequence", []):
            (image,) = derived.SourceImageSequence
            corner = [float(v) for v in frame.PlanePositionSequence[0].ImagePositionPatient]
            np.testing.assert_allclose(corner, there[image.ReferencedSOPInstanceUID], atol=1e-3)
            count += 1
    return count


def test_positions_that_are_not_quite_even(tmp_path: Path) -> None:
    """To a hundredth of a millimetre, as headers round them: each frame is its image's."""
    draw = np.random.default_rng(1)
    folder = write_series(
        tmp_path / "a", voxels(), orthogonal(), change=lambda _, file: moved(file, draw.normal(0, 0.004, 3))
    )
    write_dicom_seg(found_in(folder), tmp_path / "seg.dcm")
    assert own_frames(tmp_path / "seg.dcm", folder) == 10


def test_a_copy_of_an_image_moves_nothing(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a", voxels(), orthogonal())
    shutil.copy(folder / "IM0014", folder / "IM0014 copy")
    result = found_in(folder)
    write_dicom_seg(result, tmp_path / "seg.dcm")
    found = pixels_of(tmp_path / "seg.dcm")
    assert all(near(found[level], places_of(result, level)) for level in (1, 2))


def test_frames_of_one_file(tmp_path: Path) -> None:
    folder = write_multiframe(tmp_path / "a", voxels(), orthogonal(), order=(3, 0, 4, 1, 2))
    result = found_in(folder)
    write_dicom_seg(result, tmp_path / "seg.dcm")
    found = pixels_of(tmp_path / "seg.dcm")
    assert all(near(found[level], places_of(result, level)) for level in (1, 2))


def test_it_is_of_its_images_and_says_what_it_is(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a", voxels(), orthogonal(), number=4)
    result = dataclasses.replace(
        found_in(folder),
        report={"bundle": "tiny", "task": "a task", "steps": 9, "seed": 7, "other": 1, "manifest_sha256": "5ha"},
    )
    write_dicom_seg(result, tmp_path / "seg.dcm")
    file, images = pydicom.dcmread(tmp_path / "seg.dcm"), [pydicom.dcmread(path) for path in folder.iterdir()]
    assert file.Modality == "SEG"
    assert file.SeriesNumber == 1004
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert file[keyword].value == images[0][keyword].value
    assert file.SeriesInstanceUID != images[0].SeriesInstanceUID
    referred = {
        image.ReferencedSOPInstanceUID
        for frame in file.PerFrameFunctionalGroupsSequence
        for derived in frame.DerivationImageSequence
        for image in derived.SourceImageSequence
    }
    assert referred == {image.SOPInstanceUID for image in images}
    assert [segment.SegmentLabel for segment in file.SegmentSequence] == [
        f"at least {c} of 3 annotators" for c in (1, 2, 3)
    ]
    (algorithm,) = file.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmName == "cdiff"
    assert algorithm.AlgorithmParameters == "steps=9,seed=7"
    (kind,) = file.SegmentSequence[0].SegmentedPropertyTypeCodeSequence
    assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == ("structure", "99CDIFF", "a task")
    assert file.DeviceSerialNumber == "5ha"
    assert (file.ContentDescription, file.ContentLabel, file.InstanceNumber) == (NOTICE, "CONSENSUS_LEVELS", 1)
    assert file.SeriesDescription == "cdiff: levels of agreement of 3 annotators"
    assert (file.Manufacturer, file.ManufacturerModelName) == ("cdiff", "cdiff, model tiny")


def test_names_longer_than_the_standard_takes_are_cut_and_one_that_is_missing_is_general(tmp_path: Path) -> None:
    result = found_in(write_series(tmp_path / "a", voxels(), orthogonal()))
    report = {"bundle": "b" * 80, "task": "t" * 80, "manifest_sha256": "0" * 80}
    for name, told, structure in (("long", report, "t" * 64), ("none", {}, "structure")):
        write_dicom_seg(dataclasses.replace(result, report=told), tmp_path / f"{name}.dcm")
        file = pydicom.dcmread(tmp_path / f"{name}.dcm")
        assert max(len(file.ManufacturerModelName), len(file.DeviceSerialNumber)) <= 64
        assert file.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == structure


@every_warning_is_an_error
def test_a_map_of_nothing_is_written_as_that(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """highdicom says that it is empty, and pydicom that the name is odd, which a terminal need not show."""
    named = write_series(
        tmp_path / "a", voxels(), orthogonal(), change=lambda _, file: setattr(file, "PatientName", "no carets")
    )
    result = found_in(named)
    stack = dataclasses.replace(result.stack, held_maps=0 * result.stack.maps)
    for _ in range(2):  # what is shown otherwise is so again afterwards
        write_dicom_seg(dataclasses.replace(result, stack=stack), tmp_path / "seg.dcm")
        assert caplog.messages == []
        logging.getLogger("highdicom").warning("shown")
        assert caplog.messages == ["shown"]
        caplog.clear()
    assert pixels_of(tmp_path / "seg.dcm") == {1: set(), 2: set(), 3: set()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return Segmenter.open(make_bundle(tmp_path_factory.mktemp("seg") / "tiny"))


def test_it_is_written_with_the_maps_and_is_no_scan(model: Segmenter, tmp_path: Path) -> None:
    """Beside the images too; without it the next time the old one goes."""
    folder = write_series(tmp_path / "a", voxels(), orthogonal())
    result = model.segment(folder, **QUICK)
    report = result.save(folder, dicom_seg=True)
    assert "a_levels.dcm" in report["outputs"]
    assert near(pixels_of(folder / "a_levels.dcm").get(1, set()), places_of(result, 1))
    (again,) = scans_at(folder)
    assert len(read_scan(again.path).slices) == 5
    for file in write_series(tmp_path / "b", voxels(2), orthogonal(), number=12).iterdir():
        file.rename(folder / f"of another series {file.name}")
    (folder / "a_levels.dcm").unlink()
    (done,) = model.segment_many([folder], save_to=folder, series=3, dicom_seg=True, **QUICK)
    assert done.error is None
    assert (folder / "a_levels.dcm").is_file()
    result.save(folder)
    assert not (folder / "a_levels.dcm").exists()
    (folder / "a_levels.dcm").write_bytes(b"a reader's own")
    with pytest.raises(CdiffError, match=r"a_levels.dcm exists and would be replaced"):
        result.save(folder, dicom_seg=True)


def test_the_command_writes_one_or_says_before_the_work_that_it_cannot(
    model: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_series(tmp_path / "a", voxels(2), orthogonal())
    command = ["segment", str(folder), "--model", str(model.bundle.path), "--dicom-seg", "-o", str(tmp_path / "maps")]
    done = CliRunner().invoke(app, [*command, "--runs", "1", "--steps", "1", "--no-preview"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "maps/a_levels.dcm").is_file()
    nib.save(nib.Nifti1Image(voxels(2), np.eye(4)), tmp_path / "b.nii")
    monkeypatch.setattr(Segmenter, "segment", None)
    done = CliRunner().invoke(app, [*command[:1], str(tmp_path / "b.nii"), *command[2:]])
    assert (done.exit_code, "b.nii is not DICOM" in done.stderr) == (2, True), done.output


def test_images_that_somebody_made_anonymous_will_do(tmp_path: Path) -> None:
    folder = write_series(
        tmp_path / "a", voxels(), orthogonal(), change=lambda _, file: [file.pop(name) for name in ANONYMOUS]
    )
    write_dicom_seg(found_in(folder), tmp_path / "seg.dcm")
    assert pydicom.dcmread(tmp_path / "seg.dcm").PatientName == ""


@pytest.mark.parametrize(("said", "turned", "thick"), [("", False, 2.5), ("", True, 2.5), ("1.25", False, 1.25)])
def test_slices_as_thick_as_they_are_apart_where_nothing_says(
    said: str, turned: bool, thick: float, tmp_path: Path
) -> None:
    """Also where dcm2niix has turned the volume, so that they are not apart along its last axis."""

    def change(_: int, file: Any) -> None:
        file.SliceThickness, file.SeriesNumber = said, None  # as programs that make images anonymous empty it
        if turned:
            upright(file)

    lps = np.array([[0, 0, 2.5, 10], [0.7, 0, 0, 20], [0, -0.8, 0, 30]], dtype=float) if turned else orthogonal()
    result = found_in(write_series(tmp_path / "a", voxels(), lps, change=change))
    assert (result.grid.shape[0] == 5) == turned
    write_dicom_seg(result, tmp_path / "seg.dcm")
    (measures,) = pydicom.dcmread(tmp_path / "seg.dcm").SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert float(measures.SliceThickness) == pytest.approx(thick)


def test_without_highdicom_that_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = read_scan(write_series(tmp_path / "a", voxels(), orthogonal()))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(
        CdiffError, match=r"a: highdicom, which writes .*; try: pip install --no-deps highdicom, or leave out"
    ):
        must_allow_dicom_seg(scan)


def test_what_cannot_have_one_is_said_before_the_work(tmp_path: Path) -> None:
    folder = write_series(
        tmp_path / "a", voxels(), orthogonal(), change=lambda _, file: file.pop("FrameOfReferenceUID")
    )
    with pytest.raises(
        CdiffError, match=r"a: its DICOM images do not allow a DICOM segmentation \(.*Frame Of Reference UID"
    ):
        must_allow_dicom_seg(read_scan(folder))
    nowhere = write_series(
        tmp_path / "c", voxels(), orthogonal(), change=lambda _, file: file.pop("ImagePositionPatient")
    )
    with pytest.raises(CdiffError, match="they do not say where they lie"):
        must_allow_dicom_seg(read_scan(nowhere))
    parts = write_series(
        tmp_path / "d", voxels(), orthogonal(), change=lambda k, file: setattr(file, "FrameOfReferenceUID", f"1.2.{k}")
    )
    with pytest.raises(CdiffError, match="do not allow a DICOM segmentation"):
        must_allow_dicom_seg(read_scan(parts))
    read = read_scan(voxels())
    with pytest.raises(CdiffError, match="array is not DICOM, and a DICOM segmentation belongs to DICOM images"):
        must_allow_dicom_seg(read)
    result = Result(read.grid, read.slices, range(5), Stack(0 * read.slices, 0 * read.slices[:, 0]))
    with pytest.raises(CdiffError, match="scan was not read from DICOM"):
        result.save(tmp_path / "out", preview=False, dicom_seg=True)
    assert not list((tmp_path / "out").glob("*")), "nor are the other files written"
    must_allow_dicom_seg(read_scan(write_series(tmp_path / "b", voxels(), orthogonal())))
