"""A bundle and an engine, kept loaded: a scan in, the maps of agreement out (design, section 4)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cdiff.runtime.batching import Timings, rows_per_batch, segment_windows
from cdiff.runtime.bundle import Bundle, open_bundle
from cdiff.runtime.engines.base import Engine
from cdiff.runtime.engines.registry import open_engine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256
from cdiff.runtime.framing import Framing
from cdiff.runtime.manifest import NAME as MANIFEST
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.report import build_report, describe_input, meaning, volumes
from cdiff.runtime.results import Float32, Result, Stack
from cdiff.runtime.sampler import SamplerTable, sampler_table
from cdiff.runtime.scan import Scan, ScanInput, parse_slices, read_scan
from cdiff.runtime.variants import Variant

Combine = Literal["mean", "vote"]
RUNS = 25
SAMPLER = "ddpm"


class Segmenter:
    """`Segmenter.open(folder)` once, then `.segment(scan)` for as many scans as there are."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self._manifest_sha256 = sha256(bundle.path / MANIFEST)

    @classmethod
    def open(cls, bundle: str | os.PathLike[str] | Bundle, engine: str = "auto", device: str = "cpu") -> Segmenter:
        """Check the bundle's hashes and load its graphs into an engine.

        engine: a name of `runtime.engines.registry`, or "auto", which picks; `segmenter.engine.name` tells which.
        Raises CdiffError when the bundle is not whole, or the engine asked for cannot run on that device.
        """
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
        return cls(opened, open_engine(opened, engine, device))

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of its model."""
        return self.bundle.manifest

    def segment(
        self,
        scan: ScanInput,
        *,
        runs: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        fast: bool = False,
        combine: str = "mean",
        mirror: bool | None = None,
        seed: int = 0,
        slices: str | slice | tuple[int, int] | range | None = None,
        slice_axis: int | None = None,
        batch: int | None = None,
        keep_runs: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Segment a scan: a path (NIfTI, PNG), a NumPy array ([H, W], or three axes) or a nibabel NIfTI image.

        runs, steps, sampler: 25 runs of ddpm over all T steps unless given; with `fast`, what the bundle states for it.
        combine: "mean" over runs, or "vote", which rounds each map's mean over runs as the published code does; only for models
        that draw several maps of a slice.
        mirror: let the runs see the slice as it is and mirrored, in turn; what the bundle states unless given.
        slices: "A:B", A included and B not; the maps are NaN (the mask 0) elsewhere. A slice's maps do not depend on them.
        slice_axis: axis of the array as stored to cut along, the bundle's unless given. batch: rows a padded batch.
        keep_runs: keep every run's maps, uint8, in `result.stack.runs`. progress: called as progress(done, total).
        Raises CdiffError for a scan that cannot be read faithfully, arguments out of range, and a network that does not
        return finite values.
        """
        if combine not in get_args(Combine):
            raise CdiffError(f"combine {combine!r} is not known; use 'mean' or 'vote'")
        if not 0 <= seed < 2**64:
            raise CdiffError(f"seed {seed} is out of range; use a whole number from 0 to 2^64 - 1")
        manifest, variant = self.manifest, self.manifest.draws
        if combine == "vote" and not variant.votes:
            raise CdiffError(
                f"'vote' rounds each map at one half, and a {variant.name} model draws a single one: the soft map would be the mask; "
                "use 'mean'"
            )
        preset = manifest.fast if fast else {}
        runs = int(preset.get("runs", RUNS)) if runs is None else runs
        sampler = str(preset.get("sampler", SAMPLER)) if sampler is None else sampler
        steps = int(preset.get("steps", manifest.T)) if steps is None else steps
        if runs < 1:
            raise CdiffError(f"runs {runs} is out of range; at least one is needed")
        mirror = manifest.mirror if mirror is None else mirror
        table = sampler_table(sampler, manifest.noise_schedule, steps)

        clock = _Clock()
        axis = manifest.slice_axis if slice_axis is None else slice_axis
        read = read_scan(scan, channels=manifest.image_channels, slice_axis=axis)
        chosen = parse_slices(slices, len(read.slices))
        clock.lap("read")
        framing = Framing(manifest.framing, manifest.image_size, manifest.tile_overlap)  # type: ignore[arg-type]
        windows = framing.frame(self._normalised(read, chosen))
        clock.lap("frame")

        rows = len(windows) * manifest.conditions * runs
        batch = rows_per_batch(rows, self.engine.device) if batch is None else batch
        spent = Timings()
        finished = list(
            segment_windows(
                self.engine,
                windows,
                table,
                levels=manifest.conditions,
                runs=runs,
                seed=seed,
                batch=batch,
                slice_ids=list(chosen),
                mirror=mirror,
                keep_runs=keep_runs,
                progress=progress,
                timings=spent,
            )
        )
        maps = np.stack([one.level_means for one in finished])
        stack = Stack(
            (maps >= 0.5).astype(np.float32) if combine == "vote" else maps,
            np.stack([one.run_std for one in finished]),
            np.stack([one.runs for one in finished if one.runs is not None]) if keep_runs else None,
            variant,
            manifest.levels,
        )
        clock.lap("segment")
        report = build_report(
            {
                **self._model_report(),
                **_sampling_report(table, runs, combine, mirror, seed, fast, batch),
                "combine_note": _combine_note(combine, variant),
                "framing": {
                    "mode": manifest.framing,
                    "model_size": list(manifest.image_size),
                    "windows_per_slice": windows.per_slice,
                },
                "input": describe_input(read.source, read.sha256, read.grid, read.slices),
                "slices": {"first": chosen.start, "end": chosen.stop, "of": len(read.slices)},
                "timings": {**clock.laps, **{key: round(value, 3) for key, value in asdict(spent).items()}},
                "volumes": volumes(stack, read.grid),
                "warnings": [*read.warnings, *_notes(read, chosen, manifest)],
            }
        )
        return Result(read.grid, read.slices, chosen, stack, read.name, report)

    def _normalised(self, read: Scan, chosen: range) -> Float32:
        """The chosen slices in [-1, 1]; where the scope is the volume, the percentiles are the whole scan's."""
        intensity, part = self.manifest.normalisation, slice(chosen.start, chosen.stop)
        if intensity.scope == "volume":
            return intensity.apply(read.slices)[part]
        return intensity.apply(read.slices[part])

    def _model_report(self) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "bundle": manifest.name,
            "manifest_sha256": self._manifest_sha256,
            "variant": manifest.variant,
            "levels": manifest.levels,
            "maps": meaning(manifest.draws),
            "engine": self.engine.name,
            "engine_version": self.engine.version,
            "device": self.engine.device,
            "precision": manifest.precision,
        }


