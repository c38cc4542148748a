"""The report of a segmented scan: what was done, with what, how long it took, and the volume at each level."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from cdiff import __version__
from cdiff.runtime.expected import expected_counts, expected_dice
from cdiff.runtime.host import package_version
from cdiff.runtime.stack import Lazily, Stack

if TYPE_CHECKING:
    from cdiff.runtime.scans.grid import Grid
    from cdiff.runtime.scans.scan import Scan
    from cdiff.runtime.variants import Variant

NOTICE = "Research use only. Not a medical device."
DOUBTFUL = 0.5
"""Below this expected Dice a scan's mask is reported as doubtful: half of it, or of what it should cover, may well be wrong."""


def volumes(stack: Stack, grid: Grid) -> dict[str, Any]:
    """Volumes within the slices that were computed, in voxels, and in ml where the header has a spacing along three axes.

    levels: for each level, where its map is at least one half. annotators: the same for each annotator's map, for a model that draws
    them. mask: where the soft map is at least one half. expected: the sum of the soft map, which is the mean over the maps of the
    expected volume. A 2-D image has areas in mm2 instead of ml. unreliable: present when the header's spacing is the placeholder 1
    along every axis, so that only voxels can be trusted.
    """
    unit, size = _voxel(grid)
    soft = Lazily(stack.inside, "soft")

    def measure(voxels: float) -> dict[str, float]:
        return {"voxels": round(voxels, 2), **({unit: round(voxels * size, 6)} if size is not None else {})}

    def each(name: str, attribute: str) -> list[dict[str, Any]]:
        maps = Lazily(stack.inside, attribute)
        inside = sum((np.count_nonzero(one >= 0.5, axis=(1, 2)) for one in maps), np.zeros(maps.shape[1], np.int64))
        return [{name: k, **measure(float(count))} for k, count in enumerate(inside, start=1)]

    marked, expected = np.sum([(np.count_nonzero(one >= 0.5), one.sum(dtype=np.float64)) for one in soft], axis=0)
    return {
        "levels": each("level", "levels"),
        **({"annotators": each("annotator", "maps")} if stack.variant.told == "annotator" else {}),
        "mask": measure(float(marked)),
        "expected": measure(float(expected)),
        **({"unreliable": f"{unit}: the header's spacing may be a placeholder"} if grid.is_placeholder else {}),
    }


def expectation(stack: Stack, chosen: range) -> dict[str, Any]:
    """The Dice of the mask with an annotator's that the soft map itself predicts (`runtime.expected`); None where the mask is empty.

    mask: for all computed slices together, as one mask. slices: for each slice, with its number.
    """
    counts = np.stack([expected_counts(one, one >= 0.5) for one in Lazily(stack.inside, "soft")])

    def number(value: Any) -> float | None:
        return None if np.isnan(value) else round(float(value), 4)

    return {
        "mask": number(expected_dice(counts.sum(axis=0))),
        "slices": [
            {"slice": index, "mask": number(value)} for index, value in zip(chosen, expected_dice(counts), strict=True)
        ],
    }


def about_expected(expected: dict[str, Any], variant: Variant) -> list[str]:
    """A note where the mask's `expectation` is below DOUBTFUL; none otherwise, or where the mask is empty."""
    value = expected["mask"]
    if value is None or value >= DOUBTFUL:
        return []
    return [
        f"from its own soft map the model expects a Dice of only {value:.2f} between this mask and {variant.whose} mask: check the mask before you use it"
    ]


def meaning(variant: Variant) -> dict[str, str]:
    """What each map is, in a few words."""
    return {
        "soft": variant.soft,
        "levels": variant.levels,
        "uncertainty": variant.uncertainty,
        "mask": "soft map at least one half",
        "expected_dice": f"of the mask with {variant.whose} mask, by the soft map itself",
        "network": f"draws {variant.drawn}",
    }


def _voxel(grid: Grid) -> tuple[str, float | None]:
    return ("mm2", grid.voxel_mm) if grid.voxel_mm is not None and len(grid.spatial) == 2 else ("ml", grid.voxel_ml)


def describe_input(scan: Scan) -> dict[str, Any]:
    """The input as it was read: its path, hash, shape and spacing, and how it was cut into slices."""
    grid, spacing, header = scan.grid, scan.grid.spacing, scan.grid.header
    return {
        "path": scan.source,
        "sha256": scan.sha256,
        **({"reader": scan.reader} if scan.reader else {}),
        "shape": list(grid.shape),
        "channels": scan.slices.shape[1],
        "slice_axis": grid.slice_axis,
        "slice_axis_note": (
            "a 2-D image is one slice"
            if grid.slice_axis is None
            else f"cut along axis {grid.slice_axis} of the array as stored; in-plane axes as stored"
        ),
        "spacing_mm": None if spacing is None else [round(value, 6) for value in spacing],
        "sform_code": None if header is None else int(header["sform_code"]),
        "qform_code": None if header is None else int(header["qform_code"]),
        "maps_affine": "identity: the input has none" if header is None else "the input's",
    }


def versions() -> dict[str, str]:
    """The versions of everything besides the engine that the numbers depend on."""
    return {
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("numpy", "scipy", "nibabel")},
        "platform": platform.platform(),
    }


def build_report(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The report: the package's version and the time first, then `parts` in their order, then versions and notice."""
    return {
        "cdiff": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **parts,
        "versions": versions(),
        "notice": NOTICE,
    }
