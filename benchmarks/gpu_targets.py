"""The GPU suite's targets: each met, missed or not measured, for every one of cdiff's own ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cdiff.benchmarks.gpu_subjects import PAPER, SHIPPED

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
BASELINES = ("published", "eager16", "compiled", "onnxruntime-cpu")
"""Ways that are measured only for comparison; no targets are set for them."""

MAPS, DICE, FASTER, PEAK, HOST, LINEAR = 0.01, 0.995, 8.0, 0.5, 0.02, 0.05


@dataclass(frozen=True)
class Target:
    """One target for one way of running (`path`): what it asks for, what was found, whether that meets it, and the checks that it lacks."""

    target: str
    path: str
    found: str
    state: str
    lacks: tuple[str, ...]


def targets(checks: dict[str, Any], small: bool) -> list[dict[str, Any]]:
    """The targets of every way in `checks` (the report's, by name), as JSON values.

    A target is "not measured" where a check that it needs was refused or is missing, and always for a `small` suite.
    """
    paths = dict.fromkeys(name.split(":")[1] for name in checks if name.count(":") == 2)
    found = [target for path in paths if path not in BASELINES for target in _of(path, {} if small else checks)]
    return [vars(target) | ({"lacks": ()} if small else {}) for target in found]


def summary(found: list[dict[str, Any]]) -> list[str]:
    """A line for each way: how many of its targets are met, missed and not measured."""
    states: dict[str, list[str]] = {}
    for one in found:
        states.setdefault(one["path"], []).append(one["state"])
    return [
        f"targets of {path}: " + ", ".join(f"{of.count(state)} {state}" for state in (MET, MISSED, UNKNOWN))
        for path, of in states.items()
    ]


def _of(path: str, checks: dict[str, Any]) -> list[Target]:
    parity, whole, several = f"parity:{path}:{SHIPPED}", f"protocol:{path}:{PAPER}", f"scaling:{path}:{SHIPPED}"
    baseline = f"published:published:{PAPER}"
    maps = _result(checks, parity).get("maps", {})
    protocol, published = _result(checks, whole), _result(checks, baseline)
    rate = _result(checks, "machine").get("matmul_flop_per_s", {}).get("float16")
    slices = _result(checks, several).get("seconds_a_slice", {})
    seconds, share, host = protocol.get("seconds_a_slice"), protocol.get("flop_per_s"), protocol.get("host_share")
    faster = published["seconds_a_slice"] / seconds if published and seconds else None
    # Shown, but not judged by: the published code batches a run's levels, and PyTorch uses TF32 in convolutions unless told otherwise.
    others = {
        "row by row": published.get("by_row"),
        "without TF32": published.get("tf32_convolutions") and published.get("without_tf32"),
    }
    told = [
        f"{other['seconds_a_slice'] / seconds:.1f} times it {how}" for how, other in others.items() if other and seconds
    ]
    beside = f" ({', '.join(told)})" if told else ""
    of_peak = share / rate if share and rate else None
    longer = slices["4"] / slices["1"] - 1 if slices else None
    # Only single steps were measured, at the best batch size reached: shown, but no whole protocol to judge by.
    steps_alone = protocol.get("share") == 0

    def judge(target: str, value: float | None, form: str, good: Callable[[float], bool], **needs: Any) -> Target:
        """needs: the parts that the value is made of, by the names of their checks."""
        if value is None:
            return Target(target, path, "-", UNKNOWN, tuple(name for name, part in needs.items() if not part))
        if steps_alone and whole in needs:
            return Target(target, path, f"{form.format(value)} by single steps", UNKNOWN, (whole,))
        return Target(target, path, form.format(value), MET if good(value) else MISSED, ())

    return [
        judge(
            "soft map within 0.01 of PyTorch float32, on average",
            maps.get("mean"),
            "{:.2g}",
            lambda v: v <= MAPS,
            **{parity: maps},
        ),
        judge(
            "Dice of the maps at one half at least 0.995",
            maps.get("dice"),
            "{:.4f}",
            lambda v: v >= DICE,
            **{parity: maps},
        ),
        judge(
            "at least 8 times the published way",
            faster,
            "{:.1f} times" + beside,
            lambda v: v >= FASTER,
            **{whole: seconds, baseline: published},
        ),
        judge(
            "at least 50 % of the half-precision matmul rate",
            of_peak,
            "{:.0%}",
            lambda v: v >= PEAK,
            **{whole: share, "machine": rate},
        ),
        judge("host below 2 % of the time", host, "{:.1%}", lambda v: v < HOST, **{whole: host}),
        judge(
            "4 slices take at most 5 % more than 4 times 1",
            longer,
            "{:+.1%}",
            lambda v: v <= LINEAR,
            **{several: slices},
        ),
    ]


def _result(checks: dict[str, Any], name: str) -> dict[str, Any]:
    """A check's result, empty where there is none."""
    found: dict[str, Any] = checks.get(name, {}).get("result", {})
    return found
