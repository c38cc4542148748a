"""What a check of the data warns of, training and evaluation say too; and two files for one place are refused."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.data.oddities import marks_the_background
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scoring.choice import choose_split, trained_task
from cdiff.runtime.scoring.evaluate import Protocol, evaluate
from cdiff.runtime.segmenter import Segmenter
from cdiff.train.data import fit_to_data, read_data
from cdiff.train.presets import preset
from tests.layouts import disc, noisy, save, write_qubiq


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_qubiq(tmp_path / "data", {"Training": 3, "Validation": 1}, spacing=(0.5, 0.6, 3.0))


def training_notes(root: Path, *settings: str) -> list[str]:
    return read_data(root, fit_to_data(preset("tiny"), root, list(settings))).notes


def move(path: Path, millimetres: float) -> None:
    """Store a mask with another place in its header."""
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 3] += millimetres
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine, image.header), path)


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_a_mask_marks_the_background_when_it_holds_every_corner_and_most_of_the_rest(corner: tuple[int, int]) -> None:
    drawn = np.ones((2, 12, 30), bool)
    drawn[:, 3:9, 8:20] = False
    frame = np.ones_like(drawn)
    frame[:, 1:-1, 1:-1] = False
    assert marks_the_background(drawn)
    assert not marks_the_background(frame)
    drawn[1, *corner] = False
    assert not marks_the_background(drawn)


def test_clean_data_is_read_without_a_word(data: Path) -> None:
    assert training_notes(data) == []


def test_masks_elsewhere_than_their_image_are_told_once_with_their_cases(data: Path, tiny_bundle: Path) -> None:
    for case in ("case01", "case02"):
        move(data / f"Training/{case}/task01_seg02.nii.gz", 30.0)
    (note,) = training_notes(data)
    assert "elsewhere than their image, in 2 cases (case01, case02): case01: task01_seg02.nii.gz" in note
    said: list[str] = []
    cases = find_cases(data)["train"]
    evaluate(Segmenter.open(tiny_bundle), cases, Protocol(runs=1, steps=1, raters="use"), notice=said.append)
    assert note in said


def test_a_flat_mask_beside_an_image_with_a_last_axis_of_one_is_compared_too(data: Path) -> None:
    path = data / "Training/case01/task01_seg01.nii.gz"
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 3] += 30.0
    flat = nib.Nifti1Image(np.asarray(image.dataobj)[..., 0], affine)
    flat.header.set_xyzt_units("mm")
    nib.save(flat, path)
    assert any("elsewhere" in note for note in training_notes(data))
    (found,) = [f for f in check_data(data).report["findings"] if f["kind"] == "grid"]
    assert (found["severity"], found["case"]) == ("warning", "case01")


def test_a_picture_as_the_mask_of_a_nifti_is_told_to_training(data: Path) -> None:
    """Of a square image both have one shape, whichever way they are stored."""
    path = data / "Training/case02/task01_seg02.nii.gz"
    mask = np.asarray(nib.load(path).dataobj)[..., 0]
    path.unlink()
    Image.fromarray(mask * 255).save(path.with_name("task01_seg02.png"))
    (note,) = training_notes(data)
    assert (
        "another kind of file than their image, in 1 case (case02): case02: task01_seg02.png and image.nii.gz" in note
    )


def test_values_that_a_rule_decides_are_told_unless_labels_are_named(data: Path) -> None:
    path = data / "Training/case02/task01_seg01.nii.gz"
    save(path, disc((32, 32, 1)).astype(np.uint8) + disc((32, 32, 1), -0.5))
    (note,) = training_notes(data)
    assert "in 1 case (case02)" in note
    assert "values above half of the largest count as inside" in note
    assert training_notes(data, "labels=[1,2]") == []


def test_a_mask_of_0_and_255_among_label_maps_is_told(data: Path) -> None:
    """One annotator's tool writes 255 for 1. A map of 0 and 2 lacks the labels 1 and 4, as of a tumour that does not enhance."""
    for case, value in (("case01", 255), ("case02", 2)):
        save(data / f"Training/{case}/task01_seg01.nii.gz", np.uint8(value) * disc((32, 32, 1)), (0.5, 0.6, 3.0))
    (note,) = training_notes(data, "labels=[1,4]")
    assert (
        "above all labels that count as inside, in 1 case (case01): case01: task01_seg01.nii.gz holds 0 and 255" in note
    )
    warned = [f for f in check_data(data, labels=(1, 4)).report["findings"] if f["severity"] == "warning"]
    assert [(f["case"], f["kind"]) for f in warned] == [("case01", "values")]
    assert "task01_seg01.nii.gz holds 0, 255, and none of the labels that count as inside (1, 4)" in warned[0]["text"]


@pytest.mark.parametrize("labels", [(), (1,)])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_mask_of_negative_values_is_told(data: Path, everywhere: bool, labels: tuple[int, ...]) -> None:
    """As 255 is read that was stored in eight bits with a sign: it counted as the mask of one who saw nothing."""
    mask = np.full((32, 32, 1), -1) if everywhere else -disc((32, 32, 1)).astype(np.int8)
    save(data / "Training/case02/task01_seg01.nii.gz", mask.astype(np.int8), (0.5, 0.6, 3.0))
    (note,) = training_notes(data, f"labels={list(labels)}")
    assert (
        "values below 0, in 1 case (case02): case02: task01_seg01.nii.gz holds nothing above 0, so no pixel counts as inside"
        in note
    )
    warned = [f for f in check_data(data, labels=labels).report["findings"] if f["kind"] == "values"]
    assert [(f["severity"], f["case"]) for f in warned if f["severity"] == "warning"] == [("warning", "case02")]
    held = "-1" if everywhere else "-1, 0"
    assert f"task01_seg01.nii.gz holds {held}, nothing above 0: no pixel counts as inside" in warned[0]["text"]