class _Clock:
    """Seconds of each part, one lap after another."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.laps[part] = round(now - self._last, 3)
        self._last = now


def _sampling_report(
    table: SamplerTable, runs: int, combine: str, mirror: bool, seed: int, fast: bool, batch: int
) -> dict[str, Any]:
    return {
        "sampler": table.name,
        "steps": len(table),
        "runs": runs,
        "combine": combine,
        "mirror": mirror,
        "seed": seed,
        "fast": fast,
        "batch": batch,
    }


def _combine_note(combine: str, variant: Variant) -> str:
    steps = ["mean over runs"]
    if combine == "vote":
        steps.append(f"rounded at one half for each {variant.told}")
    if variant.told:
        steps.append(f"then mean over {variant.told}s")
    return ", ".join(steps)


def _notes(read: Scan, chosen: range, manifest: Manifest) -> list[str]:
    """What a reader of the maps should know of how this scan met this model."""
    notes = []
    size = read.slices.shape[-2:]
    if manifest.framing == "resize" and size != manifest.image_size:
        model = " x ".join(map(str, manifest.image_size))
        notes.append(
            f"slices of {size[0]} x {size[1]} were resampled to the model's {model}, and the maps back to them"
        )
    if manifest.framing == "centre" and any(n > m for n, m in zip(size, manifest.image_size, strict=True)):
        height, width = manifest.image_size
        notes.append(
            f"the model sees the central {height} x {width} of each slice's {size[0]} x {size[1]} pixels, where it expects the "
            "structure; outside them the maps are 0 and mean nothing"
        )
    if len(chosen) < len(read.slices):
        notes.append(
            f"only slices {chosen.start} to {chosen.stop - 1} of 0 to {len(read.slices) - 1} were segmented: in the others the "
            "maps are NaN and the mask is 0, and volumes leave them out"
        )
    return notes
