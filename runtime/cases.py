"""Case folders on disk: one image and several annotators' masks each, with or without the split folders above them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError

SPLITS = {
    "training": "train", "train": "train",
    "validation": "val", "val": "val",
    "testing": "test", "test": "test",
}  # fmt: skip
IMAGE_NAMES = ("image.nii.gz", "image.nii")
MASK_NAME = re.compile(r"(task\d+)_seg(\d+)\.nii(\.gz)?$")


@dataclass(frozen=True)
class Case:
    """One scan and the masks that its annotators drew, in the order of their file names."""

    name: str
    image: Path
    masks: tuple[Path, ...]


def find_cases(root: Path, task: str | None = None) -> dict[str, list[Case]]:
    """The cases below `root` by split: keys "train", "val", "test" for the split folders there are, else "all".

    task: which structure, when the masks' names carry several (`task01`, `task02`); needed only then.
    Raises CdiffError when there is no case, a case has no mask, or several tasks are there and none is named.
    """
    if not root.is_dir():
        raise CdiffError(
            f"{root} is not a folder; give a folder of case folders, each with image.nii.gz and task01_seg01.nii.gz ..."
        )
    splits = {SPLITS[d.name.lower()]: d for d in sorted(root.iterdir()) if d.is_dir() and d.name.lower() in SPLITS}
    found = (
        {split: _cases_in(folder, task) for split, folder in splits.items()}
        if splits
        else {"all": _cases_in(root, task)}
    )
    found = {split: cases for split, cases in found.items() if cases}
    if not found:
        raise CdiffError(
            f"no case in {root}: expected folders with image.nii.gz and task01_seg01.nii.gz, task01_seg02.nii.gz ..."
        )
    return found


def _cases_in(folder: Path, task: str | None) -> list[Case]:
    cases = []
    for case in sorted(d for d in folder.iterdir() if d.is_dir()):
        image = next((case / name for name in IMAGE_NAMES if (case / name).is_file()), None)
        if image is None:
            continue
        by_task: dict[str, list[tuple[int, Path]]] = {}
        for file in sorted(case.iterdir()):
            if match := MASK_NAME.match(file.name):
                by_task.setdefault(match[1], []).append((int(match[2]), file))
        if task is None and len(by_task) > 1:
            raise CdiffError(
                f"{case} has masks of several tasks ({', '.join(sorted(by_task))}); name one with --task or task="
            )
        masks = by_task.get(task, []) if task else next(iter(by_task.values()), [])
        if not masks:
            raise CdiffError(
                f"{case} has an image but no mask {task or 'task01'}_seg01.nii.gz; add its masks or remove the folder"
            )
        cases.append(Case(case.name, image, tuple(path for _, path in sorted(masks))))
    return cases


def read_case(case: Case, slice_axis: int = 2, channels: int = 1) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Image and masks as slices: float32 [S, channels, H, W] (raw intensities) and bool [S, C_case, H, W].

    2-D files make one slice. With channels > 1 the image's last axis holds the channels (as QUBIQ's tumour files do).
    Raises CdiffError for an unreadable file, a wrong number of dimensions, a non-finite image, or a mask of another shape.
    """
    image = _load(case.image).astype(np.float32)
    spatial = image.shape[:-1] if channels > 1 else image.shape
    if channels > 1 and image.shape[-1] != channels:
        raise CdiffError(f"{case.image} has shape {image.shape}; {channels} channels are expected in its last axis")
    if channels == 1 and image.ndim == 4 and image.shape[-1] == 1:
        image, spatial = image[..., 0], image.shape[:-1]
    if not np.isfinite(image).all():
        raise CdiffError(f"{case.image} holds NaN or infinite values; repair the scan or remove the case")
    slices = _as_slices(image, len(spatial), slice_axis, case.image)
    masks = []
    for path in case.masks:
        mask = _load(path)
        if mask.ndim == len(spatial) + 1 and mask.shape[-1] == 1:
            mask = mask[..., 0]
        if mask.shape != spatial:
            raise CdiffError(f"{path} has shape {mask.shape} but its image {spatial}; they must be on one grid")
        # Masks come as 0/1, 0/255 or floats: anything from half of the largest value on is inside.
        masks.append(
            _as_slices(mask > 0.5 * max(float(mask.max(initial=0)), 1e-6), len(spatial), slice_axis, path)[:, 0]
        )
    return slices, np.stack(masks, axis=1)


def _load(path: Path) -> NDArray[Any]:
    try:
        image = nib.load(path)
        return np.asanyarray(image.dataobj)  # type: ignore[attr-defined]
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise CdiffError(f"{path} cannot be read as NIfTI ({' '.join(str(error).split())}); copy it again") from error


def _as_slices(array: NDArray[Any], spatial: int, slice_axis: int, path: Path) -> NDArray[Any]:
    """[H, W(, ch)] or [.., .., ..(, ch)] -> [S, ch, H, W], cut along `slice_axis`."""
    if spatial not in (2, 3):
        raise CdiffError(
            f"{path} has shape {array.shape}: a 2-D or 3-D image is expected; if its last axis holds channels, say so "
            f"(image_channels={array.shape[-1]})"
        )
    if array.ndim == spatial:
        array = array[..., None]
    stacked = array[None] if spatial == 2 else np.moveaxis(array, slice_axis, 0)
    return np.ascontiguousarray(np.moveaxis(stacked, -1, 1))
