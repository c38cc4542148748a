"""A log of finished cases beside a report that is not finished yet, so that hours of work survive an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder, write_text


class Journal:
    """Rows appended to a JSON-lines file whose first line, the header, says what they hold for.

    Opening one that exists reads its rows when its header equals `header`, in `rows` by their key `inputs`. One with
    another header is kept under the name `*.old` and a new one is begun; `notice` gets a line about either. A last line that
    was cut off by a kill is dropped. Raises CdiffError when the file can't be read or written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], notice: Callable[[str], None]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        first = json.dumps(header, ensure_ascii=False, allow_nan=False)
        lines = _lines(path)
        if lines and lines[0] == json.loads(first):
            self.rows = {row["inputs"]: row for row in lines[1:]}
            if self.rows:
                notice(f"{path} has {len(self.rows)} finished cases of an interrupted evaluation: going on from there")
        elif lines:
            kept = path.with_name(path.name + ".old")
            os.replace(path, kept)
            notice(f"{path} was made with {_difference(lines[0], dict(header))}: starting anew, it is now {kept.name}")
        # Written anew: what a kill cut off must not stand in the middle of the file.
        make_folder(path.parent)
        text = "\n".join([first, *(json.dumps(row, ensure_ascii=False) for row in self.rows.values())])
        write_text(path, text + "\n")

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row; it's on the disk when this returns."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CdiffError(f"cannot write to {self.path}: {error.strerror}; check the space there") from None

    def remove(self) -> None:
        """Delete the file: the report that it was for is written."""
        self.path.unlink(missing_ok=True)


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
        except ValueError:
            break
    return lines


def _difference(old: Any, new: dict[str, Any]) -> str:
    """The keys that differ, with both values, for a notice."""
    if not isinstance(old, dict):
        return "something else"
    flat_old, flat_new = _flat(old), _flat(new)
    keys = [key for key in {**flat_new, **flat_old} if flat_old.get(key) != flat_new.get(key)]
    return ", ".join(f"{key} {_short(flat_old.get(key))} (now {_short(flat_new.get(key))})" for key in keys)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value) if isinstance(value, dict) else {key: value}
    return flat


def _short(value: Any) -> str:
    text = "default" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "…"
