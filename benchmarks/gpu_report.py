"""The GPU suite's report as one Markdown page; plain text, so that no package is needed to write it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from cdiff.benchmarks.gpu_checks import DONE, WAYS
from cdiff.benchmarks.gpu_plan import fault_of
from cdiff.benchmarks.gpu_subjects import PAPER, SHIPPED

NAMES = {
    "published": "PyTorch float32, one run after another, encoder for each row",
    "eager16": "PyTorch float16 eager, encoder once",
    "compiled": "PyTorch float16, torch.compile with CUDA graphs",
    "graph": "cdiff, PyTorch float16, our kernels, captured",
    "graph-tuned": "cdiff, PyTorch float16, our kernels, algorithms timed, captured",
    "graph-plain": "cdiff, PyTorch float16, its own GroupNorm, captured",
    "graph-compiled": "cdiff, PyTorch float16, compiled, algorithms timed, captured",
    "launched": "cdiff, PyTorch float16, our kernels, not captured",
    "launched-plain": "cdiff, PyTorch float16, its own GroupNorm, not captured",
    "onnxruntime": "cdiff, ONNX Runtime CUDA",
    "tensorrt": "cdiff, TensorRT",
    "tensorrt-rtx": "cdiff, TensorRT for RTX",
    "onnxruntime-tensorrt": "cdiff, ONNX Runtime's TensorRT provider",
    "onnxruntime-cpu": "ONNX Runtime on the host's processor",
}
BY_ROW = "PyTorch float32, one row after another, encoder for each"
MODELS = {PAPER: "the paper's network, random weights", SHIPPED: "the shipped model"}
NONE = "-"
MOST_KERNELS, LONGEST_NAME = 25, 120
"""Rows of the table of kernels, and characters of a name in it; a library's names can take a thousand."""


def markdown(report: dict[str, Any]) -> str:
    """The page. Everything in it is in the JSON too; what was not measured says so."""
    checks = report["checks"]
    small = "**Tiny networks: this run tried the suite itself. No number here says anything about a GPU.**"
    parts: list[Callable[[], str]] = [
        lambda: _head(report),
        lambda: small if report["settings"]["small"] else "",
        lambda: _targets(report["targets"], checks, {check["name"] for check in report["plan"]}),
        *(functools.partial(_protocol, checks, model) for model in (PAPER, SHIPPED)),
        *(functools.partial(part, checks) for part in (_parity, _scaling)),
        *(functools.partial(_sweep, checks, model) for model in (PAPER, SHIPPED)),
        *(functools.partial(part, checks) for part in (_kernels, _noise, _replay, _tests, _engines)),
        lambda: _unmeasured(report),
    ]
    return "\n\n".join(text for text in ("# GPU suite", *map(_written, parts)) if text) + "\n"


def _written(part: Callable[[], str]) -> str:
    """A part of the page, or a line in its place where a result has a form that nobody foresaw: that must not cost the other parts."""
    try:
        return part()
    except Exception as error:
        return f"**A part of this page could not be written ({type(error).__name__}: {error}); its numbers are in gpu_suite.json.**"


def _head(report: dict[str, Any]) -> str:
    found = _result(report["checks"], "machine")
    if found is None:
        return f"The machine is not described (the check `machine`: {report['checks'].get('machine', {}).get('status', 'not run')})."
    gpu, rates = found["gpu"], found["matmul_flop_per_s"]
    lines = [f"- cdiff {report['cdiff']}, Python {found['python']}, {found['cores']} processors"]
    if gpu:
        lines.append(
            f"- {gpu['name']}, compute capability {gpu['capability']}, {gpu['bytes'] / 2**30:.0f} GiB, driver {gpu['driver'] or 'unknown'}, "
            f"CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}"
            + (f", copies {gpu['copy_bytes_per_s'] / 1e12:.2f} TB/s" if "copy_bytes_per_s" in gpu else "")
        )
    lines.append("- matrix products: " + ", ".join(f"{kind} {rate / 1e12:.2f} TFLOP/s" for kind, rate in rates.items()))
    lines.append("- " + ", ".join(f"{name} {number}" for name, number in found["packages"].items()))
    if found["missing"]:
        lines.append("- not installed: " + ", ".join(found["missing"]))
    return "\n".join(lines)


def _engines(checks: dict[str, Any]) -> str:
    found = _result(checks, "machine")
    if found is None:
        return ""
    rows = (
        (name, state["version"] or NONE, ", ".join(state["devices"]) or NONE, state["missing"] or NONE)
        for name, state in found["engines"].items()
    )
    return _table("Engines", ("engine", "version", "can run on", "what it says"), rows)


