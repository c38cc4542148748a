"""What ends a command from outside: Ctrl-C, and the signals of batch systems, containers and closed terminals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import cdiff
from cdiff.cli.benchmark import benchmark
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import PART
from cdiff.train.interrupt import Interrupt
from tests.synthetic import write_synthetic_dataset

SCAN = Path(cdiff.__file__).parent / "demo" / "image.nii.gz"
LONG = [sys.executable, "-m", "cdiff.cli", "segment", SCAN, "--fast", "--slices", "3:4", "--runs", "400"]
SEGMENT = [*LONG[:-1], "1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_ended_leaves_no_unfinished_file(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*SEGMENT, "-o", tmp_path],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # also where the tests run under nohup
    ) as process:
        while not any(tmp_path.glob(f"{PART}*")):  # the picture alone takes far longer than a look at the folder
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        if number != signal.SIGINT:
            process.send_signal(number)  # as timeout(1) does
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert b"error: interrupted" in said
    assert list(tmp_path.glob(f"{PART}*")) == []


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, whose work goes on when the terminal is closed."""
    with subprocess.Popen(
        [*SEGMENT, "-o", tmp_path],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:
        while not any(tmp_path.glob(f"{PART}*")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "image.json").is_file()


def test_a_training_saves_at_each_of_them_but_not_under_nohup() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before = signal.signal(number, signal.SIG_DFL)
        try:
            with Interrupt() as interrupt:
                signal.raise_signal(number)
            assert interrupt.asked
            assert signal.getsignal(number) == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN)
            with Interrupt() as interrupt:
                signal.raise_signal(number)
            assert not interrupt.asked
        finally:
            signal.signal(number, before)


def test_an_echo_of_the_signal_does_not_cut_a_training_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system signals torchrun and all its processes, and torchrun signals these once more; a user who asks again is heard."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.asked
            later = time.monotonic() + 3
            monkeypatch.setattr(time, "monotonic", lambda: later)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of R around Python: a training that was through ended in a TypeError, since such a one cannot be given back."""
    monkeypatch.setattr("signal.getsignal", lambda _: None)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with Interrupt():
        assert signal.signal(signal.SIGHUP, before) == signal.SIG_DFL


@pytest.mark.parametrize("ended", ["terminal closed", "terminal lost", "reader ended", "disk full"])
def test_words_that_nobody_takes_do_not_end_the_work(tmp_path: Path, ended: str) -> None:
    """A closed terminal still says goodbye as documented; without its signal (disown, a `tee` that died) the work goes on."""
    screen, words = pty.openpty() if ended.startswith("terminal") else os.pipe()
    if ended == "disk full":
        words = os.open("/dev/full", os.O_WRONLY)

    def on_it() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.setsid()
        if ended == "terminal closed":
            fcntl.ioctl(words, termios.TIOCSCTTY, 0)

    out = words if ended.startswith("terminal") else subprocess.DEVNULL
    segment = LONG if ended == "terminal closed" else SEGMENT  # or it may be done before the signal comes
    with subprocess.Popen([*segment, "-o", tmp_path], stdout=out, stderr=words, preexec_fn=on_it) as process:
        os.close(words)
        if ended == "terminal closed":
            said = b""
            while b"engine" not in said:
                said += os.read(screen, 1000)
        else:
            while not any(tmp_path.glob(f"{PART}*")):
                assert process.poll() is None
                time.sleep(0.005)
        os.close(screen)
        assert process.wait(timeout=60) == (130 if ended == "terminal closed" else 0)
    assert list(tmp_path.glob(f"{PART}*")) == []
    assert (tmp_path / "image.json").is_file() == (ended != "terminal closed")


def test_a_reader_of_results_that_ended_early_is_no_crash_and_costs_no_file(tmp_path: Path) -> None:
    """As `| head -1` does: exit code 1, and not a word, of Python's shutdown neither."""
    data, files = write_synthetic_dataset(tmp_path / "data", 2, raters=2, shape=(8, 8, 2)), tmp_path / "files"
    for command in (["info"], ["data", "check", data, "--json", files / "check.json", "--sheet", files / "sheet.png"]):
        reader, results = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "cdiff.cli", *command], stdout=results, stderr=subprocess.PIPE, check=False
        )
        os.close(results)
        assert (done.returncode, done.stderr) == (1, b"")
    assert {path.name for path in files.iterdir()} == {"check.json", "sheet.png"}


def test_a_measurement_is_written_though_nobody_reads_its_tables_and_printed_though_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reader_ended(report: object) -> str:
        raise BrokenPipeError

    def full(path: Path, report: object) -> None:
        raise CdiffError("no space left")

    monkeypatch.setattr("cdiff.benchmarks.benchmark.benchmark", lambda *given, **options: {"measured": 1})
    monkeypatch.setattr("cdiff.benchmarks.benchmark.summary", reader_ended)
    with pytest.raises(BrokenPipeError):
        benchmark(json_=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == {"measured": 1}
    monkeypatch.setattr("cdiff.benchmarks.benchmark.summary", lambda report: "the tables")
    monkeypatch.setattr("cdiff.runtime.files.write_json", full)
    with pytest.raises(CdiffError, match="no space left"):
        benchmark(json_=tmp_path / "other.json")
    assert "the tables" in capsys.readouterr().out
