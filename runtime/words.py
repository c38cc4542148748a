"""Shapes, numbers and errors in words, for messages and reports."""

from __future__ import annotations


def by(shape: tuple[int, ...]) -> str:
    """A shape in words: 64 x 64."""
    return " x ".join(str(int(length)) for length in shape) or "()"


def several(number: int, word: str) -> str:
    """1 case, 2 cases."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def lasting(seconds: float) -> str:
    """A time in words, with about two digits: 0.42 s, 35 minutes, 2.3 hours, 41 days."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{0 if seconds >= 9.95 * size else 1}f} {unit}"
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"


def one_line(error: BaseException) -> str:
    """An exception's whole text on one line, or its class's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class's name where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def three_digits(value: float) -> str:
    """A size with three significant digits, or all digits before the point if those are more, and never an exponent: 0.240, 98.8, 1,520; a whole
    number as it is."""
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:#.3g}"
