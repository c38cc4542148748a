"""Scores maps in files, written by `cdiff segment` or by another program."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.case import listed
from cdiff.runtime.data.cases import Case, read_masks
from cdiff.runtime.data.oddities import Oddities
from cdiff.runtime.data.partition import count_annotators, count_channels
from cdiff.runtime.data.structures import files_of_image
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256
from cdiff.runtime.outputs import cut_short
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.nifti import nifti_voxels
from cdiff.runtime.scans.picture import opened
from cdiff.runtime.scans.scan import Scan, read_scan
from cdiff.runtime.scans.shapes import spatial_axes, without_ones
from cdiff.runtime.scans.sources import VOLUME_SUFFIXES, read_bytes
from cdiff.runtime.scans.volume import parse_volume, volume_shape
from cdiff.runtime.scoring.changed import stamped, still
from cdiff.runtime.scoring.evaluate import CHAIN, Job, Notice, Progress, Protocol
from cdiff.runtime.scoring.metrics import at_least
from cdiff.runtime.scoring.scores import CaseTally, SliceMaps
from cdiff.runtime.scoring.summary import Row
from cdiff.runtime.variants import SOFT_LABEL, VARIANTS
from cdiff.runtime.words import several

Float32 = NDArray[np.float32]
ROUNDING = 1e-5
"""By how much values may lie outside 0 to 1, which allows for the rounding of a file's scale factor (such as 1/255)."""
SHADES = (".png", ".tif", ".tiff")
"""Formats of pictures that can be a soft map, because they keep every value exactly."""
WHITE = {"1": 1, "L": 255, "I": 65535, "I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535, "F": 1}
"""The value that means 1 in a picture, for each of Pillow's grey modes."""
SPREAD = 1
"""The index of the spread over runs in a file of uncertainty; the entropy is at 0."""


@dataclass(frozen=True)
class Written:
    """The files of one case's maps. soft: the soft map. levels, uncertainty: as `cdiff segment` writes them, or None. report: the contents of
    its report, {} where there is none."""

    soft: Path
    levels: Path | None
    uncertainty: Path | None
    report: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that exist, with those that a header names for its voxels."""
        maps = (path for path in (self.soft, self.levels, self.uncertainty) if path)
        return tuple(file for path in maps for file in files_of_image(path))

    @property
    def slice_axis(self) -> int:
        """The axis along which the maps were drawn slice by slice, according to their report; else the last."""
        axis = _part(self.report, "input").get("slice_axis")
        return axis if axis in (0, 1, 2) else 2

    @property
    def squared(self) -> bool:
        """Whether the spread over runs in `uncertainty` is a variance, as that of one variant is, and no standard deviation."""
        drawn_by = self.report.get("variant")
        return any(variant.name == drawn_by and variant.spread == "variance" for variant in VARIANTS.values())


class WrittenMaps:
    """The maps of cases in a folder, as a `Source` to score.

    The maps of a case NAME are NAME_soft and, where they exist, NAME_levels and NAME_uncertainty, with a volume's suffix; or the soft map
    is NAME itself. The soft map may also be a grey picture, whose white is 1. A / in the case's name stands for a folder, or for a _.
    Raises CdiffError where a case has no soft map, where only some cases have levels, or where their numbers of levels differ.
    """

    def __init__(self, folder: Path, cases: Sequence[Case], tell: Notice) -> None:
        """tell: called with a line for each thing that a reader of the scores must know."""
        if not folder.is_dir():
            raise CdiffError(
                f"{folder} is not a folder of maps; give one that holds NAME_soft.nii.gz of each case NAME"
            )
        self._folder, self._tell = folder, tell
        found = {case.name: _written(folder, case.name) for case in cases}
        if missing := [name for name, written in found.items() if written is None]:
            raise CdiffError(
                f"{len(missing)} of {several(len(cases), 'case')} without a map in {folder} ({listed(missing)}): expected a file such as "
                f"{missing[0].replace('/', '_')}_soft.nii.gz; draw those maps, or score other cases"
            )
        self._written = {name: written for name, written in found.items() if written}
        self._stamps = {name: stamped(written.files) for name, written in self._written.items()}
        without = {name: one.soft for name, one in self._written.items() if not one.report}
        killed = {place: cut_short(place) for place in {soft.parent for soft in without.values()}}
        if cut := [name for name, soft in without.items() if soft.name in killed[soft.parent]]:
            raise CdiffError(
                f"{listed(cut)}: the maps in {folder} are of a `cdiff segment` that was killed while it put them in place; segment again"
            )
        self.levels = self._count_levels(cases)
        self.name = f"maps of {folder.resolve().name}"

    def _count_levels(self, cases: Sequence[Case]) -> int:
        with_levels = {name: written.levels for name, written in self._written.items() if written.levels}
        if not with_levels:
            return count_annotators(cases)
        if lacking := [name for name in self._written if name not in with_levels]:
            raise CdiffError(
                f"{listed(lacking)}: no file of levels in {self._folder}, where {next(iter(with_levels))} has one; "
                "add the missing files, or remove those of the others too: all levels are then read from the soft maps"
            )
        counts = {name: _count(path, self._written[name].soft) for name, path in with_levels.items()}
        if len(set(counts.values())) > 1:
            low, high = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
            raise CdiffError(
                f"in {self._folder} {low} has {several(counts[low], 'level')} and {high} {counts[high]}; score maps with one number of levels at a time"
            )
        return next(iter(counts.values()))

    def about(self) -> dict[str, Any]:
        """The folder and a hash of its maps, and the model that drew them, where their reports agree on it."""
        return {
            "model": {
                "name": self._agreed("bundle") or self._folder.resolve().name,
                "variant": self._agreed("variant") or "maps",
                "levels": self.levels,
                "maps": self._folder.resolve().name,
                "maps_sha256": self._sha256,
            }
        }

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for name, written in sorted(self._written.items()):
            digest.update(name.encode())
            for file in written.files:
                digest.update(bytes.fromhex(sha256(file)))
        return digest.hexdigest()

    def _agreed(self, key: str) -> Any:
        """The value of `key` that all reports share; None where they differ, or one lacks it."""
        said = [written.report.get(key) for written in self._written.values()]
        return said[0] if all(one == said[0] for one in said) else None

    def drawing(self, protocol: Protocol) -> dict[str, Any]:
        """How the maps were drawn, as far as all reports agree."""
        return {key: value for key in CHAIN if (value := self._agreed(key)) is not None}

    def odd(self) -> Oddities:
        """A collector for cases that are unlike one another."""
        return Oddities()

    def read(self, case: Case, odd: Oddities) -> tuple[Case, NDArray[np.bool_], NDArray[np.bool_]]:
        """The case, its masks, and which slices have maps.

        Raises CdiffError for maps that do not lie on the image's grid, hold values outside 0 to 1, or do not all have the same slices.
        """
        written, scan = self._written[case.name], self._scan(case)
        if any(written.soft.samefile(image) for image in (case.image, *case.others)):
            raise CdiffError(
                f"{written.soft} is the image of {case.name}, not a map of it; name the folder of the maps with --maps"
            )
        odd.see_grid(case, scan.grid)
        masks = read_masks(case, scan.grid, odd)
        drawn_from = _part(written.report, "input").get("sha256")
        if drawn_from and not case.others and drawn_from != scan.sha256:
            self._tell(f"{case.name}: by its report {written.soft.name} was drawn from a file that is not {case.image}")
        drawn = _drawn(_maps(written.soft, scan.grid, 1))
        for path, number in ((written.levels, self.levels), (written.uncertainty, 2)):
            if path and (_drawn(_maps(path, scan.grid, number)) != drawn).any():
                raise CdiffError(
                    f"{path} is NaN in other slices than {written.soft.name}; the two are not of the same maps"
                )
        return case, masks, drawn

    def row(self, job: Job, protocol: Protocol, progress: Progress) -> Row:
        """Score the slices of a case. Raises CdiffError where one of its maps has changed since the folder was looked into."""
        name = job.case.name
        with still(name, lambda: (self._stamps[name], stamped(self._written[name].files))):
            return self._row(job, protocol, progress)

    def _row(self, job: Job, protocol: Protocol, progress: Progress) -> Row:
        written, grid = self._written[job.case.name], self._scan(job.case).grid
        masks = read_masks(job.case, grid)
        soft = _maps(written.soft, grid, 1)
        levels = _maps(written.levels, grid, self.levels) if written.levels else SOFT_LABEL.to_levels(soft, self.levels)
        # The spread of a single run is 0 everywhere and tells nothing.
        unsure = written.uncertainty if written.report.get("runs") != 1 else None
        spread = _maps(unsure, grid, 2)[:, SPREAD] if unsure else None
        if spread is not None and written.squared:
            # As `evaluate` scores a model's: of the squares, more pixels would lie within SLACK of one another.
            spread = np.sqrt(spread)
        tally = CaseTally(masks, job.slices, protocol.combine)
        for done, index in enumerate(job.slices.tolist()):
            maps = SliceMaps(
                soft[index, 0],
                levels[index],
                at_least(levels[index], 0.5),
                None if spread is None else spread[index],
                masks[index],
            )
            tally.add_slice(index, maps, grid)
            progress(1000 * (done + 1), job.work)
        return {"case": job.case.name, "annotators": len(job.case.masks), "chain": {}, **tally.row()}

    def soft(self, case: Case, number: int, protocol: Protocol, progress: Progress) -> tuple[Scan, Float32]:
        """The scan, and the slice's soft map as it is in the file."""
        scan = self._scan(case)
        return scan, _maps(self._written[case.name].soft, scan.grid, 1)[number, 0]

    def _scan(self, case: Case) -> Scan:
        return read_scan(case.scan, channels=count_channels([case]), slice_axis=self._written[case.name].slice_axis)


def _written(folder: Path, name: str) -> Written | None:
    """The files of a case's maps; None without a soft map."""
    for place in dict.fromkeys((name, name.replace("/", "_"))):
        for ending in ("_soft", ""):
            if soft := _file(folder, place + ending, (*VOLUME_SUFFIXES, *SHADES)):
                if not ending:
                    return Written(soft, None, None, {})
                levels, uncertainty = (_file(folder, f"{place}_{kind}") for kind in ("levels", "uncertainty"))
                return Written(soft, levels, uncertainty, _report(folder / f"{place}.json"))
    return None


def _file(folder: Path, name: str, suffixes: tuple[str, ...] = VOLUME_SUFFIXES) -> Path | None:
    return next((path for suffix in suffixes if (path := folder / f"{name}{suffix}").is_file()), None)


def _count(levels: Path, soft: Path) -> int:
    """The number of levels in a file: the length of its last axis, where it has one axis more than the soft map, whose axes of length 1 after the
    third do not count (a scan may have them); else 1."""
    shape = volume_shape(levels)
    return shape[-1] if len(shape) > len(without_ones(volume_shape(soft))) else 1


def _report(path: Path) -> dict[str, Any]:
    """The report that `cdiff segment` wrote; {} where there is no such report."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) and "cdiff" in report else {}


def _part(report: dict[str, Any], key: str) -> dict[str, Any]:
    part = report.get(key)
    return part if isinstance(part, dict) else {}


def _maps(path: Path, grid: Grid, number: int) -> Float32:
    """A file's maps, cut into slices as the image's grid is: float32 [S,number,H,W], 0 to 1, or NaN in whole slices that were not drawn.

    Raises CdiffError for a grid unlike the image's, for NaN in part of a slice, and for values outside 0 to 1.
    """
    header = None
    if path.name.lower().endswith(SHADES):
        voxels = _shares(path)
    else:
        image = parse_volume(read_bytes(path), path, number)
        voxels, header = nifti_voxels(image, str(path)), image.header
    spatial = spatial_axes(voxels.shape, number, str(path))
    if len(grid.spatial) == 2 and spatial[2:] == (1,):  # a picture's map as a volume of one slice
        spatial = spatial[:2]
    own = Grid(spatial, None if len(spatial) == 2 else 2, header)
    if reason := grid.differs_from(own):
        raise CdiffError(f"{path} and its image {reason}; resample the map to the image first")
    maps = grid.cut(voxels.reshape(*grid.spatial, number))
    blank = np.isnan(maps)
    whole = blank.all(axis=(2, 3), keepdims=True)
    if (blank & ~whole).any() or (whole.any(axis=1) != whole.all(axis=1)).any():
        raise CdiffError(
            f"{path} is NaN in a part of a slice; a map is NaN in whole slices that were not drawn, and nowhere else"
        )
    low, high = (float(found(maps, initial=0, where=~blank)) for found in (np.min, np.max))
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise CdiffError(
            f"{path} holds values from {low:g} to {high:g}; a map is a share of annotators: scale it to 0 to 1"
        )
    return np.asarray(np.clip(maps, 0, 1), dtype=np.float32)


def _drawn(maps: Float32) -> NDArray[np.bool_]:
    """Bool [S]: which slices of maps [S,number,H,W] are not NaN."""
    return np.asarray(~np.isnan(maps[:, 0, 0, 0]))


def _shares(path: Path) -> Float32:
    """A grey picture's values [H,W], scaled so that white is 1. Raises CdiffError for a picture that is not in grey."""
    with opened(read_bytes(path), path) as (picture, _):
        if picture.mode not in WHITE:
            raise CdiffError(
                f"{path} is not in grey (mode {picture.mode}); save the map in grey, with 8 or 16 bits, or as NIfTI"
            )
        return np.asarray(picture, dtype=np.float32) / np.float32(WHITE[picture.mode])
