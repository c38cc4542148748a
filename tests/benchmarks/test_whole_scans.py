"""The shipped model on whole scans: the place that is named, the scores, and what is said of files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import cdiff
from cdiff.benchmarks.whole_scans import main, measure, place_in
from cdiff.runtime.scoring.metrics import dice
from cdiff.runtime.segmenter import Segmenter
from tests.conftest import REPOSITORY

DEMO = REPOSITORY / "cdiff" / "demo"


def test_the_place_is_the_middle_of_the_middle_slice() -> None:
    drawn = np.zeros((20, 30, 9), bool)
    drawn[4:7, 11:16, 3:6] = True
    drawn[0, 0, 7] = True
    assert place_in(drawn) == ((5, 13, 5), [3, 4, 5, 7])


def test_a_scan_is_said_with_its_labels_widest_slices(tmp_path: Path) -> None:
    drawn = np.zeros((20, 30, 6), np.uint8)
    drawn[5:8, 10:12, 2] = drawn[5:7, 10:19, 3] = drawn[5:15, 10, 4] = 1
    for name, values in (("image", drawn.astype(np.int16)), ("label", drawn)):
        image = sitk.GetImageFromArray(values.T)
        image.SetSpacing((0.703125, 0.75, 2.5))
        sitk.WriteImage(image, str(tmp_path / f"{name}.nrrd"))
    asked: list[dict[str, Any]] = []

    def segment(scan: object, **how: Any) -> SimpleNamespace:
        asked.append(how)
        soft = np.full(drawn.shape, 0.25)
        return SimpleNamespace(soft=soft, levels=np.stack([soft, soft], -1), report={"warnings": []})

    model = cast(Segmenter, SimpleNamespace(segment=segment))
    found = measure(model, tmp_path / "image.nrrd", tmp_path / "label.nrrd")
    assert (found["extent"], found["shape"], found["spacing_mm"]) == ([10, 9], [20, 30, 6], [0.7031, 0.75, 2.5])
    assert [one["shrink"] for one in asked] == [1, 2, 3]
    assert all((one["slices"], one["at"], one["fast"]) == ((2, 5), (6, 14, 3), True) for one in asked)
    assert [row["pixels"] for row in found["found"][2]["slices"]] == [6, 18, 10]


@pytest.mark.slow
def test_it_scores_the_maps_of_the_labels_slices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's nodule within larger slices, once with a reader's mask and once with nothing like it, in one of the slices."""
    crop = nib.load(DEMO / "image.nii.gz").get_fdata()[..., 3:5].astype(np.int16)
    mask = nib.load(sorted(DEMO.glob("*seg*.nii.gz"))[0]).get_fdata()[..., 3:5] > 0
    whole = np.pad(crop, ((40, 90), (60, 30), (0, 0)))
    for name, drawn in (("lung1", mask), ("lung2", np.roll(mask, 30, axis=0) & [True, False])):
        label = np.pad(drawn, ((40, 90), (60, 30), (0, 0))).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(whole.T), str(tmp_path / f"{name}_image.nrrd"))
        sitk.WriteImage(sitk.GetImageFromArray(label.T), str(tmp_path / f"{name}_label.nrrd"))
    assert main([str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    first, second = json.loads((tmp_path / "out.json").read_text())["scans"]
    place, numbers = place_in(np.pad(mask, ((40, 90), (60, 30), (0, 0))))
    assert first["at"] == list(place)
    ends = [[np.flatnonzero(mask[..., k].any(axis=1 - axis)) for k in (0, 1)] for axis in (0, 1)]
    assert first["extent"] == [max(one[-1] - one[0] + 1 for one in along) for along in ends]
    result = cdiff.load().segment(whole, at=place, slices=(numbers[0], numbers[-1] + 1), fast=True)
    plain, shrunk, _ = first["found"]
    assert (plain["shrink"], shrunk["shrink"]) == (1, 2)
    assert shrunk["slices"] != plain["slices"]
    for row, k in zip(plain["slices"], numbers, strict=True):
        label_k = np.pad(mask[..., k], ((40, 90), (60, 30)))
        assert row["pixels"] == mask[..., k].sum()
        assert row["mask_pixels"] == (result.soft[..., k] >= 0.5).sum()
        assert row["dice_mask"] == pytest.approx(dice(result.soft[..., k] >= 0.5, label_k))
        assert row["dice_levels"][3] == pytest.approx(dice(result.levels[..., k, 3] >= 0.5, label_k))
    assert max(row["dice_mask"] for row in plain["slices"]) > 0.8
    assert [row["dice_mask"] < 0.5 for row in second["found"][0]["slices"]] == [True]
    assert "shrunk by 3" in capsys.readouterr().out


def test_files_that_do_not_fit_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "lung1_image.nrrd does not exist" in capsys.readouterr().err
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((3, 80, 80), np.int16)), str(tmp_path / "lung1_image.nrrd"))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 80, 80), np.uint8)), str(tmp_path / "lung1_label.nrrd"))
    assert main([str(tmp_path)]) == 2
    assert "lung1_label.nrrd marks nothing, or has another shape than" in capsys.readouterr().err
