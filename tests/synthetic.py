"""Small multi-annotator datasets with a known truth, to test every path without patients' data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

AFFINE = np.diag([0.7, 0.8, 2.5, 1.0])


def write_synthetic_dataset(
    root: Path,
    cases: int | Mapping[str, int],
    raters: int,
    shape: tuple[int, ...],
    *,
    channels: int = 1,
    seed: int = 0,
) -> Path:
    """Write case folders in the layout that ``cdiff`` reads, and return ``root``.

    A case is one bright ellipse on noise. Rater k draws it a little larger than rater k-1 does, so the
    consensus maps are nested and differ, and the last rater leaves the last slice of a volume empty.

    Args:
        root: folder to create.
        cases: how many cases; a mapping gives a number for each split folder, e.g. ``{"Training": 4}``.
        raters: masks a case, ``task01_seg01.nii.gz`` and so on.
        shape: (H, W) for 2-D images, (H, W, S) for volumes.
        channels: more than one puts the channels on the image's last axis.
        seed: the same seed writes the same voxels.
    """
    rng = np.random.default_rng(seed)
    splits = cases if isinstance(cases, Mapping) else {"": cases}
    for split, number in splits.items():
        for index in range(number):
            _write_case(root / split / f"case{index + 1:02d}", raters, shape, channels, rng)
    return root


def _write_case(folder: Path, raters: int, shape: tuple[int, ...], channels: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    rows, columns = np.indices(shape[:2])
    size = np.array(shape[:2], dtype=float)
    centre = size * rng.uniform(0.4, 0.6, 2)
    radius = size * rng.uniform(0.12, 0.18, 2)
    distance = np.hypot((rows - centre[0]) / radius[0], (columns - centre[1]) / radius[1])
    depth = shape[2] if len(shape) == 3 else 1
    distances = np.stack([distance * (1 + 0.05 * z) for z in range(depth)], axis=-1)

    bright = 160.0 * (distances < 1.25)
    noise = rng.normal(50.0, 8.0, (*distances.shape, channels))
    image = np.clip(bright[..., None] + noise, 0, 255).astype(np.uint8)
    image = image[:, :, 0] if len(shape) == 2 else image
    _save(folder / "image.nii.gz", image if channels > 1 else image[..., 0])

    for rater in range(raters):
        mask = distances < 1.0 + 0.5 * rater / max(raters - 1, 1)
        if depth > 1 and rater == raters - 1:
            mask[..., -1] = False
        _save(folder / f"task01_seg{rater + 1:02d}.nii.gz", mask.reshape(shape).astype(np.uint8))


def _save(path: Path, voxels: NDArray[np.uint8]) -> None:
    import nibabel as nib  # only here: the tests that need a GPU run on machines that have no nibabel

    image = nib.Nifti1Image(voxels, AFFINE)
    image.set_qform(AFFINE, code=1)
    image.set_sform(AFFINE, code=1)
    nib.save(image, path)
