"""The log of a run where there is no room for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog

from cdiff.runtime.errors import CdiffError
from cdiff.train import log as module
from cdiff.train.log import Log, read_log


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a device without room, on this system")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """And what closing TensorBoard's file says after it does not stand in its place."""

    def full() -> None:
        raise OSError(28, "No space left on device")

    log = Log(tmp_path, Console(), 0, 9, True)
    log.row({"step": 1, "loss": 0.5})
    log.path = Path("/dev/full")
    log.board.close = full  # type: ignore[method-assign]
    with pytest.raises(CdiffError, match=r"No space left on device; make room"), log:
        log.row({"step": 2, "loss": 0.4})
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == ["1"]


def test_a_disk_that_is_full_at_the_beginning_or_the_end_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    log = Log(tmp_path, Console(), 0, 9, True)
    log.board.close = full  # type: ignore[method-assign]
    with pytest.raises(CdiffError, match="No space left on device; make room"), log:
        pass
    monkeypatch.setattr(module, "SummaryWriter", full)
    with pytest.raises(CdiffError, match="No space left on device; make room"):
        Log(tmp_path, Console(), 0, 9, True)


def test_a_resumed_run_tells_tensorboard_from_which_step_on_its_old_rows_do_not_count(tmp_path: Path) -> None:
    with Log(tmp_path, Console(), 40, 90, True):
        pass
    (events,) = (tmp_path / "tensorboard").iterdir()
    starts = [one for one in EventFileLoader(str(events)).Load() if one.HasField("session_log")]
    assert [(one.session_log.status, one.step) for one in starts] == [(SessionLog.START, 41)]


def test_damaged_lines_are_left_out_and_what_is_no_log_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    whole = b"step,loss\n1,0.5\n2,0.4\n"
    path.write_bytes(whole + b"\xff3,0.3\n" + "\u00b2,0.2\n".encode() + b"9" * 5000 + b",0.1\n")
    assert [row["step"] for row in read_log(path)] == ["1", "2"]
    path.write_bytes(whole + b"x" * 200_000)
    with pytest.raises(CdiffError, match=r"log\.csv cannot be read as a log .*move it away"):
        read_log(path)
