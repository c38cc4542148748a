"""One annotator's mask: from a volume or a picture to what is inside, on the image's grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.case import HEADER, Case
from cdiff.runtime.data.dicom_mask import Opened, read_dicom_mask
from cdiff.runtime.data.placing import place
from cdiff.runtime.data.structures import SIGN, parted
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.dicom import is_dicom
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.nifti import nifti_voxels
from cdiff.runtime.scans.picture import opened
from cdiff.runtime.scans.sources import PICTURE_SUFFIXES, read_bytes
from cdiff.runtime.scans.volume import parse_volume
from cdiff.runtime.words import by


@dataclass(frozen=True)
class Mask:
    """A mask's values as stored, [H, W] or three axes, and its header where the file has one.

    by_header: it is laid on an image by its header, whatever the case says; true of DICOM, whose frames may lie anywhere.
    notes: what its user should know, such as "has a contour outside its image".
    """

    values: NDArray[Any]
    header: nib.Nifti1Header | None = None
    by_header: bool = False
    notes: tuple[str, ...] = ()

    def is_laid(self, case: Case) -> bool:
        """Whether it is laid on the case's image by its header, and not voxel by voxel."""
        return self.by_header or case.masks_by == HEADER


def read_mask(path: Path, grid: Grid | None = None, opened: Opened | None = None) -> Mask:
    """Read a mask's file: NIfTI, NRRD, MetaImage, a DICOM segmentation or structure set, PNG, TIFF or JPEG; or FILE#NAME, one structure of
    a DICOM file. A picture with a palette gives the palette's numbers, which are labels.

    grid: of its image; contours are laid on it, since they have none of their own. opened: give the same one for all masks of a case, so
    that a file of several is read once. Raises CdiffError for a file that cannot be read, that holds NaN, or whose colours do not say what
    was drawn; where it is not clear which structure is meant; and for contours that do not lie in the image's slices.
    """
    file, name = parted(path)
    if is_dicom(file):
        values, header, notes = read_dicom_mask(path, grid, {} if opened is None else opened)
        return Mask(values, header, by_header=True, notes=notes)
    if name:
        raise CdiffError(
            f"{path} does not exist, and {file.name} is not DICOM, so its structures have no names; leave {SIGN}{name} out"
        )
    data = read_bytes(path)
    if path.name.lower().endswith(PICTURE_SUFFIXES):
        mask = Mask(_pixels(data, path))
    else:
        image = parse_volume(data, path, channels=1)
        mask = Mask(nifti_voxels(image, str(path)), image.header)
    if not np.isfinite(mask.values).all():
        raise CdiffError(f"{path} holds NaN or infinite values; a mask has numbers only: repair or remove it")
    return mask


def _pixels(data: bytes, path: Path) -> NDArray[Any]:
    """The largest of each pixel's colours; transparency does not count."""
    with opened(data, path) as (picture, _):
        if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):  # whose numbers are not 0 in black and largest in white
            picture = picture.convert("RGB")
        stored, mode = np.asarray(picture), picture.mode
    if stored.ndim == 2:
        return stored.astype(np.uint8) if stored.dtype == np.bool_ else stored  # one bit is a label too
    values = np.asarray((stored[..., :-1] if mode in ("LA", "RGBA", "PA") else stored).max(axis=-1))
    if values.min() == values.max() and (stored != stored[0, 0]).any():
        raise CdiffError(
            f"{path} is read by the largest of each pixel's colour values, which is {values.flat[0]} everywhere: what was drawn is in the "
            "transparency, or in a colour on another as bright; save it in white on black"
        )
    return values


def inside(values: NDArray[Any], labels: tuple[int, ...] = ()) -> NDArray[np.bool_]:
    """Where a mask is inside: at values among `labels`, or, without labels, above half of the largest value.

    So 0 and 1, 0 and 255, and fractions are all read as meant; a file of zeros is an annotator who saw nothing. One structure of a file
    is bool, and has no labels.
    """
    if values.dtype == np.bool_:
        return values
    if labels:
        return np.isin(np.rint(values), labels)
    return np.asarray(values > 0.5 * max(float(values.max(initial=0)), 1e-6))


