"""The check of a data set: every oddity is found, nothing is invented, and one bad file does not hide the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.data.datacheck import Check, check_data
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.pictures.sheet import CASES, chosen, sheet_figure, write_sheet
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scoring.metrics import dice_of, overlap_of_pairs
from tests.layouts import disc, save, write_brats, write_qubiq, write_table


def said(check: Check, kind: str) -> list[tuple[str, str, str]]:
    """The findings of one kind: how bad, which case, what."""
    return [(f["severity"], f["case"], f["text"]) for f in check.report["findings"] if f["kind"] == kind]


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write_qubiq(tmp_path / "clean", {"Training": 3, "Validation": 1}, spacing=(0.5, 0.6, 3.0))


def test_clean_data_has_no_findings(clean: Path) -> None:
    check = check_data(clean)
    report = check.report
    assert check.possible
    assert report["findings"] == []
    assert report["splits"]["train"] | {"pairwise_dice": None} == {
        **{"cases": 3, "unlabelled": 0, "slices": 3, "marked_slices": 3, "slices_all_marked": 3},
        "pairwise_dice": None,
    }
    assert report["annotators"] == {
        **{"levels": 3, "cases_by_number": {"3": 4}, "names": ["seg01", "seg02", "seg03"]},
    }
    assert report["image"] == {
        **{"channels": 1, "modalities": []},
        **{"sizes": {"32 x 32 x 1": 4}, "spacings_mm": {"0.5 x 0.6 x 3": 4}},
    }
    json.dumps(report, allow_nan=False)


def test_the_numbers_are_those_of_the_masks(clean: Path) -> None:
    """Class balance and pairwise Dice against a count by hand."""
    masks = [np.stack([disc((32, 32), 0.2 * k, number) for k in (1, 2, 3)]) for number in range(1, 5)]
    shares = np.mean([[(m.sum(axis=0) >= c).mean() for c in (1, 2, 3)] for m in masks], axis=0)
    report = check_data(clean).report
    assert report["class_balance"]["pixels_at_least"] == pytest.approx(shares.tolist(), abs=1e-7)
    expected = [dice_of(overlap_of_pairs(m)).mean() for m in masks]
    assert report["pairwise_dice"]["mean"] == pytest.approx(np.mean(expected))
    assert report["pairwise_dice"]["n_slices"] == 4
    assert report["cases"][0]["pairwise_dice"] == pytest.approx(expected[0])


def test_a_case_of_more_masks_than_the_others_is_not_said_to_be_usable_by_a_setting(tmp_path: Path) -> None:
    root = write_qubiq(tmp_path, {"Training": 4, "Validation": 1})
    shutil.copy(root / "Training/case02/task01_seg01.nii.gz", root / "Training/case02/task01_seg04.nii.gz")
    ((_, case, text),) = said(check_data(root), "annotators")
    assert (case, text) == ("case02", "4 masks, the others have 3; training leaves it out")


def test_qubiqs_oddities(tmp_path: Path) -> None:
    """A rater who lacks, one who saw nothing, two who are one, the fake spacing, two sizes."""
    root = write_qubiq(tmp_path, {"Training": 5, "Validation": 1}, raters=6, shapes=((64, 64, 1), (96, 64, 1)))
    folder = root / "Training"
    (folder / "case03/task01_seg04.nii.gz").unlink()
    save(folder / "case02/task01_seg02.nii.gz", np.zeros((64, 64, 1), bool), None)
    shutil.copy(folder / "case04/task01_seg05.nii.gz", folder / "case04/task01_seg06.nii.gz")
    check = check_data(root)
    assert check.possible
    ((_, case, text),) = said(check, "annotators")
    assert case == "case03"
    assert text.startswith("5 masks (seg04 missing), the others have 6")
    assert text.endswith("training leaves it out unless missing_raters says otherwise")
    assert said(check, "empty") == [("note", "case02", "seg02 marked nothing")]
    assert said(check, "duplicated") == [("warning", "case04", "identical masks: seg05 and seg06")]
    assert [case for _, case, _ in said(check, "spacing")] == [f"case{k:02d}" for k in range(1, 7)]
    assert check.report["image"]["sizes"] == {"64 x 64 x 1": 3, "96 x 64 x 1": 3}
    assert check.report["splits"]["train"]["slices_all_marked"] == 4
    assert check.report["training"]["train"] == {"cases": 4, "cases_found": 5, "slices": 4}


def save_cases(root: Path, cases: Mapping[str, Sequence[NDArray[np.bool_]]]) -> None:
    """Each case's masks, beside an image of noise."""
    for name, masks in cases.items():
        save(root / name / "image.nii.gz", np.random.default_rng(0).normal(size=masks[0].shape), None)
        for k, mask in enumerate(masks, start=1):
            save(root / name / f"task01_seg{k:02d}.nii.gz", mask, None)


