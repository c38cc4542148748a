"""What the pages' tables are made of: result files read, numbers written, rows put into Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured"
GLUE = "\N{NO-BREAK SPACE}"
"""In an interval, which a narrow column would break."""

Scores = Mapping[str, Any]


def read(name: str, results: Path) -> Scores | None:
    """One result file, or None when it was not measured yet."""
    path = results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_peer(name: str, peer: str, results: Path) -> Scores | None:
    """One peer's entry of a result of `cdiff.benchmarks.peers`, or None when it is not there."""
    report = read(name, results)
    return None if report is None else report["peers"].get(peer)


def interval(score: Mapping[str, float] | None) -> str:
    """A mean with its 95 % interval."""
    if score is None or score.get("mean") is None:
        return "-"
    return f"{score['mean']:.3f} ({score['low']:.3f}{GLUE}to{GLUE}{score['high']:.3f})"


def difference(score: Mapping[str, float] | None) -> str:
    """A difference with its 95 % interval, signed; "-" where it is not defined."""
    if score is None:
        return NOT_MEASURED
    if score["mean"] is None:
        return "-"
    return f"{score['mean']:+.3f} ({score['low']:+.3f}{GLUE}to{GLUE}{score['high']:+.3f})"


def markdown(header: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A Markdown table; the first `words` columns hold words, the others numbers."""
    lines = [header, [*["---"] * words, *["--:"] * (len(header) - words)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def distance(scores: Scores) -> str:
    """The energy distance with the number of the model's masks, which it depends on."""
    return f"{mean(scores['ged'])} ({scores['ged_samples']['model']})"


def mean(score: Scores) -> str:
    """A mean alone."""
    return "-" if score["mean"] is None else f"{score['mean']:.3f}"


def not_measured(header: list[str]) -> str:
    """The table of which nothing was measured."""
    return markdown(header, [unmeasured([*header, ""])])


def unmeasured(header: list[str]) -> list[str]:
    """The cells after a name of whatever was not measured."""
    return [NOT_MEASURED, *["-"] * (len(header) - 2)]


GED = "GED (samples)"
