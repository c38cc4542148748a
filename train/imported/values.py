"""The published options' values, from an args.json or a command line, as the types that the published code gives them."""

from __future__ import annotations

import math
from typing import Any

from cdiff.runtime.errors import CdiffError


def typed(name: str, value: Any, default: Any) -> Any:
    """`value`, from JSON or a command line, as the type of `default`. Raises CdiffError naming the option.

    A file that another program has written may hold 256.0 for 256, and [16, 8] for "16,8".
    """
    kind = type(default)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    elif kind is str and isinstance(value, list):
        value = ",".join(map(str, value))
    text = str(value).strip()
    try:
        if kind is bool:
            return {"true": True, "t": True, "yes": True, "y": True, "1": True}.get(text.lower()) or _false(text)
        if kind is str:
            return text
        number = kind(text)
        if not math.isfinite(number):
            raise ValueError(text)
        return number
    except (ValueError, OverflowError):
        words = {bool: "True or False", int: "a whole number", float: "a number"}
        raise CdiffError(f"the published option {name}={text} must be {words[kind]}") from None


def _false(text: str) -> bool:
    if text.lower() not in ("false", "f", "no", "n", "0"):
        raise ValueError(text)
    return False


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of a text such as "16,8", each at least 1. Raises CdiffError naming the option."""
    try:
        numbers = tuple(int(part) for part in str(text).split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise CdiffError(f"the published option {name}={text!r} must be whole numbers with commas between them")
    return numbers
