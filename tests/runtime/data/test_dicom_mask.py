"""DICOM segmentations as masks of DICOM images: what is bright in the image is what was marked, wherever and however the frames lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.runtime.data import dicom_mask
from cdiff.runtime.data.case import MASKS_BY, Case
from cdiff.runtime.data.cases import find_cases, read_case
from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.data.masks import inside, mask_slices, read_mask
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scans.sources import any_bytes
from cdiff.runtime.scoring.evaluate import case_sha256
from tests.runtime.data.rtstruct import rectangle, write_rtstruct
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
    path: Path,
    images: Path,
    pixels: NDArray[Any],
    *,
    kind: str = "BINARY",
    numbers: Sequence[int] = (1,),
    labels: Sequence[str] = (),
) -> Path:
    """A segmentation by highdicom of `pixels` [columns, rows, slices] (segments on a last axis, where they overlap).

    labels: of the segments, "segment 1" and so on unless given.
    """
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
            hd.seg.SegmentDescription(number, label, code, code, "MANUAL")
            for number, label in zip(numbers, labels or [f"segment {number}" for number in numbers], strict=True)
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
    case, grid = Case("case", folder, (mask,), labels=labels), read_scan(folder).grid
    return mask_slices(read_mask(mask, grid), grid, case, mask)


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


def test_a_segmentation_of_another_scan_is_refused_and_of_another_series_told(tmp_path: Path) -> None:
    """Where it lies says nothing of it: every scan of a chest lies at about the same place."""
    marked = drawn()
    images, mask = series(tmp_path / "images", marked, orthogonal()), tmp_path / "seg.dcm"
    (referenced,) = changed(write_seg(mask, images, marked)).ReferencedSeriesSequence
    grid = read_scan(images).grid
    assert read_mask(mask, grid).notes == ()
    referenced.SeriesInstanceUID = "1.2.3"
    changed(mask, ReferencedSeriesSequence=[referenced])
    assert read_mask(mask, grid).notes == (
        "was drawn on another series than its image, though in the same frame of reference",
    )
    np.testing.assert_array_equal(on(images, mask), read_scan(images).slices[:, 0] > 0)
    changed(mask, FrameOfReferenceUID="1.2.4")
    with pytest.raises(
        CdiffError, match=r"seg\.dcm cannot be laid on its image: its frame of reference is not its image's"
    ):
        read_mask(mask, grid)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("slices", [[2], [1, 4], [0, 5], [0, 2, 5], [0, 2, 4]])
def test_frames_that_are_left_out_stay_empty(slices: list[int], told: bool, tmp_path: Path) -> None:
    """Frames without a pixel need not be in the file, nor the distance of the slices, which the frames that are there then belie."""
    images = series(tmp_path / "images", drawn(slices), orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, drawn(slices))
    file = pydicom.dcmread(mask)
    assert file.NumberOfFrames == len(slices)
    measures = file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if told:
        measures.SliceThickness = 5  # which does not count then: slices may overlap
    else:
        del measures.SpacingBetweenSlices
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
    for path in (mask, Path(f"{mask}#1")):  # named or not
        np.testing.assert_array_equal(on(images, path), read_scan(images).slices[:, 0] > 0)
    write_seg(mask, images, drawn() * 0.4, kind="FRACTIONAL")
    assert not on(images, mask).any(), "fractions are of one, whatever a file's largest is"


def test_an_empty_segmentation_is_an_opinion(tmp_path: Path) -> None:
    images = series(tmp_path / "images", drawn(), orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, np.zeros(SHAPE, np.uint8))
    assert not on(images, mask).any()


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    images = series(tmp_path / "images", drawn(), orthogonal())
    mask = write_seg(tmp_path / "seg.dcm", images, np.stack([drawn(), drawn()], axis=-1), numbers=(1, 2))
    with pytest.raises(
        CdiffError,
        match=r"seg.dcm has segments that overlap: segment 1, segment 2; name the one .* such as seg.dcm#segment 1$",
    ):
        read_mask(mask)
    fractions = np.stack([drawn() * 0.6, (1 - drawn()) * 0.4], axis=-1)
    write_seg(mask, images, fractions, kind="FRACTIONAL", numbers=(1, 2))
    with pytest.raises(
        CdiffError, match=r"seg.dcm holds the fractions of several segments: segment 1, .* such as seg.dcm#segment 1"
    ):
        read_mask(mask)
    with pytest.raises(CdiffError, match=r"is DICOM \(CT\), but neither a segmentation nor contours"):
        read_mask(next(images.iterdir()))
    write_seg(mask, images, drawn())
    mask.write_bytes(mask.read_bytes()[:-400])
    with pytest.raises(CdiffError, match=r"seg.dcm cannot be read as a DICOM segmentation"):
        read_mask(mask)
    mask.write_bytes(b"no DICOM at all")
    with pytest.raises(CdiffError, match=r"seg.dcm cannot be read as a DICOM segmentation"):
        read_mask(mask)
    mask.write_bytes(b"")
    with pytest.raises(CdiffError, match=r"seg.dcm is empty"):
        read_mask(mask)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_a_segment_is_read_by_its_label_or_number(kind: str, tmp_path: Path) -> None:
    """Whichever overlap it, or whether it has a pixel; labels of label maps are not asked of it."""
    images = series(tmp_path / "images", drawn(), orthogonal())
    pixels = np.stack([drawn(seed=1), drawn(), drawn(()), drawn(seed=2)], axis=-1)
    if kind == "LABELMAP":  # whose segments cannot overlap
        pixels = np.where(drawn(), 2, drawn(seed=1)).astype(np.uint8)
    elif kind == "FRACTIONAL":
        pixels = pixels * 0.6
    labels = ("GTV-1vis-1", "GTV-1vis-2", "3", "GTV-1vis-1")
    mask = write_seg(tmp_path / "seg.dcm", images, pixels, kind=kind, numbers=(1, 2, 3, 4), labels=labels)
    bright = read_scan(images).slices[:, 0] > 0
    for name in ("GTV-1vis-2", "2"):
        np.testing.assert_array_equal(on(images, Path(f"{mask}#{name}")), bright)
    assert not on(images, Path(f"{mask}#3")).any()
    assert on(images, Path(f"{mask}#1")).any()
    if kind != "FRACTIONAL":
        np.testing.assert_array_equal(on(images, Path(f"{mask}#2"), labels=(7,)), bright)
    for name, message in (
        (
            "GTV",
            r"seg\.dcm#GTV does not exist: the file holds 1 \(GTV-1vis-1\), 2 \(GTV-1vis-2\), 3 \(3\), 4 \(GTV-1vis-1\)",
        ),
        ("GTV-1vis-1", r"seg\.dcm#GTV-1vis-1 is the name of several structures; name one by its number \(1, 4\)"),
    ):
        with pytest.raises(CdiffError, match=message):
            read_mask(Path(f"{mask}#{name}"))


def test_other_files_have_no_structures(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(drawn()[..., 0]).save(path)
    with pytest.raises(
        CdiffError, match=r"mask\.png#anna does not exist, and mask\.png is not DICOM.*; leave #anna out"
    ):
        read_mask(Path(f"{path}#anna"))
    path.rename(tmp_path / "mask#anna.png")  # a file's own name may have the sign
    assert read_mask(tmp_path / "mask#anna.png").values.any()


def write_readers(folder: Path, case: str, marked: NDArray[np.uint8], readers: int = 3) -> tuple[str, list[str]]:
    """A case whose readers' outlines are one structure set's, each a column further; its image's cell of a table, and its masks'."""
    images = series(folder / case, marked, orthogonal())
    columns, rows, slices = (np.flatnonzero(marked.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    sides = columns[0] - 0.5, rows[0] - 0.5, columns[-1] + 0.5, rows[-1] + 0.5
    drawn = {
        f"GTV-1vis-{n + 1}": [(int(k), rectangle(sides[0], sides[1], sides[2] + n, sides[3])) for k in slices]
        for n in range(readers)
    }
    write_rtstruct(folder / f"{case}.dcm", images, orthogonal(), drawn)
    return case, [f"{case}.dcm#{name}" for name in drawn]


def solid(columns: int, rows: int = 10) -> NDArray[np.uint8]:
    marked = np.zeros(SHAPE, np.uint8)
    marked[5 : 5 + columns, 4 : 4 + rows, 1:5] = 1
    return marked


def write_readers_table(folder: Path, splits: Sequence[str]) -> Path:
    rows = ["case,split,image,rater,mask"]
    for number, split in enumerate(splits):
        image, masks = write_readers(folder, f"p{number}", solid(6 + number))
        rows += [f"p{number},{split},{image},{rater},{mask}" for rater, mask in zip("abc", masks, strict=True)]
    (folder / "cases.csv").write_text("\n".join(rows))
    return folder / "cases.csv"


def test_one_file_may_hold_all_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read once for all of them, however masks are laid; two who drew alike are told, as of files of their own."""
    table = write_readers_table(tmp_path, ("train", "val"))
    read: list[str] = []
    monkeypatch.setattr(dicom_mask, "any_bytes", lambda path: read.append(path.name) or any_bytes(path))
    for masks_by in MASKS_BY:
        for (case,) in find_cases(table, masks_by=masks_by).values():
            image, masks = read_case(case)
            assert read == [f"{case.name}.dcm"]
            read.clear()
            np.testing.assert_array_equal(masks[:, 0], image[:, 0] > 0)
            assert [mask.sum() for mask in masks.swapaxes(0, 1)] == [(6 + int(case.name[1]) + n) * 40 for n in range(3)]
        check = check_data(table, masks_by=masks_by, labels=(4,))
        assert read == ["p0.dcm", "p1.dcm"]
        read.clear()
        assert check.possible
        assert check.report["findings"] == []
        assert [row["raters"] for row in check.report["cases"]] == [["a", "b", "c"]] * 2
    table.write_text(table.read_text().replace("p1.dcm#GTV-1vis-2", "p1.dcm#GTV-1vis-3"))
    texts = [finding["text"] for finding in check_data(table).report["findings"]]
    assert any(text.startswith(f"cases.csv names more than once: {tmp_path / 'p1.dcm#GTV-1vis-3'};") for text in texts)
    assert "identical masks: b and c" in texts


