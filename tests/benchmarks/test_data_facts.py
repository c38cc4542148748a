"""What the pages say of the data of the shipped model: counted right, and said as it was counted."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from cdiff.benchmarks.data_facts import MIDDLE, SHORT, Drawn, facts, main
from tests.conftest import REPOSITORY
from tests.test_docs import prose


def test_cases_and_slices_are_counted(tmp_path: Path) -> None:
    masks = np.zeros(
        (2, 80, 80, 3)
    )  # of two annotators: slice 0 by one of them, 1 by both and beside the middle, 2 by none
    masks[0, 40:42, 40:45, 0] = 1
    masks[:, 40, 40, 1] = masks[1, 2, 40, 1] = 1
    for split, numbers in (("Training", (1, 2)), ("Testing", (3,))):
        for number in numbers:
            folder = tmp_path / "data" / split / f"P{(number + 1) // 2}_{number}"
            folder.mkdir(parents=True)
            for name, values in (("image", masks[0]), ("task01_seg01", masks[0]), ("task01_seg02", masks[1])):
                nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), folder / f"{name}.nii.gz")
    out = tmp_path / "facts.json"
    assert main(["--data", str(tmp_path / "data"), "--group", "P[0-9]", "--json", str(out)]) == 0
    splits = json.loads(out.read_text())["splits"]
    assert [splits[name]["cases"] for name in ("train", "test", "together")] == [2, 1, 3]
    assert [splits[name]["patients"] for name in ("train", "test", "together")] == [1, 1, 2]
    assert splits["train"] == {
        "cases": 2, "patients": 1, "slices": 6, "slices_a_case": [3, 3], "short_cases": 2, "marked_by_any": 4, "marked_by_all": 2,
        "nothing_beside_the_middle": 4, "pixels_marked": {"5": 2, "50": 6, "95": 10},
    }  # fmt: skip


def test_short_cases_are_those_of_the_pages() -> None:
    found = facts([Drawn(f"case{n}", n, 0, 0, []) for n in (16, 15, 4)], None)
    assert (found["slices_a_case"], found["short_cases"]) == ([4, 16], 2)


def test_the_pages_say_of_the_data_what_was_counted() -> None:
    report = json.loads((REPOSITORY / "benchmarks" / "results" / "data_facts.json").read_text())
    assert (report["middle"], report["short"]) == (MIDDLE, SHORT)
    splits = report["splits"]
    train, val, test, all_ = (splits[name] for name in ("train", "val", "test", "together"))
    shortest, longest = all_["slices_a_case"]
    model, choices = prose("docs/model.md"), prose("docs/choices.md")
    assert (
        f"{all_['cases']} nodules as 128 x 128 crops of {shortest} to {longest} slices ({all_['short_cases'] / all_['cases']:.0%} of"
    ).replace("%", " %") in model
    assert (
        f"split by patient into {train['cases']} for training, {val['cases']} for validation and {test['cases']} for"
        in model
    )
    assert f"({train['slices']:,}, {val['slices']} and {test['slices']} slices)" in model
    assert (
        f"Testing's {test['cases']} are of {test['patients']} patients, Validation's {val['cases']} of {val['patients']}"
        in model
    )
    low, middle, high = (f"{pixels:.0f}" for pixels in all_["pixels_marked"].values())
    assert f"union covers {low}, {middle} and {high} pixels at the 5th, 50th and 95th percentile" in model
    within = 100 * train["nothing_beside_the_middle"] / train["slices"]
    assert f"hold all four outlines on {within:.1f} % of the training slices and on all of Testing" in model
    assert test["nothing_beside_the_middle"] == test["slices"]
    assert f"drew something on {100 - within:.1f} % of the training slices" in prose("docs/benchmarks.md")
    unmarked = train["slices"] - train["marked_by_any"]
    assert f"Every slice of Testing ({test['marked_by_any']}) and Validation ({val['marked_by_any']})" in choices
    assert f"all but {unmarked} of Training's {train['slices']:,}, was marked" in choices
