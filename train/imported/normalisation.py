"""How an imported network's images were normalised, which neither code stores with its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.intensity import Intensity
from cdiff.runtime.scans.nifti import nifti_shape, parse_nifti
from cdiff.runtime.scans.sources import read_bytes
from cdiff.train.imported.options import IMPLICIT


def intensity_of(source: str, mean: tuple[float, ...], std: tuple[float, ...], images: Path | None) -> Intensity:
    """The normalisation of a checkpoint from `source`.

    The implicit-ensemble code feeds the stored values. The consensus code subtracts the mean and divides by the standard deviation
    of its training images, per channel: `mean` and `std` as given, or computed from the training cases in `images`; without
    either, each slice's own stand in. Raises CdiffError for numbers that do not fit together or a folder without images.
    """
    if mean or std:
        if images is not None:
            raise CdiffError("--images and --mean/--std say the same thing twice; give one of them")
        return Intensity("slice", method="standard", mean=mean, std=std)
    if images is not None:
        return Intensity("slice", method="standard", **training_statistics(images))  # type: ignore[arg-type]
    if source == IMPLICIT:
        return Intensity("slice", method="standard", mean=(0.0,), std=(1.0,))
    return Intensity("slice", method="standard")


def training_statistics(images: Path) -> dict[str, tuple[float, ...]]:
    """{"mean", "std"}, one number per channel, as the consensus code computes them: each image's own, then the mean over images.

    images: the folder of training cases, each with image.nii.gz [H, W], [H, W, 1] or [H, W, channels]. Every case counts, even one that
    training leaves out for a missing rater. Raises CdiffError when there is none, one cannot be read or holds no image, they differ in
    channels, or a channel is the same everywhere.
    """
    paths = sorted(images.glob("*/image.nii.gz"))
    if not paths:
        raise CdiffError(f"{images} has no */image.nii.gz; give the folder of the training cases (train or Training)")
    means, stds = [], []
    for path in paths:
        values = _values(path)
        means.append(values.mean(axis=(0, 1)))
        stds.append(values.std(axis=(0, 1)))
    if len(channels := sorted({len(mean) for mean in means})) > 1:
        raise CdiffError(
            f"the images in {images} differ in channels: their last axis, read as the channels of a slice as in the published code, has "
            f"{' or '.join(map(str, channels))}; keep one kind there, or for volumes give --mean and --std"
        )
    mean, std = np.mean(means, axis=0).tolist(), np.mean(stds, axis=0).tolist()
    if min(std) <= 0:
        raise CdiffError(
            f"channel {std.index(min(std)) + 1} of the images in {images} is the same everywhere, so that it has no standard deviation; give "
            "--mean and --std"
        )
    return {"mean": tuple(mean), "std": tuple(std)}


def _values(path: Path) -> NDArray[np.float64]:
    """An image as [H, W, channels]. Raises CdiffError when it cannot be read, or does not hold finite real numbers."""
    data = read_bytes(path)
    shape = nifti_shape(data, path)
    image = parse_nifti(data, path, channels=shape[-1] if len(shape) > 3 else 1)  # of three axes any may be the last
    values = np.asarray(image.get_fdata())
    if not np.isfinite(values).all():
        raise CdiffError(f"{path} holds NaN or infinite values; replace them first, or give --mean and --std")
    return values.reshape(*values.shape[:2], -1)