def test_a_case_is_scored_again_when_another_structure_is_named(tmp_path: Path) -> None:
    image, masks = write_readers(tmp_path, "p0", solid(6))
    one, other = (Case("p0", tmp_path / image, (tmp_path / masks[0], tmp_path / masks[n])) for n in (1, 2))
    assert case_sha256(one) == case_sha256(one) != case_sha256(other)


def test_an_image_that_cannot_be_read_is_told_once(tmp_path: Path) -> None:
    """And not again for each of the contours that would lie on it; but what is wrong with a structure is."""
    table = write_readers_table(tmp_path, ("train", "val"))
    table.write_text(table.read_text().replace("p1.dcm#GTV-1vis-2", "p1.dcm#GTV-1vis-9"))
    next((tmp_path / "p1").iterdir()).write_bytes(b"")
    image, structure = [f["text"] for f in check_data(table).report["findings"] if f["kind"] == "unreadable"]
    assert "is empty (0 bytes)" in image
    assert "p1.dcm#GTV-1vis-9 does not exist" in structure


@pytest.mark.slow
def test_from_one_structure_set_a_case_to_scores(tiny_bundle: Path, tmp_path: Path) -> None:
    """By the commands: the check, its sheet, training, and evaluation of another training's bundle."""
    table = write_readers_table(tmp_path, ("train", "train", "val", "test"))

    def command(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result

    command("data", "check", table, "--json", tmp_path / "check.json", "--sheet", tmp_path / "sheet.png")
    assert json.loads((tmp_path / "check.json").read_text())["findings"] == []
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    command("train", "--data", table, "--preset", "tiny", "--max-steps", 2, "--out", tmp_path / "run", "-q")
    assert json.loads((tmp_path / "run" / "data.json").read_text())["train"][1]["marked"] == (7 + 8 + 9) * 40
    scored = ("--json", tmp_path / "scores.json", "--runs", 2, "--steps", 2)
    command("evaluate", "--data", table, "--model", tiny_bundle, *scored, "-q")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["data"]["split"], scores["n_slices"]) == ("test", 4)
    # Of the pairs' Dice on the columns 9, 10 and 11 that the readers marked.
    pairs = np.mean([2 * a / (a + b) for a, b in ((9, 10), (10, 11), (9, 11))])
    assert abs(scores["pairwise_dice_annotators"]["mean"] - pairs) < 1e-6


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


def test_a_file_whose_kind_is_damaged_is_refused_in_one_line(tmp_path: Path) -> None:
    """pydicom reads a value when it is asked for."""
    path = write_seg(tmp_path / "m.dcm", series(tmp_path / "images", drawn(), orthogonal()), drawn())
    data = path.read_bytes()
    kind = data.index(b"\x08\0\x16\0UI")
    path.write_bytes(data[: kind + 4] + b"UY" + data[kind + 6 :])
    with pytest.raises(CdiffError, match=r"m\.dcm cannot be read as a DICOM segmentation"):
        read_mask(path)
