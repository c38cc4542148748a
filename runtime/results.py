"""The result of segmenting a scan, on the scan's own grid (soft map, one map per level, uncertainty, majority mask, report), and its files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import dump_json, most_bytes_of_a_name, sha256, staged
from cdiff.runtime.map_file import write_map
from cdiff.runtime.outputs import cut_short, listed_outputs
from cdiff.runtime.sampling.framing import Box
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.stack import Float32, Lazily, Stack
from cdiff.runtime.variants import Variant
from cdiff.runtime.words import by, several

TOGETHER = 16
"""Slices that are put on a scan's grid at a time: where they are cut along the array's fastest axis, neighbouring slices share the
processor's cache lines."""


@dataclass(frozen=True, eq=False)
class Result:
    """The maps of one scan on the scan's own grid. Outside the chosen slices float maps are NaN and the mask is 0.

    grid: shape and geometry. image [S,channels,h,w]: the scan as read, for pictures. slices: the numbers of the computed slices,
    which `stack` holds in that order. name: what file names begin with unless `save` is given another. report: see
    `runtime.report`; `save` adds the outputs to the copy that it writes and returns. window: the part of each slice that the
    model saw, where the user named a place; pictures show that part. dicom: the files of the DICOM series that the scan was read from.
    """

    grid: Grid
    image: Float32
    slices: range
    stack: Stack
    name: str = "scan"
    report: dict[str, Any] = field(default_factory=dict)
    window: Box | None = None
    dicom: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        """One line for notebooks, where the arrays would fill pages."""
        levels = self.stack.annotators or self.stack.held_maps.shape[1]
        numbers = f"slices {self.slices.start} to {self.slices.stop - 1}"
        return f"<Result {self.name}: {by(self.grid.shape)}, {numbers}, {several(levels, 'level')}>"

    @property
    def soft(self) -> Float32:
        """The fraction of annotators who would include the voxel, float32, in the input's shape."""
        return self.on_grid("soft").reshape(self.grid.shape)

    @property
    def levels(self) -> Float32:
        """[*spatial, C] float32: at index c-1 the map of "at least c annotators"."""
        return self.on_grid("levels")

    @property
    def maps(self) -> Float32:
        """[*spatial, K] float32: the network's own maps, one per level, one per annotator, or one."""
        return self.on_grid("maps")

    @property
    def uncertainty(self) -> Float32:
        """[*spatial, 2] float32: the entropy of the soft map in bits; its standard deviation (or variance, as the variant has it) over runs."""
        return self.on_grid("uncertainty")

    @property
    def mask(self) -> NDArray[np.uint8]:
        """1 where the soft map is at least one half, uint8, in the input's shape."""
        return self.on_grid("mask").reshape(self.grid.shape)

    def on_grid(self, attribute: str, make: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray) -> NDArray[Any]:
        """A map of `stack`, given by its attribute's name, as [*spatial,K]; NaN, or 0 for integers, in the slices that were not chosen.

        make: applied to m slices [m,h,w] or [m,K,h,w] at a time before they are placed."""
        maps = Lazily(self.stack, attribute)
        one = make(maps[:1])
        K = 1 if one.ndim == 3 else one.shape[1]
        whole = np.full((*self.grid.spatial, K), np.nan if one.dtype.kind == "f" else 0, one.dtype)
        into = self.grid.planes(whole)
        for i in range(0, len(maps), TOGETHER):
            part = make(maps[i : i + TOGETHER])
            first = self.slices.start + i
            into[first : first + len(part)] = part.reshape(len(part), K, *part.shape[-2:])
        return whole

    def save(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        preview: bool = True,
        page: bool = False,
        dicom_seg: bool = False,
    ) -> dict[str, Any]:
        """Write NAME_soft, _levels, _uncertainty and _mask .nii.gz, NAME_preview.png and, last, NAME.json; return the report.

        A model that draws each annotator's map also gives NAME_annotators.nii.gz. page: also write NAME_page.html, for browsing the
        slices. dicom_seg: also write NAME_levels.dcm, for scans read from DICOM.
        Each file appears whole or not at all. The report, which holds the SHA-256 of the others, appears last: where it exists, all
        do. An optional file of an older result, listed in its report, is removed if this result has none. Raises CdiffError when the
        folder cannot be written, or a file in it would be replaced that no report of ours lists.
        """
        name = name or self.name
        if not name or Path(name).name != name:
            raise CdiffError(f"the name {name!r} cannot begin a file's name; give one without folders")
        started = time.perf_counter()
        variant = self.stack.variant
        must_be_free(Path(folder), name, variant, preview=preview, page=page, dicom_seg=dicom_seg)
        kinds = _kinds(variant)
        with staged(Path(folder)) as stage:
            parts = {f"{name}_{kind}.nii.gz": stage(f"{name}_{kind}.nii.gz") for kind in kinds}
            for part, (attribute, intent) in zip(parts.values(), kinds.values(), strict=True):
                write_map(part, self.grid, self.slices, Lazily(self.stack, attribute), intent)
            if preview:
                from cdiff.runtime.pictures.preview import write_preview

                parts[f"{name}_preview.png"] = stage(f"{name}_preview.png")
                write_preview(self, parts[f"{name}_preview.png"], name)
            if page:
                from cdiff.runtime.pictures.page import write_page

                parts[f"{name}_page.html"] = stage(f"{name}_page.html")
                write_page(self, parts[f"{name}_page.html"], name)
            if dicom_seg:
                from cdiff.runtime.dicom_seg import write_dicom_seg

                parts[f"{name}_levels.dcm"] = stage(f"{name}_levels.dcm")
                write_dicom_seg(self, parts[f"{name}_levels.dcm"])
            not_always = {f"{name}_{more}" for more in ("preview.png", "page.html", "annotators.nii.gz", "levels.dcm")}
            older = {file for file in not_always - set(parts) if os.path.lexists(Path(folder) / file)}
            if older:  # rarely so; otherwise `cut_short` would list the folder of all files again for each of thousands of scans
                ours = (listed_outputs(Path(folder) / f"{name}.json") or set()) | cut_short(Path(folder))
                for file in older & ours:
                    stage.replaces(file)
            outputs = {file: {"sha256": sha256(part), "bytes": part.stat().st_size} for file, part in parts.items()}
            timings = {**self.report.get("timings", {}), "write": round(time.perf_counter() - started, 3)}
            report = {**self.report, "timings": timings, "outputs": outputs}
            stage(f"{name}.json").write_text(dump_json(report), encoding="utf-8")
        return report


