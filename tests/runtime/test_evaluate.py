"""Evaluation with a segmenter whose maps are known: what is scored, what is left out, and resuming."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.cases import Case, find_cases, read_case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.evaluate import Protocol, choose_split, evaluate
from cdiff.runtime.results import Stack
from cdiff.runtime.scores import PER_SLICE, marked_slices, true_levels
from cdiff.runtime.segmenter import Segmenter
from tests.synthetic import write_synthetic_dataset


@dataclass
class KnownMaps:
    """Stands where a Segmenter does; its maps are the annotators' own consensus, moved by `shift` pixels."""

    bundle_folder: Path
    levels: int
    shift: int = 0
    stop_after: int | None = None
    asked: list[tuple[str, slice]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bundle_folder.mkdir(exist_ok=True)
        (self.bundle_folder / "manifest.json").write_text(f"{self.levels} {self.shift}")
        self.bundle = SimpleNamespace(path=self.bundle_folder)
        self.engine = SimpleNamespace(name="known", device="cpu")
        self.manifest = SimpleNamespace(
            name="known", variant="consensus", levels=self.levels, slice_axis=2, image_channels=1
        )

    def segment(self, scan: Path, *, slices: slice, keep_runs: bool, progress: Any, **chain: Any) -> Any:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        assert keep_runs
        self.asked.append((scan.parent.name, slices))
        masks = read_case(_case(scan.parent))[1][slices]
        levels = np.stack([true_levels(drawn, self.levels) for drawn in masks]).astype(np.float32)
        levels = np.roll(levels, self.shift, axis=-1)
        runs = np.repeat(levels[:, :, None] * 255, 2, axis=2).astype(np.uint8)
        progress(1, 2)
        report = {"runs": 2, "steps": 5, "sampler": "ddim", "mirror": False}
        return SimpleNamespace(stack=Stack(levels, np.zeros_like(levels[:, 0]), runs), report=report)


def _case(folder: Path) -> Case:
    return Case(folder.name, folder / "image.nii.gz", tuple(sorted(folder.glob("task01_seg*.nii.gz"))))


def _run(segmenter: KnownMaps, cases: list[Case], protocol: Protocol | None = None, **more: Any) -> dict[str, Any]:
    return evaluate(cast(Segmenter, segmenter), cases, protocol or Protocol(), **more)


def _without_seconds(report: dict[str, Any]) -> dict[str, Any]:
    cases = [{key: value for key, value in case.items() if key != "seconds"} for case in report["cases"]]
    return report | {"cases": cases}


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    """Four cases, three annotators, four slices; in the last slice the third annotator marked nothing."""
    return find_cases(write_synthetic_dataset(tmp_path / "data", 4, raters=3, shape=(24, 20, 4)))["all"]


def test_perfect_maps_score_one(cases: list[Case], tmp_path: Path) -> None:
    report = _run(KnownMaps(tmp_path / "b", 3), cases)
    assert (report["n_slices"], report["n_cases"]) == (16, 4)
    assert report["soft_dice_5"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n_slices": 16}
    assert report["soft_dice_9"]["mean"] == 1
    assert [entry["level"] for entry in report["dice_per_level"]] == [1, 2, 3]
    assert all(entry["mean"] == 1 for entry in report["dice_per_level"])
    assert report["ged"]["mean"] == pytest.approx(report["ged_floor"]["mean"])
    assert report["soft_dice_5_annotators"]["mean"] < 1
    assert report["protocol"] == {
        **{"runs": 2, "steps": 5, "sampler": "ddim", "fast": False, "combine": "mean", "seed": 0},
        **{"mirror": False},
        **{"all_raters": False, "raters": "skip"},
    }
    json.dumps(report, allow_nan=False)


def test_maps_beside_the_truth_score_less(cases: list[Case], tmp_path: Path) -> None:
    """The score of the report is the mean over slices, and maps are compared with their own slice."""
    report = _run(KnownMaps(tmp_path / "b", 3, shift=2), cases)
    scores = [s["soft_dice_5"] for case in report["cases"] for s in case["slices"]]
    assert 0.2 < report["soft_dice_5"]["mean"] < 0.95
    assert report["soft_dice_5"]["mean"] == pytest.approx(np.mean(scores))
    assert report["soft_dice_5"]["low"] <= report["soft_dice_5"]["mean"] <= report["soft_dice_5"]["high"]
    assert report["ged"]["mean"] > report["ged_floor"]["mean"]
    assert set(PER_SLICE) <= set(report)


def test_only_marked_slices_are_scored_and_computed(cases: list[Case], tmp_path: Path) -> None:
    """Case 1: nobody marked slice 0 or 3. `all_raters` leaves slice 3 of the others out."""
    for path in cases[0].masks:
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj).copy()
        voxels[..., [0, 3]] = 0
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
    segmenter = KnownMaps(tmp_path / "b", 3)
    report = _run(segmenter, cases)
    assert report["n_slices"] == 14
    assert segmenter.asked[0] == ("case01", slice(1, 3))
    assert [s["slice"] for s in report["cases"][0]["slices"]] == [1, 2]
    assert report["soft_dice_5"]["mean"] == 1

    strict = _run(KnownMaps(tmp_path / "b", 3), cases, Protocol(all_raters=True))
    assert [len(case["slices"]) for case in strict["cases"]] == [2, 3, 3, 3]


def test_marked_slices() -> None:
    masks = np.zeros((3, 2, 4, 4), dtype=bool)
    masks[1, 0, 0, 0] = masks[2, :, 1, 1] = True
    assert marked_slices(masks, all_raters=False).tolist() == [1, 2]
    assert marked_slices(masks, all_raters=True).tolist() == [2]


def test_levels_of_another_number_of_annotators() -> None:
    """Level c of C asks for at least c n / C of n annotators: 2 of 4 levels is one half, whoever counts."""
    masks = np.arange(4)[:, None, None] < np.arange(5)[None, None, :]  # pixel k was marked by k of 4
    assert true_levels(masks, 4).sum(axis=(1, 2)).tolist() == [4, 3, 2, 1]
    assert true_levels(masks, 2).sum(axis=(1, 2)).tolist() == [3, 1]
    assert true_levels(masks[:3], 4)[:, 0].tolist() == [[k * 4 >= c * 3 for k in (0, 1, 2, 3, 3)] for c in (1, 2, 3, 4)]


def test_a_case_with_fewer_annotators_is_told_and_handled_as_chosen(cases: list[Case], tmp_path: Path) -> None:
    cases[1].masks[2].unlink()
    cases = [_case(case.image.parent) for case in cases]
    told: list[str] = []
    skipped = _run(KnownMaps(tmp_path / "b", 3), cases, notice=told.append)
    assert skipped["n_cases"] == 3
    assert skipped["left_out"]["other_number_of_annotators"] == {"case02": 2}
    assert "case02" in told[0]
    assert "2 annotators" in told[0]

    told.clear()
    used = _run(KnownMaps(tmp_path / "b", 3), cases, Protocol(raters="use"), notice=told.append)
    assert used["n_cases"] == 4
    assert used["cases"][1]["annotators"] == 2
    # Two annotators' 0, 1/2, 1 is not what three levels can say exactly, but the levels are compared like with like.
    assert all(entry["mean"] == 1 for entry in used["dice_per_level"])
    assert "share c/3" in told[0]


def test_no_case_left_says_what_to_do(cases: list[Case], tmp_path: Path) -> None:
    with pytest.raises(CdiffError, match="--raters use"):
        _run(KnownMaps(tmp_path / "b", 5), cases)


def test_an_unreadable_mask_stops_before_any_work(cases: list[Case], tmp_path: Path) -> None:
    cases[3].masks[0].write_bytes(b"not a NIfTI file")
    segmenter = KnownMaps(tmp_path / "b", 3)
    with pytest.raises(CdiffError, match="task01_seg01"):
        _run(segmenter, cases)
    assert segmenter.asked == []


def test_progress_reaches_the_end_and_never_goes_back(cases: list[Case], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    _run(KnownMaps(tmp_path / "b", 3), cases, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (16_000, 16_000)
    assert len(seen) == 8


def test_an_interrupted_evaluation_goes_on(cases: list[Case], tmp_path: Path) -> None:
    whole = _run(KnownMaps(tmp_path / "b", 3, shift=1), cases)
    out, partial = tmp_path / "scores.json", tmp_path / "scores.partial.jsonl"
    with pytest.raises(KeyboardInterrupt):
        _run(KnownMaps(tmp_path / "b", 3, shift=1, stop_after=2), cases, out=out)
    assert not out.exists()
    with partial.open("a") as file:
        file.write('{"case": "case03", "inpu')  # what a kill in the middle of a line leaves

    rest = KnownMaps(tmp_path / "b", 3, shift=1)
    told: list[str] = []
    report = _run(rest, cases, out=out, notice=told.append)
    assert [name for name, _ in rest.asked] == ["case03", "case04"]
    assert "2 finished cases" in told[0]
    assert _without_seconds(report) == _without_seconds(whole)
    assert json.loads(out.read_text()) == report
    assert not partial.exists()


@pytest.mark.parametrize("changed", ["seed", "model", "case"])
def test_rows_of_something_else_are_not_used(cases: list[Case], tmp_path: Path, changed: str) -> None:
    out = tmp_path / "scores.json"
    with pytest.raises(KeyboardInterrupt):
        _run(KnownMaps(tmp_path / "b", 3, stop_after=3), cases, out=out)
    if changed == "case":
        image = nib.load(cases[1].image)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj) + 1, image.affine), cases[1].image)
    rest = KnownMaps(tmp_path / "b", 3, shift=int(changed == "model"))
    told: list[str] = []
    _run(rest, cases, Protocol(seed=int(changed == "seed")), out=out, notice=told.append)
    if changed == "case":
        assert [name for name, _ in rest.asked] == ["case02", "case04"]
    else:
        assert len(rest.asked) == 4
        assert {"seed": "seed 0 (now 1)", "model": "bundle_sha256"}[changed] in told[0]
        assert (tmp_path / "scores.partial.jsonl.old").exists()


def test_choosing_the_split(cases: list[Case]) -> None:
    splits = {name: [case] for name, case in zip(("train", "val", "test"), cases, strict=False)}
    assert choose_split(splits)[0] == "test"
    assert choose_split({k: v for k, v in splits.items() if k != "test"})[0] == "val"
    assert choose_split({"all": cases}) == ("all", cases)
    assert choose_split(splits, "train") == ("train", [cases[0]])
    assert choose_split(splits, "all")[1] == cases[:3]
    with pytest.raises(CdiffError, match="train"):
        choose_split({"train": cases})
    with pytest.raises(CdiffError, match="has all"):
        choose_split({"all": cases}, "val")