def mask_slices(mask: Mask, grid: Grid, case: Case, path: Path) -> NDArray[np.bool_]:
    """A mask on its image's grid as slices, bool [S, H, W]: voxel by voxel or, by the case's `masks_by`, where its header puts it.

    Raises CdiffError where voxel by voxel the shapes differ (axes of length one after the second do not count), and where a header
    does not say where the mask lies, or puts all of it outside the image.
    """
    marked = inside(mask.values, case.labels)
    if mask.is_laid(case):
        own = own_grid(mask, path)
        if mask.by_header:
            _must_be_of(own, grid, path, case.image)
        try:
            laid = place(marked.reshape(own.spatial), own, grid)
        except CdiffError as error:
            raise CdiffError(f"{path} cannot be laid on its image {case.image}: {error}") from None
        return grid.cut(laid[..., None])[:, 0]
    shape, wanted = marked.shape, grid.spatial
    if counted(shape) != counted(wanted):
        placed = mask.header is not None and grid.has_orientation and own_grid(mask, path).has_orientation
        hint = ", or be laid by their headers (--masks-by header)" if placed else ""
        if len(wanted) == 3 and counted(shape) == counted(wanted[:2]):
            hint = f"; if the image's last axis holds channels, it takes a model trained with --set image_channels={wanted[2]}"
        elif grid.header is not None and counted(shape) == counted(grid.header.get_data_shape()):
            hint = "; the image's last axis is read as channels, which its other masks lack: store all masks alike"
        elif shape[2:] in ((3,), (4,)) and shape[:2] == counted(wanted) and not placed:
            hint = "; if its last axis holds a picture's colours, save one of them alone"
        elif counted(shape) == counted(wanted)[::-1] and not placed:
            hint = (
                "; its axes are the image's in the opposite order: another program turned one of them, store both alike"
            )
        elif len(wanted) == 3 and counted(shape) == wanted[1:]:
            hint = "; channels, or a single slice's axis, are read from the end: move the image's first axis there"
        raise CdiffError(
            f"{path} has shape {by(shape)} but its image {case.image} {by(wanted)}; they must be on one grid{hint}"
        )
    return grid.cut(marked.reshape(wanted)[..., None])[:, 0]


def _must_be_of(own: Grid, grid: Grid, path: Path, image: Path) -> None:
    """Raise CdiffError where a DICOM segmentation's voxels are not as large as those of its image, whose frames it repeats.

    The spacing of its slices may be a guess: a file need not give it, nor hold all slices.
    """
    if grid.header is None:
        return
    # Where both have a single slice, the spacing of slices means nothing.
    alone = 1 in own.spatial and 1 in (*grid.spatial, 1)[:3]
    here, there = (_edges(each, but_of_one=alone) for each in (own, grid))
    if not np.allclose(here, there, rtol=0.01):
        raise CdiffError(
            f"{path} has voxels of {_mm(here)} mm and its image {image} of {_mm(there)} mm; convert it to NIfTI, and use that with --masks-by header"
        )


def _edges(grid: Grid, *, but_of_one: bool) -> list[float]:
    """A voxel's edges in mm, the shortest first; but_of_one: without those along axes of length one."""
    lengths = np.linalg.norm(grid.affine[:3, :3], axis=0)
    return sorted(
        float(edge) for edge, n in zip(lengths, (*grid.spatial, 1)[:3], strict=True) if n > 1 or not but_of_one
    )


def _mm(lengths: list[float]) -> str:
    return " x ".join(f"{length:.3g}" for length in lengths)


def own_grid(mask: Mask, path: Path) -> Grid:
    """The grid of a mask's own file. Raises CdiffError for a picture, which does not say where it lies."""
    if mask.header is None:
        raise CdiffError(
            f"{path} is a picture, and a picture's file does not say where it lies; leave out --masks-by header"
        )
    return Grid(mask.values.shape, None if mask.values.ndim == 2 else 2, mask.header)


def counted(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without axes of length one after its second."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
