"""A log of finished cases beside a report that is not finished yet, so that hours of work survive an interruption."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder, write_text

Rows = dict[str, dict[str, Any]]


class Journal:
    """Rows appended to NAME.partial.jsonl beside the report NAME.json, whose first line, the header, says what they hold for.

    `rows` has those that are known, by their key `inputs`: of a journal that exists and has the header `header`, and of a report that
    was made with it; asked are the keys of the cases to be scored now. A journal with another header is kept under the name `*.old` and a new one is begun; `notice` gets a line about
    each. A last line that was cut off by a kill is dropped, and so is a row without one of `keys`. Raises CdiffError when the
    journal can't be read or written, or the report's name is a folder's.
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
        finished, own = _finished(report, header, keys, asked, notice), Rows()
        first = json.dumps(header, allow_nan=False)
        lines = _lines(path)
        if lines and lines[0] == json.loads(first):
            own = _whole(lines[1:], keys)
            if own:
                notice(f"{path} has {len(own)} finished cases of an interrupted evaluation: going on from there")
        elif lines:
            kept = path.with_name(path.name + ".old")
            try:
                os.replace(path, kept)
            except OSError as error:
                reason = str(error.strerror).lower()
                raise CdiffError(
                    f"cannot rename {path} to {kept.name}: {reason}; remove one of them, or check the permissions"
                ) from None
            notice(f"{path} was made with {_difference(lines[0], dict(header))}: starting anew, it is now {kept.name}")
        # Written anew: what a kill cut off must not stand in the middle of the file.
        make_folder(path.parent)
        text = "\n".join([first, *(json.dumps(row) for row in own.values())])
        write_text(path, text + "\n")
        self.rows = finished | own

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row; it's on the disk when this returns."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CdiffError(f"cannot write to {self.path}: {error.strerror}; check the space there") from None

    def remove(self) -> None:
        """Delete the file: the report that it was for is written."""
        self.path.unlink(missing_ok=True)


def fingerprint(header: Mapping[str, Any]) -> str:
    """SHA-256 of a header, by which a finished report says what its rows hold for."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _finished(
    path: Path, header: Mapping[str, Any], keys: Sequence[str], asked: Container[str], notice: Callable[[str], None]
) -> Rows:
    """The cases of a report at `path` that was made with the same header, by their key `inputs`; none of any other file.

    asked: the inputs of the cases that are to be scored now. notice: is told which of the report's cases are used, and which are lost.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except IsADirectoryError:
        raise CdiffError(f"{path} is a folder; name a file for the report") from None
    except (OSError, ValueError, RecursionError):
        notice(f"{path} is there and cannot be read as a report: this evaluation will replace it")
        return {}
    if not isinstance(report, dict) or report.get("made_with") != fingerprint(header):
        notice(f"{path} is there, of another model, protocol or data: this evaluation will replace it")
        return {}
    cases = report.get("cases")
    rows = _whole(cases if isinstance(cases, list) else [], keys)
    used, there = sum(key in asked for key in rows), f"{path} is there, made with the same model, protocol and data"
    if rows and used == len(rows):
        notice(f"{there}: its {used} cases are not computed again")
    elif rows:
        notice(
            f"{there}: {used} of its {len(rows)} cases are not computed again; the others are not asked for, or their files changed, "
            "and the new report will not hold them"
        )
    return {key: {name: row[name] for name in keys} for key, row in rows.items()}


def _whole(rows: Iterable[Any], keys: Sequence[str]) -> Rows:
    """Those rows that have all keys, by the one named `inputs`."""
    whole = [row for row in rows if isinstance(row, dict) and all(key in row for key in keys)]
    return {row["inputs"]: row for row in whole if isinstance(row["inputs"], str)}


def _lines(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CdiffError(f"cannot read {path}: {error.strerror}; remove it to start anew") from None
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return lines


def _difference(old: Any, new: dict[str, Any]) -> str:
    """The keys that differ, with both values, for a notice."""
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
