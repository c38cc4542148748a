"""Which cases are scored where the data has no validation split: those that the training of the model held out of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cdiff.runtime.data.case import Case
from cdiff.runtime.data.cases import DataSet, find_cases
from cdiff.runtime.data.partition import partition
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.scoring.choice import choose_split, held_out


def folder_of(root: Path, count: int = 6) -> Path:
    """Cases without split folders; their masks differ in length, as no two of real data are alike."""
    for number in range(count):
        case = root / f"case{number:02d}"
        case.mkdir(parents=True)
        for name in ("image", "task01_seg01", "task01_seg02"):
            (case / f"{name}.nii.gz").write_bytes(b"x" * (10 + number))
    return root


def trained_on(root: Path, **change: Any) -> Manifest:
    """A bundle's word on a training on `root`."""
    split = partition(find_cases(root), root, 0.3, 5, 2)
    assert split.held_out is not None
    data = {"notes": list(split.notes), "held_out": {**split.held_out, **change}}
    return cast(Manifest, SimpleNamespace(training={"data": data}))


def test_what_a_training_held_out_is_scored_and_nothing_else(tmp_path: Path) -> None:
    """Also where the data has moved; asked for or not. All of it only by that word."""
    root = folder_of(tmp_path / "a")
    manifest = trained_on(root)
    expected = [case.name for case in partition(find_cases(root), root, 0.3, 5, 2).val]
    moved = root.rename(tmp_path / "moved")
    found = find_cases(moved)
    held = held_out(found, moved, manifest)
    assert [case.name for case in held] == expected
    assert 0 < len(held) < 6
    assert choose_split(found, None, held) == ("val", held)
    assert choose_split(found, "val", held) == ("val", held)
    assert len(choose_split(found, "all", held)[1]) == 6


def test_other_data_of_the_same_names_is_scored_whole(tmp_path: Path) -> None:
    """One case more, one less, other files under the same names, another mask, or a bundle that does not say: nothing is left out of the scores."""
    manifest = trained_on(folder_of(tmp_path / "a"))
    for count in (5, 7):
        root = folder_of(tmp_path / f"{count}", count)
        assert held_out(find_cases(root), root, manifest) == []
    root = folder_of(tmp_path / "b")
    (root / "case03" / "image.nii.gz").write_bytes(b"other")
    found = find_cases(root)
    assert held_out(found, root, manifest) == []
    assert choose_split(found, None, [])[0] == "all"
    with pytest.raises(CdiffError, match="no split val"):
        choose_split(found, "val", [])
    root = folder_of(tmp_path / "c")
    trained = partition(find_cases(root), root, 0.3, 5, 2).train[0]
    (root / trained.name / "task01_seg03.nii.gz").write_bytes(b"a third opinion")
    assert held_out(find_cases(root), root, manifest) == []
    root = tmp_path / "a"
    for told in (
        {"seed": None},
        {"seed": -1},
        {"seed": "x"},
        {"val_fraction": 7},
        {"val_fraction": 1e999},
        {"cases": "?"},
    ):
        assert held_out(find_cases(root), root, trained_on(root, **told)) == []
    for training in ({}, {"data": None}, {"data": {"held_out": "yes"}}, {"data": {"held_out": {}}}):
        assert held_out(find_cases(root), root, cast(Manifest, SimpleNamespace(training=training))) == []


def test_a_validation_split_of_its_own_stays(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "a")
    manifest = trained_on(root)
    folder_of(tmp_path / "b" / "Training")
    folder_of(tmp_path / "b" / "Validation", 2)
    assert held_out(find_cases(tmp_path / "b"), tmp_path / "b", manifest) == []


def test_without_a_seed_nothing_is_held_out_whatever_numpy_draws(tmp_path: Path) -> None:
    """NumPy takes no seed for a new one: of two cases it then held out the right one every other time."""
    root = folder_of(tmp_path, 2)
    manifest = trained_on(root, seed=None)
    assert [held_out(find_cases(root), root, manifest) for _ in range(40)] == [[]] * 40


def test_a_share_that_leaves_none_to_train_on_is_told(tmp_path: Path) -> None:
    root = folder_of(tmp_path, 6)
    found = find_cases(root)
    split = partition(found, root, 0.9)
    assert (len(split.train), len(split.val)) == (1, 5)
    with pytest.raises(CdiffError, match=r"val_fraction=0\.99 of 6 cases leaves none to train on; lower it"):
        partition(found, root, 0.99)


def test_a_patient_is_held_out_whole_and_one_that_can_be_used() -> None:
    """Whatever the seed; and however small the share, somebody is."""
    found = DataSet()
    found["all"] = [
        Case(f"c{i}", Path(f"c{i}.nii"), (Path("a"), Path("b"), Path("c"))[: 3 if i < 2 else 2], patient=f"p{i // 2}")
        for i in range(8)
    ]
    for seed in range(6):
        for fraction, levels in ((0.25, None), (0.01, None), (0.25, 3)):
            split = partition(found, Path(), fraction, seed, levels)
            held = {case.patient for case in split.val}
            assert len(held) == 1
            assert not held & {case.patient for case in split.train}
            assert held == {"p0"} or levels is None
        held = {case.patient for case in partition(found, Path(), 0.75, seed, 3).val}
        assert len(held) == 3, "the share is held out, also where few can be used"
        assert "p0" in held
