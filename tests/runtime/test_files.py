"""Whole or not at all: interrupted, failing and repeated writes, and a process that is really interrupted."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import (
    PART,
    atomic_folder,
    atomic_path,
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
    target = tmp_path / "new" / "below" / "maps.nii.gz"
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
    with staged(tmp_path) as stage:
        stage("report.json").write_text("newer")
        stage.replaces("a.bin")
    assert names(tmp_path) == ["report.json"]


def read(folder: Path) -> dict[str, str]:
    """What the files of a set hold, without unfinished ones."""
    return {name: (folder / name).read_text() for name in names(folder) if not name.startswith(PART)}


def replace_set(folder: Path) -> None:
    """A set of two files and one that is out of date with them."""
    with staged(folder) as stage:
        stage("a.bin").write_text("new")
        stage.replaces("page.html")
        stage("report.json").write_text("new")


OLD = {"a.bin": "old", "page.html": "old", "report.json": "old"}
NEW = {"a.bin": "new", "report.json": "new"}
RENAMES = 5
"""Of `replace_set` over OLD: three aside and two in place."""


def at_rename(number: int, happens: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen in place of the rename of that number (from 1) and no other."""
    count, real = [0], os.rename

    def counted(source: Path, target: Path) -> None:
        count[0] += 1
        if count[0] == number:
            happens()
        real(source, target)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, counted)


@pytest.mark.parametrize("number", range(1, RENAMES + 1))
@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), KeyboardInterrupt()])
def test_an_older_set_is_back_where_the_renames_end_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> None:
    fill(tmp_path, OLD)

    def fail() -> None:
        raise error

    at_rename(number, fail, monkeypatch)
    with pytest.raises(CdiffError if isinstance(error, OSError) else KeyboardInterrupt):
        replace_set(tmp_path)
    assert read(tmp_path) == OLD
    assert names(tmp_path) == sorted(OLD)


def test_ctrl_c_once_the_new_set_is_there_leaves_nothing_of_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, OLD)
    real = os.fsync

    def interrupt(handle: int) -> None:
        real(handle)
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # the folder comes after the renames
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_set(tmp_path)
    assert read(tmp_path) == NEW
    assert names(tmp_path) == sorted(NEW)


def test_a_new_set_that_is_cut_short_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "b.bin").mkdir()  # the second rename must fail
    with pytest.raises(CdiffError, match="cannot write"):
        fill(tmp_path, {"a.bin": "new", "b.bin": "new", "report.json": "new"})
    assert names(tmp_path) == ["b.bin"]


def test_of_a_killed_replacement_no_report_vouches_for_a_mixture(tmp_path: Path) -> None:
    for number in range(1, RENAMES + 1):
        folder = tmp_path / str(number)
        fill(folder, OLD)
        if (child := os.fork()) == 0:
            with pytest.MonkeyPatch.context() as patch:
                at_rename(number, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
                replace_set(folder)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        left = read(folder)
        assert left == OLD if number == 1 else "report.json" not in left
        kept = [path.read_text() for path in folder.iterdir()]
        assert kept.count("old") == 3  # under whatever name
        replace_set(folder)
        assert read(folder).items() >= NEW.items()


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("number", range(1, RENAMES + 1))
def test_nor_does_one_while_the_older_set_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, renamed: bool
) -> None:
    """A kill may come then too: no report stands beside files of another set, or without them."""
    fill(tmp_path, OLD)
    count, real = [0], os.rename

    def interrupted(source: Path, target: Path) -> None:
        left = read(tmp_path)
        assert "report.json" not in left or left in (OLD, NEW)
        count[0] += 1
        if renamed or count[0] != number:
            real(source, target)
        if count[0] == number:
            raise KeyboardInterrupt

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_set(tmp_path)
    assert count[0] >= number


def test_a_single_file_is_there_at_every_moment_of_its_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a.txt", "old")
    there: list[bool] = []
    for name in ("rename", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *of, real=real: there.append((tmp_path / "a.txt").exists()) or real(*of))
    write_text(tmp_path / "a.txt", "new")
    assert there
    assert all(there)


def test_a_set_waits_for_a_folder_that_another_process_holds_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdiff.runtime.files.PATIENCE", 0.02)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    fill(tmp_path, OLD)
    os.close(handle)
    assert read(tmp_path) == OLD


def test_two_sets_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits while the first is being put in place."""
    fill(tmp_path, OLD)
    second = threading.Thread(target=fill, args=(tmp_path, {"a.bin": "second", "report.json": "second"}))

    def start_second() -> None:
        second.start()
        second.join(0.3)
        assert second.is_alive()

    at_rename(4, start_second, monkeypatch)
    replace_set(tmp_path)
    second.join(10)
    assert read(tmp_path) == {"a.bin": "second", "report.json": "second"}
    assert names(tmp_path) == ["a.bin", "report.json"]


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
    with pytest.raises(CdiffError, match="already exists"), atomic_folder(target):
        pytest.fail("hours of work begin before this is said")
    with pytest.raises(RuntimeError):
        fill_folder(target, "b.json", RuntimeError(), replace=True)
    assert names(target / "sub") == ["a.json"]
    fill_folder(target, "b.json", replace=True)
    assert names(target / "sub") == ["b.json"]
    assert names(tmp_path) == ["bundle"]


def test_a_folder_takes_the_place_of_an_empty_one_and_of_no_link(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("link", "broken"):
        with pytest.raises(CdiffError, match="already exists"), atomic_folder(tmp_path / name):
            pytest.fail("hours of work begin before this is said")
    fill_folder(tmp_path / "empty", "a.json")
    assert names(tmp_path / "empty" / "sub") == ["a.json"]


def test_an_older_folder_is_back_where_the_renames_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"

    def interrupt() -> None:
        raise KeyboardInterrupt

    fill_folder(target, "a.json")
    for number in (1, 2, 3):  # of the file, then of the older folder, then of the new one
        with monkeypatch.context() as patch:
            at_rename(number, interrupt, patch)
            with pytest.raises(KeyboardInterrupt):
                fill_folder(target, "b.json", replace=True)
        assert names(target / "sub") == ["a.json"]
        assert names(tmp_path) == ["bundle"]

    def refuse(source: Path, place: Path) -> None:
        if place == target:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.replace(source, place)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CdiffError, match="cannot write"):
        fill_folder(target, "b.json", replace=True)
    [aside] = names(tmp_path)  # not even back: nothing is lost
    assert names(tmp_path / aside / "sub") == ["a.json"]


def test_a_folder_that_is_removed_meanwhile_is_one_line(tmp_path: Path) -> None:
    def write_folder() -> None:
        with atomic_folder(tmp_path / "out" / "bundle") as part:
            shutil.rmtree(tmp_path / "out")
            (part / "a.bin").write_bytes(b"x")

    def write_set() -> None:
        with staged(tmp_path / "out") as stage:
            stage("a.bin").write_bytes(b"x")
            shutil.rmtree(tmp_path / "out")
            stage("report.json").write_bytes(b"x")

    for write in (write_folder, write_set):
        with pytest.raises(
            CdiffError, match="out, or what was being written in it, was removed while writing"
        ) as caught:
            write()
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "other"):  # of what is read its reader says it
        (tmp_path / "nowhere").read_bytes()


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
    with pytest.raises(CdiffError, match=r"cannot write to .*: 8 requested and 3 written"):
        fill(tmp_path, {}, OSError("8 requested and 3 written"))  # NumPy's, of a full disk


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
