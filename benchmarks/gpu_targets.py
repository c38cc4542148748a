"""The GPU suite's targets, each met, missed or not measured, by the best of cdiff's own ways and by each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cdiff.benchmarks.gpu_subjects import PAPER, SHIPPED

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
BASELINES = ("published", "eager16", "compiled", "onnxruntime-cpu")
"""Ways that are there to be compared with; the targets are not theirs."""

MAPS, DICE, FASTER, PEAK, HOST, LINEAR = 0.01, 0.995, 8.0, 0.5, 0.02, 0.05


@dataclass(frozen=True)
class Target:
    """One target for one way of running: what it asks for, what was measured, and whether that does."""

    target: str
    path: str
    found: str
    state: str


def targets(checks: dict[str, Any], small: bool) -> list[dict[str, str]]:
    """The targets of every way that a check was planned for, JSON values; a `small` suite measures no target.

    checks: the report's, by name. A path whose check was refused or is missing is "not measured".
    """
    paths = sorted({name.split(":")[1] for name in checks if name.count(":") == 2} - set(BASELINES))
    found = [target for path in paths for target in _of(path, {} if small else checks)]
    return [vars(target) for target in found]


def _of(path: str, checks: dict[str, Any]) -> list[Target]:
    maps = _result(checks, "parity", path, SHIPPED).get("maps", {})
    protocol = _result(checks, "protocol", path, PAPER)
    published = _result(checks, "published", "published", PAPER)
    rate = _result(checks, "machine").get("matmul_flop_per_s", {}).get("float16")
    slices = _result(checks, "scaling", path, SHIPPED).get("seconds_a_slice", {})
    seconds, share = protocol.get("seconds_a_slice"), protocol.get("flop_per_s")
    faster = published["seconds_a_slice"] / seconds if published and seconds else None
    # Told beside, not judged: nobody runs the published code without TF32 unasked.
    exact = published.get("tf32_convolutions") and published.get("without_tf32")
    beside = f" ({exact['seconds_a_slice'] / seconds:.1f} times it without TF32)" if exact and seconds else ""
    of_peak = share / rate if share and rate else None
    longer = slices["4"] / slices["1"] - 1 if slices else None
    return [
        _judge(
            "soft map within 0.01 of PyTorch float32, mean absolute",
            path,
            maps.get("mean"),
            "{:.2g}",
            lambda v: v <= MAPS,
        ),
        _judge("thresholded maps' Dice at least 0.995", path, maps.get("dice"), "{:.4f}", lambda v: v >= DICE),
        _judge(
            "at least 8 times the published way, same GPU", path, faster, "{:.1f} times" + beside, lambda v: v >= FASTER
        ),
        _judge(
            "at least 50 % of the measured half-precision matmul rate", path, of_peak, "{:.0%}", lambda v: v >= PEAK
        ),
        _judge("host below 2 % of the time", path, protocol.get("host_share"), "{:.1%}", lambda v: v < HOST),
        _judge(
            "slices scale linearly: 4 take at most 5 % more than 4 times 1",
            path,
            longer,
            "{:+.1%}",
            lambda v: v <= LINEAR,
        ),
    ]


def _judge(target: str, path: str, value: float | None, form: str, good: Any) -> Target:
    if value is None:
        return Target(target, path, "-", UNKNOWN)
    return Target(target, path, form.format(value), MET if good(value) else MISSED)


def _result(checks: dict[str, Any], *name: str) -> dict[str, Any]:
    """A check's result, empty where there is none."""
    found: dict[str, Any] = checks.get(":".join(name), {}).get("result", {})
    return found
