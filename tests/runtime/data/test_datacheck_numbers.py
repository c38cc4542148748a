"""The numbers of a data check where cases have different numbers of slices, by a count of pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cdiff.runtime.data.datacheck import check_data
from tests.layouts import noisy, save

SIDE = 16


def drawn(slices: int, rows: int, label: int = 2) -> NDArray[np.uint8]:
    """A volume of 16 x 16 pixels in whose first slice so many rows hold a label."""
    out = np.zeros((SIDE, SIDE, slices), np.uint8)
    out[:rows, :, 0] = label
    return out


def write(folder: Path, *masks: NDArray[np.uint8]) -> None:
    save(folder / "image.nii.gz", noisy(masks[0] > 0, seed=len(folder.name)))
    for number, mask in enumerate(masks, start=1):
        save(folder / f"task01_seg{number:02d}.nii.gz", mask)


def test_every_slice_counts_once_and_only_the_labels_that_are_meant(tmp_path: Path) -> None:
    first = drawn(1, 4)
    first[10:] = 3  # another structure, which is no part of this one
    write(tmp_path / "Training/a", first, drawn(1, 2))
    write(tmp_path / "Training/bb", drawn(3, 8), drawn(3, 0))
    write(tmp_path / "Validation/ccc", drawn(2, 4), drawn(2, 0))
    done: list[tuple[int, int]] = []
    report = check_data(tmp_path, labels=(2,), progress=lambda *so_far: done.append(so_far)).report
    assert done == [(1, 3), (2, 3), (3, 3)]
    slices = 1 + 3 + 2
    assert report["class_balance"]["pixels_at_least"] == pytest.approx(
        [(4 + 8 + 4) / SIDE / slices, 2 / SIDE / slices], rel=1e-6
    )
    training = report["training"]
    assert [training[split] for split in ("train", "val")] == [
        {"cases": 2, "cases_found": 2, "slices": 4},
        {"cases": 1, "cases_found": 1, "slices": 2},
    ]
    assert [report["splits"][split]["marked_slices"] for split in ("train", "val")] == [2, 1]
    across = check_data(tmp_path, labels=(2,), slice_axis=0).report
    assert [across["training"][split]["slices"] for split in ("train", "val")] == [2 * SIDE, SIDE]


@pytest.mark.parametrize(("rows", "told"), [(0, True), (3, False)])
def test_a_level_that_no_pixel_reaches_is_told(rows: int, told: bool, tmp_path: Path) -> None:
    """Whatever the only annotator of a case marked, which training leaves out."""
    for name in ("a", "bb"):
        write(tmp_path / name, drawn(1, 4), drawn(1, rows))
    write(tmp_path / "ccc", drawn(1, 8))
    text = "no pixel of any case was marked by all 2 annotators"
    report = check_data(tmp_path).report
    assert any(finding["text"] == text for finding in report["findings"]) is told
    assert report["class_balance"]["pixels_at_least"] == pytest.approx([4 / SIDE, rows / SIDE])
    assert report["class_balance"]["cases"] == 2
    for name in ("a", "bb"):
        (tmp_path / name / "image.nii.gz").write_bytes(b"")
    unread = check_data(tmp_path).report
    assert text not in [finding["text"] for finding in unread["findings"]], "nothing was read"
    assert unread["class_balance"]["pixels_at_least"] == []


def test_one_annotator_in_two_splits_is_told(tmp_path: Path) -> None:
    for split in ("Training", "Validation"):
        write(tmp_path / split / "a", drawn(1, 4))
    notes = [(found["severity"], found["kind"]) for found in check_data(tmp_path).report["findings"]]
    assert {("note", "annotators"), ("note", "names")} <= set(notes)
