"""Makes a scan ready for the engine, without needing it: reads the scan, chooses its slices and normalises their intensities."""

from __future__ import annotations

import math
import operator
import os
import time
from dataclasses import dataclass, replace

import numpy as np

from cdiff.runtime.data.case import must_be_in_order
from cdiff.runtime.data.oddities import better_axis
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.sampling.framing import Box, Windows, box_around
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.intensity import Normalised
from cdiff.runtime.scans.lie import Lie, directions, lie_of, otherwise
from cdiff.runtime.scans.place import At, Place, find_place, must_take_a_place
from cdiff.runtime.scans.scale import out_of_scale, pixel_mm
from cdiff.runtime.scans.scan import Scan, ScanInput, parse_slices, read_scan
from cdiff.runtime.stack import Float32, Stack
from cdiff.runtime.words import by

Slices = str | slice | tuple[int, int] | range | None
MUCH_LARGER = 1.25
"""A scan's slices are reported as larger than the training's beyond this many times their size: a crop may be a little larger."""
FEW = range(2, 5)
"""So few slices may really be the modalities of one slice: QUBIQ's tumour files have four, and a colour picture has three."""
BESIDE = 0.1
"""A structure off the window's middle is reported beyond this share of the window's side: training itself moves windows that far (`shift`)."""
AROUND = 5
"""How many slices on either side of a place the example in the note about it takes."""


class Clock:
    """Measures the seconds of successive parts, in `laps`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """End the part that began with the previous call, and name it."""
        now = time.perf_counter()
        self.laps[part] = round(now - self._last, 3)
        self._last = now


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `Segmenter.prepare` returns and `Segmenter.segment` takes.

    scan: as read. chosen: the slices to segment. windows: their windows, in the model's intensities; each is made when the engine
    asks for it. seconds: what each part took. place: where the user says that the structure is. alone: whether only the place's
    slice was chosen, because the user named no slices. unnamed: whether the channels came in one file or array, so that only their
    order tells which is which.
    """

    scan: Scan
    chosen: range
    windows: Windows
    seconds: dict[str, float]
    place: Place | None = None
    alone: bool = False
    unnamed: bool = False


