"""Whole or not at all: interrupted, failing and repeated writes, and a process that is really interrupted."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import (
    atomic_folder,
    atomic_path,
    most_bytes_of_a_name,
    must_be_a_file,
    sha256,
    staged,
    write_json,
    write_text,
)


def fill(folder: Path, files: dict[str, str], error: BaseException | None = None) -> None:
    """Write a set of files into `folder`, and be interrupted by `error` before it is complete."""
    with staged(folder) as stage:
        for name, text in files.items():
            stage(name).write_text(text)
        if error:
            raise error


def fill_folder(target: Path, name: str, error: BaseException | None = None, *, replace: bool = False) -> None:
    """Write a folder with one file in a folder, and be interrupted by `error` before it is complete."""
    with atomic_folder(target, replace=replace) as part:
        (part / "sub").mkdir()
        write_json(part / "sub" / name, {})
        if error:
            raise error


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_a_file_appears_whole_and_keeps_the_usual_permissions(tmp_path: Path) -> None:
    target = tmp_path / "new" / "maps.nii.gz"
    with atomic_path(target) as part:
        assert part.parent == target.parent
        assert part.name.endswith(".nii.gz")
        part.write_bytes(b"abc")
        assert not target.exists()
    (tmp_path / "plain").write_bytes(b"abc")
    assert target.read_bytes() == b"abc"
    assert names(target.parent) == ["maps.nii.gz"]
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sha256(target) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_files(tmp_path: Path, error: BaseException) -> None:
    fill(tmp_path, {"a.bin": "old", "report.json": "old"})
    with pytest.raises(type(error)):
        fill(tmp_path, {"a.bin": "half of the n", "report.json": "new"}, error)
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "a.bin": "old",
        "report.json": "old",
    }


def test_a_set_replaces_what_it_makes_out_of_date(tmp_path: Path) -> None:
    fill(tmp_path, {"a.bin": "old", "preview.png": "old", "report.json": "old"})
    with staged(tmp_path) as stage:
        stage("a.bin").write_text("new")
        stage.replaces("preview.png")
        stage("report.json").write_text("new")
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "a.bin": "new",
        "report.json": "new",
    }


def test_no_report_vouches_for_a_mixture(tmp_path: Path) -> None:
    fill(tmp_path, {"a.bin": "old", "report.json": "old"})
    (tmp_path / "b.bin").mkdir()  # the second rename must fail
    with pytest.raises(CdiffError, match="cannot write"):
        fill(tmp_path, {"a.bin": "new", "b.bin": "new", "report.json": "new"})
    assert names(tmp_path) == ["a.bin", "b.bin"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        fill_folder(target, "a.json", KeyboardInterrupt())
    assert names(tmp_path) == []
    fill_folder(target, "a.json")
    assert (target / "sub" / "a.json").read_text() == "{}\n"


def test_an_older_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    fill_folder(target, "a.json")
    with pytest.raises(CdiffError, match="already exists"):
        fill_folder(target, "b.json")
    with pytest.raises(RuntimeError):
        fill_folder(target, "b.json", RuntimeError(), replace=True)
    assert names(target / "sub") == ["a.json"]
    fill_folder(target, "b.json", replace=True)
    assert names(target / "sub") == ["b.json"]
    assert names(tmp_path) == ["bundle"]


def test_of_two_folders_written_at_once_the_first_that_is_whole_stays(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def write_late() -> None:
        with atomic_folder(target) as late:
            fill_folder(target, "first.json")
            write_text(late / "late.json", "x")

    with pytest.raises(CdiffError, match="already exists"):
        write_late()
    assert names(target / "sub") == ["first.json"]
    assert names(tmp_path) == ["bundle"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    with pytest.raises(CdiffError, match="not a folder") as caught:
        write_text(tmp_path / "file" / "below", "x")
    assert "\n" not in str(caught.value)
    with pytest.raises(CdiffError, match="cannot write"):
        write_text(tmp_path / ("n" * 300), "x")


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
    monkeypatch.delattr("os.pathconf")  # as on Windows
    assert most_bytes_of_a_name(tmp_path) == 255


def test_ctrl_c_in_a_real_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from cdiff.runtime.files import staged\n"
        "with staged(pathlib.Path(sys.argv[1])) as stage:\n"
        "    stage('a.bin').write_bytes(b'x' * 100000); stage('b.json').write_text('{}')\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert len(names(tmp_path)) == 2
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert names(tmp_path) == []


def test_a_name_that_is_not_utf8_can_stand_in_a_report(tmp_path: Path) -> None:
    name = os.fsdecode(b"M\xfcller")
    write_json(tmp_path / "a.json", {"case": name, "other": "Müller"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"case": name, "other": "Müller"}
    assert "Müller" in text
