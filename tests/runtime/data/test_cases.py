"""Every layout to the same cases: what is found in a folder, and that voxels and masks come as they were written."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.data.case import must_be_in_order, natural
from cdiff.runtime.data.cases import Case, find_cases, read_case
from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.data.masks import inside, read_mask
from cdiff.runtime.data.partition import count_annotators, count_channels, partition
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.pictures.preview import _sizes
from cdiff.runtime.report import volumes
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.stack import Stack
from tests.layouts import BRATS, disc, noisy, save, write_brats, write_qubiq, write_table


@pytest.mark.parametrize("shape", [(32, 24), (32, 24, 1), (32, 24, 3)])
def test_four_modalities_in_the_last_axis(tmp_path: Path, shape: tuple[int, ...]) -> None:
    root = write_qubiq(tmp_path, {"Training": 1}, channels=4, shapes=(shape,))
    (case,) = find_cases(root)["train"]
    assert count_channels([case]) == 4
    image, masks = read_case(case, channels=4)
    stored = np.asanyarray(nib.load(case.image).dataobj)
    depth = shape[2] if len(shape) == 3 else 1
    assert image.shape == (depth, 4, 32, 24)
    assert masks.shape == (depth, 3, 32, 24)
    np.testing.assert_array_equal(image[-1, 2], stored[..., 2].reshape(32, 24, depth)[..., -1])


def test_a_volume_of_four_slices_is_no_image_of_four_channels(tmp_path: Path) -> None:
    root = write_qubiq(tmp_path / "volume", {"Training": 1}, shapes=((32, 24, 4),))
    assert count_channels(find_cases(root)["train"]) == 1
    root = write_qubiq(tmp_path / "channels", {"Training": 1}, shapes=((32, 24),), channels=4)
    with pytest.raises(CdiffError, match=r"takes a model trained with --set image_channels=4"):
        read_case(find_cases(root)["train"][0])
    case = find_cases(root)["train"][0]
    save(case.masks[1], disc((32, 24, 4)))
    with pytest.raises(
        CdiffError,
        match=r"_seg02.* has shape 32 x 24 x 4 but .* 32 x 24; .* is read as channels, which its other masks lack",
    ):
        read_case(case, channels=4)
    save(case.masks[1], disc((32, 24)))
    save(case.image, np.moveaxis(np.asanyarray(nib.load(case.image).dataobj), -1, 0))
    with pytest.raises(CdiffError, match=r"has shape 32 x 24 but .* 4 x 32 x 24; .* move the image's first axis there"):
        read_case(case)


@pytest.mark.parametrize("shape", [(20, 16), (20, 16, 1), (20, 16, 3), (20, 16, 3, 1)])
def test_an_image_of_channels_may_have_ones_after_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The published loader drops such an axis, as of [H, W, 4, 1]."""
    root = write_qubiq(tmp_path, {"Training": 2}, shapes=(shape,), channels=4)
    plain = read_case(find_cases(root)["train"][0], channels=4)
    for image in root.rglob("image.nii.gz"):
        save(image, np.asanyarray(nib.load(image).dataobj)[..., None])
    cases = find_cases(root)["train"]
    assert count_channels(cases) == 4
    for before, after in zip(plain, read_case(cases[0], channels=4), strict=True):
        np.testing.assert_array_equal(after, before)
    with pytest.raises(CdiffError, match=r"has shape 20 x 16 (x . )*x 4 x 1; 3 channels on the last axis are needed"):
        read_case(cases[0], channels=3)


def test_masks_and_image_may_write_the_third_axis_or_not(tmp_path: Path) -> None:
    save(tmp_path / "a/image.nii.gz", noisy(disc((20, 16, 1))))
    save(tmp_path / "a/task01_seg01.nii.gz", disc((20, 16)))
    save(tmp_path / "b/image.nii.gz", noisy(disc((20, 16))))
    save(tmp_path / "b/task01_seg01.nii.gz", disc((20, 16, 1)))
    for case in find_cases(tmp_path)["all"]:
        np.testing.assert_array_equal(read_case(case)[1][0, 0], disc((20, 16)))


def test_slices_are_cut_along_the_axis_that_is_asked_for(tmp_path: Path) -> None:
    (case,) = find_cases(write_qubiq(tmp_path, {"Training": 1}, shapes=((20, 16, 4),)))["train"]
    for axis, shape in ((0, (20, 16, 4)), (1, (16, 20, 4)), (2, (4, 20, 16))):
        images, masks = read_case(case, slice_axis=axis)
        assert images[:, 0].shape == masks[:, 0].shape == shape


