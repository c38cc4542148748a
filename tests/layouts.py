"""Synthetic data in every layout that is read, with the oddities that the real ones have."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

BRATS = ("t1", "t1ce", "t2", "flair")


def disc(shape: tuple[int, ...], grow: float = 0.0, seed: int = 0) -> NDArray[np.bool_]:
    """A disc in the middle of a slice, moved a little by `seed`, larger by `grow` of its radius."""
    rng = np.random.default_rng(seed)
    size = np.array(shape[:2], dtype=float)
    centre, radius = size * rng.uniform(0.42, 0.58, 2), size.min() * 0.2 * (1 + grow)
    rows, columns = np.indices(shape[:2])
    inside = np.hypot(rows - centre[0], columns - centre[1]) < radius
    return inside.reshape(*shape[:2], *([1] * (len(shape) - 2))) & np.ones(shape, bool)


def noisy(inside: NDArray[np.bool_], channels: int = 0, seed: int = 0) -> NDArray[np.float32]:
    """Noise with the structure bright in it, the more so the later the channel; channels on a last axis when there are any."""
    rng = np.random.default_rng(seed)
    shape = (*inside.shape, channels) if channels else inside.shape
    gain = 60.0 + 20.0 * np.arange(channels) if channels else np.float64(100.0)
    bright = inside[..., None] * gain if channels else inside * gain
    return np.asarray(bright + rng.normal(50, 8, shape), dtype=np.float32)


def save(path: Path, voxels: NDArray[np.generic], spacing: Sequence[float] | None = (0.5, 0.6, 3.0)) -> Path:
    """Write a NIfTI; spacing None: the fake 1 x 1 x 1 of a header that lost its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = voxels.astype(np.uint8) if voxels.dtype == bool else voxels
    image = nib.Nifti1Image(stored, np.diag([*(spacing or (1, 1, 1)), 1.0]))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def write_qubiq(
    root: Path,
    splits: dict[str, int],
    *,
    raters: int = 3,
    tasks: int = 1,
    shapes: Sequence[tuple[int, ...]] = ((32, 32, 1),),
    channels: int = 0,
    spacing: Sequence[float] | None = None,
) -> Path:
    """Cases as QUBIQ has them, numbered through the splits; sizes in turn; rater k's disc larger than rater k - 1's."""
    number = 0
    for split, count in splits.items():
        for _ in range(count):
            number += 1
            folder, shape = root / split / f"case{number:02d}", shapes[number % len(shapes)]
            save(folder / "image.nii.gz", noisy(disc(shape, 0.2, number), channels, number), spacing)
            for task in range(1, tasks + 1):
                for rater in range(1, raters + 1):
                    mask = disc(shape, 0.2 * rater - 0.3 * (task - 1), number)
                    save(folder / f"task{task:02d}_seg{rater:02d}.nii.gz", mask, spacing)
    return root


def write_brats(root: Path, slices: int = 3, size: int = 32, patients: int = 1, labelled: bool = True) -> Path:
    """Slices as the implicit-ensemble code lays them out: a folder each, four modalities and a label map 0, 2, 4."""
    for number in range(slices):
        patient = number % patients + 1
        inside, core = disc((size, size), 0.3, number), disc((size, size), -0.4, number)
        folder = root / f"{number + 1:06d}"
        for place, name in enumerate(BRATS):
            image = noisy(inside, 0, 10 * number + place) / 200
            save(folder / f"brats_train_{patient:03d}_{name}_{80 + number:03d}_w.nii.gz", image, None)
        if labelled:
            labels = np.where(core, 4.0, np.where(inside, 2.0, 0.0))
            save(folder / f"brats_train_{patient:03d}_seg_{80 + number:03d}_w.nii.gz", labels, None)
    return root


def write_table(
    root: Path, cases: int = 4, *, raters: int = 2, modalities: Sequence[str] = (), deep: bool = True, size: int = 32
) -> Path:
    """PNGs and a CSV that names them: 16-bit images when `deep`, masks of 0 and 255. Returns the CSV."""
    (root / "files").mkdir(parents=True)
    rows = []
    for number in range(cases):
        inside = disc((size, size + 4), 0.2, number)
        row: dict[str, str] = {"case": f"p{number}", "split": "val" if number == cases - 1 else "train"}
        for place, name in enumerate(modalities or ("",)):
            column = f"image_{name}" if name else "image"
            values = noisy(inside, 0, 10 * number + place).clip(0, 255)
            pixels = (values * 250).astype(np.uint16) if deep else values.astype(np.uint8)
            row[column] = f"files/p{number}{name}.png"
            Image.fromarray(pixels).save(root / row[column])
        for rater in range(1, raters + 1):
            row[f"mask{rater}"] = f"files/p{number}_m{rater}.png"
            mask = disc((size, size + 4), 0.2 * rater, number)
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / row[f"mask{rater}"])
        rows.append(row)
    table = root / "cases.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table
