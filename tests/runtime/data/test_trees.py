"""Trees of data sets, splits and structures, as benchmarks come: what is found at each level, and what has to be asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cdiff.runtime.data.cases import _told_by_words, find_cases, read_case
from cdiff.runtime.data.partition import count_annotators, partition
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.inputs import scans_at
from tests.layouts import write_qubiq


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
    with pytest.raises(CdiffError, match=r"no case in .* 'task03'; its masks are of task01"):
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
    test = write_qubiq(tmp_path / "QUBIQ21_Test/pancreas", {"Testing": 1}, raters=2)
    write_qubiq(tmp_path / "training_data_v3_QC/kidney", {"Training": 1})
    found = find_cases(tmp_path, "pancreas")
    assert {split: len(cases) for split, cases in found.items()} == {"train": 3, "val": 2, "test": 1}
    shutil.rmtree(test / "Testing")
    write_qubiq(test, {"": 1}, raters=2)
    assert {split: len(cases) for split, cases in find_cases(tmp_path, "pancreas").items()} == {
        "train": 3,
        "test": 1,
        "val": 2,
    }, "as the folders' words say"
    shutil.rmtree(tmp_path / "training_data_v3_QC/pancreas")
    beside_validation = find_cases(tmp_path, "pancreas")
    assert {split: len(cases) for split, cases in beside_validation.items()} == {"test": 1, "val": 2}, (
        "nothing to train on"
    )
    write_qubiq(tmp_path / "training_data_v3_QC/pancreas", {"": 3}, raters=2)
    test.parent.rename(tmp_path / "QUBIQ21")
    with pytest.raises(CdiffError, match=r"QUBIQ21/pancreas \(1 case\), training_data_v3_QC/pancreas"):
        find_cases(tmp_path, "pancreas")
    assert _told_by_words("training/pancreas") == "train"
    assert _told_by_words("training_and_testing/pancreas") == _told_by_words("training") == "", (
        "several, and none above"
    )
    (tmp_path / "QUBIQ21").rename(tmp_path / "training_more")
    with pytest.raises(CdiffError, match=r"training_data_v3_QC/pancreas \(3 cases\), training_more/pancreas"):
        find_cases(tmp_path, "pancreas")


def test_a_tree_of_a_split_that_another_tree_holds_is_not_mixed_with_it_nor_left_out(tmp_path: Path) -> None:
    write_qubiq(tmp_path / "training_data_v3_QC/pancreas", {"": 3}, raters=2)
    write_qubiq(tmp_path / "new/pancreas", {"Training": 2, "Validation": 1}, raters=2)
    with pytest.raises(CdiffError, match=r"new/pancreas \(3 cases\), training_data_v3_QC/pancreas \(3 cases\)"):
        find_cases(tmp_path)
    assert {split: len(cases) for split, cases in find_cases(tmp_path, "new/pancreas").items()} == {
        "train": 2,
        "val": 1,
    }


def test_a_tree_that_nothing_names_a_split_is_the_training_split_beside_another(tmp_path: Path) -> None:
    write_qubiq(tmp_path / "one/kidney", {"": 2})
    write_qubiq(tmp_path / "two/kidney", {"Testing": 1})
    assert {split: len(cases) for split, cases in find_cases(tmp_path).items()} == {"train": 2, "test": 1}


def test_a_case_beside_split_folders_is_left_out_of_trees_that_are_joined(tmp_path: Path) -> None:
    """It is in no split, so nothing may be trained or scored with it."""
    write_qubiq(tmp_path / "one/kidney", {"Validation": 1, "": 1})
    write_qubiq(tmp_path / "two/kidney", {"Testing": 1})
    found = find_cases(tmp_path)
    assert {split: [case.name for case in cases] for split, cases in found.items()} == {
        "val": ["case01"],
        "test": ["case01"],
    }
    assert found.notes == ["1 case beside the split folders (case02): left out"]


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


@pytest.mark.parametrize("before", ["case02_", ""])
def test_masks_that_name_their_case_or_nothing_are_of_the_first_structure(tmp_path: Path, before: str) -> None:
    """As in some folders of QUBIQ 2021; and such a folder is one scan when it is segmented."""
    write_qubiq(tmp_path, {"Training": 2}, raters=3)
    for path in (tmp_path / "Training/case02").glob("task01_*"):
        path.rename(path.with_name(path.name.replace("task01_", before)))
    found = find_cases(tmp_path, "task01")
    assert [case.raters for case in found["train"]] == [("seg01", "seg02", "seg03")] * 2
    assert [path.name for path in found["train"][1].masks] == [f"{before}seg{k:02d}.nii.gz" for k in (1, 2, 3)]
    assert [scan.name for scan in scans_at(tmp_path / "Training/case02")] == ["case02"]


def test_a_structure_and_an_annotator_are_known_by_their_numbers(tmp_path: Path) -> None:
    """Folders that several people put together write them with and without zeros."""
    write_qubiq(tmp_path, {"Training": 3}, raters=3, tasks=2)
    for case, old, new in (("case02", "task0", "Task"), ("case03", "seg0", "seg")):
        for path in (tmp_path / "Training" / case).glob("task*"):
            path.rename(path.with_name(path.name.replace(old, new)))
    for task in ("task02", "task2", "Task2"):
        found = find_cases(tmp_path, task)
        assert found.task == "task02"
        assert [case.raters for case in found["train"]] == [("seg01", "seg02", "seg03")] * 3
    twice = tmp_path / "Training/case01/task02_seg1.nii.gz"
    shutil.copy(twice.with_name("task02_seg01.nii.gz"), twice)
    with pytest.raises(CdiffError, match=r"task02_seg01\.nii\.gz and task02_seg1\.nii\.gz in .* one annotator's mask"):
        find_cases(tmp_path, "task02")


def test_scans_of_one_patient_that_only_their_names_tell_stay_together(tmp_path: Path) -> None:
    """QUBIQ 2021's of the pancreas: case1-1, case1-2; a patient's folder says more than a name."""
    for place in ("Training/anna", "Training/ben"):
        write_qubiq(tmp_path / "folders" / place, {"": 1})
        (tmp_path / "folders" / place / "case01").rename(tmp_path / "folders" / place / "case1-1")
    assert {case.patient for case in find_cases(tmp_path / "folders")["train"]} == {"anna", "ben"}
    cases = write_qubiq(tmp_path / "pancreas", {"": 12})
    for number, path in enumerate(sorted(cases.iterdir())):
        path.rename(cases / f"case{number // 2 + 1}-{number % 2 + 1}")
    found = find_cases(cases)
    for seed in range(4):
        split = partition(found, cases, seed=seed)
        assert len(split.val) == 2
        assert {case.name[:-2] for case in split.val}.isdisjoint(case.name[:-2] for case in split.train)
    years = write_qubiq(tmp_path / "years", {"": 3})
    for number, path in enumerate(sorted(years.iterdir())):
        path.rename(years / f"case2023-{number}")
    assert {case.patient for case in find_cases(years)["all"]} == {""}


def test_a_folder_of_scans_alone_is_no_data_set(qubiq: Path) -> None:
    """Validation cases whose masks the benchmark keeps, in a folder that is not called Validation."""
    kidney = qubiq / "kidney"
    for number in (8, 9):
        shutil.copytree(kidney / "train/case01", kidney / f"Validation_No_Mask/case0{number}")
    for path in kidney.glob("Validation_No_Mask/*/task*"):
        path.unlink()
    found = find_cases(kidney)
    assert {split: len(cases) for split, cases in found.items()} == {"train": 2, "val": 1}
    assert found.notes == ["folders of cases without masks, left out: Validation_No_Mask (2 cases)"]
    assert find_cases(kidney, "task01") == found
    with pytest.raises(CdiffError, match=r"case08 .*has an image but no mask"):
        find_cases(kidney, "Validation_No_Mask")


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
        with pytest.raises(CdiffError, match=r"several data sets: the folder itself \(1 case\), more \(2 cases\)"):
            find_cases(mine, task)
    for task in ("more", "more/task01"):
        assert [case.name for case in find_cases(mine, task)["all"]] == ["case02", "case03"]


def test_a_folder_for_each_patient_without_a_split_folder_says_where_to_put_them(tmp_path: Path) -> None:
    for number in range(14):
        write_qubiq(tmp_path / f"patient{number:02d}", {"": 1})
    message = r"patient11 \(1 case\) and 2 more; name one.* patient of one data set, put them in a split folder, such as Training"
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