def whole(name: str, value: int) -> int:
    """An argument as a Python int, which a report can hold; NumPy's integers are accepted. Raises CdiffError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise CdiffError(f"{name} {value!r} is not a whole number") from None


def prepare(
    scan: ScanInput | Scan,
    manifest: Manifest,
    slices: Slices,
    slice_axis: int | None,
    at: At | None = None,
    series: int | None = None,
    shrink: int | None = None,
) -> Prepared:
    """Read a scan for one model. Arguments and errors are those of `Segmenter.segment`.

    A Scan that `read_scan` made for this model is taken as it is; slice_axis and series must then have been given to read_scan.
    """
    if isinstance(scan, Scan) and (slice_axis is not None or series is not None):
        raise CdiffError("this scan was read already; give slice_axis and series to read_scan")
    if at is not None:
        must_take_a_place(manifest)
    elif shrink is not None:
        raise CdiffError("shrink needs the place of the structure; give --at too (in Python, at)")
    if isinstance(scan, list | tuple) and all(isinstance(part, str | os.PathLike) for part in scan):
        must_be_in_order(scan, manifest.modalities)
    unnamed = len(scan) == 1 if isinstance(scan, list | tuple) else not isinstance(scan, Scan)
    clock = Clock()
    axis = manifest.slice_axis if slice_axis is None else whole("slice_axis", slice_axis)
    series, shrink = (n if n is None else whole(name, n) for name, n in (("series", series), ("shrink", shrink)))
    if isinstance(scan, Scan):
        read = scan
    else:
        read = read_scan(scan, channels=manifest.image_channels, slice_axis=axis, series=series)
    place = None if at is None else find_place(at, read.grid, manifest, 1 if shrink is None else shrink)
    alone = place is not None and slices is None and len(read.slices) > 1
    chosen = _chosen(slices, len(read.slices), place)
    clock.lap("read")
    framing = manifest.slice_framing
    if place is None:
        windows = framing.frame(_normalised(read.slices, manifest, chosen, None))
    elif place.shrunk and place.inner:
        point, field = place.inner
        small = _normalised(place.shrunk.shrink(read.slices), manifest, chosen, field)
        windows = replace(framing.frame(small, point, manifest.slice_size), shrunk=place.shrunk)
    else:
        windows = framing.frame(
            _normalised(read.slices, manifest, chosen, place.field), place.point, manifest.slice_size
        )
    clock.lap("frame")
    return Prepared(read, chosen, windows, clock.laps, place, alone, unnamed)


def notes(prepared: Prepared, manifest: Manifest) -> list[str]:
    """What a reader of the maps should know about how well this scan suits this model, one line per note."""
    read, chosen = prepared.scan, prepared.chosen
    turned = _lies_otherwise(read.grid, manifest.lie)
    found = list(turned)
    shrunk = prepared.place.shrunk if prepared.place else None
    mm = pixel_mm(read.grid, manifest.resampled)
    if text := out_of_scale(mm and mm * (shrunk.factor if shrunk else 1), manifest.pixel_mm):
        found.append(f"by its header this scan's {text}; resample it to that size, and segment the result")
    axis = better_axis(read.grid.spatial, manifest.slice_axis) if read.grid.slice_axis == manifest.slice_axis else None
    if axis is not None and not turned:
        found.append(
            f"slices along axis {manifest.slice_axis}, as in training, are strips of {by(read.slices.shape[-2:])} pixels; if those along "
            f"axis {axis} are meant, give --slice-axis {axis} (in Python slice_axis={axis})"
        )
    size = read.slices.shape[-2:]
    if manifest.resampled and size != manifest.resampled:
        found.append(
            f"slices of {by(size)} were resampled to the model's {by(manifest.resampled)}, and the maps back to them"
        )
    if manifest.image_channels == 1 and len(read.slices) in FEW and read.grid.slice_axis == 2 and not read.dicom:
        found.append(
            f"each of the {len(read.slices)} planes along the last axis was taken as a slice; if they are the modalities of one slice, "
            "give a file that holds only the modality that the model was trained on"
        )
    if prepared.unnamed and manifest.modalities:
        found.append(
            f"the channels along the last axis were taken as {', '.join(manifest.modalities)}, in the order of the training; if "
            "they are in another order, rearrange them and segment the result"
        )
    found += _what_the_model_sees(prepared, manifest)
    if prepared.alone:
        first, end = max(chosen.start - AROUND, 0), min(chosen.stop + AROUND, len(read.slices))
        found.append(
            f"only slice {chosen.start} (of 0 to {len(read.slices) - 1}), which holds {prepared.place}, was segmented, because the model "
            "marks something in every slice that it is shown: in the others the maps are NaN and the mask is 0, and volumes leave "
            f"them out; name the slices that the structure is in with --slices A:B, such as --slices {first}:{end}"
        )
    elif len(chosen) < len(read.slices):
        which = f"slices {chosen.start} to {chosen.stop - 1}" if len(chosen) > 1 else f"slice {chosen.start}"
        found.append(
            f"only {which} (of 0 to {len(read.slices) - 1}) {'were' if len(chosen) > 1 else 'was'} segmented: in the others the "
            "maps are NaN and the mask is 0, and volumes leave them out"
        )
    return [*read.warnings, *found]


def about_place(prepared: Prepared, manifest: Manifest, stack: Stack) -> list[str]:
    """Notes on what the chosen slices' maps (`stack`) show at the place that the user named; none where no place was named."""
    place = prepared.place
    if place is None:
        return []
    at = place.number - prepared.chosen.start
    soft = stack[at : at + 1].soft[0]
    return [*_missed(place, manifest, soft), *_beside(place, prepared.scan.grid, soft)]


def _missed(place: Place, manifest: Manifest, soft: Float32) -> list[str]:
    """A note where the soft map [h,w] of the place's slice leaves out the named voxel itself; else nothing."""
    share = float(soft[place.point])
    if share >= 0.5:
        return []
    factor = 2 * (place.shrunk.factor if place.shrunk else 1)
    fits = all(n >= factor * seen for n, seen in zip(soft.shape, manifest.image_size, strict=True))
    return [
        f"the mask leaves out {place}, where you say that the structure is (there the soft map is {share:.2f}): the model may have missed "
        f"it, as it does with structures that are faint or that do not fit into its {by(manifest.image_size)} pixels with a margin"
        + (f"; --shrink {factor} lets it see a larger structure whole" if fits else "")
    ]


