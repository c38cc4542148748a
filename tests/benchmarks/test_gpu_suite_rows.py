"""A batch that is too large for a kernel costs a GPU suite's check that batch, and not its protocol."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdiff.benchmarks import gpu_checks, gpu_measure, gpu_suite
from cdiff.benchmarks.gpu_checks import Settings
from cdiff.benchmarks.gpu_plan import Check
from cdiff.benchmarks.gpu_suite import Suite
from tests.benchmarks.tiny import CPU

NAME = "protocol:graph:shipped"


class Card:
    """What breaks at more than `rows` rows, and then in all that follows in the same process. `ran`: the checks that were started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
        self.rows, self.spoilt, self.ran = rows, False, list[str]()
        self.step_seconds = gpu_measure.step_seconds
        monkeypatch.setattr(gpu_measure, "step_seconds", self.measure)
        monkeypatch.setattr(gpu_suite, "in_a_process", self.process)

    def measure(self, engine: Any, model: Any, image: Any, batch: int) -> float:
        if self.spoilt or batch > self.rows:
            self.spoilt = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.step_seconds(engine, model, image, batch)

    def process(self, name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        self.spoilt = False
        self.ran.append(name)
        return gpu_checks.run_check(name, settings)


def suite(folder: Path, *, expected: int = 1, minutes: float = 5) -> dict[str, Any]:
    """What became of the one check."""
    checks = [Check(NAME, "", 60, expected)]
    made = Suite(folder, CPU, checks, fresh=False)
    made.run(checks, minutes)
    found: dict[str, Any] = made.report["checks"][NAME]
    return found


def test_the_protocol_is_measured_with_the_rows_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, rows=1)
    found = suite(tmp_path)
    assert card.ran == [NAME, f"{NAME}@1"]
    assert (found["status"], found["result"]["batch"]) == ("done", 1)
    assert found["result"]["share"] > 0, "a protocol, and not its steps alone"
    assert list(found["result"]["sweep"]) == ["1", "6"]
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "CUDA error: an illegal memory access was encountered" in page


@pytest.mark.parametrize(
    ("status", "sweep", "took"),
    [
        ("done", {"1": {}, "6": {"error": "no room"}}, 1),
        ("failed", {"1": {}, "6": {}}, 1),  # by something else
        ("failed", {"1": {"error": "broke"}, "6": {"error": "broke"}}, 1),
        (
            "failed",
            {"1": {}, "6": {"error": "broke"}},
            150,
        ),  # more than half of the time that another try should take is gone
    ],
)
def test_what_would_break_again_or_come_too_late_is_not_tried_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, sweep: dict[str, Any], took: float
) -> None:
    now, ran = [0.0], list[str]()

    def process(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        ran.append(name)
        now[0] += took
        return {"status": status, "message": "it broke", "result": {"batch": 1, "sweep": sweep}, "seconds": took}

    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu_suite, "in_a_process", process)
    assert suite(tmp_path, expected=100, minutes=3)["status"] == status
    assert ran == [NAME]


def test_a_process_that_ends_in_a_batch_has_said_in_which(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, rows=100)
    kept: list[str] = []
    found = gpu_checks.run_check(NAME, CPU, lambda result: kept.append(json.dumps(result)))
    assert "error" not in json.dumps(found)
    before = json.loads(kept[1])
    assert before["batch"] == 1
    assert before["sweep"]["6"] == {"error": "the check's process ended while it was measured"}


def test_a_disk_that_is_full_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), settings.work)

    monkeypatch.setattr(gpu_suite, "in_a_process", full)
    assert gpu_suite.main(["--device", "cpu", "--small", "--checks", "machine", "--out", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
