"""A scan made ready for the engine, which needs nothing of the engine: read, its slices chosen, their intensities normalised."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.framing import Framing, Windows
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.results import Float32
from cdiff.runtime.scan import Scan, ScanInput, parse_slices, read_scan

Slices = str | slice | tuple[int, int] | range | None


class Clock:
    """Seconds of each part, one lap after another."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """End the part that began with the last call."""
        now = time.perf_counter()
        self.laps[part] = round(now - self._last, 3)
        self._last = now


@dataclass(frozen=True)
class Prepared:
    """What `Segmenter.prepare` gives and `Segmenter.segment` takes.

    scan: as read. chosen: the slices to segment. windows: theirs, in the model's intensities; each is resampled when the engine
    asks for it. seconds: what each part took.
    """

    scan: Scan
    chosen: range
    windows: Windows
    seconds: dict[str, float]


def prepare(scan: ScanInput | Scan, manifest: Manifest, slices: Slices, slice_axis: int | None) -> Prepared:
    """Read a scan for one model. The arguments, and the CdiffError for what cannot be read, are `Segmenter.segment`'s.

    What `read_scan` gave for this model is taken as it is; slice_axis is then read_scan's.
    """
    if isinstance(scan, Scan) and slice_axis is not None:
        raise CdiffError("this scan was read already; give slice_axis to read_scan")
    clock = Clock()
    axis = manifest.slice_axis if slice_axis is None else slice_axis
    read = scan if isinstance(scan, Scan) else read_scan(scan, channels=manifest.image_channels, slice_axis=axis)
    chosen = parse_slices(slices, len(read.slices))
    clock.lap("read")
    framing = Framing(manifest.framing, manifest.image_size, manifest.tile_overlap)  # type: ignore[arg-type]
    windows = framing.frame(_normalised(read, manifest, chosen))
    clock.lap("frame")
    return Prepared(read, chosen, windows, clock.laps)


def notes(prepared: Prepared, manifest: Manifest) -> list[str]:
    """What a reader of the maps should know of how this scan met this model, one line each."""
    read, chosen, found = prepared.scan, prepared.chosen, []
    size = read.slices.shape[-2:]
    if manifest.framing == "resize" and size != manifest.image_size:
        model = " x ".join(map(str, manifest.image_size))
        found.append(
            f"slices of {size[0]} x {size[1]} were resampled to the model's {model}, and the maps back to them"
        )
    if manifest.framing == "centre" and any(n > m for n, m in zip(size, manifest.image_size, strict=True)):
        height, width = manifest.image_size
        found.append(
            f"the model sees the central {height} x {width} of each slice's {size[0]} x {size[1]} pixels, where it expects the "
            "structure; outside them the maps are 0 and mean nothing"
        )
    if len(chosen) < len(read.slices):
        found.append(
            f"only slices {chosen.start} to {chosen.stop - 1} of 0 to {len(read.slices) - 1} were segmented: in the others the "
            "maps are NaN and the mask is 0, and volumes leave them out"
        )
    return [*read.warnings, *found]


def _normalised(read: Scan, manifest: Manifest, chosen: range) -> Float32:
    """The chosen slices in [-1, 1]; where the scope is the volume, the percentiles are the whole scan's."""
    intensity, part = manifest.normalisation, slice(chosen.start, chosen.stop)
    if intensity.scope == "volume":
        return intensity.apply(read.slices)[part]
    return intensity.apply(read.slices[part])
