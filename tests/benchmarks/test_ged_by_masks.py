"""One model's maps as one mask, as the levels of its soft map, and as the levels of its runs: which masks, and their distances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import pytest

import cdiff
from cdiff.benchmarks.ged_by_masks import PROTOCOL, main, measure, readings
from cdiff.benchmarks.peers.__main__ import main as train_peers
from cdiff.benchmarks.peers.drawn import Drawn
from cdiff.runtime.data.cases import Case, read_case
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scoring.metrics import bootstrap_over_cases, ged
from cdiff.runtime.stack import Stack
from tests.conftest import REPOSITORY
from tests.synthetic import write_synthetic_dataset

DEMO = REPOSITORY / "cdiff" / "demo"


def test_the_readings_by_hand() -> None:
    # Two levels, two runs, four pixels: the soft map is 1, 3/4, 1/4 and 0.
    runs = np.array([[[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 0, 0, 0]]], np.uint8)[None, :, :, None, :]
    stack = Stack(runs.mean(axis=2).astype(np.float32), np.zeros((1, 1, 4), np.float32), runs * 255)
    drawn = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]], bool)[:, None]
    found = {name: masks[:, 0].astype(int).tolist() for name, masks in readings(stack, 0, drawn).items()}
    assert found == {
        "one_mask": [[1, 1, 0, 0]],
        "levels_of_the_map": [[1, 1, 1, 0], [1, 1, 0, 0]],
        "levels_of_every_run": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]],
        "annotators_majority": [[1, 0, 0, 1]],
    }
    four = np.concatenate([drawn, np.array([[[0, 1, 0, 0]]], bool)])
    assert readings(stack, 0, four)["annotators_majority"][0, 0].tolist() == [1, 1, 0, 1], "half is enough"


def test_distances_are_of_each_slices_own_maps_with_intervals_over_cases() -> None:
    """Two cases of three and two slices, the first of which begins at slice 1 and leaves out slice 2."""
    rng, drawn = np.random.default_rng(0), []
    for chosen, count in (([1, 3, 4], 4), ([0, 1], 2)):
        runs = (rng.random((count, 2, 2, 1, 6)) < 0.5).astype(np.uint8)
        stack = Stack(runs.mean(axis=2).astype(np.float32), np.zeros((count, 1, 6), np.float32), runs * 255)
        drawn.append(Drawn(cast(Grid, None), rng.random((5, 3, 1, 6)) < 0.5, np.array(chosen), stack))

    def distances(name: str) -> list[list[float]]:
        return [
            [ged(readings(one.stack, k - one.chosen[0], one.masks[k])[name], one.masks[k]) for k in one.chosen]
            for one in drawn
        ]

    report = measure(lambda number, case: drawn[number], [cast(Case, None)] * 2)
    for name, found in report["ged"].items():
        wanted = bootstrap_over_cases(distances(name)).to_json()
        assert {key: found[key] for key in wanted} == wanted, name
    apart = [
        [every - one for one, every in zip(*pair, strict=True)]
        for pair in zip(distances("levels_of_the_map"), distances("levels_of_every_run"), strict=True)
    ]
    assert report["levels_of_every_run_minus_of_the_map"] == bootstrap_over_cases(apart).to_json()
    assert (PROTOCOL.zooms, PROTOCOL.all_raters) == ((1.0,), True)


def test_the_command_measures_the_slices_that_all_marked(tmp_path: Path) -> None:
    case = tmp_path / "data" / "Testing" / "demo"
    case.mkdir(parents=True)
    for file in DEMO.glob("*.nii.gz"):
        nib.save(nib.load(file).slicer[:, :, 2:4], case / file.name)
    assert main(["--data", str(tmp_path / "data"), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["ged"]
    masks = read_case(Case("demo", case / "image.nii.gz", tuple(sorted(case.glob("task01_seg*")))))[1]
    chosen = np.flatnonzero(masks.any(axis=(2, 3)).all(axis=1))
    assert chosen.size
    soft = cdiff.load().segment(case / "image.nii.gz", **PROTOCOL.chain).stack.soft
    assert found["one_mask"]["mean"] == pytest.approx(np.mean([ged((soft[i] >= 0.5)[None], masks[i]) for i in chosen]))
    assert [one["masks"] for one in found.values()] == [1, 4, 16, 1]
    assert {one["n_slices"] for one in found.values()} == {len(chosen)}


def test_a_unets_map_is_read_as_its_levels_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its one mask has the energy distance that the peers' table gives it; its levels are read where the variants' rule has them."""
    splits = {"Training": 1, "Validation": 1, "Testing": 2}
    data = str(write_synthetic_dataset(tmp_path / "data", splits, raters=3, shape=(32, 32, 3)))
    peers = ["--data", data, "--out", str(tmp_path), "--only", "unet-soft"]
    command = ["--data", data, "--unet", str(tmp_path / "unet-soft"), "--json", str(tmp_path / "out.json")]
    assert main(command) == 2
    assert "holds no finished run of the peer unet-soft" in capsys.readouterr().err
    assert train_peers([*peers, "--steps", "2", "--batch", "1", "--crop", "32", "--validations", "1"]) == 0
    assert train_peers([*peers, "--score", "test", "--all-raters", "--json", str(tmp_path / "peers.json")]) == 0
    assert main(command) == 0
    found = json.loads((tmp_path / "out.json").read_text())["ged"]
    scored = json.loads((tmp_path / "peers.json").read_text())["peers"]["unet-soft"]
    assert found["one_mask"]["mean"] == pytest.approx(scored["ged"]["mean"])
    assert {name: one["masks"] for name, one in found.items()} == {
        "one_mask": 1,
        "levels_of_the_map": 3,
        "annotators_majority": 1,
    }
    assert (
        found["one_mask"]["n_slices"] == scored["n_slices"] == 4
    )  # the last of each case's three was not marked by all


def test_data_without_a_slice_that_all_marked_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 2
    assert "error" in capsys.readouterr().err