@pytest.mark.parametrize("everything", [False, True])
def test_black_drawn_on_white_and_masks_of_everything_are_told_to_training(data: Path, everything: bool) -> None:
    mask = np.ones((32, 32, 1), bool) if everything else ~disc((32, 32, 1))
    save(data / "Training/case02/task01_seg03.nii.gz", mask, (0.5, 0.6, 3.0))
    (note,) = training_notes(data)
    assert "mark the background, in 1 case (case02): case02: task01_seg03.nii.gz marks the corners" in note


def test_volumes_in_strips_are_told_to_training(tmp_path: Path) -> None:
    write_qubiq(tmp_path, {"Training": 2, "Validation": 1}, shapes=[(3, 32, 32)])
    assert any("strips" in note and "along axis 0" in note for note in training_notes(tmp_path))
    assert training_notes(tmp_path, "slice_axis=0") == []


@pytest.mark.parametrize("name", ["image", "task01_seg01"])
def test_two_files_for_one_place_are_refused(data: Path, name: str) -> None:
    save(data / f"Training/case01/{name}.nii", noisy(disc((32, 32, 1))))
    with pytest.raises(
        CdiffError, match=rf"{name}.nii and {name}.nii.gz in .*case01 are both .*; remove or rename one"
    ):
        find_cases(data)
    assert find_cases(data, strict=False).problems[0].case == "case01"


def test_a_structure_is_not_refused_for_the_files_of_another(data: Path) -> None:
    for name in ("task02_seg01.nii", "task02_seg01.nii.gz"):
        save(data / "Training/case01" / name, disc((32, 32, 1)))
    assert len(find_cases(data, "task01")["train"]) == 3
    with pytest.raises(CdiffError, match="one annotator's mask"):
        find_cases(data, "task02")


def test_cases_of_one_name_in_two_splits_are_told_apart(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_qubiq(tmp_path / split, {split: 2})
    found = {split: find_cases(tmp_path / split)[split] for split in ("train", "val")}
    assert [case.name for case in choose_split(found, "all")[1]] == [
        "train/case01",
        "train/case02",
        "val/case01",
        "val/case02",
    ]
    assert [case.name for case in choose_split(found, "val")[1]] == ["case01", "case02"]


def test_a_model_names_its_structure_only_where_its_task_is_one(tiny_bundle: Path) -> None:
    from dataclasses import replace

    manifest = Segmenter.open(tiny_bundle).manifest
    assert trained_task(replace(manifest, task="brain-tumor/task02")) == "task02"
    assert trained_task(replace(manifest, task="task01")) == "task01"
    assert trained_task(replace(manifest, task="lung nodule on CT, four radiologists")) is None


def test_a_report_of_another_protocol_is_replaced_with_a_word(data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    segmenter, cases, said = Segmenter.open(tiny_bundle), find_cases(data)["val"], list[str]()
    out = tmp_path / "scores.json"
    for seed in (0, 0, 1):
        said.clear()
        evaluate(segmenter, cases, Protocol(runs=1, steps=1, seed=seed, raters="use"), out=out, notice=said.append)
    assert any(f"{out} exists, but is of another model, protocol or data" in line for line in said)


@pytest.mark.parametrize("ink", [(255, 255, 255, 255), (255, 0, 0, 255)])
def test_a_mask_that_holds_a_pictures_colours_is_told(ink: tuple[int, ...], tmp_path: Path) -> None:
    """Beside an image of as many slices it was read as four, in the last of which everything is marked; beside one slice it is refused."""
    colours = np.where(disc((16, 16))[..., None], np.uint8(ink), np.uint8((0, 0, 0, 255)))
    image = np.random.default_rng(0).random((16, 16, 4)).astype(np.float32)
    for case in ("case01", "case02", "case03"):
        save(tmp_path / "data" / case / "image.nii.gz", image, None)
        for k in (1, 2):
            save(tmp_path / "data" / case / f"task01_seg0{k}.nii.gz", disc((16, 16, 4), seed=k), None)
    assert not any("colours" in note for note in training_notes(tmp_path / "data"))
    save(tmp_path / "data/case02/task01_seg02.nii.gz", colours, None)
    (found,) = [f for f in check_data(tmp_path / "data").report["findings"] if f["kind"] == "colours"]
    assert (found["severity"], found["case"]) == ("warning", "case02")
    assert found["text"].startswith("seg02 marks all of the fourth slice of four: are these a picture's colours")
    (note,) = [note for note in training_notes(tmp_path / "data") if "colours" in note]
    assert "in 1 case (case02): case02: task01_seg02.nii.gz marks all of its fourth slice of four" in note
    save(tmp_path / "data/case02/image.nii.gz", image[..., 0], None)
    save(tmp_path / "data/case02/task01_seg01.nii.gz", disc((16, 16)), None)
    (found,) = [f for f in check_data(tmp_path / "data").report["findings"] if f["kind"] == "shape"]
    assert found["text"].endswith("on one grid; if its last axis holds a picture's colours, save one of them alone")
