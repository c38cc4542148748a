"""Files that appear whole or not at all: temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cdiff.runtime.errors import CdiffError

PART = ".part-"
"""Prefix of unfinished files. Only a killed process (SIGKILL, power cut) can leave one; they are safe to delete."""

PATIENCE = 30.0
"""Seconds to wait for another process to put its files in place, which normally takes milliseconds."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> Path:
    """Make `folder` and its parents where they are missing, and return it. Raises `CdiffError` when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CdiffError(f"{folder} is not a folder, or lies below a file; give another place to write to") from None
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return folder


def must_take_files(folder: Path) -> None:
    """Raise `CdiffError` when `folder` cannot be written to or made, which is worth knowing before long work. Makes nothing.

    It does not notice what only writing shows, such as a full disk.
    """
    there = folder
    try:
        while not _exists(there) and there != there.parent:
            there = there.parent
    except OSError as error:
        raise _cannot_write(folder, error) from None
    if not there.is_dir():
        raise CdiffError(f"{folder} is not a folder, or lies below a file; give another place to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def must_be_a_file(path: Path) -> None:
    """Raise `CdiffError` where `path` is a folder, a device, a pipe or the name of an open file such as /dev/stdout: a rename onto it
    would fail, or replace it by a file."""
    if os.path.isdir(path):
        raise CdiffError(f"{path} is a folder; name a file to write to")
    named = os.path.islink(path) and os.readlink(path).startswith("/proc/")
    # os.path says False of what may not be looked at: the write itself then tells why it fails.
    if named or (os.path.exists(path) and not os.path.isfile(path)):
        raise CdiffError(f"{path} is a device or a pipe, and would be replaced by a file; name a file to write to")


def must_take(path: Path) -> None:
    """Raise `CdiffError` where a file cannot be written to `path`, as far as can be told without writing: worth knowing before long work."""
    must_be_a_file(path)
    must_take_files(path.parent)
    if (length := len(os.fsencode(path.name))) > (most := most_bytes_of_a_name(path.parent)):
        raise CdiffError(
            f"{path.name} is too long for the name of a file ({length} bytes of at most {most}); give a shorter one"
        )


def must_not_be_read(paths: Iterable[Path], read: Iterable[Path]) -> None:
    """Raise `CdiffError` where one of `paths`, which will be written, is one of the files that will be `read`: the user would lose it."""
    written = {identity: path for path in paths if (identity := _identity(path))}
    for one in (
        read if written else ()
    ):  # there may be thousands: each is looked at once, and none where nothing is replaced
        if (identity := _identity(one)) and (path := written.get(identity)):
            raise CdiffError(f"{path} is one of the files that are read, and would be replaced; write to another place")


def _identity(path: Path) -> tuple[int, int] | None:
    """What is the same for every name of a file, and for no other file; None where there is none to be seen."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # no name with a NUL is a file's
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _exists(path: Path) -> bool:
    """Like Path.exists, but raises OSError where the system does not say: from Python 3.14 on, Path.exists is False then."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def most_bytes_of_a_name(folder: Path) -> int:
    """The most bytes that a file's name may have in `folder`, which need not exist yet; 255, the usual limit, where the system does not say."""
    try:
        there = next(there for there in (folder, *folder.absolute().parents) if there.is_dir())
        return os.pathconf(there, "PC_NAME_MAX")
    except (AttributeError, OSError, StopIteration, ValueError):
        return 255


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that exists only during the block. Raises `CdiffError` where none can be made."""
    try:
        made = tempfile.TemporaryDirectory(prefix="cdiff-")
    except OSError as error:
        raise CdiffError(
            f"no temporary folder can be made ({error.strerror}); set TMPDIR to a folder that can be written to"
        ) from None
    with made as folder:
        yield Path(folder)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; its content becomes `path` on a clean exit, and only then.

    The temporary name keeps the suffixes, for writers that choose a format by them. If the block ends early (an error,
    Ctrl-C), the temporary file is removed and an older `path` stays as it was. Raises `CdiffError` when the system
    refuses to write (no space, no permission), and as `must_be_a_file` does.
    """
    must_be_a_file(path)
    with staged(path.parent) as stage:
        yield stage(path.name)


