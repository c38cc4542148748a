"""Help that fits the terminal and names every option; commands that load no more than they need."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from cdiff.cli.app import app

OPTIONS = {
    "": ["--version", "segment", "evaluate", "data", "train", "export", "info", "doctor", "benchmark"],
    "segment": [
        *("SCAN", "-i", "-o", "--model", "--runs", "--steps", "--sampler", "--fast", "--levels", "--seed", "--engine"),
        *("--device", "--slices", "--at", "--preview", "--no-preview", "-q", "cdiff_output"),
    ],
    "evaluate": [
        *(
            "--data",
            "--model",
            "--runs",
            "--steps",
            "--limit",
            "--json",
            "--all-raters",
            "--all-slices",
            "--slices-per-case",
            "--raters",
            "--split",
        ),
        *("--task", "--sampler", "--fast", "--levels", "--seed", "--engine", "--device", "-q"),
        *("--report", "--steps-curve", "--worst", "--paper-table", "--group", "--mirror"),
    ],
    "data": ["check"],
    "data check": ["DIR", "--task", "--layout", "--labels", "--slice-axis", "--json", "--sheet", "--no-sheet", "-q"],
    "train": [
        "--data",
        "--task",
        "--layout",
        "--labels",
        "--preset",
        "--out",
        "--set",
        "--resume",
        "--max-steps",
        "--dry-run",
    ],
    "import": ["CHECKPOINT", "--out", "--args", "--from", "--option", "--images", "--mean", "--std", "--image-size"],
    "export": ["RUN", "--out", "--fp16", "--engine", "--rows", "--capability", "--workspace", "--refit"],
    "info": ["BUNDLE", "--json"],
    "doctor": [],
    "benchmark": [],
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", OPTIONS)
def test_help_fits_and_is_whole(command: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Typer keeps the TERMINAL_WIDTH that it found first, whichever test that was; COLUMNS is read each time, in a dumb terminal with LINES.
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", None)
    environment = {"COLUMNS": str(width), "LINES": "50", "TERM": "dumb", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, [*command.split(), "--help"], env=environment)
    assert result.exit_code == 0, result.output
    assert (
        max(map(len, result.output.splitlines())) == width
    )  # the panels fill it, so this is the width that was asked for
    for word in OPTIONS[command]:
        assert word in result.output
    assert "…" not in result.output  # rich shortens what does not fit
    assert "<bool>" not in result.output, "a switch looks as if it took a value"


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"cdiff {version('cdiff')}"


def test_no_command_shows_help() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code in (0, 2)
    assert "segment" in result.output
