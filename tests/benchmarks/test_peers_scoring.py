"""What a peer draws of a case to be scored: each slice with a seed of its own, as many runs and views as were asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cdiff.benchmarks.peers import __main__ as command
from cdiff.benchmarks.peers import score
from cdiff.benchmarks.peers.draws import mixed
from cdiff.benchmarks.peers.score import Scoring, draw_case, stack_of
from cdiff.benchmarks.peers.training import STATE
from cdiff.benchmarks.peers.unets import UNETS
from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.scoring.evaluate import Protocol
from cdiff.runtime.variants import NO_ANNOTATOR
from tests.synthetic import write_synthetic_dataset


def test_each_slice_is_drawn_with_its_own_seed_as_asked(tiny_data: Path) -> None:
    seen: list[tuple[int, int]] = []

    def draw(network: nn.Module, image: Tensor, n: int) -> Tensor:
        seen.append((torch.initial_seed(), n))
        return image.sigmoid().expand(n, -1, -1, -1)

    peer = replace(UNETS["unet-dropout"], draw=draw)
    case = find_cases(tiny_data)["val"][1]
    drawn = draw_case(peer, nn.Identity(), case, 7, 3, Scoring(runs=5, mirror=False, seed=2, slices_per_case=2))
    assert drawn is not None
    assert len(drawn.chosen) == 2
    assert seen == [(mixed(2, 7, int(k)), 5) for k in drawn.chosen]
    assert drawn.stack.runs is not None
    first, last = (drawn.stack.soft[int(k) - drawn.first] for k in drawn.chosen)
    assert drawn.stack.runs.shape[2] == 5
    assert not np.array_equal(first, last)
    assert first.any()
    assert last.any()
    seen.clear()
    draw_case(peer, nn.Identity(), case, 7, 3, Scoring(runs=4, seed=2, slices_per_case=1))
    assert [n for _, n in seen] == [1] * 4, "the views in turn"


def test_a_stack_is_the_mean_over_runs_and_keeps_them_to_the_nearest_of_256() -> None:
    runs = np.array([0.0, 0.998, 0.5, 0.25], np.float32).reshape(1, 1, 4, 1, 1)
    stack = stack_of(runs, NO_ANNOTATOR, 3)
    assert stack.runs is not None
    assert stack.runs.ravel().tolist() == [0, 254, 128, 64]
    assert float(stack.maps.ravel()[0]) == pytest.approx(0.437)
    assert float(stack.run_std.ravel()[0]) == pytest.approx(float(runs.std()))


def test_a_diffusion_peer_is_scored_as_asked_with_the_steps_of_validation(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], Protocol]] = []

    def on_validation(run: Path, segmenter: Any, cases: list[Any], protocol: Protocol, say: Any) -> dict[int, float]:
        asked.append(([str(case.name) for case in cases], protocol))
        return {1: 0.25, 5: 0.5}

    def evaluated(segmenter: Any, cases: list[Any], protocol: Protocol, **_: Any) -> dict[str, Any]:
        asked.append(([str(case.name) for case in cases], protocol))
        return dict.fromkeys(score.KEPT)

    for name, value in (("bundle_of", None), ("summary", {})):
        monkeypatch.setattr(score.diffusion, name, lambda run, value=value: value)
    monkeypatch.setattr(score.diffusion, "steps_on_validation", on_validation)
    monkeypatch.setattr(score, "evaluate", evaluated)
    for name in ("Segmenter", "open_engine"):
        monkeypatch.setattr(score, name, lambda *_, **__: None)
    monkeypatch.setattr(score, "cpu_seconds_a_slice", lambda case, draw: 0.0)
    found = find_cases(tiny_data)
    scoring = Scoring("train", True, mirror=False, seed=4, slices_per_case=2, zooms=(1.0, 1.5))
    score.score_diffusion("consensus", tmp_path, tiny_data, found["train"], scoring, print)
    protocol = Protocol(fast=True, mirror=False, zooms=(1.0, 1.5), seed=4, all_raters=True, slices_per_case=2)
    assert asked == [
        ([case.name for case in found["val"]], protocol),
        ([case.name for case in found["train"]], replace(protocol, steps=5)),
    ]


def test_the_first_cases_alone_are_scored_if_asked_and_those_left_out_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = write_synthetic_dataset(tmp_path / "data", {"Validation": 3}, 3, (16, 16, 2)), tmp_path / "unet-soft"
    mask = data / "Validation" / "case02" / "task01_seg01.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((16, 16, 2), np.uint8), nib.load(mask).affine), mask)
    peer = replace(UNETS["unet-soft"], build=lambda C: nn.Linear(1, 1), draw=lambda network, image, n: image.sigmoid())
    monkeypatch.setitem(UNETS, "unet-soft", peer)
    run.mkdir()
    save_file(nn.Linear(1, 1).state_dict(), run / "best.safetensors")
    (run / "run.json").write_text("{}")
    for limit, count in ((2, 1), (None, 2)):
        scoring = Scoring("val", all_raters=True, limit=limit)
        found = score.score_all(["unet-soft"], tmp_path, data, scoring, say=print)["peers"]["unet-soft"]
        assert found["n_cases"] == count
        assert "case02" in str(found["left_out"])
        assert found["protocol"]["runs"] == 1, "every run would be the same"


@pytest.mark.parametrize(("clock", "steps", "used"), [("cpu", 0, 0.25), ("wall", 0, 0.75), ("wall", 20, 0.5)])
def test_an_unfinished_run_has_used_that_share_of_its_own_budget(
    clock: str, steps: int, used: float, tmp_path: Path
) -> None:
    state = dict.fromkeys(STATE, 0)
    budget = {"minutes": 2.0, "clock": clock, "steps": steps}
    torch.save(state | {"step": 10, "wall": 90.0, "cpu": 30.0, "budget": budget}, tmp_path / "last.pt")
    assert score.share("unet-soft", tmp_path) == 0, "no weights yet"
    (tmp_path / "best.safetensors").touch()
    assert score.share("unet-soft", tmp_path) == used


def test_time_is_that_of_one_slice(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], []

    def draw(case: Any, chosen: range) -> None:
        drawn.append(len(chosen))
        now[0] += 2 * len(chosen)

    monkeypatch.setattr("cdiff.benchmarks.peers.score.time.process_time", lambda: now[0])
    assert score.cpu_seconds_a_slice(find_cases(tiny_data)["val"][0], draw) == 2
    assert drawn == [1, 4], "one to warm up"


def test_what_the_command_was_given_reaches_training_and_scoring(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def trained(peer: Any, data: Path, run: Path, budget: Any) -> bool:
        seen.append(budget)
        return True

    def scored(names: list[str], runs: Path, data: Path, scoring: Scoring, **_: Any) -> dict[str, Any]:
        seen.append(scoring)
        peers = {
            name: {"soft_dice_5": {"mean": mean, "low": None}, "ged": {"mean": 0.5, "low": 0.25}, "share_of_budget": 1}
            for name, mean in (("unet-soft", 0.25), ("unet-heads", 0.75))
        }
        return {"peers": peers, "not_scored": {}}

    monkeypatch.setattr(command, "train_unet", trained)
    monkeypatch.setattr(command, "score_all", scored)
    base = ["--data", f"{tiny_data}", "--out", f"{tmp_path}", "--only", "unet-soft", "--seed", "3"]
    training = ["--minutes", "7", "--clock", "cpu", "--batch", "5", "--crop", "32", "--validations", "9"]
    assert command.main([*base, *training]) == 0
    scoring = ["--score", "val", "--all-raters", "--slices-per-case", "2", "--runs", "6", "--no-mirror", "--limit", "4"]
    assert command.main([*base, *scoring, "--zooms", "1,1.25"]) == 0
    wanted = {"minutes": 7, "clock": "cpu", "batch": 5, "crop": 32, "validations": 9, "seed": 3, "steps": 0}
    assert {key: getattr(seen[0], key) for key in wanted} == wanted
    assert seen[1] == Scoring("val", True, 6, False, 3, 4, 1, 2, (1.0, 1.25))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["unet-heads", "soft", "Dice", "0.750", "GED", "0.500"],
        ["unet-soft", "soft", "Dice", "0.250", "GED", "0.500"],
    ]
