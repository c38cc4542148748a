"""Every layout to the same cases: what is found, what has to be asked, and that voxels and masks come as they were written."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.cases import Case, find_cases, read_case
from cdiff.runtime.datacheck import check_data
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.inputs import scans_at
from cdiff.runtime.masks import inside, read_mask
from cdiff.runtime.partition import count_annotators, count_channels, partition
from cdiff.runtime.preview import _sizes
from cdiff.runtime.report import volumes
from cdiff.runtime.results import Stack
from cdiff.runtime.scan import read_scan
from tests.layouts import BRATS, disc, noisy, save, write_brats, write_qubiq, write_table


@pytest.fixture
def qubiq(tmp_path: Path) -> Path:
    """A benchmark's root: two data sets, one of them with two structures, years 2020 and 2021 side by side."""
    root = tmp_path / "qubiq"
    write_qubiq(
        root / "prostate", {"Training": 3, "Validation": 1}, raters=6, tasks=2, shapes=((32, 24, 1), (24, 32, 1))
    )
    write_qubiq(root / "kidney", {"train": 2, "val": 1}, raters=3)
    return root


def test_a_benchmarks_root_asks_which_data_set_and_which_structure(qubiq: Path) -> None:
    with pytest.raises(CdiffError, match=r"kidney \(3 cases\), prostate \(4 cases\); name one"):
        find_cases(qubiq)
    with pytest.raises(CdiffError, match=r"task01 \(in 4 cases\), task02 .* --task prostate/task01"):
        find_cases(qubiq, "prostate")
    with pytest.raises(CdiffError, match=r"several tasks.*--task task01"):
        find_cases(qubiq / "prostate")
    with pytest.raises(CdiffError, match=r"no case in .* 'task03'; there is task01"):
        find_cases(qubiq / "prostate", "task03")


def test_every_level_of_the_tree_leads_to_the_same_cases(qubiq: Path) -> None:
    whole = find_cases(qubiq, "prostate/task02")
    assert {split: [case.name for case in cases] for split, cases in whole.items()} == {
        "train": ["case01", "case02", "case03"],
        "val": ["case04"],
    }
    assert find_cases(qubiq / "prostate", "task02") == whole
    assert find_cases(qubiq / "prostate" / "Training", "task02") == {"all": whole["train"]}
    assert find_cases(qubiq / "prostate/Training/case02", "task02") == {"all": [whole["train"][1]]}
    assert find_cases(qubiq, "kidney") == find_cases(qubiq / "kidney")
    assert set(find_cases(qubiq / "kidney")) == {"train", "val"}
    first = whole["train"][0]
    assert [path.name for path in first.masks] == [f"task02_seg{k:02d}.nii.gz" for k in range(1, 7)]


def test_training_and_validation_in_two_trees_are_one_data_set(tmp_path: Path) -> None:
    write_qubiq(tmp_path / "training_data_v3_QC" / "kidney", {"Training": 2})
    write_qubiq(tmp_path / "validation_data_QC" / "kidney", {"Validation": 1})
    assert {split: len(cases) for split, cases in find_cases(tmp_path).items()} == {"train": 2, "val": 1}
    write_qubiq(tmp_path / "old" / "kidney", {"Training": 1})
    with pytest.raises(CdiffError, match=r"several data sets: .*training_data_v3_QC/kidney"):
        find_cases(tmp_path)


def test_a_training_tree_without_split_folders_goes_with_the_validation_tree(tmp_path: Path) -> None:
    """As QUBIQ 2021 ships pancreas and pancreatic-lesion."""
    write_qubiq(tmp_path / "training_data_v3_QC/pancreas", {"": 3}, raters=2)
    write_qubiq(tmp_path / "validation_data_qubiq2021_QC/pancreas", {"Validation": 2}, raters=2)
    test = write_qubiq(tmp_path / "QUBIQ21_test/pancreas", {"Testing": 1}, raters=2)
    write_qubiq(tmp_path / "training_data_v3_QC/kidney", {"Training": 1})
    found = find_cases(tmp_path, "pancreas")
    assert {split: len(cases) for split, cases in found.items()} == {"train": 3, "val": 2, "test": 1}
    shutil.rmtree(test / "Testing")
    write_qubiq(test, {"": 1}, raters=2)
    with pytest.raises(CdiffError, match=r"QUBIQ21_test/pancreas \(1 cases\), training_data_v3_QC/pancreas"):
        find_cases(tmp_path, "pancreas")