def test_black_drawn_on_white_is_told(tmp_path: Path) -> None:
    """Of one annotator, or of all; a structure that fills most of a slice, or reaches a corner, is none."""
    shape = (16, 16, 2)
    drawn = np.zeros(shape, bool)
    drawn[5:9, 5:9] = True
    large, cut, full = np.zeros(shape, bool), np.ones(shape, bool), np.ones(shape, bool)
    large[1:15, 1:] = True
    cut[12:, 12:, 0] = False
    cases = {
        "one": (drawn, ~drawn),
        "all": (~drawn, ~drawn[::-1, ::-1]),
        "none": (large, drawn),
        "corner": (cut, drawn),
        "full": (full, drawn),
    }
    save_cases(tmp_path, cases)
    text = "the corners of every slice and most of it: are the values swapped, with 0 where something was drawn?"
    assert said(check_data(tmp_path), "inverted") == [
        ("warning", "all", f"seg01, seg02 mark {text}"),
        ("warning", "one", f"seg02 marks {text}"),
    ]
    assert [case for _, case, text in said(check_data(tmp_path), "values") if "everywhere" in text] == ["full"]


def test_a_mask_beside_all_others_is_told(tmp_path: Path) -> None:
    """As of a file that was mistaken for another case's, or that is stored turned; not one that is empty, or stands alone."""
    shape = (16, 16, 2)
    here, there, none = (np.zeros(shape, bool) for _ in range(3))
    here[2:8, 2:8], there[10:14, 2:8] = True, True
    near = np.roll(here, 5, axis=0)
    cases = {
        "one": (here, near, here[::-1, ::-1]),
        "two": (here, there, none),
        "none": (here, near, none),
        "alone": (here, none, none),
    }
    save_cases(tmp_path, cases)
    text = "of this case, and stored as the others are?"
    assert said(check_data(tmp_path), "apart") == [
        ("warning", "one", f"seg03 shares no pixel with any other mask: is it {text}"),
        ("warning", "two", f"seg01, seg02 share no pixel with any other mask: are they {text}"),
    ]


def test_bad_files_are_named_and_the_others_are_checked(tmp_path: Path) -> None:
    root = write_qubiq(tmp_path, {"Training": 4, "Validation": 1, "Testing": 1})
    truncated = root / "Training/case01/task01_seg02.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:90])
    (root / "Training/case02/image.nii.gz").write_text("not a scan")
    save(root / "Training/case02/task01_seg01.nii.gz", np.full((32, 32, 1), np.nan, np.float32))
    save(root / "Training/case03/task01_seg03.nii.gz", disc((32, 30, 1)))
    (root / "Testing/case06/image.nii.gz").write_bytes(b"")
    check = check_data(root)
    assert not check.possible
    unreadable = said(check, "unreadable")
    assert [(severity, case) for severity, case, _ in unreadable] == [
        ("error", "case01"),
        ("error", "case02"),
        ("error", "case02"),
        ("warning", "case06"),
    ]
    assert str(truncated) in unreadable[0][2]
    assert "NaN" in unreadable[2][2]
    ((severity, case, text),) = said(check, "shape")
    assert (severity, case) == ("error", "case03")
    assert "32 x 30 x 1" in text
    assert check.report["splits"]["train"]["marked_slices"] == 1  # case04, checked all the same
    assert "4 files" in check.report["training"]["reasons"][0]


def test_a_bad_test_case_does_not_stop_training(clean: Path) -> None:
    write_qubiq(clean, {"Testing": 1})
    (clean / "Testing/case01/image.nii.gz").write_text("not a scan")
    check = check_data(clean)
    assert check.possible
    assert [severity for severity, _, _ in said(check, "unreadable")] == ["warning"]


