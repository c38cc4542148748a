"""The shipped model on whole CT scans that it has nothing to do with: `python -m cdiff.benchmarks.whole_scans FOLDER`.

FOLDER is `data` of PyRadiomics' source distribution (pyradiomics-3.0.1.tar.gz on the Python package index), whose lung1 and lung2 are
chest CTs with one lung tumour labelled in each. The place that is named (`--at`) is the middle of the label in its middle slice, and the
slices are the label's; each scan is segmented as it is, and with `--shrink 2` and 3.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cdiff
from cdiff.benchmarks.script import parser_of, script
from cdiff.runtime.data.masks import inside, read_mask
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scoring.metrics import dice
from cdiff.runtime.segmenter import Segmenter

SCANS = ("lung1", "lung2")
FACTORS = (1, 2, 3)
Row = dict[str, Any]


def measure(model: Segmenter, image: Path, label: Path) -> Row:
    """The numbers of one scan and, for each of FACTORS and each slice of the label, the Dice of every level and of the mask with the label.

    Raises CdiffError when a file cannot be read, or the label is empty or of another shape.
    """
    scan, drawn = read_scan(image), inside(read_mask(label).values)
    if drawn.shape != scan.grid.spatial or not drawn.any():
        raise CdiffError(f"{label} marks nothing, or has another shape than {image}")
    place, numbers = place_in(drawn)
    found = []
    for factor in FACTORS:
        result = model.segment(scan, at=place, shrink=factor, slices=(numbers[0], numbers[-1] + 1), fast=True, seed=0)
        rows = [_row(drawn[..., k], result.soft[..., k], result.levels[..., k, :], k) for k in numbers]
        found.append({"shrink": factor, "slices": rows, "warnings": result.report["warnings"]})
    return {
        "scan": image.name,
        "sha256": {"image": scan.sha256, "label": read_scan(label).sha256},
        "shape": list(scan.grid.spatial),
        "spacing_mm": [round(mm, 4) for mm in scan.grid.spacing or ()],
        "at": list(place),
        "extent": [int(n) for n in np.max([_extent(drawn[..., k]) for k in numbers], axis=0)],
        "found": found,
    }


def place_in(drawn: NDArray[np.bool_]) -> tuple[tuple[int, int, int], list[int]]:
    """The middle voxel of a label [i, j, k] in its middle slice, and the numbers of all of its slices."""
    numbers = [int(k) for k in np.flatnonzero(drawn.any(axis=(0, 1)))]
    middle = numbers[len(numbers) // 2]
    i, j = np.rint(np.argwhere(drawn[..., middle]).mean(axis=0)).astype(int)
    return (int(i), int(j), middle), numbers


def _extent(drawn: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pixels from one end of a label [i, j] to the other, along each axis [2]."""
    return np.asarray(np.ptp(np.argwhere(drawn), axis=0) + 1)


def _row(drawn: NDArray[np.bool_], soft: Any, levels: Any, k: int) -> Row:
    return {
        "slice": k,
        "pixels": int(drawn.sum()),
        "mask_pixels": int((soft >= 0.5).sum()),
        "dice_mask": float(dice(soft >= 0.5, drawn)),
        "dice_levels": [float(dice(levels[..., c] >= 0.5, drawn)) for c in range(levels.shape[-1])],
    }


@script
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = parser_of("whole_scans", __doc__)
    parser.add_argument("folder", type=Path, help="data of PyRadiomics' source distribution")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write the numbers")
    options = parser.parse_args(argv)
    model = cdiff.load()
    found = [
        measure(model, options.folder / f"{name}_image.nrrd", options.folder / f"{name}_label.nrrd") for name in SCANS
    ]
    for scan in found:
        print(f"{scan['scan']}, {' x '.join(map(str, scan['shape']))}, at {scan['at']}")
        for part in scan["found"]:
            print(f"  shrunk by {part['shrink']}")
            for row in part["slices"]:
                levels = " ".join(f"{value:.3f}" for value in row["dice_levels"])
                print(f"    {row['slice']:3}: {row['pixels']:5} pixels, mask {row['dice_mask']:.3f}, levels {levels}")
    if options.json:
        write_json(options.json, {"model": model.manifest.name, "scans": found})


if __name__ == "__main__":
    sys.exit(main())
