"""The bar and the results: what goes to stdout stays there, whatever is on the terminal."""

from __future__ import annotations

import threading

import pytest
from rich.console import Console

from cdiff.cli import console


def test_a_result_shown_beside_a_bar_goes_to_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich sends what is printed while its bar is on the screen to the bar's own stream, and a pipe would lack the paths."""
    monkeypatch.setattr(console, "err", Console(stderr=True, force_terminal=True))
    with console.Meter("segment") as meter:
        meter(1, 2)
        writer = threading.Thread(target=console.Meter.show, args=("maps/[a]_soft.nii.gz",))
        writer.start()
        writer.join()
        meter(2, 2)
    console.Meter.show("after")
    printed = capsys.readouterr()
    assert printed.out == "maps/[a]_soft.nii.gz\nafter\n"
    assert "maps" not in printed.err
    assert "segment" in printed.err
