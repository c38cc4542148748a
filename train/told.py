"""Checks the types of what a checkpoint or a bundle says of its training: another program, or a person, may have changed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cdiff.runtime.errors import CdiffError

NUMBER = (int, float)
MAYBE = (int, float, type(None))
SPLIT = {"cases": int, "slices": int}
WHERE_FROM: dict[str, Any] = {"name": str, "sha256": str}
"""What is said of the run or bundle that the weights started from."""
PUBLISHED = dict.fromkeys(("repository", "variant", "file", "sha256"), str)
"""What is said of the published code's checkpoint that they were imported from."""
TOLD: dict[str, Any] = {
    "step": int,
    "seconds": NUMBER,
    "best": MAYBE,
    "best_window": int,
    "parameters": int,
    "precision": str,
    "data": {},
    "machine": {},
    "val_soft_dice_5": MAYBE,
    "val_protocol": {},
}
"""The types of the values that are read; {} stands for an object with any keys."""


def must_tell(told: dict[str, Any], path: Path) -> None:
    """Raise CdiffError, naming the file, for a value of another type than is read, or one that no report could hold.

    Keys may be missing, except those that describe a split, or where the weights came from.
    """
    try:
        # Python's JSON reader accepts NaN, 1e999 and lone surrogates; a bundle can hold none of them.
        json.dumps(told, ensure_ascii=False, allow_nan=False).encode()
        wrong = _wrong(told)
    except (ValueError, RecursionError) as error:
        wrong = f"values that no bundle can hold ({error})"
    if wrong:
        raise CdiffError(f"{path} has {wrong}; it is damaged: copy the run or the bundle again")


def _wrong(told: dict[str, Any]) -> str:
    """What is missing or of another type, in words, here or in what the weights started from; "" where all is as it should be."""
    known = {key: kind for key, kind in TOLD.items() if key in told}
    if wrong := _other(told, known, ""):
        return wrong
    splits = {part: SPLIT for part in ("train", "val") if part in told.get("data", {})}
    came = {key: kind for key, kind in (("init", WHERE_FROM), ("imported", PUBLISHED)) if key in told}
    if wrong := _other(told.get("data", {}), splits, "data, ") or _other(told, came, ""):
        return wrong
    return _wrong(told["init"]) if "init" in told else ""


def _other(value: dict[str, Any], kinds: dict[str, Any], above: str) -> str:
    for key, kind in kinds.items():
        if key not in value:
            return f"no {above}{key}"
        held = value[key]
        if isinstance(kind, dict):
            if not isinstance(held, dict):
                return f"{above}{key} {held!r:.50}"
            if wrong := _other(held, kind, f"{above}{key}, "):
                return wrong
        elif not isinstance(held, kind) or isinstance(held, bool):
            return f"{above}{key} {held!r:.50}"
    return ""
