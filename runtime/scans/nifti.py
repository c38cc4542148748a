"""From NIfTI bytes to a header that can be trusted and voxels, or to one line that says what is wrong."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.shapes import check_kind, check_size, spatial_axes
from cdiff.runtime.scans.stored import must_not_hold_more
from cdiff.runtime.words import one_line

GZIP = b"\x1f\x8b"
EXTENDER = 4
"""Bytes after a header, which say whether extensions follow."""
LINE_ENDS = (13, 10, 26, 10)
"""Bytes in a NIfTI-2 header by which a change of line ends shows."""
XFORM_CODES = range(6)
"""The values of qform_code and sform_code (nifti1.h; 5, another template, from NIfTI-2)."""
TOGETHER = 16
"""Slices of a file that are made float32 at a time: all at once would be in memory twice."""
SHORTEST, LONGEST = 1e-12, 1e12
"""Limits of a voxel's edges in a header's unit, be it microns or metres: beyond them squares and inverses exceed a double, and volumes become
0 or NaN."""
MOST_BEFORE_VOXELS = 2**30
"""Most bytes of header and extensions in a file that is not damaged."""


def parse_nifti(data: bytes, path: Path, channels: int) -> nib.Nifti1Image:
    """The NIfTI image in `data`, its header checked before nibabel can mend it in silence (it makes a zero spacing 1).

    Raises CdiffError for a file that is no NIfTI or is damaged, and as `check_header` does for `channels`.
    """
    packed = data.startswith(GZIP)
    with _unpacked(data, path) as file:
        start, kind, header = _begin(file, path)
        check_header(header, str(path), channels)
        size = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        end = int(header["vox_offset"]) + size
        # Deflate packs at most about 1032 to 1: a header that promises more than that lies, and is not given memory. Nor is one
        # with more before its voxels than extensions ever take.
        if end > (1032 if packed else 1) * len(data) or end - size > MOST_BEFORE_VOXELS:
            raise CdiffError(
                f"{path} holds less than its header promises ({size} bytes of voxels); it is truncated or damaged: copy it again"
            )
        raw = start + file.read(max(0, end - len(start)))
        beyond = len(raw) - end
        while more := len(file.read(2**20)):  # read to the end so that gzip checks its sum; nothing is kept
            beyond += more
        must_not_hold_more(size + beyond, size, header.get_data_shape(), path)
        return kind.from_bytes(raw)


def nifti_shape(data: bytes, path: Path) -> tuple[int, ...]:
    """The shape that the header of the NIfTI file in `data` gives. Raises CdiffError when there is no such header."""
    with _unpacked(data, path) as file:
        return tuple(_begin(file, path)[2].get_data_shape())


@contextmanager
def _unpacked(data: bytes, path: Path) -> Iterator[Any]:
    """An open file with the bytes of `data`, unpacked as they are read. Raises CdiffError for what goes wrong in the block."""
    try:
        with gzip.open(io.BytesIO(data)) if data.startswith(GZIP) else io.BytesIO(data) as file:
            yield file
    except (EOFError, OSError, zlib.error) as error:
        raise CdiffError(f"{path} is truncated or damaged ({one_line(error)}); copy it again") from None
    except (ImageFileError, HeaderDataError, ValueError, OverflowError) as error:
        raise CdiffError(f"{path} is not a valid NIfTI file ({one_line(error)}); convert it again") from None
    except MemoryError:
        raise CdiffError(f"{path} needs more memory than there is; crop the scan first") from None


def _begin(file: Any, path: Path) -> tuple[bytes, type[nib.Nifti1Image], nib.Nifti1Header]:
    """A file's first bytes, nibabel's image class for it, and its header as stored. To be called in an `_unpacked` block."""
    start = file.read(540)
    kind = {b"n+1": nib.Nifti1Image, b"n+2": nib.Nifti2Image}.get(
        start[344:347] if start[344:347] == b"n+1" else start[4:7]
    )
    if kind is None:
        raise CdiffError(f"{path} is not a NIfTI file (no NIfTI mark in its header); convert it, e.g. with dcm2niix")
    size = kind.header_class.template_dtype.itemsize
    if len(start) < size:
        raise EOFError("it ends within its header")
    header = kind.header_class(start[:size], check=False)
    # nibabel would mend most of these, but what else such a header says cannot be relied on. At 0 it would take the header for voxels;
    # programs differ in whether they then begin right behind the header or four bytes later.
    sound = {
        "sizeof_hdr": header["sizeof_hdr"] == size,
        "magic": header["magic"].item() in (b"n+1", b"n+2"),
        "vox_offset": header["vox_offset"] >= size + EXTENDER,
    }
    if kind is nib.Nifti2Image:
        sound["eol_check"] = tuple(header["eol_check"]) in (LINE_ENDS, (0, 0, 0, 0))
    for field in (field for field, fits in sound.items() if not fits):
        raise CdiffError(f"{path} has {header[field]} as {field} in its header; it is damaged: copy it again")
    return start, kind, header


def check_header(header: nib.Nifti1Header, where: str, channels: int) -> None:
    """Raise CdiffError where a header's shape, data type, spacing or affine, as it stands in the file, cannot be a scan's."""
    shape = header.get_data_shape()
    check_size(shape, where)
    try:
        check_kind(header.get_data_dtype(), where)
    except (KeyError, HeaderDataError):
        raise CdiffError(
            f"{where} has data type {int(header['datatype'])}, which NIfTI does not know; convert it again"
        ) from None
    axes = len(spatial_axes(shape, channels, where))
    zooms = [float(zoom) for zoom in header["pixdim"][1 : 1 + axes]]
    if not all(zoom > 0 for zoom in zooms):  # NaN is refused too
        raise CdiffError(
            f"{where} has the spacing {_listed(zooms)} in its header; every one must be above zero: correct the header"
        )
    if min(zooms) < SHORTEST or max(zooms) > LONGEST:
        raise CdiffError(
            f"{where} has the spacing {_listed(zooms)} in its header, which no scan has; correct the header"
        )
    for form, code in (("sform", int(header["sform_code"])), ("qform", int(header["qform_code"]))):
        if code not in XFORM_CODES:
            raise CdiffError(f"{where} has the {form}_code {code}, which NIfTI does not know; correct the header")
        if not code:
            continue
        if not _spans(header, form, axes):
            raise CdiffError(
                f"{where} has a singular or non-finite {form} (its axes do not span space); correct the header"
            )


def _listed(zooms: list[float]) -> str:
    return " x ".join(f"{zoom:g}" for zoom in zooms)


def _spans(header: nib.Nifti1Header, form: str, axes: int) -> bool:
    """Whether the first `axes` columns of the affine are finite, as long as a voxel can be, and independent."""
    if header["pixdim"][0] == 0:  # nibabel's get_qform refuses it; for NIfTI it means 1, as which it is read later
        header = header.copy()
        header["pixdim"][0] = 1
    try:
        matrix = header.get_sform() if form == "sform" else header.get_qform()
    except (HeaderDataError, ValueError):  # a quaternion longer than 1
        return False
    columns = matrix[:3, :axes]
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(columns, axis=0)
    if not np.isfinite(matrix).all() or not ((lengths >= SHORTEST) & (lengths <= LONGEST)).all():
        return False
    return bool(np.linalg.matrix_rank(columns / lengths, 1e-5) == axes)


def nifti_voxels(image: nib.Nifti1Pair, where: str) -> NDArray[np.float32]:
    """The image's values, scaled as its header says. A volume's slices along the last axis lie one after another in memory, ready to be cut.
    Raises CdiffError when the file ends early."""
    try:
        with np.errstate(all="ignore"):  # infinite values are refused by whoever makes slices of them
            stored = image.dataobj
            if (
                len(image.shape) != 3
                or not isinstance(stored, ArrayProxy)
                or not isinstance(stored.file_like, io.BytesIO)
            ):
                return np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
            voxels = np.moveaxis(np.empty((image.shape[2], *image.shape[:2]), np.float32), 0, 2)
            for start in range(0, image.shape[2], TOGETHER):
                part = voxels[..., start : start + TOGETHER]
                offset = stored.offset + start * math.prod(image.shape[:2]) * stored.dtype.itemsize
                few = (part.shape, stored.dtype, offset, stored.slope, stored.inter)
                part[...] = np.asarray(ArrayProxy(stored.file_like, few), dtype=np.float32)
            return voxels
    except (EOFError, OSError, OverflowError, ValueError, zlib.error) as error:
        raise CdiffError(f"{where} is truncated or damaged ({one_line(error)}); copy it again") from None
    except MemoryError:
        raise CdiffError(f"{where} needs more memory than there is; crop the scan first") from None
