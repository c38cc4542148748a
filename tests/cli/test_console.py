"""The bar and the results: what goes to stdout stays there, whatever is on the terminal."""

from __future__ import annotations

import logging
import threading
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cdiff.cli import console
from cdiff.cli.app import main


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


def test_a_result_shown_beside_a_bar_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True))
    monkeypatch.setattr(console, "out", Console(file=screen))
    with console.Meter("segment") as meter:
        meter(1, 2)
        console.Meter.show("maps/a_soft.nii.gz")
        meter(2, 2)
    before, after = screen.getvalue().split("maps/a_soft.nii.gz")
    assert before.endswith("\x1b[2K"), "the bar's line is erased"
    assert after.startswith("\n")
    assert "segment" in after, "and drawn again"


def test_a_quiet_terminal_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True))
    with console.Meter("segment", quiet=True) as meter:
        meter(1, 2)
    assert screen.getvalue() == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_without_a_terminal_a_line_comes_now_and_then(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log of hours must stay readable, and one that is quiet empty; also where nothing is done yet."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with console.Meter("evaluate", quiet) as meter:
        for done in range(0, 101, 5):
            meter(done if done > 30 else 0, 100)
            now[0] += 10
    lines = ("0%, about 3000", "0%, about 6000", "45%, about 110", "60%, about 80", "75%, about 50", "90%, about 20")
    said = capsys.readouterr().err.splitlines()
    assert said == ([] if quiet else [f"evaluate: {line} s left" for line in lines])


@pytest.mark.parametrize(
    "name", ["[/x]", "[bold]b", "a:heart:b", "tab\there", "bell\x07", "two  spaces" * 30, "back\\"]
)
def test_a_path_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A program reads it: no markup, no emoji, no blanks for a tab, nothing left out."""
    console.written(Path("maps") / name)
    console.Meter.show(f"maps/{name}")
    assert capsys.readouterr().out == f"maps/{name}\n" * 2


def test_a_terminal_does_not_obey_a_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file or in a bundle: a title, colours, a line that runs backwards, or one that ends early."""
    name, seen = "a\x1b]0;x\x07b\u202egnp\n[/]:heart:\\.", r"a\x1b]0;x\x07b\u202egnp\n[/]:heart:\."
    for function in (console.fail, console.warn, console.say):
        function(name)
    text = capsys.readouterr().err
    assert text == f"error: {seen}\nnote: {seen}\n{seen}\n"
    console.fail("wrong are:\n  a\n  b")  # a list, as of tensors that do not fit
    assert capsys.readouterr().err == "error: wrong are:\n  a\n  b\n"
    console.facts("Model", [("name", name)])
    assert seen in capsys.readouterr().out.replace("\n", "")
    monkeypatch.setattr(console, "out", Console(force_terminal=True))
    console.written(name)
    assert capsys.readouterr().out == f"{seen}\n"
    assert console.visible("患者 é \U0001f600") == "患者 é \U0001f600"


def test_what_the_runtime_warns_of_is_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As all else that a user must not miss; Python's own handler printed it without a word before it."""
    log = logging.getLogger("cdiff")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("cdiff.cli.app.app", lambda prog_name: log.warning("%s; going on with %d rows", "no [room]", 4))
    main("cdiff")
    assert capsys.readouterr().err == "note: no [room]; going on with 4 rows\n"
