"""A log of finished cases beside an unfinished report, so that hours of work survive an interruption."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder
from cdiff.runtime.words import several

Rows = dict[str, dict[str, Any]]
SEAL = "row_sha256"
"""The key of a row's checksum, which shows when the row is read again that it is as it was written."""


class Journal:
    """Rows appended to NAME.partial.jsonl beside the report NAME.json. Its first line is the header, which says what the rows hold for.

    rows: the known rows by their `inputs`, from an existing journal and an existing report, if those were made with `header`.
    keys: those that a row must have. asked: the `inputs` of the cases to be scored now; rows of the report that are asked for are
    copied into the journal, because the new report will replace the old one. A journal with another header is renamed to `*.old`
    and a new one is begun. A last line cut off by a kill is dropped, and a row that is not as `sealed` made it for this header is
    not used. `notice` gets a line about each of these, except the cut line.
    The file stays open and locked until the end of a `with` block, because another evaluation's rows would be taken for this one's.
    Raises CdiffError when the file is open elsewhere or cannot be read or written, or the report's name is a folder's.
    """

    def __init__(
        self,
        report: Path,
        header: Mapping[str, Any],
        keys: Sequence[str],
        asked: Container[str],
        notice: Callable[[str], None],
    ) -> None:
        self.path = path = report.with_name(f"{report.stem}.partial.jsonl")
        make_folder(path.parent)
        self._file = _held(path)
        try:
            finished, own = _finished(report, header, keys, asked, notice), Rows()
            first = json.dumps(header, allow_nan=False)
            lines, whole = _lines(path)
            if lines and lines[0] == json.loads(first):
                own = _whole(lines[1:], path, fingerprint(header), keys, notice)
                if own:
                    notice(
                        f"{path} has {several(len(own), 'finished case')} of an interrupted evaluation: going on from there"
                    )
                # What a kill cut off must not stand in the middle of the file.
                self._file.truncate(whole)
            else:
                if lines:
                    kept = _kept(path)
                    notice(
                        f"{path} was made with {_difference(lines[0], dict(header))}: it was renamed to {kept.name}, and this evaluation starts anew"
                    )
                    self._file.close()
                    self._file = _held(path)
                self._file.truncate(0)
                self._write([first])
            self._write(json.dumps(row) for key, row in finished.items() if key in asked and key not in own)
            self.rows = finished | own
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row, made by `sealed`; it is on the disk when this returns."""
        self._write([json.dumps(row, allow_nan=False)])

    def _write(self, lines: Iterable[str]) -> None:
        try:
            left = memoryview("".join(f"{line}\n" for line in lines).encode())
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CdiffError(f"cannot write to {self.path}: {error.strerror}; check the space there") from None

    def remove(self) -> None:
        """Delete the file, once its report is written."""
        self.path.unlink(missing_ok=True)


def _held(path: Path) -> FileIO:
    """The file, opened for appending (made if missing) and locked. Raises CdiffError where another evaluation holds it, or it cannot be opened."""
    while True:
        try:
            file = FileIO(path, "ab")  # unbuffered, so that a full disk shows at the write
        except OSError as error:
            reason = str(error.strerror).lower()
            raise CdiffError(f"cannot write to {path}: {reason}; check the space and the permissions there") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # else another has just removed or renamed it
                return file
        except BlockingIOError:
            file.close()
            raise CdiffError(
                f"{path} is being written by another evaluation; wait until that ends, or give this one another place"
            ) from None
        except FileNotFoundError:
            pass
        except OSError:  # no locks on this file system
            return file
        file.close()


def _kept(path: Path) -> Path:
    """Where the journal of another evaluation is kept from now on."""
    kept = path.with_name(path.name + ".old")
    try:
        os.replace(path, kept)
    except OSError as error:
        reason = str(error.strerror).lower()
        raise CdiffError(
            f"cannot rename {path} to {kept.name}: {reason}; remove one of them, or check the permissions"
        ) from None
    return kept


def fingerprint(header: Mapping[str, Any]) -> str:
    """SHA-256 of a header, with which a finished report records what its rows hold for."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def sealed(row: Mapping[str, Any], made_with: str) -> dict[str, Any]:
    """The row with the SHA-256 of its contents and of what they hold for: a digit changed on the disk would be a wrong score that nobody notices.

    made_with: the `fingerprint` of the header. The case's name is left out: the same files under another name are the same case.
    """
    held = {key: value for key, value in row.items() if key not in ("case", SEAL)}
    return {**row, SEAL: hashlib.sha256(f"{made_with} {json.dumps(held, sort_keys=True)}".encode()).hexdigest()}