def test_a_split_that_is_named_twice(tmp_path: Path) -> None:
    """Archives unpacked into a folder for each split, and a folder that unpacking doubled; but not a test and its retest."""
    for name, raters in (("kidney", 3), ("brain-growth", 7)):
        write_qubiq(tmp_path / "raw/train/training_data_v3_QC" / name, {"Training": 2}, raters=raters)
        write_qubiq(tmp_path / "raw/valid/validation_data" / name, {"Validation": 1}, raters=raters)
    with pytest.raises(CdiffError, match=r"several data sets: brain-growth \(3 cases\), kidney \(3 cases\)"):
        find_cases(tmp_path / "raw")
    kidney = find_cases(tmp_path / "raw", "kidney")
    assert {split: [case.name for case in cases] for split, cases in kidney.items()} == {
        "train": ["case01", "case02"],
        "val": ["case01"],
    }
    write_qubiq(tmp_path / "doubled", {"Training/Training": 2, "Validation/Validation": 1})
    assert {case.patient for case in find_cases(tmp_path / "doubled")["train"]} == {""}
    shutil.copytree(tmp_path / "doubled/Training/Training/case01", tmp_path / "again/Testing/anna/test")
    shutil.copytree(tmp_path / "doubled/Training/Training/case01", tmp_path / "again/Testing/anna/retest")
    assert {case.patient for case in find_cases(tmp_path / "again")["test"]} == {"anna"}


def test_masks_that_name_their_case_are_of_the_first_structure(tmp_path: Path) -> None:
    """As in some folders of QUBIQ 2021; and such a folder is one scan when it is segmented."""
    write_qubiq(tmp_path, {"Training": 2}, raters=3)
    for path in (tmp_path / "Training/case02").glob("task01_*"):
        path.rename(path.with_name(path.name.replace("task01", "case02")))
    found = find_cases(tmp_path, "task01")
    assert [case.raters for case in found["train"]] == [("seg01", "seg02", "seg03")] * 2
    assert [path.name for path in found["train"][1].masks] == [f"case02_seg{k:02d}.nii.gz" for k in (1, 2, 3)]
    assert [scan.name for scan in scans_at(tmp_path / "Training/case02")] == ["case02"]


def test_a_linked_case_has_the_links_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "farm/Training").mkdir(parents=True)
    for name in ("anna", "ben"):
        write_qubiq(tmp_path / "store" / name, {"": 1})
        (tmp_path / "farm/Training" / name).symlink_to(tmp_path / "store" / name / "case01")
    assert [case.name for case in find_cases(tmp_path / "farm")["train"]] == ["anna", "ben"]
    assert [scan.name for scan in scans_at(tmp_path / "farm/Training")] == ["anna", "ben"]
    monkeypatch.chdir(tmp_path / "store/anna/case01")
    assert [case.name for case in find_cases(Path())["all"]] == ["case01"]


def test_a_tree_is_found_from_far_above_it(tmp_path: Path) -> None:
    deep = tmp_path / "raw/qubiq/extracted/training_data_v3/training_data_v3"
    write_qubiq(deep / "prostate", {"Training": 2})
    assert len(find_cases(tmp_path)["train"]) == 2


def test_cases_in_the_folder_and_in_one_below_it_are_not_mixed_up(qubiq: Path, tmp_path: Path) -> None:
    """Nor are those below left out in silence where a structure is named."""
    mine = tmp_path / "mine"
    for place in ("case01", "more/case02", "more/case03"):
        shutil.copytree(qubiq / "kidney/train/case01", mine / place)
    for task in (None, "task01"):
        with pytest.raises(CdiffError, match=r"several data sets: the folder itself \(1 cases\), more \(2 cases\)"):
            find_cases(mine, task)
    for task in ("more", "more/task01"):
        assert [case.name for case in find_cases(mine, task)["all"]] == ["case02", "case03"]


def test_a_folder_for_each_patient_without_a_split_folder_says_where_to_put_them(tmp_path: Path) -> None:
    for number in range(14):
        write_qubiq(tmp_path / f"patient{number:02d}", {"": 1})
    message = (
        r"patient11 \(1 cases\) and 2 more; name one.* patients of one, put them in a split folder, such as Training"
    )
    with pytest.raises(CdiffError, match=message):
        find_cases(tmp_path)


