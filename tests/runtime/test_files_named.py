"""What a file may be called and hold, and what is not replaced by one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import most_bytes_of_a_name, must_be_a_file, write_json, write_text


def test_a_disk_that_is_read_only_is_told_by_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no file, and refuses the removal of one that is not there too: the user was told of a name that nobody had given."""

    def refuse(path: Path, **_: bool) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: refuse(path))
    with pytest.raises(CdiffError, match=f"^cannot write to {tmp_path}: read-only file system"):
        write_text(tmp_path / "sheet.txt", "")


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    """The superuser may rename a file to /dev/null, and every program would write into it from then on."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # a file where stdout goes to one
    for name in ("pipe", "null", "stdout"):
        before = os.lstat(tmp_path / name)
        with pytest.raises(CdiffError, match=f"{name} is a device or a pipe"):
            write_json(tmp_path / name, {})
        assert os.lstat(tmp_path / name) == before
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    for name in ("real", "link", "new"):
        must_be_a_file(tmp_path / name)


def test_how_long_a_name_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = most_bytes_of_a_name(tmp_path / "not/there/yet")
    (tmp_path / ("n" * longest)).write_text("")
    with pytest.raises(OSError, match="too long"):
        (tmp_path / ("n" * (longest + 1))).write_text("")
    monkeypatch.setattr(os, "pathconf", lambda folder, of: {(tmp_path, "PC_NAME_MAX"): 143}[folder, of])  # encrypted
    assert most_bytes_of_a_name(tmp_path / "not/there/yet") == 143
    monkeypatch.delattr("os.pathconf")  # as on Windows
    assert most_bytes_of_a_name(tmp_path) == 255


def test_a_name_that_is_not_utf8_can_stand_in_a_report(tmp_path: Path) -> None:
    name = os.fsdecode(b"M\xfcller")
    write_json(tmp_path / "a.json", {"case": name, "other": "Müller"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"case": name, "other": "Müller"}
    assert "Müller" in text
    with pytest.raises(ValueError, match="JSON"):  # it would be read as JSON by Python alone
        write_json(tmp_path / "a.json", {"dice": float("nan")})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text