def test_values_that_are_not_zero_and_one(tmp_path: Path) -> None:
    root = write_qubiq(tmp_path, {"Training": 3, "Validation": 1})
    label_map = disc((32, 32, 1)) * 1.0 + disc((32, 32, 1), -0.5) * 3.0
    save(root / "Training/case01/task01_seg01.nii.gz", label_map)
    for rater in (1, 2, 3):
        save(
            root / f"Training/case02/task01_seg{rater:02d}.nii.gz",
            (disc((32, 32, 1), rater / 9) * 255).astype(np.uint8),
        )
    findings = said(check_data(root), "values")
    assert [(severity, case) for severity, case, _ in findings] == [("warning", "case01"), ("note", "case02")]
    assert findings[0][2].startswith("task01_seg01.nii.gz holds 0, 1, 4, not 0 and 1")
    assert "values above half of the largest count as inside" in findings[0][2]
    assert findings[1][2] == "all masks hold 0, 255, not 0 and 1: read as 0 and 1"
    for rater in (2, 3):
        (root / f"Training/case02/task01_seg{rater:02d}.nii.gz").rename(tmp_path / f"{rater}")
    alone = said(check_data(root), "values")[1]
    assert alone[2] == "the mask holds 0, 255, not 0 and 1: read as 0 and 1", "no file's name: cases share the line"
    for rater in (2, 3):
        (tmp_path / f"{rater}").rename(root / f"Training/case02/task01_seg{rater:02d}.nii.gz")
    chosen_ = said(check_data(root, labels=(4,)), "values")
    above = [(kind, case) for kind, case, text in chosen_ if "none of the labels that count as inside (4)" in text]
    assert above == [("warning", "case02")]
    assert all("of these 4 count as inside" in text for _, case, text in chosen_ if case != "case02")
    for value, path in ((1, "case01/task01_seg01.nii.gz"), (255, "case02/task01_seg02.nii.gz")):
        save(root / "Training" / path, np.full((32, 32, 1), value, np.uint8))
    full = [(severity, text) for severity, _, text in said(check_data(root), "values") if "everywhere" in text]
    assert full == [
        ("warning", "task01_seg01.nii.gz holds 1 everywhere: every pixel counts as inside"),
        ("warning", "task01_seg02.nii.gz holds 255 everywhere: every pixel counts as inside"),
    ]


def test_a_mask_that_lies_elsewhere_is_told(clean: Path) -> None:
    save(clean / "Training/case01/task01_seg02.nii.gz", disc((32, 32, 1), 0.3, 1), (0.7, 0.6, 3.0))
    ((severity, case, text),) = said(check_data(clean), "grid")
    assert (severity, case) == ("warning", "case01")
    apart, _, remedy = text.partition("; ")
    assert apart == "task01_seg02.nii.gz and its image have different spacings (0.5 x 0.6 and 0.7 x 0.6 mm)"
    assert remedy == "--masks-by header lays it where its header says"


@pytest.mark.parametrize(
    ("mask_at", "told"),
    [
        ((-90, -126, -72), False),
        ((90, 126, -72), True),  # the mask is stored turned, as another program writes it
        ((0, 0, 0), False),  # a header that lost its place
    ],
)
def test_a_turned_mask_of_one_millimetre_voxels_is_told(tmp_path: Path, mask_at: tuple[int, ...], told: bool) -> None:
    root = write_qubiq(tmp_path, {"Training": 1}, raters=1)
    for name, at in (("image", (-90, -126, -72)), ("task01_seg01", mask_at)):
        path = root / f"Training/case01/{name}.nii.gz"
        turn = -1 if at[0] > 0 else 1
        affine = np.diag([turn, turn, 1.0, 1.0])
        affine[:3, 3] = at
        nib.save(nib.Nifti1Image(np.asanyarray(nib.load(path).dataobj), affine), path)
    assert [text.partition(" have ")[2].partition(";")[0] for _, _, text in said(check_data(root), "grid")] == (
        ["different affines (they do not lie in the same place)"] if told else []
    )
    read_scan([root / f"Training/case01/{name}.nii.gz" for name in ("image", "task01_seg01")], channels=2)


def test_a_picture_as_the_mask_of_a_nifti_is_told(tmp_path: Path) -> None:
    """A square one fits either way round."""
    folder = write_qubiq(tmp_path, {"Training": 1}, raters=2) / "Training/case01"
    for rater, words in (("seg01", "task01_seg01.png is a"), ("seg02", "each mask is a")):
        (folder / f"task01_{rater}.nii.gz").unlink()
        Image.fromarray(disc((32, 32), seed=len(words))).save(folder / f"task01_{rater}.png")
        ((severity, _, text),) = said(check_data(tmp_path), "grid")
        assert severity == "warning"
        told = f"{words} picture and its image a NIfTI: the two usually store a slice in different orientations"
        assert text.startswith(told)


