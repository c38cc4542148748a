"""What a dry run says that the whole run would take."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from cdiff.runtime.errors import CdiffError
from cdiff.train import pace
from cdiff.train.data import Data, read_data
from cdiff.train.fabric import fabric_on
from cdiff.train.learner import Learner
from cdiff.train.presets import preset
from cdiff.train.rows import Rows
from cdiff.train.run import Run
from cdiff.train.trainer import train
from tests.train.test_scale import CPU

GROWING = preset("tiny").with_values({"steps": 100, "val_every": 50, "framing": "tile", "crop": 16, "late": 0.25})

EVEN = preset("tiny").with_values({"steps": 100})


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> Data:
    return read_data(tiny_data, preset("tiny"))


def test_steps_after_the_windows_have_grown_count_as_what_they_take() -> None:
    """75 steps of 2 s and 25 of 10 s; a forecast by the first ones alone said 200 s."""
    said = pace.forecast(GROWING, 0, 0.0, 2.0, 10.0)
    assert said == (
        "a step takes about 2 s here, and 10 s once windows have 32 pixels, so 100 steps take about 6.7 minutes, and 2 validations besides"
    )
    assert "50 more steps take about 4.6 minutes" in pace.forecast(GROWING, 50, 50.0, 1.0, 10.0)
    assert pace.forecast(GROWING, 80, 125.0, 10.0, 10.0).startswith("a step takes about 10 s here, so 20 more steps")
    assert "so 100 steps take about 100 s" in pace.forecast(
        preset("tiny").with_values({"steps": 100}), 0, 0.0, 1.0, 1.0
    )


def test_the_minutes_hold_fewer_of_the_later_steps() -> None:
    """Of two minutes, 90 s hold 90 steps and the last 30 s three."""
    config = GROWING.with_values({"minutes": 2.0, "steps": 1000})
    assert "after 93 of them at most" in pace.forecast(config, 0, 0.0, 1.0, 10.0)
    assert "after 33 of them at most" in pace.forecast(config, 60, 60.0, 1.0, 10.0)
    assert "after 2 of them at most" in pace.forecast(config, 91, 100.0, 10.0, 10.0)


def test_a_dry_run_also_takes_the_larger_steps(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run whose last quarter does not fit into the memory would be found out after three."""
    step = Learner.step

    def small_alone(self: Learner, k: int, parts: list[Rows], lr: float) -> tuple[float, float]:
        if parts[0].image.shape[-1] > 16:
            raise CdiffError("too large")
        return step(self, k, parts, lr)

    monkeypatch.setattr(Learner, "step", small_alone)
    with pytest.raises(CdiffError, match="too large"):
        train(GROWING, tiny_data, tmp_path / "run", dry_run=True, quiet=True)


def test_a_dry_run_says_how_long_the_steps_of_either_size_take(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "try_out", lambda self, window: (0.5 * window, 10.0 if window == 32 else 1.0))
    for config, says in (
        (GROWING, "1 s here, and 10 s once windows have 32 pixels, so 100"),
        (EVEN, "10 s here, so 100"),
    ):
        said = io.StringIO()
        result = train(config, tiny_data, tmp_path / "run", dry_run=True, console=Console(file=said))
        assert f"\na step takes about {says} steps take about" in said.getvalue()
        assert (result.loss, result.finished) == (8 if config is GROWING else 16, False)


def test_minutes_are_counted_on_the_clock_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "process_time", lambda: 3.0)
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    assert [pace.now(preset("tiny").with_values({"clock": clock})) for clock in ("cpu", "wall")] == [3.0, 5.0]


@pytest.mark.parametrize(
    ("ahead", "clock", "step", "takes"),
    [(0, "wall", 1, 1.4), (2, "wall", 0.1, 0.2), (2, "wall", 1, 1), (2, "cpu", 0.1, 0.1)],
)
def test_a_step_is_not_quicker_than_its_data(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int, clock: str, step: float, takes: float
) -> None:
    """What is prepared while the first, slow step is taken is no measure of what a run waits for."""
    run = Run(preset("tiny").with_values({"prefetch": ahead, "clock": clock}), data, fabric_on(CPU), tmp_path)
    now = [0.0]

    def after(seconds: float, value: object) -> object:
        now[0] += seconds
        return value

    monkeypatch.setattr(pace, "now", lambda config: now[0])
    monkeypatch.setattr(run.feed, "prepare", lambda k, window: after(0.4, []))
    if ahead:
        monkeypatch.setattr(run.feed, "take", lambda k, window: [])
    monkeypatch.setattr(Learner, "step", lambda *_: after(step, (0.5, 1.0)))
    assert run.try_out(32) == (0.5, pytest.approx(takes))