def _kinds(variant: Variant) -> dict[str, tuple[str, str]]:
    """For each KIND of map that a result of `variant` saves as NAME_KIND.nii.gz: the attribute of `Stack`, and what the header says of it."""
    kinds = {
        "soft": ("soft", f"soft map: {variant.soft}"),
        "levels": ("levels", f"{variant.levels}, c last"),
        "uncertainty": ("uncertainty", variant.uncertainty),
        "mask": ("mask", "mask: soft map at least 0.5"),
    }
    return kinds | ({"annotators": ("maps", "one map per annotator, last axis")} if variant.told == "annotator" else {})


def must_be_free(folder: Path, name: str, variant: Variant, *, preview: bool, page: bool, dicom_seg: bool) -> None:
    """Raise CdiffError when `Result.save` would replace files in `folder` that no report of ours there lists, or a file name is too long for it.

    Such files are a reader's own NAME_mask.nii.gz, or the NAME.json that dcm2niix writes beside a scan. The report that a `save`
    left under a temporary name, when it was killed while putting its files in place, counts as a report too.
    """
    listed = listed_outputs(folder / f"{name}.json")
    files = {f"{name}_{kind}.nii.gz" for kind in _kinds(variant)}
    also = {"preview.png": preview, "page.html": page, "levels.dcm": dicom_seg}
    files |= {f"{name}_{more}" for more, asked in also.items() if asked}
    length, longest = max((len(os.fsencode(file)), file) for file in files)
    if length > (most := most_bytes_of_a_name(folder)):  # else shorter names would be written, and no report
        raise CdiffError(
            f"{longest} is too long for the name of a file ({length} bytes of at most {most}); rename the scan"
        )
    for file in sorted(files | {f"{name}.json"} if listed is None else files - listed):
        # os.path.exists, because it returns False in a folder that cannot be searched, and does not raise.
        if os.path.exists(folder / file) and file not in cut_short(folder):
            raise CdiffError(
                f"{folder / file} exists and would be replaced, but no report beside it says that it is an older result; move it, or "
                "write to another folder"
            )
