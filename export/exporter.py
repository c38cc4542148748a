"""From a training run to a verified bundle: graphs, weights, card and manifest, written whole or not at all."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from cdiff import __version__
from cdiff.export.card import METHOD, Card, render
from cdiff.export.graphs import DenoiserGraph, EncoderGraph, write_denoiser, write_encoder
from cdiff.export.half import check_half, half_network
from cdiff.export.reference import TorchEngine
from cdiff.export.verify import verify
from cdiff.export.weights import write_weights
from cdiff.runtime.bundle import Bundle, write_bundle
from cdiff.runtime.engines.base import Float32
from cdiff.runtime.engines.registry import available_engines
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import CARD, DENOISER, ENCODER, ONE_ZOOM, WEIGHTS, Manifest
from cdiff.runtime.sampling.mirror import VIEWS
from cdiff.runtime.sampling.sampler import kept_timesteps
from cdiff.runtime.sampling.zoom import check_zooms
from cdiff.runtime.scans.sources import must_be_text
from cdiff.train.checkpoint import ORIGIN, LoadedRun, load_run
from cdiff.train.machine import as_it_starts

Progress = Callable[[int, int], None]
TILE_OVERLAP = 0.25
PARTS = 5


@as_it_starts()
def export_run(
    run: Path,
    out: Path,
    *,
    fp16: bool = False,
    replace: bool = False,
    fast_steps: int | None = None,
    zooms: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export the averaged weights of a run's best checkpoint to the bundle folder `out`.

    RUN/card.json, if it exists, is the author's part of the model card. The graphs are compared with PyTorch on random images, and on
    the validation samples that the trainer left in RUN. fp16: convolutions and products in float16, or an error. replace: an older
    bundle in `out` is replaced.
    fast_steps: the DDIM steps, 1..T, that `--fast` means for this bundle; by default those that the run was validated with.
    zooms: the multiples of a slice's size at which the runs see it in turn; by default only its own size. progress:
    called as progress(done, total).
    Raises CdiffError when the run cannot be read, or when a graph differs from PyTorch by more than `verify.BOUNDS`; then nothing
    is written.
    """
    if not any("cpu" in state.devices for state in available_engines()):
        raise CdiffError(
            "export checks its graphs with ONNX Runtime, which is not installed: pip install '.[train,cpu]' in cdiff's clone"
        )
    must_be_text(out)  # else ONNX Runtime opens no graph in it, and the model may be named after it
    loaded = load_run(run)
    fast_steps = min(loaded.config.training.val_steps, loaded.config.network.T) if fast_steps is None else fast_steps
    kept_timesteps(loaded.config.network.T, fast_steps)  # raises now, not after the graphs were written
    sizes = ONE_ZOOM if zooms is None else check_zooms(zooms, loaded.config.data.framing)
    card = Card.read(run / "card.json") if (run / "card.json").exists() else Card()
    slices = _real_slices(run, loaded.config.network.image_channels)
    report = progress or (lambda done, total: None)

    def build(folder: Path) -> Manifest:
        report(0, PARTS)
        half = _write_graphs(loaded, folder, fp16, report)
        metadata = {"config": json.dumps(loaded.config.to_json()), "format": "pt"}
        write_weights(folder / WEIGHTS, loaded.network.state_dict(), metadata)
        manifest = _manifest(loaded, card, card.name or out.name, folder, fp16, fast_steps)
        if sizes != ONE_ZOOM:
            fast = manifest.fast | {"runs": VIEWS * len(sizes)}  # each view at each size once
            manifest = dataclasses.replace(manifest, zooms=sizes, fast=fast)
        report(3, PARTS)
        checked = verify(Bundle(folder, manifest), TorchEngine(loaded.network, loaded.schedule), slices)
        packages = {name: importlib.metadata.version(name) for name in ("torch", "onnx")}
        checked |= {"exported_by": {"cdiff": __version__, **packages}}
        manifest = dataclasses.replace(manifest, verification=checked | ({"half_share": half} if fp16 else {}))
        report(4, PARTS)
        (folder / CARD).write_text(render(card, manifest, loaded.config), encoding="utf-8")
        return manifest

    bundle = write_bundle(out, build, replace=replace)
    report(PARTS, PARTS)
    return bundle


def _write_graphs(loaded: LoadedRun, folder: Path, fp16: bool, report: Progress) -> dict[str, float]:
    """Write both graphs; returns each one's share of half-precision nodes by its name, or {} without `fp16`."""
    config = loaded.config.network
    network = half_network(loaded.network) if fp16 else loaded.network
    dtype = torch.float16 if fp16 else torch.float32
    encoder = write_encoder(EncoderGraph(network.encoder, dtype), config, folder)
    report(1, PARTS)
    denoiser = write_denoiser(DenoiserGraph(network.denoiser, config, loaded.schedule), config, folder, dtype)
    report(2, PARTS)
    return {path.stem: check_half(path) for path in (encoder, denoiser)} if fp16 else {}


def _manifest(loaded: LoadedRun, card: Card, name: str, folder: Path, fp16: bool, fast_steps: int) -> Manifest:
    config, info = loaded.config, loaded.info
    opset = next(o.version for o in onnx.load(folder / DENOISER).opset_import if not o.domain)
    settings = config.training
    training: dict[str, Any] = {
        key: info[key]
        for key in ("step", "seconds", "parameters", "precision", "data", "machine", *ORIGIN)
        if key in info
    }
    training |= {
        key: getattr(settings, key) for key in ("batch", "rows_per_image", "lr", "weight_decay", "ema", "seed", "clock")
    }
    scores: dict[str, Any] = {}
    if info.get("val_soft_dice_5") is not None:
        protocol = ", ".join(f"{key} {value}" for key, value in info.get("val_protocol", {}).items())
        scores["validation"] = {"soft_dice_5": info["val_soft_dice_5"], "protocol": protocol}
    entry = {name: {"sha256": "", "bytes": 0} for name in (ENCODER, DENOISER)}
    return Manifest(
        name=name,
        task=card.task or config.data.task or "segmentation by several annotators",
        citation=[*METHOD, *card.citation],
        variant=config.network.variant,
        levels=config.network.levels,
        T=config.network.T,
        schedule=loaded.schedule.to_json(),
        target=config.network.target,
        variance=config.network.variance,
        image_size=(config.network.image_size, config.network.image_size),
        image_channels=config.network.image_channels,
        framing=config.data.framing,
        tile_overlap=TILE_OVERLAP,
        intensity=loaded.intensity.to_json(),
        slice_axis=config.data.slice_axis,
        mirror=settings.augment,
        precision="float16" if fp16 else "float32",
        opset=opset,
        features_channels=config.network.base_channels,
        fast={"sampler": "ddim", "steps": fast_steps, "runs": VIEWS},  # each mirrored view once
        training=training,
        scores=scores | card.scores,
        outside=config.network.outside,
        files=entry,  # type: ignore[arg-type]  # filled in by write_bundle
    )


def _real_slices(run: Path, channels: int) -> Float32 | None:
    """The validation slices [S, channels, h, w] that the trainer kept, normalised; None for a run without them."""
    path = run / "samples.npz"
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as samples:
            slices = np.asarray(samples["images"], dtype=np.float32)
        if slices.ndim != 4 or slices.shape[1] != channels:
            raise ValueError(
                f"its images have the shape {list(slices.shape)}, but the network takes [S, {channels}, h, w]"
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CdiffError(f"{path} cannot be read ({error}); remove it, or train again to have it written") from None
    return slices
