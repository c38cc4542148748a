"""What a scan's segmentation gives: soft map, one map a level, uncertainty, majority mask, report; and its files."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
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
from cdiff.runtime.variants import CONSENSUS, Variant
from cdiff.runtime.words import by, several

Float32 = NDArray[np.float32]


def entropy(soft: Float32) -> Float32:
    """Entropy in bits of a pixel's yes or no, H(p) = -p log2 p - (1-p) log2 (1-p); 0 where all agree, 1 at p = 1/2."""
    found, unsure = np.zeros(soft.shape, np.float32), (soft != 0) & (soft != 1)  # of most maps few pixels are
    p = soft[unsure].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(q > 0, -q * np.log2(q), 0.0) for q in (p, 1 - p)]
    found[unsure] = np.where(np.isnan(p), np.nan, terms[0] + terms[1])
    return found


@dataclass(frozen=True, eq=False)
class Stack:
    """The maps of the slices that were computed, n of them, in-plane axes as stored.

    maps [n,K,h,w] float32: what the network drew, mean over runs; K and what they are is the variant's. run_std [n,h,w] float32:
    standard deviation over runs of a run's soft map. runs [n,K,R,h,w] uint8 (255 = 1), when they were kept. annotators is C, K
    unless given.
    """

    maps: Float32
    run_std: Float32
    runs: NDArray[np.uint8] | None = None
    variant: Variant = CONSENSUS
    annotators: int | None = None

    @property
    def soft(self) -> Float32:
        """[n,h,w]: the mean over the maps, a fraction of annotators (from levels: the sum of P(at least c) over c, divided by C)."""
        found = np.empty((len(self.maps), *self.maps.shape[2:]), np.float32)
        # Slice by slice, or a long scan would lie in memory in float64.
        for one, maps in zip(found, self.maps, strict=True):
            one[...] = maps.mean(axis=0, dtype=np.float64)
        return found

    @property
    def levels(self) -> Float32:
        """[n,C,h,w]: at index c-1 the map of "at least c annotators", as the variant has it."""
        return self.variant.to_levels(self.maps, self.annotators or self.maps.shape[1])

    @property
    def spread(self) -> Float32:
        """[n,h,w]: how much the runs differ: their standard deviation, or their variance where the variant's paper has that."""
        return self.run_std**2 if self.variant.spread == "variance" else self.run_std

    @property
    def uncertainty(self) -> Float32:
        """[n,2,h,w]: entropy of the soft map in bits, and `spread`."""
        found = np.empty((len(self.maps), 2, *self.maps.shape[2:]), np.float32)
        for one, soft, spread in zip(found, self.soft, self.spread, strict=True):
            one[0], one[1] = entropy(soft), spread
        return found

    @property
    def mask(self) -> NDArray[np.uint8]:
        """[n,h,w]: 1 where the soft map is at least one half."""
        return (self.soft >= 0.5).astype(np.uint8)


class _Lazily:
    """A map of a stack as an array whose slices are computed when they are asked for: all of them would be as large as the scan."""

    def __init__(self, stack: Stack, attribute: str) -> None:
        self._stack, self._attribute = stack, attribute
        one = self[:1]
        self.shape: tuple[int, ...] = (len(stack.maps), *one.shape[1:])
        self.dtype: np.dtype[Any] = one.dtype

    def __getitem__(self, part: slice, /) -> NDArray[Any]:
        stack = replace(self._stack, maps=self._stack.maps[part], run_std=self._stack.run_std[part], runs=None)
        found: NDArray[Any] = getattr(stack, self._attribute)
        return found