def _beside(place: Place, grid: Grid, soft: Float32) -> list[str]:
    """A note where a window could be placed with the region that the soft map [h,w] marks much nearer to its middle; else nothing.

    The model learned from structures in the middle and draws others worse: docs/model.md has the shipped model's figures.
    """
    marked = np.argwhere(soft >= 0.5)
    if not len(marked):
        return []
    row, column = (round(float(middle)) for middle in marked.mean(axis=0))
    height, width = (part.stop - part.start for part in place.window)
    other = box_around((soft.shape[0], soft.shape[1]), (height, width), (row, column))
    away = math.hypot(*(there.start - here.start for there, here in zip(other, place.window, strict=True)))
    if away <= BESIDE * min(height, width):
        return []
    plane = iter((row, column))
    voxel = tuple(index if axis == grid.slice_axis else next(plane) for axis, index in enumerate(place.at))
    return [
        f"the middle of what the map marks in the slice of {place} lies {math.dist((row, column), place.point):.0f} pixels from that point, but the "
        f"model draws best what lies in the middle of its window: --at {','.join(map(str, voxel))} (in Python at={voxel}) centres it"
    ]


def _lies_otherwise(grid: Grid, trained: Lie | None) -> list[str]:
    """A note on a scan whose slices lie otherwise in the patient than the training's; none where they lie alike or that is not known."""
    lie, axes = lie_of(grid), directions(grid)
    text = otherwise(lie, trained, "those that the model learned from")
    if not text or lie is None or trained is None or axes is None:
        return []
    axis = axes.index(trained.through)
    remedy = (
        f"--slice-axis {axis} (in Python slice_axis={axis}) cuts slices like those of the training"
        if lie.plane != trained.plane
        else ("the model sees them turned; store the scan's axes in the order of the training")
    )
    return [f"by its header this scan's {text}: {remedy}"]


def _what_the_model_sees(prepared: Prepared, manifest: Manifest) -> list[str]:
    """Notes on which part of each slice the model sees; none where it sees all of it."""
    read, place = prepared.scan, prepared.place
    size, seen, trained = read.slices.shape[-2:], manifest.image_size, manifest.slice_size
    if manifest.framing != "centre" or all(n <= m for n, m in zip(size, seen, strict=True)):
        return []
    whole, outside = by(size), "outside them the maps are 0 and mean nothing"
    if place is None:
        note = f"the model sees the central {by(seen)} of each slice's {whole} pixels, where it expects the structure; {outside}"
        if trained and any(n > MUCH_LARGER * m for n, m in zip(size, trained, strict=True)):
            letters, indices = ("I,J", "i, j") if read.grid.slice_axis is None else ("I,J,K", "i, j, k")
            scaled = "" if manifest.normalisation.mean else ", and intensities are scaled by the whole slice"
            note += (
                f". It was trained on {by(trained)} pixels around the structure: say where that is with --at {letters} (in Python "
                f"at=({indices})); without it the model takes the slice's middle{scaled}"
            )
        return [note]
    where = f"{by(seen)} of each slice's {whole} pixels"
    if place.shrunk:
        many = tuple(n * place.shrunk.factor for n in seen)
        where = f"{by(many)} of each slice's {whole} pixels, shrunk to {by(seen)}"
    moved = ", which is not in their middle because it lies near the slice's edge" if place.moved else ""
    found = [f"the model sees {where}, around {place}{moved}; {outside}"]
    if trained is None and not manifest.normalisation.mean:
        found.append(
            "the bundle does not say how large its training slices were, so intensities were normalised over whole slices; if "
            "it was trained on crops, cut such a crop around the structure and segment that"
        )
    return found


def _chosen(slices: Slices, count: int, place: Place | None) -> range:
    """The slices to segment: those named, or else only the place's, or else all. Raises CdiffError where those named leave out the place's."""
    if place is None:
        return parse_slices(slices, count)
    if slices is None:
        return range(place.number, place.number + 1)
    chosen = parse_slices(slices, count)
    if place.number not in chosen:
        raise CdiffError(
            f"at {place} lies in slice {place.number}, which slices {chosen.start}:{chosen.stop} leave out; name slices that hold it"
        )
    return chosen


def _normalised(slices: Float32, manifest: Manifest, chosen: range, field: Box | None) -> Normalised:
    """The chosen slices [S,ch,h,w] in the model's intensities; if the scope is the volume, percentiles are taken over all its slices.

    field: the part of each slice that percentiles are taken over; all of it unless given.
    """
    intensity, part = manifest.normalisation, slice(chosen.start, chosen.stop)
    over = slices if field is None else slices[..., *field]
    limits = intensity.limits(over) if intensity.scope == "volume" else None
    found = Normalised(intensity, slices[part], over[part], limits)
    if intensity.mean:  # these numbers may overflow values: normalising now raises before the long work
        for index in range(len(found)):
            found[index]
    return found
