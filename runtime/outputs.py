"""What a report says that was written with it, and what a `save` left that was killed while it put its files in place."""

from __future__ import annotations

import json
import os
import time
from functools import lru_cache
from pathlib import Path

from cdiff.runtime.files import PART

SETTLED = 10**9
"""Nanoseconds after which a folder's time of change tells whether it has changed again: clocks of file systems are coarse."""


def listed_outputs(report: Path) -> set[str] | None:
    """The names of the files that a report of a segmentation says were written; None where there is no report of ours."""
    try:
        return set(json.loads(report.read_text(encoding="utf-8"))["outputs"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def cut_short(folder: Path) -> set[str]:
    """The names of the files whose `save` into `folder` was killed: its report lies there under a temporary name, which lists them.

    Some may be there, of the older result or of the new one, and none of them can be trusted where no report of its own lists it.
    """
    try:
        changed = os.stat(folder).st_mtime_ns
    except OSError:
        return set()
    # A folder is not listed anew for each of its files that is asked about.
    parts = _known(folder, changed) if time.time_ns() - changed > SETTLED else _reports(folder)
    return set[str]().union(*(listed_outputs(part) or () for part in parts))


def _reports(folder: Path) -> tuple[Path, ...]:
    """The reports under temporary names in a folder."""
    return tuple(folder.glob(f"{PART}*.json"))


@lru_cache(maxsize=64)
def _known(folder: Path, changed: int) -> tuple[Path, ...]:
    """`_reports` of a folder that was last changed then."""
    return _reports(folder)
