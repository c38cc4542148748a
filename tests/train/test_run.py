"""What a run writes when it is killed, when its clock runs on, and when a validation scores nothing."""

from __future__ import annotations

import json
import math
import shutil
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.words import lasting
from cdiff.train import checkpoint
from cdiff.train.checkpoint import checkpoint_folder, load_run, read_json
from cdiff.train.data import read_data
from cdiff.train.fabric import fabric_on
from cdiff.train.learner import Learner
from cdiff.train.log import read_log
from cdiff.train.pace import forecast
from cdiff.train.presets import preset
from cdiff.train.run import Run
from cdiff.train.trainer import train

GROWING = {"framing": "tile", "crop": 16}


@pytest.mark.parametrize("name", ["log.csv", "samples.npz", "best.json", "tensorboard", "data.json", "last.json"])
def test_a_file_that_is_called_as_a_runs_is_not_replaced(tiny_data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    (tmp_path / "notes.txt").touch()  # which no run has
    with pytest.raises(CdiffError, match=rf"{tmp_path} holds no run, but {name}, which a run would replace"):
        train(preset("tiny").with_values({"steps": 1}), tiny_data, tmp_path, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {name, "notes.txt"}
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_run_that_ended_before_it_said_what_it_is_can_be_started_again(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cdiff.train.trainer.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            train(preset("tiny"), tiny_data, tmp_path, init=tiny_run, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "last.json", "data.json"}
    train(preset("tiny").with_values({"steps": 1}), tiny_data, tmp_path, quiet=True)
    assert (tmp_path / "config.json").is_file()


def test_a_run_whose_name_is_no_text_is_refused_before_anything_is_written(tiny_data: Path, tmp_path: Path) -> None:
    """TensorBoard's log cannot be there."""
    for out in (tmp_path / "\udcff", tmp_path / "\udcff/run"):
        with pytest.raises(CdiffError, match=r"\\xff.* has a name that is not UTF-8"):
            train(preset("tiny"), tiny_data, out, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pointer", ["best", "last"])
def test_a_kill_before_either_pointer_loses_no_best_checkpoint(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pointer: str
) -> None:
    run, config = tmp_path / "run", preset("tiny").with_values({"steps": 2, "val_every": 1})

    def killed(path: Path, value: object) -> None:
        if path.name == f"{pointer}.json":
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tiny_data, run, quiet=True)
    result = train(config, tiny_data, run, resume=True, quiet=True)
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    assert (run / "checkpoints" / best).is_dir()
    assert load_run(run).info["val_soft_dice_5"] == result.best


@pytest.mark.parametrize("pointer", ["best", "last"])
@pytest.mark.parametrize("again", [0.3, 0.5, 0.7])
def test_a_kill_between_the_pointers_keeps_the_best_where_the_step_scores_otherwise_when_taken_again(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pointer: str, again: float
) -> None:
    """As it may on another machine."""
    run, config, scores = tmp_path / "run", preset("tiny").with_values({"steps": 2, "val_every": 1}), [0.4, 0.5]

    def killed(path: Path, value: dict[str, str]) -> None:
        if path.name == f"{pointer}.json" and value["checkpoint"] == "step-0000002":
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(Run, "validate", lambda self, window: scores.pop(0))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tiny_data, run, quiet=True)
    assert load_run(run).info["val_soft_dice_5"] == 0.4, "what was the best until then"
    scores.append(again)
    result = train(config, tiny_data, run, resume=True, quiet=True)
    assert load_run(run).info["val_soft_dice_5"] == result.best == (0.5 if pointer == "best" else max(0.4, again))


def test_a_run_says_whether_it_is_at_its_end(tiny_data: Path, tmp_path: Path) -> None:
    config = preset("tiny").with_values({"steps": 2, "val_every": 2})
    assert train(config, tiny_data, tmp_path / "none", max_steps=0, quiet=True).step == 0
    assert not train(config, tiny_data, tmp_path / "run", max_steps=1, quiet=True).finished
    assert train(config, tiny_data, tmp_path / "run", resume=True, max_steps=2, quiet=True).finished
    timed = config.with_values({"steps": 100, "minutes": 1e-6})
    assert train(timed, tiny_data, tmp_path / "timed", quiet=True).finished, "its minutes are over"


@pytest.mark.parametrize(
    ("settings", "done", "seconds", "said"),
    [
        ({}, 0, 0, "a step takes about 0.42 s here, so 10,000 steps take about 70 minutes, and 40 validations besides"),
        ({"steps": 4}, 0, 0, "a step takes about 0.42 s here, so 4 steps take about 1.7 s, and 1 validation besides"),
        (
            {"clock": "cpu", "minutes": 7},
            9_400,
            100,
            "a step takes about 0.42 s of processor time here, so 600 more steps take about 4.2 minutes, and 3 validations besides",
        ),
        (
            {"minutes": 7},
            100,
            84,
            "a step takes about 0.42 s here, so 9,900 more steps take about 69 minutes, and 40 validations besides; the setting minutes ends "
            "the run after 800 of them at most",
        ),
    ],
)
def test_what_a_run_will_take_is_told_from_one_step(
    settings: dict[str, object], done: int, seconds: float, said: str
) -> None:
    assert forecast(preset("small").with_values(settings), done, seconds, 0.42, 0.42) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04167, "0.042 s"),
        (9.96, "10 s"),
        (119, "119 s"),
        (120, "2.0 minutes"),
        (3540, "59 minutes"),
        (8100, "2.2 hours"),
        (100 * 3600, "4.2 days"),
        (86400 * 1234.6, "1,235 days"),
    ],
)
def test_a_time_is_told_in_two_digits_or_so(seconds: float, said: str) -> None:
    assert lasting(seconds) == said