def _targets(found: list[dict[str, Any]], checks: dict[str, Any], planned: set[str]) -> str:
    """A line for each way, a column for each target; then which way was measured for want of a better one."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        ways.setdefault(one["path"], []).append(one)
    rows = []
    for path, own in ways.items():
        cells = (one["state"] if one["found"] == NONE else f"{one['found']}: **{one['state']}**" for one in own)
        lacking = dict.fromkeys(name for one in own for name in one["lacks"])
        states = {
            name: checks[name]["status"] if name in checks else "not run"
            for name in lacking
            if name in {*checks, *planned}
        }
        why = ", ".join(f"{name} {state}" for name, state in states.items()) or (
            "no check of it is planned" if lacking else ""
        )
        rows.append((_name(path), *cells, why))
    columns = ("", *(one["target"] for one in found[: len(found) // max(1, len(ways))]), "not measured because")
    faults = [f"- {_name(way)}: {fault}." for way in WAYS if (fault := fault_of(way, checks))]
    done = [way for way in WAYS if checks.get(f"protocol:{way}:{PAPER}", {}).get("status") == DONE]
    held = next((way for way in done if not fault_of(way, checks)), None)
    if faults:
        faults.append(f"- Measured in place of these: {_name(held) if held else 'nothing yet'}.")
    return "\n\n".join(filter(None, [_table("Targets", columns, rows), "\n".join(faults)]))


def _protocol(checks: dict[str, Any], model: str) -> str:
    """Seconds per slice of each way, beside the baselines of the same run."""
    published = _result(checks, f"published:published:{model}") or {}
    rate = checks.get("machine", {}).get("result", {}).get("matmul_flop_per_s", {}).get("float16")
    rows = []
    baselines = [(NAMES["published"], published), (BY_ROW, published.get("by_row"))]
    if published.get("tf32_convolutions"):
        baselines.append((NAMES["published"], published.get("without_tf32")))
    ways = [(_name(name.split(":")[1]), result) for name, result in _of(checks, ("protocol",), model)]
    for name, result in [*((name, result) for name, result in baselines if result), *ways]:
        steps = result.get("step_seconds", {})
        batch = result.get("batch", 1)
        rows.append((
            name + _tf32(result), f"{result['seconds_a_slice']:.2f}", _share(result["share"]),
            f"{published['seconds_a_slice'] / result['seconds_a_slice']:.1f}" if published else NONE,
            f"{result['flop'] / result['seconds_a_slice'] / rate:.0%}" if rate else NONE,
            str(batch), _ms(result.get("encoder_seconds")), _ms(steps.get("denoise")), _ms(steps.get("noise")), _ms(steps.get("update")),
            _ms(steps.get("replay")), _ms(result.get("transfer_seconds")), f"{result['host_share']:.1%}" if "host_share" in result else NONE,
            f"{result['peak_bytes'] / 2**30:.1f}" if result.get("peak_bytes") else NONE,
        ))  # fmt: skip
    columns = (
        "", "s per slice", "measured", "times the published way", "of the half-precision matmul rate", "rows per batch", "encoder, ms",
        "denoiser, ms per step", "noise, ms per step", "update, ms per step", "whole step, ms", "x to the device and back, ms", "host", "memory in use, GiB",
    )  # fmt: skip
    return _table(f"Whole protocol: {MODELS[model]}, all levels, runs and steps of one slice", columns, rows)


def _tf32(result: dict[str, Any]) -> str:
    """What float32 meant in a baseline that leaves it to PyTorch; empty for the others."""
    if "tf32_convolutions" not in result:
        return ""
    used = [what for what in ("convolutions", "products") if result[f"tf32_{what}"]]
    return f" (TF32 in {' and '.join(used)})" if used else " (no TF32)"


def _share(share: float) -> str:
    if share <= 0:
        return "single steps; all else extrapolated"
    return "all of it" if share >= 1 else f"{share:.1%} of the steps; the rest extrapolated"


def _sweep(checks: dict[str, Any], model: str) -> str:
    rows = [
        (
            _name(name.split(":")[1]),
            f"{size} (the runtime's own)" if size == str(result.get("runtime_batch")) else size,
            _number(cell.get("ms_a_step")),
            _number(cell.get("ms_a_row")),
            cell.get("error", ""),
        )
        for name, result in _of(checks, ("protocol",), model)
        for size, cell in result["sweep"].items()
    ]
    return _table(f"Batch sizes: {MODELS[model]}", ("", "rows", "ms per step", "ms per row", "refused with"), rows)


def _parity(checks: dict[str, Any]) -> str:
    rows = []
    for name, result in _of(checks, ("parity",)):
        _, path, model = name.split(":")
        maps, batch = result.get("maps", {}), result.get("batch")
        for kind, errors in result["calls"].items():
            real = kind == "real"
            rows.append((
                _name(path), MODELS[model], kind, f"{errors['encoder']:.1e}", f"{errors['x0']:.1e}", f"{errors['eps']:.1e}",
                f"{maps['mean']:.1e}" if maps and real else NONE, f"{maps['max']:.1e}" if maps and real else NONE,
                f"{maps['dice']:.4f}" if maps and real else NONE, f"{maps['dice_levels']:.4f}" if maps and real else NONE,
                f"{batch['x0']:.1e} ({batch['batch']} rows)" if batch and real else NONE,
            ))  # fmt: skip
    columns = (
        "",
        "model",
        "input",
        "encoder",
        "x0",
        "eps",
        "soft map, mean",
        "soft map, largest",
        "Dice",
        "Dice, worst level",
        "x0, the same rows in a large batch",
    )
    return _table(
        "Against PyTorch float32 with the same noise (largest differences unless it says mean)", columns, rows
    )


def _noise(checks: dict[str, Any]) -> str:
    rows = (
        (
            _name(result["engine"]),
            *((f"{result['max']:.1e}", f"{result['equal_share']:.1%}") if "max" in result else (result["note"], NONE)),
        )
        for _, result in _of(checks, ("noise",))
    )
    return _table(
        "Noise on the device against the NumPy form", ("", "largest difference", "equal to the last bit"), rows
    )


def _kernels(checks: dict[str, Any]) -> str:
    """The longest kernels; all of them are in the JSON."""
    found = _result(checks, f"kernels:graph:{PAPER}")
    if found is None:
        return ""
    rows = (
        (
            f"`{one['name'][:LONGEST_NAME]}`",
            _number(one["ms_a_step"]),
            f"{one['ms_a_step'] / found['ms_a_step']:.1%}",
            f"{one['calls_a_step']:g}",
        )
        for one in found["kernels"][:MOST_KERNELS]
    )
    return _table(
        f"Kernels of a step of {found['batch']} rows: {MODELS[PAPER]}, launched plainly, {found['ms_a_step']:.3g} ms in all",
        ("", "ms per step", "share", "calls per step"),
        rows,
    )


def _replay(checks: dict[str, Any]) -> str:
    rows = []
    for name, result in _of(checks, ("replay",)):
        path = _name(name.split(":")[1])
        if "note" in result:
            rows.append((path, result["note"], NONE, NONE, NONE))
        for size in (1, 8) if "note" not in result else ():
            ms = result["ms_a_step"]
            rows.append(
                (
                    path,
                    str(size),
                    _number(ms[f"launches_{size}"]),
                    _number(ms[f"replay_{size}"]),
                    f"{result[f'ratio_{size}']:.2f}",
                )
            )
    return _table(
        "Graph replay against plain launches: the shipped model",
        ("", "rows", "launches, ms per step", "replay, ms per step", "times as fast"),
        rows,
    )


def _scaling(checks: dict[str, Any]) -> str:
    rows = (
        (
            _name(name.split(":")[1]),
            *(f"{result['seconds_a_slice'][n]:.3f}" for n in ("1", "2", "4")),
            _share(result["share"]),
        )
        for name, result in _of(checks, ("scaling",))
    )
    return _table(
        "Seconds per slice over several slices: the shipped model",
        ("", "1 slice", "2 slices", "4 slices", "measured"),
        rows,
    )


def _tests(checks: dict[str, Any]) -> str:
    found = _result(checks, "tests")
    rows = [(str(found["passed"]), str(found["skipped"]), "; ".join(found["reasons"]))] if found else []
    return _table("Tests marked gpu", ("passed", "skipped", "why"), rows)


def _unmeasured(report: dict[str, Any]) -> str:
    rows = []
    for name, found in report["checks"].items():
        if "parts_error" in found.get("result", {}):
            rows.append((name, "done but for a step's parts", found["result"]["parts_error"]))
        elif "message" in found:
            state = found["status"] + (", measured in part" if "result" in found else "")
            rows.append((name, state, found["message"]))
    planned = (check["name"] for check in report["plan"] if not check["spare"])
    rows += [(name, "not measured", "not run") for name in planned if name not in report["checks"]]
    return _table("Not measured", ("check", "state", "why"), rows)


def _of(
    checks: dict[str, Any], kinds: tuple[str, ...], model: str | None = None
) -> Iterable[tuple[str, dict[str, Any]]]:
    for name, found in checks.items():
        kind, *rest = name.split(":")
        if kind in kinds and "result" in found and model in (None, rest[-1]):
            yield name, found["result"]


def _result(checks: dict[str, Any], name: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = checks.get(name, {}).get("result")
    return found


def _name(path: str) -> str:
    return NAMES.get(path, path)


def _ms(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e3 * seconds)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table under a heading; nothing when it has no row."""
    lines = ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([f"## {title}", "", *head, *lines])
