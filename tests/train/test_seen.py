"""A run goes on with the cases that it began with, wherever they lie, and with no others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.train.presets import preset
from cdiff.train.seen import NAME, Seen, check_seen, learned_from, write_seen
from cdiff.train.trainer import train
from tests.synthetic import write_synthetic_dataset

CONFIG = preset("tiny").with_values({"steps": 2, "val_every": 2})


@pytest.fixture
def begun(tiny_data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run of one step of two, and data of its own."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    train(CONFIG, data, tmp_path / "run", max_steps=1, quiet=True)
    return tmp_path / "run", data


def refusal(run: Path, data: Path) -> str:
    before = (run / "last.json").read_text()
    with pytest.raises(CdiffError) as caught:
        train(CONFIG, data, run, resume=True, quiet=True)
    assert (run / "last.json").read_text() == before
    line = str(caught.value)
    assert "\n" not in line
    assert f"{data} does not hold what {run} began with" in line
    assert f"--init {run}" in line
    return line


def test_other_data_is_refused_in_a_line_that_says_what_differs(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = begun
    other = write_synthetic_dataset(tmp_path / "other", {"Training": 4, "Validation": 2}, 3, (32, 32, 4), seed=1)
    assert "cases to train on: case01 has" in refusal(run, other)
    shutil.rmtree(other / "Training" / "case04")
    (other / "Validation" / "case02").rename(other / "Validation" / "case09")
    line = refusal(run, other)
    assert "cases to train on: case04 gone, case01 has" in line
    assert "cases to validate on: case02 gone, case09 new" in line
    (data / "Training" / "case01").rename(data / "Training" / "case99")
    assert "cases to train on: case01 gone, case99 new;" not in refusal(run, data)  # cases are drawn by their order
    assert "case01 gone, case99 new" in refusal(run, data)


def test_changed_values_masks_and_sizes_are_other_data(begun: tuple[Path, Path]) -> None:
    run, data = begun
    first, second = (data / "Training" / "case02" / f"task01_seg0{i}.nii.gz" for i in (1, 2))

    def exchange() -> None:
        aside = first.rename(data / "aside.nii.gz")
        second.rename(first)
        aside.rename(second)

    exchange()
    assert "cases to train on: case02 has other pixels marked" in refusal(run, data)
    exchange()
    path = data / "Training" / "case02" / "image.nii.gz"
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(values[::-1], image.affine), path)
    assert "cases to train on: case02 has an image of the same mean" in refusal(run, data)
    nib.save(nib.Nifti1Image(values // 2, image.affine), path)
    assert "cases to train on: case02 has a mean of" in refusal(run, data)
    for file in (data / "Training" / "case02").iterdir():
        image = nib.load(file)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:, :-1], image.affine), file)
    assert "case02 is 4 x 32 x 31 and was 4 x 32 x 32)" in refusal(run, data)


def test_moved_and_renamed_data_are_the_same(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = begun
    data = data.rename(tmp_path / "elsewhere")
    for case in sorted((data / "Training").iterdir()):
        case.rename(case.with_name(f"patient_{case.name}"))
    assert train(CONFIG, data, run, resume=True, quiet=True).step == 2


def test_a_run_that_does_not_say_resumes_and_says_from_then_on(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = begun
    (run / NAME).unlink()
    other = write_synthetic_dataset(tmp_path / "other", {"Training": 3, "Validation": 2}, 3, (32, 32, 4), seed=1)
    assert train(CONFIG, other, run, resume=True, dry_run=True, quiet=True).step == 1
    assert not (run / NAME).exists()
    assert train(CONFIG, other, run, resume=True, quiet=True).step == 2
    assert (run / NAME).exists()


def test_a_run_of_before_hashes_were_kept_is_held_to_the_mean(begun: tuple[Path, Path]) -> None:
    run, data = begun
    path = data / "Training" / "case02" / "image.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), path)
    refusal(run, data)
    kept = json.loads((run / NAME).read_text())
    for case in [*kept["train"], *kept["val"]]:
        del case["values"]
    del kept["before"]
    (run / NAME).write_text(json.dumps(kept))
    assert train(CONFIG, data, run, resume=True, quiet=True).step == 2


def test_what_differs_is_short_and_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    cases = [Seen(f"case{i:02d}", 3, (1, 8, 8), i, 0.5, "") for i in range(20)]
    write_seen(tmp_path, {"train": cases, "val": cases[:1]})
    check_seen(tmp_path, {"train": cases, "val": cases[:1]}, tmp_path)
    with pytest.raises(CdiffError, match=r"case01, case02, case03, case04, case05 and 14 more gone\)"):
        check_seen(tmp_path, {"train": cases[:1], "val": cases[:1]}, tmp_path)
    with pytest.raises(CdiffError, match=r"\(cases to train on: another order\)"):
        check_seen(tmp_path, {"train": cases[::-1], "val": cases[:1]}, tmp_path)
    nearly = [replace(case, mean=0.5 * (1 + 4e-6)) for case in cases]
    check_seen(tmp_path, {"train": nearly, "val": cases[:1]}, tmp_path)  # a sum's rounding, on another machine
    fewer = [replace(case, masks=2) for case in cases]
    with pytest.raises(CdiffError, match=r"case00 has 2 masks and had 3, and 19 more differ\)"):
        check_seen(tmp_path, {"train": fewer, "val": cases[:1]}, tmp_path)
    (tmp_path / NAME).write_text('{"train": [{"name": 1}]}')
    with pytest.raises(CdiffError, match="it is damaged: remove it"):
        check_seen(tmp_path, {"train": cases, "val": []}, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"drawn": [1]},
        {"name": 3},
        {"masks": "3"},
        {"shape": [1, 2]},
        {"shape": [1, 2, 2.5]},
        {"mean": None},
        {"marked": True},
    ],
)
def test_a_value_of_another_kind_says_what_to_do(wrong: dict[str, Any], tmp_path: Path) -> None:
    case = Seen("a", 3, (2, 32, 32), 10, 0.5, "0", "1")
    write_seen(tmp_path, {"train": [case], "val": [], "before": []})
    assert learned_from(tmp_path) == [case]
    written = json.loads((tmp_path / NAME).read_text())
    written["train"][0] |= wrong
    (tmp_path / NAME).write_text(json.dumps(written))
    with pytest.raises(CdiffError, match=r"does not say which cases the run began with .*remove it to resume"):
        learned_from(tmp_path)