@dataclass(frozen=True, eq=False)
class Result:
    """The maps of one scan on the scan's own grid. Outside the chosen slices floats are NaN and the mask is 0.

    grid: shape and geometry. image [S,channels,h,w]: the scan as read, for pictures. slices: the numbers of those computed,
    which `stack` holds in that order. name: what the files' names begin with unless another is given. report: see
    `runtime.report`; `save` adds the outputs to the copy that it writes and returns. window: the part of each slice that the
    model saw, where the user named its place: pictures show that part. dicom: the files of the DICOM series that it was read from.
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
        """One line, as a notebook shows it: the arrays would fill pages."""
        levels = self.stack.annotators or self.stack.maps.shape[1]
        numbers = f"slices {self.slices.start} to {self.slices.stop - 1}"
        return f"<Result {self.name}: {by(self.grid.shape)}, {numbers}, {several(levels, 'level')}>"

    @property
    def soft(self) -> Float32:
        """Fraction of annotators who would include the voxel, float32, shape of the input."""
        return self._on_grid(self.stack.soft[:, None]).reshape(self.grid.shape)

    @property
    def levels(self) -> Float32:
        """[*spatial, C] float32: at index c-1 the map of "at least c annotators"."""
        return self._on_grid(self.stack.levels)

    @property
    def maps(self) -> Float32:
        """[*spatial, K] float32: the network's own maps, one a level, one an annotator, or one."""
        return self._on_grid(self.stack.maps)

    @property
    def uncertainty(self) -> Float32:
        """[*spatial, 2] float32: entropy of the soft map in bits; its standard deviation, or variance, over runs."""
        return self._on_grid(self.stack.uncertainty)

    @property
    def mask(self) -> NDArray[np.uint8]:
        """1 where the soft map is at least one half, uint8, shape of the input."""
        return (self.soft >= 0.5).astype(np.uint8)

    def _on_grid(self, maps: Float32) -> Float32:
        """[n,K,h,w] of the chosen slices -> [*spatial,K], NaN in the others."""
        whole = np.full((len(self.image), *maps.shape[1:]), np.nan, np.float32)
        whole[self.slices.start : self.slices.stop] = maps
        return self.grid.restore(whole)

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
        A model that draws each annotator's map adds NAME_annotators.nii.gz; page, NAME_page.html to leaf through in a browser; dicom_seg, for
        what was read from DICOM, NAME_levels.dcm.

        Each file appears whole or not at all; the report, which holds the others' SHA-256, appears last, so where it is, all
        are. What is not always written and an older report there lists is removed where this result has none. Raises CdiffError when
        the folder cannot be written, or a file in it that no report of ours lists would be replaced.
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
                write_map(part, self.grid, self.slices, _Lazily(self.stack, attribute), intent)
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
            ours = (listed_outputs(Path(folder) / f"{name}.json") or set()) | cut_short(Path(folder))
            for file in ours & not_always - set(parts):
                stage.replaces(file)
            outputs = {file: {"sha256": sha256(part), "bytes": part.stat().st_size} for file, part in parts.items()}
            timings = {**self.report.get("timings", {}), "write": round(time.perf_counter() - started, 3)}
            report = {**self.report, "timings": timings, "outputs": outputs}
            stage(f"{name}.json").write_text(dump_json(report), encoding="utf-8")
        return report


def _kinds(variant: Variant) -> dict[str, tuple[str, str]]:
    """The maps that a result of `variant` has as NAME_KIND.nii.gz: the attribute of `Stack` and what the header says of it."""
    kinds = {
        "soft": ("soft", f"soft map: {variant.soft}"),
        "levels": ("levels", f"{variant.levels}, c last"),
        "uncertainty": ("uncertainty", variant.uncertainty),
        "mask": ("mask", "mask: soft map at least 0.5"),
    }
    return kinds | ({"annotators": ("maps", "one map an annotator, last axis")} if variant.told == "annotator" else {})


def must_be_free(folder: Path, name: str, variant: Variant, *, preview: bool, page: bool, dicom_seg: bool) -> None:
    """Raise CdiffError when files in `folder` that no report of ours there lists would be replaced by `Result.save`, or their names are too long for it.

    A reader's own NAME_mask.nii.gz is such a file, and so is the NAME.json that dcm2niix writes beside a scan. A `save` that was killed
    while it put its files in place left its report under a temporary name, which counts too.
    """
    listed = listed_outputs(folder / f"{name}.json")
    files = {f"{name}_{kind}.nii.gz" for kind in _kinds(variant)}
    also = {"preview.png": preview, "page.html": page, "levels.dcm": dicom_seg}
    files |= {f"{name}_{more}" for more, asked in also.items() if asked}
    length, longest = max((len(os.fsencode(file)), file) for file in files)
    if length > (most := most_bytes_of_a_name(folder)):  # the shorter names would be there, and no report with them
        raise CdiffError(
            f"{longest} is too long for the name of a file ({length} bytes of at most {most}); rename the scan"
        )
    for file in sorted(files | {f"{name}.json"} if listed is None else files - listed):
        # `exists` is False, not an error, in a folder that cannot be searched.
        if os.path.exists(folder / file) and file not in cut_short(folder):
            raise CdiffError(
                f"{folder / file} is there, would be replaced, and no report there says that it is an older result; move it, or "
                "write to another folder"
            )
