"""A diffusion peer's whole road by the command: train, interrupt, go on, export, score; and what its configuration holds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cdiff.benchmarks.peers import diffusion
from cdiff.benchmarks.peers.__main__ import main
from cdiff.benchmarks.peers.diffusion import DIFFUSION, configuration
from cdiff.benchmarks.peers.training import Budget
from cdiff.runtime.data.cases import Case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scoring.evaluate import Protocol, evaluate
from cdiff.runtime.segmenter import Segmenter
from cdiff.train.learner import Learner
from cdiff.train.presets import PRESETS, preset
from cdiff.train.run import Run
from cdiff.train.trainer import train
from tests.synthetic import write_synthetic_dataset


def test_the_peers_are_the_variants_with_the_presets_network_and_the_budget(tiny_data: Path) -> None:
    for name in DIFFUSION:
        config = configuration(name, tiny_data, Budget(minutes=7, clock="cpu", seed=3), "lidc", threads=2)
        assert config.network.variant == name
        assert config.network.levels == 3, "as many as the data has annotators"
        assert config.network.channel_mult == preset("lidc").network.channel_mult
        training = config.training
        assert (training.minutes, training.clock, training.seed, training.threads) == (7, "cpu", 3, 2)
        assert training.steps >= 1_000_000, "the clock ends it"
        assert training.batch == preset("lidc").training.batch
    changed = configuration("consensus", tiny_data, Budget(minutes=7), "lidc", 1, ["batch=2", "minutes=99"]).training
    assert (changed.batch, changed.minutes) == (2, 7), "a setting changes the preset, and never the budget"
    with pytest.raises(CdiffError, match="bach"):
        configuration("consensus", tiny_data, Budget(), "lidc", 1, ["bach=2"])
    counted = configuration("consensus", tiny_data, Budget(steps=5), "lidc", threads=1).training
    assert (counted.steps, counted.minutes) == (5, 0)


def test_validation_says_how_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of steps is scored with itself, on the first Validation cases; the best is taken, and of equals the smallest."""
    seen: list[tuple[int | None, int, Path]] = []

    def scored(
        segmenter: Segmenter, cases: list[Case], protocol: Protocol, *, out: Path, **_: object
    ) -> dict[str, Any]:
        assert protocol.fast
        assert not protocol.all_raters
        assert protocol.slices_per_case is None
        seen.append((protocol.steps, len(cases), out))
        return {"soft_dice_5": {"mean": {1: 0.5, 3: 0.6, 5: 0.7}[protocol.steps or 0]}}

    monkeypatch.setattr(diffusion, "evaluate", scored)
    cases, asked = cast(list[Case], [None] * 9), Protocol(all_raters=True, slices_per_case=1)

    def tried(T: int) -> dict[int, float]:
        model = cast(Segmenter, SimpleNamespace(manifest=SimpleNamespace(T=T)))
        return diffusion.steps_on_validation(tmp_path, model, cases, asked, print)

    assert tried(100) == {1: 0.5, 5: 0.7}
    assert seen == [(1, 6, tmp_path / "steps_1.json"), (5, 6, tmp_path / "steps_5.json")]
    assert tried(3) == {1: 0.5, 3: 0.6}, "no more steps than the model has"
    assert diffusion.best_steps({1: 0.5, 5: 0.7}) == 5
    assert diffusion.best_steps({1: 0.7, 5: 0.5}) == 1
    assert diffusion.best_steps({5: 0.7, 1: 0.7}) == 1


def test_a_run_is_summed_up_with_its_last_step_and_its_best_score(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"parameters": 9, "machine": {}, "data": {"train": {"slices": 16}}, "val_protocol": {"slices": 8}}
    infos = {"last": {"step": 7, "seconds": 30.0, "val_soft_dice_5": 0.5}, "best": {"step": 4, "val_soft_dice_5": 0.75}}
    config = configuration("consensus", tiny_data, Budget(minutes=2, clock="cpu"), "tiny", 1)
    monkeypatch.setattr(diffusion, "read_config", lambda out: config)
    monkeypatch.setattr(diffusion, "checkpoint_folder", lambda out, which: out / which)
    monkeypatch.setattr(diffusion, "read_json", lambda path: infos[path.parent.name] | about)
    found = diffusion.summary(tmp_path)
    wanted = {"peer": "consensus", "steps": 7, "cpu_seconds": 30.0, "best_val_soft_dice_5": 0.75}
    wanted |= {"parameters": 9, "train_slices": 16, "val_slices": 8}
    assert {key: found[key] for key in wanted} == wanted
    assert "wall_seconds" not in found
    assert (found["budget"]["minutes"], found["budget"]["clock"], found["budget"]["steps"]) == (2, "cpu", 0)