def test_brats_slices(tmp_path: Path) -> None:
    write_brats(tmp_path / "training", 3)
    write_brats(tmp_path / "testing", 2, labelled=False)
    found = find_cases(tmp_path)
    assert (found.layout, found.modalities) == ("brats", BRATS)
    assert set(found) == {"train"}  # the test slices have no label map
    assert [case.name for case in found.unlabelled["test"]] == ["000001", "000002"]
    case = found["train"][0]
    image, masks = read_case(case, channels=4)
    assert image.shape == (1, 4, 32, 32)
    for channel, path in enumerate((case.image, *case.others)):
        assert f"_{BRATS[channel]}_" in path.name
        np.testing.assert_array_equal(image[0, channel], np.asanyarray(nib.load(path).dataobj))
    label_map = np.asanyarray(nib.load(case.masks[0]).dataobj)
    np.testing.assert_array_equal(masks[0, 0], label_map > 0)
    (core, *_) = find_cases(tmp_path, labels=(4,))["train"]
    np.testing.assert_array_equal(read_case(core, channels=4)[1][0, 0], label_map == 4)
    assert 0 < (label_map == 4).sum() < (label_map > 0).sum()


def test_brats_volumes_and_slices_in_one_folder(tmp_path: Path) -> None:
    for number in (1, 2):
        for name in (*BRATS, "seg"):
            save(tmp_path / f"Training/BraTS20_Training_{number:03d}_{name}.nii.gz", disc((16, 16, 3)))
    found = find_cases(tmp_path)
    assert [case.name for case in found["train"]] == ["BraTS20_Training_001", "BraTS20_Training_002"]
    assert read_case(found["train"][1], channels=4)[0].shape == (3, 4, 16, 16)


def test_brats_slices_without_a_label_map(tmp_path: Path) -> None:
    write_brats(tmp_path, 2)
    next((tmp_path / "000002").glob("*_seg_*")).unlink()
    with pytest.raises(
        CdiffError,
        match=r"000002 .* no mask \(its name must have seg in place of t1\); add its masks .* call the modalities image_t1 and so on",
    ):
        find_cases(tmp_path)


def test_case_folders_of_mri_sequences_are_not_brats(tmp_path: Path) -> None:
    """The names of docs/own-data.md, which are half of BraTS's."""
    for number in range(3):
        folder = tmp_path / f"Training/case{number}"
        for name in ("image_t1", "image_flair", "mask_anna", "mask_ben"):
            save(folder / f"{name}.nii.gz", disc((16, 16), seed=number))
    found = find_cases(tmp_path)
    assert (found.layout, found.modalities, len(found["train"])) == ("cases", ("flair", "t1"), 3)


def test_a_number_names_no_modality(tmp_path: Path) -> None:
    for name in ("image", "image_2", "mask"):
        save(tmp_path / f"case01/{name}.nii.gz", disc((16, 16)))
    found = find_cases(tmp_path)
    assert (found.modalities, found["all"][0].others) == ((), ())
    assert found.notes == ["files beside those of a case, not used: image_2.nii.gz"]
    (tmp_path / "case01/image.nii.gz").rename(tmp_path / "case01/image_1.nii.gz")
    with pytest.raises(CdiffError, match=r"no case in .*: expected folders with image\.nii\.gz"):
        find_cases(tmp_path)


def test_a_missing_modality_is_named(tmp_path: Path) -> None:
    write_brats(tmp_path, 3)
    next((tmp_path / "000002").glob("*_t2_*")).unlink()
    with pytest.raises(CdiffError, match="000002 lacks t2, but other cases have t1, t1ce, t2, flair"):
        find_cases(tmp_path)
    found = find_cases(tmp_path, strict=False)
    assert [problem.case for problem in found.problems] == ["000002"]
    assert [case.name for case in found["all"]] == ["000001", "000003"]


def test_real_brats_slices(brats_slices: Path) -> None:
    found = find_cases(brats_slices)
    assert [len(found["train"]), len(found.unlabelled["test"])] == [6, 2]
    image, masks = read_case(found["train"][0], channels=4)
    assert image.shape == (1, 4, 240, 240)
    assert int(masks.sum()) == 4018 + 199  # labels 2 and 4 of the file
    enhancing = find_cases(brats_slices, labels=(4,))["train"][0]
    assert int(read_case(enhancing, channels=4)[1].sum()) == 199


