"""How a command ends where its work ended otherwise than done: its exit code, what it says, and that it names no result that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.runtime.doctor import Check, Diagnosis
from cdiff.train.fabric import FailedElsewhere
from cdiff.train.run import TrainResult

RUN = Path("runs/mine")
TRAIN = ("train", "--data", "data", "--out", "run")


def ended(*command: str) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr."""
    result = CliRunner().invoke(app, command)
    return result.exit_code, result.stdout, result.stderr.splitlines()


def trained(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Have a training end so, which is otherwise done."""
    done: dict[str, Any] = {
        **{"step": 7, "loss": 0.25, "best": 0.625, "seconds": 90.0, "out": RUN, "parameters": 1, "data": {}},
        **{"interrupted": False, "finished": True, "first": True},
    }
    patch.setattr("cdiff.train.trainer.train", lambda *_, **__: TrainResult(**done | changes))


def test_a_training_is_done_stopped_or_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    went = "step 7, 1.5 minutes of training, best validation soft Dice 0.625"
    trained(monkeypatch)
    assert ended(*TRAIN) == (0, f"{RUN}\n", [went])
    assert ended(*TRAIN, "-q") == (0, f"{RUN}\n", [])
    assert ended(*TRAIN, "--dry-run") == (0, "", ["dry run: the first step's loss is 0.2500; nothing is written"])
    trained(monkeypatch, best=None)
    assert ended(*TRAIN) == (0, f"{RUN}\n", ["step 7, 1.5 minutes of training, not validated yet"])
    trained(monkeypatch, finished=False)
    stopped = "stopped before the run's end, as --max-steps says; --resume goes on from here"
    assert ended(*TRAIN) == (0, f"{RUN}\n", [went, stopped])
    trained(monkeypatch, finished=False, interrupted=True)
    saved = "error: interrupted; the work so far is saved, and --resume goes on from step 7"
    assert ended(*TRAIN) == (130, "", [went, saved])


def test_of_processes_that_train_together_one_speaks_and_all_end_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    trained(monkeypatch, first=False)
    assert ended(*TRAIN) == (0, "", [])
    trained(monkeypatch, first=False, finished=False, interrupted=True)
    assert ended(*TRAIN) == (130, "", [])

    def failed(*_: object, **__: object) -> None:
        raise FailedElsewhere

    monkeypatch.setattr("cdiff.train.trainer.train", failed)
    assert ended(*TRAIN) == (2, "", [])


@pytest.mark.parametrize("usable", [True, False])
def test_a_machine_on_which_no_engine_runs_is_an_exit_code(usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script asks before it sends work there."""
    checks = [Check("onnxruntime", usable, "1.31", "install it"), Check("cores", None, "2")]
    monkeypatch.setattr("cdiff.runtime.doctor.diagnose", lambda: Diagnosis({"Engines": checks}, usable))
    code, printed, _ = ended("doctor")
    rows = [line.split() for line in printed.splitlines()[1:3]]
    assert (code, rows) == (
        0 if usable else 2,
        [["onnxruntime", "yes" if usable else "no", "1.31;", "install", "it"], ["cores", "2"]],
    )


def test_a_benchmark_prints_its_tables_and_where_the_numbers_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdiff.benchmarks.benchmark.benchmark", lambda *_, **__: {"ms": 2.5})
    monkeypatch.setattr("cdiff.benchmarks.benchmark.summary", lambda report: f"a table of {report['ms']}")
    out = tmp_path / "a.json"
    assert ended("benchmark", "--json", str(out)) == (0, f"a table of 2.5\n{out}\n", [])
    assert json.loads(out.read_text()) == {"ms": 2.5}
    assert ended("benchmark") == (0, "a table of 2.5\n", [])