@pytest.mark.parametrize("clock", ["cpu", "wall"])
def test_minutes_are_counted_on_the_clock_that_was_asked_for(
    clock: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one clock a step takes 10 s, on the other none: a budget of 25 s is three steps, or all five."""
    now = {"cpu": 0.0, "wall": 0.0}
    monkeypatch.setattr("cdiff.train.pace.time.process_time", lambda: now["cpu"])

    def step(self: Run, k: int) -> tuple[float, float]:
        now["cpu"] += 10
        return 1.0, 1.0

    monkeypatch.setattr(Run, "step", step)
    monkeypatch.setattr(Run, "validate", lambda self, window: 0.5)
    config = preset("tiny").with_values({"minutes": 25 / 60, "clock": clock, "steps": 5, "val_every": 100})
    result = train(config, tiny_data, tmp_path / "run", quiet=True)
    assert result.step == (3 if clock == "cpu" else 5)
    assert (result.seconds == 30) == (clock == "cpu")


@pytest.mark.slow
def test_from_training_to_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {"Training": 2, "Validation": 1, "Testing": 1}
    data = write_synthetic_dataset(tmp_path / "data", splits, raters=3, shape=(16, 16, 2))
    least = {"image_size": 16, "channel_mult": (1,), "attention_depths": (), "rrdbs": 0, "base_channels": 4, "heads": 1}
    monkeypatch.setitem(PRESETS, "least", preset("tiny").with_values(least | {"groups": 2, "val_slices": 1}))
    command = ["--data", f"{data}", "--out", f"{tmp_path / 'runs'}", "--only", "no-annotator", "--steps", "4"]
    command += ["--preset", "least", "--set", "batch=3"]
    run = tmp_path / "runs" / "no-annotator"

    with monkeypatch.context() as patched:
        plain = Learner.step

        def interrupted(self: Learner, k: int, *rest: object) -> tuple[float, float]:
            if k == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return plain(self, k, *rest)  # type: ignore[arg-type]

        patched.setattr(Learner, "step", interrupted)
        assert main(command) == 130
    assert diffusion.spent(run) == 0.5
    assert not diffusion.is_finished(run)
    score = ["--data", f"{data}", "--out", f"{tmp_path / 'runs'}", "--only", "no-annotator", "--score", "test"]
    assert main(score) == 2
    assert "50% of its budget used" in capsys.readouterr().err
    assert main(command) == 0
    assert diffusion.spent(run) == 1
    assert main(command) == 0
    assert "finished before, skipped" in capsys.readouterr().err

    assert main([*score, "--json", f"{tmp_path / 'scores.json'}"]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())["peers"]["no-annotator"]
    from cdiff.runtime.data.cases import find_cases

    cases, segmenter = find_cases(data), Segmenter.open(run / "bundle")
    tried = found["training"]["steps_on_validation"]
    assert set(tried) == {"1", "5"}
    for steps, score in tried.items():
        alone = evaluate(segmenter, cases["val"], Protocol(fast=True, steps=int(steps)))
        assert score == alone["soft_dice_5"]["mean"]
    best = diffusion.best_steps({int(steps): score for steps, score in tried.items()})
    assert found["protocol"]["steps"] == best
    wanted = evaluate(segmenter, cases["test"], Protocol(fast=True, steps=best))
    for key in ("n_slices", "soft_dice_5", "ged", "ece_near", "dice_per_level"):
        assert found[key] == wanted[key], f"{key} is that of cdiff evaluate --fast with those steps"
    assert found["training"]["steps"] == 4
    assert found["training"]["wall_seconds"] > 0
    budget = {"minutes": 0.0, "clock": "wall", "steps": 4, "batch": 3, "rows_per_image": 2}
    assert found["training"]["budget"] == budget, "what the run used, with --set"
    assert found["ged_samples"]["model"] == 4