class Stage:
    """A set of files being written into one folder; `stage(name)` gives the temporary path for one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[str, Path] = {}
        self._stale: list[str] = []
        self._aside: dict[str, Path] = {}
        self._given_way: list[Path] = []

    def __call__(self, name: str) -> Path:
        """The temporary path for `name`: same folder (so that the rename is atomic), same suffixes."""
        if Path(name).name != name:
            raise ValueError(f"a file name without folders is needed, not {name!r}")
        if name not in self._parts:
            self._parts[name] = self._temporary(name)
        return self._parts[name]

    def replaces(self, name: str) -> None:
        """Remove an older `name` from the folder when the set is put in place, because it is out of date then."""
        self._stale.append(name)

    def _temporary(self, name: str) -> Path:
        return self.folder / f"{PART}{secrets.token_hex(8)}{''.join(Path(name).suffixes[-2:])[-20:]}"

    def _commit(self) -> None:
        for part in self._parts.values():
            _sync(part)
        if len(self._parts) == 1 and not self._stale:
            [(name, part)] = self._parts.items()
            os.replace(part, self.folder / name)
        else:
            with _alone(self.folder):
                try:
                    self._put_in_place()
                except BaseException:
                    self._put_back()
                    raise
            self._given_way += self._aside.values()
        _sync(self.folder)

    def _put_in_place(self) -> None:
        # The last file vouches for the others (a report with their hashes), so an older file of that name is removed first: a set
        # whose last file is there is complete, even when a kill cuts the renames short.
        names = list(self._parts)
        for name in [*names[-1:], *self._stale, *names[:-1]]:
            if (self.folder / name).is_symlink() or (self.folder / name).is_file():
                self._aside[name] = self._temporary(name)
                os.rename(self.folder / name, self._aside[name])
        for name in names:
            os.replace(self._parts[name], self.folder / name)

    def _put_back(self) -> None:
        """Restore the older set. A file that cannot be put back stays under its temporary name."""
        for name in reversed(self._parts):  # the file that vouches for the new set goes first
            if not self._parts[name].exists():
                with suppress(OSError):
                    os.rename(self.folder / name, self._parts[name])
        for name in reversed(self._aside):  # and the one that vouches for the older set comes back last
            with suppress(OSError):
                os.rename(self._aside[name], self.folder / name)

    def _discard(self) -> None:
        for part in (*self._parts.values(), *self._given_way):
            # A failure here must not hide the error that is under way (a read-only disk refuses this too, even where there is no file),
            # nor spoil a set that is already in place.
            with suppress(OSError):
                part.unlink()


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """Write several files that appear together: every one is complete and on the disk before the first is renamed.

    Files are renamed in the order in which their names were asked for; ask last for the one that vouches for the rest. An older
    set is replaced as a whole, and restored if an error or Ctrl-C interrupts the renames; two processes' sets do not mix.
    Makes `folder` when it is missing. Raises `CdiffError` when the system refuses to write.
    """
    stage = Stage(make_folder(folder))
    try:
        yield stage
        stage._commit()
    except OSError as error:
        if error.errno == errno.ENOENT and _is_of(error, folder):
            raise _gone(folder) from None
        raise _cannot_write(folder, error) from None
    finally:
        stage._discard()  # after a commit, this removes the older set


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path` to fill; on a clean exit it becomes `path`, whole.

    An existing `path` is an error unless it is an empty folder or `replace` is given; then the old folder is moved aside, and
    removed once the new one is in place. Raises `CdiffError` for that and when the system refuses to write.
    """
    if not replace:
        must_be_new(path)
    make_folder(path.parent)
    token = secrets.token_hex(8)
    part, old = path.parent / f"{PART}{token}", path.parent / f"{PART}{token}-old"
    try:
        part.mkdir()
        yield part
        for item in sorted(part.rglob("*"), reverse=True):  # contents before their folder
            _sync(item)
        _sync(part)
        with _alone(path.parent):
            if not replace:
                must_be_new(path)  # another process may have written it meanwhile
            try:
                if _is_empty_folder(path):
                    path.rmdir()
                elif path.exists():
                    os.rename(path, old)
                os.rename(part, path)
            except BaseException:
                if old.exists() and not path.exists():
                    os.rename(old, path)
                raise
        _sync(path.parent)
    except OSError as error:
        if not _is_of(error, part, path):  # an error of reading something else
            raise
        raise (_gone(path.parent) if error.errno == errno.ENOENT else _cannot_write(path, error)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _is_of(error: OSError, *paths: Path) -> bool:
    """Whether an error names one of these paths or something inside, or names no path, as errors of a write do."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return not named or any(name.is_relative_to(path) for name in named for path in paths)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock `folder` against other processes that put files or a folder in place there.

    Goes on without a lock where the file system has none, as some network ones, and after PATIENCE seconds where another process
    holds the folder for long, as a training does its run's.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.01)
                    continue
            except OSError:
                pass
            break
        yield
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all; NaN has no JSON form and raises `ValueError`."""
    write_text(path, dump_json(value))


def dump_json(value: Any) -> str:
    """`value` as the indented JSON text that every report of this package uses. NaN raises `ValueError`.

    Lone surrogates, which Python uses for the bytes of a file name that is not UTF-8, are escaped: they cannot be encoded.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def must_be_new(path: Path) -> None:
    """Raise `CdiffError` where `path` exists and is not an empty folder."""
    if (path.exists() or path.is_symlink()) and not _is_empty_folder(path):
        raise CdiffError(f"{path} already exists; remove it or give another name")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a folder, but a file must be synced
            raise
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> CdiffError:
    reason = error.strerror or str(error)
    return CdiffError(
        f"cannot write to {path}: {reason[:1].lower()}{reason[1:]}; check the space and the permissions there"
    )


def _gone(folder: Path) -> CdiffError:
    return CdiffError(
        f"{folder}, or what was being written in it, was removed while writing; run the same command again"
    )
