"""`cdiff info`: what a bundle is, how it was trained and how it scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cdiff.cli.console import out


def info(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="A folder that `cdiff export` wrote.",
            show_default="the model that comes with cdiff",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as it is.")] = False,
) -> None:
    """Check a bundle's files and print what it is, how it was trained and how it scored."""
    from cdiff.runtime.bundle import open_bundle, shipped_bundle
    from cdiff.runtime.files import dump_json

    opened = open_bundle(bundle or shipped_bundle())
    manifest = opened.manifest
    if as_json:
        typer.echo(dump_json(manifest.to_json()), nl=False)
        return
    size = sum(entry["bytes"] for entry in manifest.files.values())
    height, width = manifest.image_size
    facts: dict[str, Any] = {
        "name": manifest.name,
        "task": manifest.task,
        "folder": f"{opened.path} ({len(manifest.files)} files, {size / 1e6:.1f} MB, every SHA-256 as listed)",
        "levels": f"{manifest.levels}: at least 1 to {manifest.levels} annotators",
        "image": f"{height} x {width}, {manifest.image_channels} channel(s), {manifest.framing}, sliced along axis "
        f"{manifest.slice_axis}",
        "chain": f"T = {manifest.T}, predicts {manifest.target}, variance {manifest.variance}",
        "--fast": ", ".join(f"{key} {value}" for key, value in manifest.fast.items()),
        "precision": f"{manifest.precision}, opset {manifest.opset}",
    }
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    for section in ("training", "scores", "verification"):
        for name, value in _flat(getattr(manifest, section)).items():
            table.add_row(f"{section}: {name}", Text(_number(value)))
    for line in manifest.citation:
        table.add_row("cite", Text(line))
    out.print(table)


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key} ") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
