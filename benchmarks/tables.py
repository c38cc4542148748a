"""The benchmark's report as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cdiff.runtime.words import several

NAMES = {
    "published": "PyTorch, one run after another",
    "pytorch": "PyTorch, batched, encoder once",
    "compiled": "PyTorch compiled, batched",
    "exported": "exported engine",
}
SHORT = {"published": "run after run", "pytorch": "batched", "compiled": "compiled", "exported": "exported"}
PARTS = {
    "read": "reading the scan", "encode": "encoder", "denoise": "denoiser", "noise": "drawing noise",
    "update": "the sampler's update", "collect": "adding up maps", "other": "anything else",
}  # fmt: skip


def summary(report: dict[str, Any]) -> RenderableType:
    """Everything that `benchmarks.benchmark` measured, in three tables and the lines that say of what."""
    return Group(
        _head(report), _end_to_end(report), Text(), _calls(report), Text(), _parts(report), Text(), _foot(report)
    )


def name_of(report: dict[str, Any], kind: str) -> str:
    """What a contender is called in tables."""
    return f"{NAMES[kind]} ({report['contenders'][kind]['engine']})" if kind == "exported" else NAMES[kind]


def _head(report: dict[str, Any]) -> Text:
    machine, model, protocol = report["machine"], report["model"], report["protocol"]
    lines = (
        f"{machine['cpu']}, {machine['cores']} cores, threads used: {machine['threads']}; torch {machine['torch']}, "
        f"{', '.join(f'{name} {version}' for name, version in machine['versions'].items())}",
        f"model {model['name']}: {model['parameters'] / 1e6:.2f} M parameters, {model['image_size'][0]}x{model['image_size'][1]}, "
        f"{model['levels']} levels, {model['precision']}",
        f"{several(protocol['slices'], 'slice')} of {protocol['scan']}, {several(protocol['runs'], 'run')}, {several(protocol['steps'], 'step')} of "
        f"{protocol['sampler']}; medians of {protocol['repeats']} rounds",
        "",
    )
    return Text("\n".join(lines))


def _end_to_end(report: dict[str, Any]) -> Table:
    table = _table("End to end: a scan's file in, maps out", "s", "slices/min", "speed", "peak MiB")
    for kind, found in report["end_to_end"].items():
        ratio = report["ratios"].get(f"{kind}_over_published")
        table.add_row(
            name_of(report, kind),
            f"{found['seconds']:.2f}",
            f"{found['slices_a_minute']:.2f}",
            "1.00 x" if ratio is None else f"{ratio['median']:.2f} x",
            f"{found['peak_bytes'] / 2**20:.0f}",
        )
    floor = report["floor"]["end_to_end_seconds"]
    table.add_row(
        "floor: its FLOPs as matrix products",
        f"{floor:.2f}",
        f"{60 * report['protocol']['slices'] / floor:.2f}",
        "",
        "",
    )
    return table


def _calls(report: dict[str, Any]) -> Table:
    calls, floor = report["denoiser_call"], report["floor"]["ms_a_row"]
    sizes = list(next(iter(calls.values())))
    table = _table("One denoiser call, ms (ms a row)", *(f"batch {size}" for size in sizes))
    for kind, found in calls.items():
        table.add_row(name_of(report, kind), *(f"{found[n]['ms']:.1f} ({found[n]['ms_a_row']:.1f})" for n in sizes))
    table.add_row("floor", *(f"{int(n) * floor:.1f} ({floor:.1f})" for n in sizes))
    return table


def _parts(report: dict[str, Any]) -> Table:
    end = report["end_to_end"]
    table = _table("Where the time goes, %", *(SHORT[kind] for kind in end))
    for part, what in PARTS.items():
        shares = (100 * found["parts"][part] / sum(found["parts"].values()) for found in end.values())
        table.add_row(what, *(f"{share:.1f}" for share in shares))
    return table


def _foot(report: dict[str, Any]) -> Text:
    floor, whole = report["floor"], report["end_to_end"]["exported"]["estimate_25_runs_all_steps_seconds_a_slice"]
    gap = report["agreement"]["exported"]["max"]
    lines = (
        f"Matrix products here: {floor['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s in float32. A slice's encoding is "
        f"{floor['encoder_flop'] / 1e9:.2f} GFLOP, a row's denoiser call {floor['denoiser_flop'] / 1e9:.2f}.",
        f"Writing the files takes {report['write_seconds']:.2f} s more. A slice with 25 runs of all {report['model']['T']} steps: "
        f"about {whole:.0f} s by the exported engine (in proportion).",
        f"The exported engine's soft map differs from PyTorch's with the same noise by at most {gap:.1e}.",
    )
    return Text("\n".join(lines))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
