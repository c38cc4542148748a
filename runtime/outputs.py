"""What a report says that was written with it, and what a `save` left that was killed while it put its files in place."""

from __future__ import annotations

import json
from pathlib import Path

from cdiff.runtime.files import PART


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
    return set[str]().union(*(listed_outputs(part) or () for part in folder.glob(f"{PART}*.json")))