def test_a_run_that_goes_on_in_another_precision_says_so(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """amp=auto is bf16 on one machine and float32 on the next."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    folder = checkpoint_folder(run, "last")
    assert folder is not None
    for before, notes in (("mixed bf16", 1), ("float32", 0)):
        write_json(folder / "checkpoint.json", read_json(folder / "checkpoint.json") | {"precision": before})
        said = StringIO()
        train(preset("tiny"), tiny_data, run, resume=True, dry_run=True, quiet=True, console=Console(file=said))
        told = "note: the run was computed in mixed bf16 so far, and goes on in float32\n"
        assert said.getvalue().count(told) == notes


def test_a_validation_that_scores_nothing_is_no_best_and_ends_nothing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdiff.train.run.score", lambda *_, **__: math.nan)
    config = preset("tiny").with_values({"steps": 2, "val_every": 1})
    result = train(config, tiny_data, tmp_path / "run", quiet=True)
    assert (result.step, result.best) == (2, None)
    assert checkpoint_folder(tmp_path / "run", "best") is None
    assert [row["val_soft_dice_5"] for row in read_log(tmp_path / "run" / "log.csv")] == ["nan", "nan"]


def test_without_a_late_phase_no_window_is_larger(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the last checkpoint, validated on windows that training never saw, would be the best whatever it scores."""
    scores = iter([0.5, 0.4])
    monkeypatch.setattr("cdiff.train.run.score", lambda *_, **__: next(scores))
    config = preset("tiny").with_values({**GROWING, "late": 0.0, "steps": 2, "val_every": 1})
    assert train(config, tiny_data, tmp_path / "run", quiet=True).best == 0.5
    assert load_run(tmp_path / "run").info["step"] == 1


def test_a_score_belongs_to_the_windows_that_it_was_made_on(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock windows may grow while a validation runs; its score must not stand against those of larger ones."""
    config = preset("tiny").with_values({**GROWING, "late": 0.5, "steps": 1000, "val_every": 1, "minutes": 1.0})
    run = Run(config, read_data(tiny_data, config), fabric_on(torch.device("cpu")), tmp_path)
    seen = []

    def slow(*_: object, **__: object) -> float:
        seen.append(next(iter(run.val_batches)))
        clock[0] += 31.0  # beyond half of the minute
        return 0.9

    clock = [0.0]
    monkeypatch.setattr("cdiff.train.run.score", slow)
    monkeypatch.setattr("cdiff.train.pace.now", lambda config: clock[0])
    run.loop(1, Console(), quiet=True)
    assert (seen, run.window()) == ([16], 32)
    assert run.best_window == 16
    folder = checkpoint_folder(tmp_path, "best")
    assert folder is not None
    assert read_json(folder / "checkpoint.json")["val_protocol"]["window"] == 16


def test_the_best_starts_anew_with_larger_windows_also_in_a_resumed_run(tiny_data: Path, tmp_path: Path) -> None:
    """Small windows around a structure score better, and their checkpoint would stay the best for ever."""
    config = preset("tiny").with_values({**GROWING, "steps": 9})
    data = read_data(tiny_data, config)

    def best(*scores: tuple[float | None, int]) -> tuple[int, float | None]:
        """The step that is the best and the best score, after a run has gone on with these scores on windows of these sizes."""
        run = Run(config, data, fabric_on(torch.device("cpu")), tmp_path)
        run.restore()
        for score, window in scores:
            run.done += 1
            run.save(score, window)
        folder = checkpoint_folder(tmp_path, "best")
        assert folder is not None
        return int(folder.name[-7:]), run.result(0.0).best

    assert best((0.8, 16), (0.9, 16), (0.7, 16)) == (2, 0.9)
    assert best((0.8, 16)) == (2, 0.9)
    assert best((0.5, 32), (0.4, 32), (None, 0)) == (5, 0.5)
    assert best((0.4, 32)) == (5, 0.5)
    assert best((0.6, 32)) == (9, 0.6)


def test_validation_takes_slices_on_which_something_is_drawn_from_the_first_to_the_last(
    tiny_data: Path, tmp_path: Path
) -> None:
    data = read_data(tiny_data, preset("tiny"))
    data.val.masks[2].zero_()
    run = Run(preset("tiny").with_values({"val_slices": 4}), data, fabric_on(torch.device("cpu")), tmp_path)
    assert run.val_chosen == [0, 3, 5, 7]


def test_the_log_s_learning_rate_is_the_step_s(tiny_data: Path, tmp_path: Path) -> None:
    config = preset("tiny").with_values({"steps": 2, "val_every": 2, "log_every": 1, "warmup": 2, "lr": 2e-3})
    train(config, tiny_data, tmp_path / "run", quiet=True)
    assert [float(row["lr"]) for row in read_log(tmp_path / "run" / "log.csv")] == [1e-3, 2e-3]


def test_a_run_is_logged_validated_and_saved_when_its_settings_say(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row every second step, a score every third and at the end, a checkpoint 15 s after the last; and a checkpoint says what was done."""
    clock, scores, taken, saved = [0.0], iter([0.5, 0.6, 0.4]), [], []
    save = Run.save

    def step(*_: object) -> tuple[float, float]:
        clock[0] += 10.0
        return 0.25, 1.5

    monkeypatch.setattr("cdiff.train.run.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("cdiff.train.run.score", lambda *_, **how: taken.append(how) or next(scores))
    monkeypatch.setattr("cdiff.train.mfu.image_flop", lambda *_: 5e11)
    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(Run, "save", lambda self, *of: saved.append((self.done, of[0])) or save(self, *of))
    when = {"steps": 7, "val_every": 3, "log_every": 2, "save_every_s": 15.0}
    config = preset("tiny").with_values({**when, "seed": 3, "peak_tflops": 1.0})
    result = train(config, tiny_data, tmp_path / "run", quiet=True)
    assert (result.step, result.loss, result.best, result.out) == (7, 0.25, 0.6, tmp_path / "run")
    assert (result.interrupted, result.finished, result.first) == (False, True, True)
    assert saved == [(2, None), (3, 0.5), (5, None), (6, 0.6), (7, 0.4)]
    rows = read_log(tmp_path / "run" / "log.csv")
    scored = [("2", ""), ("3", "0.5"), ("4", ""), ("6", "0.6"), ("7", "0.4")]
    assert [(row["step"], row["val_soft_dice_5"]) for row in rows] == scored
    assert {(row["loss"], row["grad_norm"], row["window"]) for row in rows} == {("0.25", "1.5", "32")}
    (share,) = {row["mfu"] for row in rows}
    assert float(share) == pytest.approx(4 * 0.5 / 10), "four images of 0.5 TFLOP in 10 s"
    how = {"steps": config.training.val_steps, "runs": config.training.val_runs, "seed": 3}
    assert [{key: given[key] for key in how} for given in taken] == [how] * 3
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-0000006", "step-0000007"}
    info = load_run(tmp_path / "run").info
    assert info["val_protocol"] == {"sampler": "ddim", "steps": 4, "runs": 2, "slices": 4, "window": 32}
    assert (info["step"], info["val_soft_dice_5"], info["best"], info["is_best"]) == (6, 0.6, 0.6, True)
    assert (info["parameters"], info["machine"]["processes"], info["machine"]["device"]) == (
        result.parameters,
        1,
        "cpu",
    )
