"""`cdiff info`: what a bundle is, how it was trained and how it scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdiff.cli.console import facts
from cdiff.cli.options import option

if TYPE_CHECKING:
    from cdiff.runtime.manifest import Manifest


def info(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE",
            help="A folder that `cdiff export` wrote.",
            show_default="the model that comes with cdiff",
        ),
    ] = None,
    as_json: Annotated[bool, option("--json", "Print the manifest as it is.")] = False,
) -> None:
    """Check a bundle's files and print what it is, how it was trained and how it scored."""
    from cdiff.runtime.bundle import open_bundle, shipped_bundle
    from cdiff.runtime.files import dump_json
    from cdiff.runtime.words import several

    opened = open_bundle(bundle or shipped_bundle())
    manifest = opened.manifest
    if as_json:
        typer.echo(dump_json(manifest.to_json()), nl=False)
        return
    size = sum(entry["bytes"] for entry in manifest.files.values())
    height, width = manifest.image_size
    channels = several(manifest.image_channels, "channel")
    if manifest.modalities:
        channels += f" ({', '.join(manifest.modalities)})"
    about: dict[str, Any] = {
        "name": manifest.name,
        "task": manifest.task,
        "folder": f"{opened.path} ({len(manifest.files)} files, {size / 1e6:.1f} MB, every SHA-256 as listed)",
        "variant": f"{manifest.variant}: draws {manifest.draws.drawn}",
        "levels": f"{manifest.levels}: {manifest.draws.levels}, c = 1 to {manifest.levels}",
        "image": f"{height} x {width}, {channels}, {manifest.framing}, sliced along axis {manifest.slice_axis}",
        "chain": f"T = {manifest.T}, predicts {manifest.target}, variance {manifest.variance}{_views(manifest)}",
        "--fast": ", ".join(f"{key} {value}" for key, value in manifest.fast.items()) or "not stated",
        "precision": f"{manifest.precision}, opset {manifest.opset}",
    }
    facts("Model", [(name, str(value)) for name, value in about.items()])
    for title, section in (
        ("Training", manifest.training),
        ("Scores", manifest.scores),
        ("Graphs against PyTorch, largest differences", manifest.verification),
    ):
        if section:
            facts(title, [(name, _words(value)) for name, value in section.items()])
    facts("Cite", [(line,) for line in manifest.citation])


def _views(manifest: Manifest) -> str:
    """What the runs see of a slice other than the slice as it is, to end a line with."""
    seen = ["mirrored in turn"] if manifest.mirror else []
    if manifest.zooms != (1,):
        seen.append(f"at {' and '.join(f'{zoom:g}' for zoom in manifest.zooms)} times its size")
    return f"; runs see the slice {'; '.join(seen)}" if seen else ""


def _words(value: Any) -> str:
    """A value of the manifest on one line: nested ones as `key value`, a score with its interval, numbers to four digits."""
    if _is_score(value):
        return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    if isinstance(value, dict):
        nested = {key: isinstance(inner, dict) and not _is_score(inner) for key, inner in value.items()}
        return ", ".join(f"{k} ({_words(v)})" if nested[k] else f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_score(value: Any) -> bool:
    keys = ("mean", "low", "high")
    return isinstance(value, dict) and all(isinstance(value.get(key), float) for key in keys)