def test_sizes_may_differ_and_a_rater_may_lack(qubiq: Path) -> None:
    (qubiq / "prostate/Training/case02/task01_seg03.nii.gz").unlink()
    found = find_cases(qubiq, "prostate/task01")
    assert dict(find_cases(qubiq, "prostate/task01/")) == dict(found)  # as a shell's completion writes it
    assert found["train"][1].raters == ("seg01", "seg02", "seg04", "seg05", "seg06")
    assert count_annotators(found["train"]) == 6
    shapes = [read_case(case)[1].shape for case in found["train"]]
    assert shapes == [(1, 6, 24, 32), (1, 5, 32, 24), (1, 6, 24, 32)]


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
    with pytest.raises(CdiffError, match=r"image_channels=4"):
        read_case(find_cases(root)["train"][0])
    case = find_cases(root)["train"][0]
    save(case.image, np.moveaxis(np.asanyarray(nib.load(case.image).dataobj), -1, 0))
    with pytest.raises(CdiffError, match=r"has shape 32 x 24 but .* 4 x 32 x 24; .* move the image's first axis there"):
        read_case(case)


def test_masks_and_image_may_write_the_third_axis_or_not(tmp_path: Path) -> None:
    save(tmp_path / "a/image.nii.gz", noisy(disc((20, 16, 1))))
    save(tmp_path / "a/task01_seg01.nii.gz", disc((20, 16)))
    save(tmp_path / "b/image.nii.gz", noisy(disc((20, 16))))
    save(tmp_path / "b/task01_seg01.nii.gz", disc((20, 16, 1)))
    for case in find_cases(tmp_path)["all"]:
        np.testing.assert_array_equal(read_case(case)[1][0, 0], disc((20, 16)))


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
    with pytest.raises(CdiffError, match=r"000002 .* has an image but no mask; add its masks"):
        find_cases(tmp_path)


def test_case_folders_of_mri_sequences_are_not_brats(tmp_path: Path) -> None:
    """The names of docs/own-data.md, which are half of BraTS's."""
    for number in range(3):
        folder = tmp_path / f"Training/case{number}"
        for name in ("image_t1", "image_flair", "mask_anna", "mask_ben"):
            save(folder / f"{name}.nii.gz", disc((16, 16), seed=number))
    found = find_cases(tmp_path)
    assert (found.layout, found.modalities, len(found["train"])) == ("cases", ("flair", "t1"), 3)


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
    assert count_channels(find_cases(tmp_path / "grey")["all"]) == 1


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


def test_cases_without_masks(tmp_path: Path) -> None:
    """One that nobody drew is told when it is a test case or shows another structure only, and else an error."""
    write_qubiq(tmp_path, {"Training": 3, "Testing": 1}, tasks=2)
    for path in (tmp_path / "Testing/case04").glob("task*"):
        path.unlink()
    for path in (tmp_path / "Training/case02").glob("task02*"):
        path.unlink()
    found = find_cases(tmp_path, "task02")
    assert {split: [case.name for case in cases] for split, cases in found.items()} == {"train": ["case01", "case03"]}
    assert any("1 train cases without a mask of task02 (case02)" in note for note in found.notes)
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
    with pytest.raises(CdiffError, match=r"2 files .* 3 channels"):
        read_scan([first, first], channels=3)
    assert read_scan((first, first), channels=2).slices.shape == (2, 2, 20, 16)


def test_the_models_modalities_are_taken_in_its_order(tmp_path: Path) -> None:
    case = Case("k", Path("a"), (), others=(Path("b"), Path("c")), modalities=("t1", "t2", "flair"))
    assert case.with_modalities(("flair", "t1")).scan == (Path("c"), Path("a"))
    assert case.with_modalities(()) is case
    with pytest.raises(CdiffError, match="k has no pd"):
        case.with_modalities(("t1", "pd"))
    unnamed = dataclasses.replace(case, modalities=())
    assert unnamed.with_modalities(("t1",)) is unnamed


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
    with pytest.raises(CdiffError, match=r"p0\.png does not exist"):
        read_case(find_cases(table)["train"][0])
