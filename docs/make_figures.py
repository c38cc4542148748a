"""Draws docs/images/result.png, the picture at the top of README.md: the demo scan, its four readers, and the maps.

Run as `python docs/make_figures.py`. The maps are the shipped model's, with all runs and steps and seed 0; the readers'
masks are only drawn. The slice is the one on which the readers disagree most: the largest area that some of them and
not all marked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import cdiff
from cdiff.runtime.data.cases import Case, read_case
from cdiff.runtime.pictures.preview import reader_figure

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "cdiff" / "demo"
NOTE = "CT: LIDC-IDRI, CC BY 3.0, doi:10.7937/K9/TCIA.2015.LO9QL9SX"


def most_disputed(masks: NDArray[np.bool_]) -> int:
    """The slice of masks [S, n, H, W] with most pixels that some readers, not all, marked."""
    votes = masks.sum(axis=1)
    return int(((votes > 0) & (votes < masks.shape[1])).sum(axis=(1, 2)).argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another bundle than the shipped one")
    parser.add_argument("--fast", action="store_true", help="few steps and runs, for a look")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "result.png")
    options = parser.parse_args()

    masks = tuple(sorted(DEMO.glob("task01_seg*.nii.gz")))
    image, readers = read_case(Case("demo", DEMO / "image.nii.gz", masks))
    index = most_disputed(readers)
    result = cdiff.load(options.model).segment(DEMO / "image.nii.gz", fast=options.fast, slices=(index, index + 1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    reader_figure(
        options.out,
        image[index, 0],
        readers[index],
        result.stack.soft[0],
        result.uncertainty[..., index, 0],
        view=result.grid.view,
        note=NOTE,
    )
    print(options.out)


if __name__ == "__main__":
    main()
