"""Which files a report says were written with it, and which ones a `save` killed while it put its files in place has left."""

from __future__ import annotations

import json
import os
import time
from functools import lru_cache
from pathlib import Path

from cdiff.runtime.files import PART

SETTLED = 10**9
"""Nanoseconds after a folder's last change from which on a further change is sure to show in its time stamp: file systems' clocks are coarse."""


def listed_outputs(report: Path) -> set[str] | None:
    """The names of the files that a segmentation's report says were written; None where `report` is no such report."""
    try:
        return set(json.loads(report.read_text(encoding="utf-8"))["outputs"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def cut_short(folder: Path) -> set[str]:
    """The names of the files whose `save` into `folder` was killed: they are listed in its report, left under a temporary name.

    Some may exist, from the older result or the new one. One that no report under its final name lists cannot be trusted.
    """
    try:
        changed = os.stat(folder).st_mtime_ns
    except OSError:
        return set()
    # Callers ask about many files of one folder: it is not listed again for each.
    parts = _known(folder, changed) if time.time_ns() - changed > SETTLED else _reports(folder)
    return set[str]().union(*(listed_outputs(part) or () for part in parts))


def _reports(folder: Path) -> tuple[Path, ...]:
    """The reports under temporary names in a folder."""
    return tuple(folder.glob(f"{PART}*.json"))


@lru_cache(maxsize=64)
def _known(folder: Path, changed: int) -> tuple[Path, ...]:
    """`_reports` of a folder last changed at `changed` (ns), cached."""
    return _reports(folder)