def test_own_case_folders_of_png_and_several_files(tmp_path: Path) -> None:
    """Sixteen bits reach the array unchanged; annotators are known by name; a palette's numbers are labels."""
    folder, inside_ = tmp_path / "patient1", disc((20, 24))
    folder.mkdir()
    deep = (noisy(inside_).clip(0, 255) * 250).astype(np.uint16)
    Image.fromarray(deep).save(folder / "image_uv.png")
    Image.fromarray(deep[::-1].copy()).save(folder / "image_dapi.tif")
    Image.fromarray(inside_.astype(np.uint8) * 255).save(folder / "mask_ben.png")
    palette = Image.fromarray(inside_.astype(np.uint8) * 2, mode="P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 1, 1, 1])
    palette.save(folder / "mask_anna.png")
    found = find_cases(tmp_path)
    (case,) = found["all"]
    assert (found.modalities, case.raters) == (("dapi", "uv"), ("anna", "ben"))
    image, masks = read_case(case, channels=2)
    np.testing.assert_array_equal(image[0], np.stack([deep[::-1], deep]).astype(np.float32))
    assert image.max() > 255
    np.testing.assert_array_equal(masks[0], np.stack([inside_, inside_]))
    assert set(np.unique(read_mask(folder / "mask_anna.png").values)) == {0, 2}


def test_colours_are_counted_and_grey_saved_as_colour_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, pixels in (("colour", rng.integers(0, 255, (16, 16, 3))), ("grey", np.full((16, 16, 3), 7))):
        folder = tmp_path / name / "case1"
        folder.mkdir(parents=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "image.png")
        Image.fromarray(disc((16, 16))).save(folder / "mask_1.png")
    assert count_channels(find_cases(tmp_path / "colour")["all"]) == 3
    assert count_channels(grey := find_cases(tmp_path / "grey")["all"]) == 1
    colour = find_cases(tmp_path / "colour")["all"]
    assert count_channels(grey * 3 + colour) == count_channels(colour + grey) == 3, "the most that any of the first has"


def test_patients_stay_together(tmp_path: Path) -> None:
    for patient in range(4):
        for scan in range(3):
            write_qubiq(tmp_path / "Training" / f"p{patient}" / f"scan{scan}", {"": 1})
    found = find_cases(tmp_path)
    assert found["train"][0].name == "p0/scan0/case01"
    split = partition(found, tmp_path, val_fraction=0.25)
    assert [len(split.train), len(split.val)] == [9, 3]
    assert len({case.patient for case in split.val}) == 1
    assert not {case.patient for case in split.val} & {case.patient for case in split.train}


@pytest.mark.parametrize("other", ["Validation", "Testing"])
def test_a_patient_in_several_splits_is_told(tmp_path: Path, other: str) -> None:
    for split, patients in (("Training", ("p1", "p2", "p3")), (other, ("p3", "p4"))):
        for patient in patients:
            write_qubiq(tmp_path / split / patient, {"": 2 if patient == "p1" else 1})  # two scans of one in one split
    *_, note = partition(find_cases(tmp_path), tmp_path).notes
    assert note == "patients in several splits (p3): if they are the same people, scores are too good"
    (tmp_path / other / "p3").rename(tmp_path / other / "p5")
    assert not any("several splits" in note for note in partition(find_cases(tmp_path), tmp_path).notes)


def test_cases_without_masks(tmp_path: Path) -> None:
    """One that nobody drew is told when it is a test case or shows another structure only, and else an error."""
    write_qubiq(tmp_path, {"Training": 3, "Testing": 1}, tasks=2)
    for path in (tmp_path / "Testing/case04").glob("task*"):
        path.unlink()
    for path in (tmp_path / "Training/case02").glob("task02*"):
        path.unlink()
    found = find_cases(tmp_path, "task02")
    assert {split: [case.name for case in cases] for split, cases in found.items()} == {"train": ["case01", "case03"]}
    assert any("1 train case without a mask of task02 (case02)" in note for note in found.notes)
    for path in (tmp_path / "Training/case02").glob("task*"):
        path.unlink()
    with pytest.raises(CdiffError, match=r"case02 .* has an image but no mask task02_seg01"):
        find_cases(tmp_path, "task02")


def test_validation_masks_that_a_benchmark_kept_back(tmp_path: Path) -> None:
    write_qubiq(tmp_path, {"Training": 4, "Validation": 2})
    for path in (tmp_path / "Validation").rglob("task*"):
        path.unlink()
    found = find_cases(tmp_path)
    assert set(found) == {"train"}
    split = partition(found, tmp_path)
    assert [len(split.train), len(split.val)] == [3, 1]
    assert split.notes == ("the validation cases have no masks: held out 1 of 4 cases for validation",)


def test_a_case_that_would_be_left_out_is_not_all_that_validation_gets(tmp_path: Path) -> None:
    write_qubiq(tmp_path, {"Training": 6}, raters=3)
    found = find_cases(tmp_path)
    (held,) = partition(found, tmp_path).val
    assert partition(found, tmp_path, levels=3).val == [held]
    held.masks[-1].unlink()
    found = find_cases(tmp_path)
    split = partition(found, tmp_path, levels=3)
    assert [len(case.masks) for case in split.val] == [3]
    assert [len(split.train), held.name in {case.name for case in split.train}] == [5, True]
    assert partition(found, tmp_path).val[0].name == held.name, "used as it is"
    training = check_data(tmp_path).report["training"]
    assert (training["possible"], training["train"]["cases"], training["val"]["cases"]) == (True, 4, 1)


def test_a_patient_one_of_whose_cases_would_be_used_is_enough_for_validation(tmp_path: Path) -> None:
    for patient in range(4):
        for scan in range(2):
            write_qubiq(tmp_path / "Training" / f"p{patient}" / f"scan{scan}", {"": 1}, raters=2)
    found = find_cases(tmp_path)
    val = partition(found, tmp_path, levels=2).val
    val[0].masks[-1].unlink()
    found = find_cases(tmp_path)
    assert [case.name for case in partition(found, tmp_path, levels=2).val] == [case.name for case in val]
    # Where no case has as many, there is none to prefer, and who uses them says so.
    assert [case.name for case in partition(found, tmp_path, levels=9).val] == [case.name for case in val]


def test_as_many_annotators_as_half_of_the_cases_have(tmp_path: Path) -> None:
    write_qubiq(tmp_path, {"Training": 4}, raters=3)
    found = find_cases(tmp_path)["train"]
    fewer = [dataclasses.replace(case, masks=case.masks[:2], raters=case.raters[:2]) for case in found]
    assert count_annotators([*fewer[:2], *found[2:]]) == 3
    assert count_annotators([*fewer[:3], *found[3:]]) == 2
    lone = dataclasses.replace(found[2], masks=found[2].masks[:1])
    assert count_annotators([fewer[0], found[1], lone]) == 2, "three masks are two also"


def test_files_of_different_grids_are_no_channels(tmp_path: Path) -> None:
    first = save(tmp_path / "a.nii.gz", noisy(disc((20, 16, 2))))
    moved = nib.load(first)
    affine = moved.affine.copy()
    affine[0, 3] = 5
    nib.save(nib.Nifti1Image(np.asanyarray(moved.dataobj), affine), tmp_path / "moved.nii.gz")
    for other, message in (
        (save(tmp_path / "b.nii.gz", noisy(disc((20, 18, 2)))), r"different shapes \(20 x 16 x 2 and 20 x 18 x 2\)"),
        (save(tmp_path / "c.nii.gz", noisy(disc((20, 16, 2))), (0.5, 0.6, 5)), "different spacings"),
        (tmp_path / "moved.nii.gz", "different affines"),
    ):
        with pytest.raises(CdiffError, match=message):
            read_scan([first, other], channels=2)
    with pytest.raises(CdiffError, match=r"2 files .* the model takes 3"):
        read_scan([first, first], channels=3)
    assert read_scan((first, first), channels=2).slices.shape == (2, 2, 20, 16)


def test_modalities_of_which_some_are_pictures_are_told(tmp_path: Path) -> None:
    flat, picture = save(tmp_path / "t1.nii.gz", noisy(disc((16, 16)))), tmp_path / "t2.png"
    Image.fromarray(noisy(disc((16, 16))).clip(0, 255).astype(np.uint8)).save(picture)
    for files, told in (((flat, picture), True), ((flat, flat), False), ((picture, picture), False)):
        scan = read_scan(files, channels=2)
        assert any("different orientations" in warning for warning in scan.warnings) is told
        assert len(set(scan.warnings)) == len(scan.warnings), "what holds for both is said once"
        of_each = b"".join(bytes.fromhex(read_scan(file).sha256) for file in files)
        assert scan.sha256 == hashlib.sha256(of_each).hexdigest()


def test_the_models_modalities_are_taken_in_its_order() -> None:
    case = Case("k", Path("a"), (), others=(Path("b"), Path("c")), modalities=("t1", "t2", "flair"))
    ordered = case.with_modalities(("flair", "t1"))
    assert (ordered.scan, ordered.modalities) == ((Path("c"), Path("a")), ("flair", "t1"))
    assert case.with_modalities(()) is case
    with pytest.raises(CdiffError, match="k has no pd"):
        case.with_modalities(("t1", "pd"))
    unnamed = dataclasses.replace(case, modalities=())
    assert unnamed.with_modalities(("t1",)) is unnamed


def test_files_in_another_order_than_the_models_are_refused_by_their_names() -> None:
    wanted = ("dwi", "t1", "t1_post")
    for names in (
        ("p1_dwi.nii.gz", "P1_T1.nii.gz", "p1_t1_post.nii.gz"),
        ("b.nii", "a.nii", "c.nii"),
        ("p1_t1_on_dwi.nii", "p1_dwi_on_t1.nii", "p1_t1_post.nii"),  # each names two
        ("p1_t1.nii", "p1_t1.nii", "p1_dwi.nii"),
        ("xdwi.nii", "t1w.nii", "t1_post.nii"),  # no words of their own
        ("t1w.nii", "dwi.nii", "t1_post.nii"),
        ("xt1.nii", "dwi.nii", "t1_post.nii"),
        ("t1/a.nii", "dwi/b.nii", "t1_post/c.nii"),  # folders' names are not the files'
        ("t1_post_on_dwi.nii", "dwi.nii", "t1.nii"),
        ("t1.nii", "dwi.nii"),  # too few: reading says so
        ("t1.nii", "dwi.nii", "t1_post.nii", "t1.nii"),
    ):
        must_be_in_order(names, wanted)
    with pytest.raises(CdiffError, match=r"are t1_post, dwi, t1, but the model was trained on dwi, t1, t1_post; give"):
        must_be_in_order(["p/image_T1_post.nii.gz", Path("p/image_dwi.nii"), "t1.mha"], wanted)
    must_be_in_order(["t1.nii", "dwi.nii"], ())
    with pytest.raises(CdiffError, match="are pre_t1, t1, but"):
        must_be_in_order(["pre_t1.nii", "t1.nii"], ("t1", "pre_t1"))


def test_names_are_in_the_order_of_their_numbers_whatever_their_zeros_and_capitals() -> None:
    """By it annotators are the same in every case, and a variant for each annotator learns one's masks as one's."""
    names = ["Seg1", "seg02", "seg3", "seg009", "Seg10", "tom", "Uma"]
    assert sorted({*names}, key=natural) == names
    assert natural("Task01") == natural("task1") != natural("task10")


def test_what_a_mask_puts_inside() -> None:
    values = np.array([0.0, 1.0, 2.0, 4.0])
    assert inside(values).tolist() == [False, False, False, True]
    assert inside(values, (1, 2)).tolist() == [False, True, True, False]
    assert inside(np.array([0.0, 0.4, 0.6, 1.0])).tolist() == [False, False, True, True]
    assert not inside(np.zeros(3)).any()


def test_volumes_of_a_fake_spacing_are_marked(tmp_path: Path) -> None:
    levels = np.ones((2, 1, 8, 8), np.float32)
    for spacing, marked in ((None, True), ((0.5, 1, 1), False)):
        grid = read_scan(save(tmp_path / "a.nii.gz", noisy(disc((8, 8, 2))), spacing)).grid
        found = volumes(Stack(levels, levels[:, 0]), grid)
        assert ("unreliable" in found) is marked
        words = _sizes(found, "voxels", True)[0][0]
        assert words == ("at least half agree on 128 voxels" if marked else "at least half agree on 64 mm³")


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    table = write_table(tmp_path, 2)
    (tmp_path / "files/p0_m2.png").unlink()
    with pytest.raises(CdiffError, match=r"p0_m2\.png does not exist"):
        read_case(find_cases(table)["train"][0])
    shutil.rmtree(tmp_path / "files")
    with pytest.raises(CdiffError, match=r"p0\.png does not exist; check the path$"):
        read_case(find_cases(table)["train"][0])
    table.write_text(table.read_text().replace("/", "\\"))
    with pytest.raises(CdiffError, match=r"files\\p0\.png does not exist; check the path: here / separates folders$"):
        read_case(find_cases(table)["train"][0])