def test_what_makes_training_impossible_is_said(tmp_path: Path) -> None:
    one = write_qubiq(tmp_path / "one", {"Training": 1})
    assert f"{one} has one training case, and that is not enough" in check_data(one).report["training"]["reasons"][0]
    only_tests = write_qubiq(tmp_path / "tests", {"Testing": 2})
    assert "no training cases" in check_data(only_tests).report["training"]["reasons"][0]
    blank = write_qubiq(tmp_path / "blank", {"Training": 2, "Validation": 1})
    for path in (blank / "Validation").rglob("task*"):
        save(path, np.zeros((32, 32, 1), bool))
    assert "no validation slice" in check_data(blank).report["training"]["reasons"][0]
    brats = write_brats(tmp_path / "brats", 3)
    next((brats / "000002").glob("*_t2_*")).unlink()
    check = check_data(brats)
    assert "1 case cannot be used" in check.report["training"]["reasons"][0]
    assert [(severity, case) for severity, case, _ in said(check, "layout")] == [("error", "000002")]
    with pytest.raises(CdiffError, match="no case in"):
        check_data(tmp_path / "one/Training/case01", layout="brats")


def test_channels_are_counted_in_the_training_cases_as_training_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, colours, count in (("Testing", 1, 4), ("Training", 3, 2)):
        for number in range(count):
            folder = tmp_path / split / f"case{number}"
            folder.mkdir(parents=True)
            pixels = np.broadcast_to(rng.integers(0, 255, (16, 16, colours)), (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "image.png")
            Image.fromarray(disc((16, 16))).save(folder / "mask_anna.png")
    assert check_data(tmp_path).report["training"]["image_channels"] == 3


def test_an_image_that_several_cases_have_is_told(tmp_path: Path) -> None:
    """A folder for each annotator, each with the image: below a split folder that is how patients lie. Images of one value say nothing."""
    for annotator in ("anna", "ben"):
        root = write_qubiq(tmp_path / "Training" / annotator, {"": 3}, raters=1)
        save(root / "case03/image.nii.gz", np.zeros((32, 32)))
    advice = "put all masks of an image in one case, and no image in two splits"
    pairs = ", ".join(f"(anna/case0{k} in train, ben/case0{k} in train)" for k in (1, 2))
    assert said(check_data(tmp_path), "duplicated") == [
        ("warning", "", f"cases with the same image: {pairs}; {advice}")
    ]


def test_a_validation_split_with_fewer_annotators_says_how_to_use_it(clean: Path) -> None:
    (clean / "Validation/case04/task01_seg03.nii.gz").unlink()
    training = check_data(clean).report["training"]
    assert training["reasons"] == [
        "no usable val slice: no val case has 3 masks (they have 2); --set missing_raters=as-is uses the masks that there are"
    ]


def test_volumes_that_are_cut_into_strips_are_told(tmp_path: Path) -> None:
    """As QUBIQ's of the pancreas, whose slices lie along the first axis."""
    for number, shape in enumerate(((9, 40, 36), (7, 40, 36), (40, 36, 9), (16, 30, 30), (1, 40, 36)), start=1):
        for name in ("image", "task01_seg01", "task01_seg02"):
            save(tmp_path / f"case{number}/{name}.nii.gz", np.moveaxis(disc((*shape[1:], shape[0])), 2, 0))
    save(tmp_path / "case6/image.nii.gz", np.zeros((4, 40, 36)))
    save(tmp_path / "case6/task01_seg01.nii.gz", disc((40, 36)))  # channels come first: no volume
    ((severity, _, text),) = said(check_data(tmp_path), "slices")
    assert severity == "warning"
    assert text.startswith(
        "3 volumes are cut into strips (9 x 40 of 9 x 40 x 36); along axis 0 the slices would be 40 x 36: "
    )
    assert "--slice-axis 0 here, and --set slice_axis=0 to cdiff train" in text
    ((_, _, text),) = said(check_data(tmp_path, slice_axis=0), "slices")
    assert text.startswith("case3 is cut into strips (36 x 9 of 40 x 36 x 9); along axis 2")


def test_pictures_of_a_table(tmp_path: Path) -> None:
    table = write_table(tmp_path, 3, modalities=("a", "b"))
    flat = np.zeros((32, 36), np.uint16)
    Image.fromarray(flat).save(tmp_path / "files/p1b.png")
    check = check_data(table)
    assert check.report["image"]["modalities"] == ["a", "b"]
    assert check.report["image"]["channels"] == 2
    assert check.report["image"]["spacings_mm"] == {"unknown": 3}
    assert ("warning", "p1", "channel 2 has the same value everywhere") in said(check, "image")
    assert check.possible


def test_real_nodules_agree_as_published(lidc: Path) -> None:
    """Testing: 485 slices, 351 marked by all, where two readers' mean Dice is 0.770 (counted when the data was made)."""
    check = check_data(lidc / "Testing")
    report = check.report
    assert report["splits"]["all"]["slices"] == 485
    assert report["pairwise_dice"]["slices_all_marked"]["n_slices"] == 351
    assert report["pairwise_dice"]["slices_all_marked"]["mean"] == pytest.approx(0.770, abs=1e-3)
    assert [finding["kind"] for finding in report["findings"] if finding["severity"] == "error"] == []


def test_the_sheet_shows_cases_from_all_over_the_data(tmp_path: Path) -> None:
    root = write_qubiq(
        tmp_path / "many", {"Training": 14, "Validation": 3}, shapes=((16, 20, 1), (24, 16, 1)), channels=4
    )
    check = check_data(root)
    shown = chosen(check.looks)
    assert len(shown) == CASES
    assert (shown[0].case.name, shown[-1].case.name) == ("case01", "case17")
    target = tmp_path / "sheet.png"
    write_sheet(target, check.looks[:3], check.channels, 2, "a $title", "a note")
    with Image.open(target) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] > 800
    # The soft label's colours are there: plasma's yellow where all agree, which no grey image holds.
    assert ((pixels[..., 0] - pixels[..., 2]) > 100).mean() > 0.005
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "sheet.png"]