def _finished(
    path: Path, header: Mapping[str, Any], keys: Sequence[str], asked: Container[str], notice: Callable[[str], None]
) -> Rows:
    """The rows of a report at `path` that was made with the same header, by their `inputs`; {} for any other file.

    asked: the `inputs` of the cases to be scored now. notice: is told which of the report's cases are used, and which are lost.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except IsADirectoryError:
        raise CdiffError(f"{path} is a folder; name a file for the report") from None
    except (OSError, ValueError, RecursionError):
        notice(f"{path} exists but cannot be read as a report: this evaluation will replace it")
        return {}
    if not isinstance(report, dict) or report.get("made_with") != fingerprint(header):
        notice(f"{path} exists, but is of another model, protocol or data: this evaluation will replace it")
        return {}
    cases = report.get("cases")
    rows = _whole(cases if isinstance(cases, list) else [], path, report["made_with"], keys, notice)
    used, there = sum(key in asked for key in rows), f"{path} exists, made with the same model, protocol and data"
    if rows and used == len(rows):
        notice(f"{there}: its {several(used, 'case')} {'is' if used == 1 else 'are'} not computed again")
    elif rows:
        notice(
            f"{there}: {used} of its {len(rows)} cases {'is' if used == 1 else 'are'} not computed again; the others were not asked for or their files have changed, "
            "and the new report will leave them out"
        )
    return rows


def _whole(rows: Sequence[Any], path: Path, made_with: str, keys: Sequence[str], notice: Callable[[str], None]) -> Rows:
    """Those rows, read from `path`, that are as they were written, by their `inputs`; of each only the values of `keys`."""

    def whole(row: Any) -> bool:
        try:
            return bool(sealed(row, made_with)[SEAL] == row[SEAL])
        except RecursionError:
            return False

    held = [
        {key: row[key] for key in keys} for row in rows if isinstance(row, dict) and all(key in row for key in keys)
    ]
    own = [row for row in held if whole(row)]
    if lost := len(rows) - len(own):
        notice(f"{path}: {several(lost, 'case')} in it damaged or of another evaluation, so not used")
    return {row["inputs"]: row for row in own}


def _lines(path: Path) -> tuple[list[Any], int]:
    """The values of the lines before the first that is not whole JSON, and the length of these lines in bytes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CdiffError(f"cannot read {path}: {error.strerror}; remove it to start anew") from None
    lines: list[Any] = []
    whole = 0
    for line in data.splitlines(keepends=True):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            break
        if not line.endswith(b"\n"):
            lines.pop()
            break
        whole += len(line)
    return lines, whole


def _difference(old: Any, new: dict[str, Any]) -> str:
    """The keys whose values differ, with both values, for a notice."""
    if not isinstance(old, dict):
        return "something else"
    flat_old, flat_new = _flat(old), _flat(new)
    keys = [key for key in {**flat_new, **flat_old} if flat_old.get(key, "none") != flat_new.get(key, "none")]
    return ", ".join(
        f"{key} {_short(flat_old.get(key, 'none'))} (now {_short(flat_new.get(key, 'none'))})" for key in keys
    )


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value) if isinstance(value, dict) else {key: value}
    return flat


def _short(value: Any) -> str:
    text = "default" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "…"
