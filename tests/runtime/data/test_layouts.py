"""What names alone say of cases: order, structure, patient and split. No file is opened."""

from __future__ import annotations

from pathlib import Path

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.data.layouts import brats_in, cases_in


def touched(*paths: Path) -> list[Path]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return list(paths)


def test_a_volume_is_taken_before_a_picture_of_it(tmp_path: Path) -> None:
    """Whichever name comes first: a picture that shows the image, or the mask, holds other values."""
    files = [tmp_path / f"{name}.{kind}" for name in ("image", "task01_seg01") for kind in ("jpg", "nii.gz", "tif")]
    (entry,) = cases_in(tmp_path, files)
    assert [path.name for path in entry.files] == ["image.nii.gz", "task01_seg01.nii.gz"]
    assert not entry.clashes


def test_modalities_are_in_the_order_of_their_own_names(tmp_path: Path) -> None:
    """Whatever stands before a name, and of whichever kind its file is: else a case's channels would be another's in another order."""
    for names in (("image-b.nii.gz", "image_a.nii.gz"), ("image_b.nii.gz", "image_a.png")):
        (entry,) = cases_in(tmp_path, [tmp_path / name for name in names])
        assert list(entry.images) == ["a", "b"]


def test_slices_of_one_brats_patient_are_one_patients_and_every_label_is_tumour(tmp_path: Path) -> None:
    """3 is a label of the earlier years, 4 of the later ones. Were the patient not known, validation would hold slices of training's."""
    files = [
        tmp_path / f"brats_train_{p}_{kind}_{k}_w.nii.gz" for p in (1, 2) for k in (80, 90) for kind in ("t1", "t2")
    ]
    entries = brats_in(tmp_path, files)
    assert [entry.patient for entry in entries] == ["brats_train_1"] * 2 + ["brats_train_2"] * 2
    assert {entry.labels for entry in entries} == {(1, 2, 3, 4)}
    assert brats_in(tmp_path, [tmp_path / "scan_t1.nii.gz"]) == [], "a scan that somebody named so"
    assert brats_in(tmp_path, [tmp_path / "a_t1.png", tmp_path / "a_t2.png"]) == []


def test_a_case_in_a_split_folder_itself_is_of_that_split(tmp_path: Path) -> None:
    for folder in ("Training", "Validation", "Testing"):
        touched(*(tmp_path / "one" / folder / name for name in ("image.nii.gz", "task01_seg01.nii.gz")))
    found = find_cases(tmp_path / "one")
    assert {split: [case.name for case in cases] for split, cases in found.items()} == {
        "train": ["Training"], "val": ["Validation"], "test": ["Testing"],
    }  # fmt: skip


def test_a_case_in_the_split_folder_of_a_data_set_is_of_that_data_set(tmp_path: Path) -> None:
    for name in ("kidney", "prostate"):
        touched(*(tmp_path / name / "Training" / file for file in ("image.nii.gz", "task01_seg01.nii.gz")))
    (case,) = find_cases(tmp_path, "kidney")["train"]
    assert (case.name, case.image) == ("Training", tmp_path / "kidney/Training/image.nii.gz")


def test_a_case_beside_the_split_folders_is_left_out_with_a_word(tmp_path: Path) -> None:
    for folder in ("Training/a", "Training/b", "c"):
        touched(*(tmp_path / folder / file for file in ("image.nii.gz", "task01_seg01.nii.gz")))
    found = find_cases(tmp_path)
    assert {split: [case.name for case in cases] for split, cases in found.items()} == {"train": ["a", "b"]}
    assert found.notes == ["1 case beside the split folders (c): left out"]


def test_several_cases_in_one_folder_of_a_split_are_called_after_it_too(tmp_path: Path) -> None:
    files = [f"b_{p}_{kind}_{k}.nii.gz" for p in (1, 2) for k in (80, 90) for kind in ("t1", "t2", "seg")]
    touched(*(tmp_path / "Training" / folder / file for folder in ("x", "y") for file in files))
    found = find_cases(tmp_path)["train"]
    assert {case.patient for case in found} == {"b_1", "b_2"}, "the files say more than their folder"
    assert [case.name for case in found] == [
        f"{folder}/b_{p}_{k}" for folder in ("x", "y") for p in (1, 2) for k in (80, 90)
    ]


def test_the_modalities_of_most_cases_are_the_data_sets(tmp_path: Path) -> None:
    """Of equally many the longer list: the cases that lack one are told then."""
    for case, names in (("a", ("t1", "t2")), ("b", ("t1", "t2")), ("c", ("flair", "t1", "t2"))):
        touched(*(tmp_path / case / f"image_{name}.nii.gz" for name in names), tmp_path / case / "mask_anna.nii.gz")
    found = find_cases(tmp_path, strict=False)
    assert (found.modalities, [problem.case for problem in found.problems]) == (("t1", "t2"), ["c"])
    (tmp_path / "b/mask_anna.nii.gz").unlink()
    for file in (tmp_path / "b").iterdir():
        file.unlink()
    found = find_cases(tmp_path, strict=False)
    assert (found.modalities, [problem.case for problem in found.problems]) == (("flair", "t1", "t2"), ["a"])