@pytest.mark.parametrize("raters", [1, 4, 5, 14])
def test_the_keys_of_a_sheet_with_one_case_stand_side_by_side(raters: int, tmp_path: Path) -> None:
    check = check_data(write_qubiq(tmp_path / "one", {"Training": 1}, raters=raters))
    figure = sheet_figure(check.looks, check.channels, 2, "a title", "a note")
    figure.canvas.draw()
    (lines,) = [axes for axes in figure.axes if "annotator" in {text.get_text() for text in axes.texts}]
    (bar,) = [axes for axes in figure.axes if axes.get_xlabel().startswith("soft label")]
    drawn = [text.get_window_extent().x1 for text in lines.texts]
    assert len(drawn) == raters + 1, "every annotator is named"
    assert max(drawn) < bar.get_window_extent().x0


@pytest.mark.parametrize(("cases", "names"), [(2, ["Ben Smith", "Chloé", r"$\odd$"]), (1, ["1", "2", "3"])])
def test_annotators_are_called_by_their_names_where_these_have_room(
    cases: int, names: list[str], tmp_path: Path
) -> None:
    root = write_qubiq(tmp_path / "one", {"Training": cases}, raters=3)
    for path in root.rglob("task01_seg0*.nii.gz"):
        name = ("Ben Smith", "Chloé", r"$\odd$")[int(path.name[-8]) - 1]
        path.rename(path.with_name(f"mask_{name}.nii.gz"))
    check = check_data(root)
    figure = sheet_figure(check.looks, check.channels, 2, "a title", "a note")
    figure.canvas.draw()
    (lines,) = [axes for axes in figure.axes if "annotator" in {text.get_text() for text in axes.texts}]
    assert sorted(text.get_text() for text in lines.texts if text.get_text() != "annotator") == sorted(names)
    ends = [(text.get_window_extent().x0, text.get_window_extent().x1) for text in lines.texts[:-1]]
    assert all(end < start for (_, end), (start, _) in pairwise(ends))


def test_every_case_of_the_sheet_is_readable(tmp_path: Path) -> None:
    root = write_qubiq(tmp_path, {"Training": 3})
    (root / "Training/case02/image.nii.gz").write_text("not a scan")
    assert [look.case.name for look in chosen(check_data(root).looks)] == ["case01", "case03"]
    found: Any = find_cases(root)
    assert len(found["train"]) == 3
