"""Reading a scan (NIfTI, NRRD, DICOM, picture, array) into slices [S, channels, H, W], or saying in one line why not."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.case import name_of
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.host import package_version
from cdiff.runtime.scans.dicom import INDEX, holds_dicom, is_dicom, read_dicom
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.nifti import check_header, nifti_voxels
from cdiff.runtime.scans.picture import read_picture
from cdiff.runtime.scans.shapes import check_kind, check_size, spatial_axes
from cdiff.runtime.scans.sources import ITK_SUFFIXES, PICTURE_SUFFIXES, is_there, read_bytes
from cdiff.runtime.scans.volume import parse_volume
from cdiff.runtime.words import several

OneScan = str | os.PathLike[str] | NDArray[Any] | nib.Nifti1Image
ScanInput = OneScan | Sequence[str | os.PathLike[str]]
"""One scan, or the paths of its modalities, one file each."""
MOST = float(np.finfo(np.float32).max) / 2
"""Largest distance between a scan's values for which float32 still has numbers while they are normalised."""


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan that is fit to be segmented.

    slices: float32 [S, channels, H, W], raw intensities, in-plane axes as stored. grid: how to go back.
    source: the path (of each modality), or "array" / "NIfTI image" for something in memory. sha256: of the file's bytes (or the
    array's, with its type and shape), for NRRD and MetaImage followed by the voxels'; for several files, of their hashes joined.
    name: the file's (or the DICOM folder's) without its suffix. warnings: what a user of the result should know, one line each.
    reader: the program that read or converted it, unless that was one of cdiff's own libraries for NIfTI and pictures. dicom: the
    series' files, where it was read from DICOM.
    """

    slices: NDArray[np.float32]
    grid: Grid
    source: str
    sha256: str
    name: str = "scan"
    warnings: tuple[str, ...] = ()
    reader: str = ""
    dicom: tuple[Path, ...] = ()


def is_one_scan(given: object) -> bool:
    """Whether something is a scan (`OneScan`) by its type; the paths of a scan's modalities could as well be several scans, and so could
    an array of paths, such as a table's column."""
    if isinstance(given, np.ndarray):
        return given.dtype.kind not in "OUT"
    return isinstance(given, str | os.PathLike | nib.Nifti1Pair)


def read_scan(scan: ScanInput, *, channels: int = 1, slice_axis: int = 2, series: int | None = None) -> Scan:
    """Read a path (NIfTI, NRRD or MetaImage, 2-D or 3-D, a DICOM file or folder, PNG, TIFF, JPEG), an array ([H, W] or three
    axes), a nibabel image, or several paths.

    channels: how many the model takes. Several lie on the last axis of a NIfTI or array (for a picture they are its colours), or are
    the files of a list, one modality each, all on one grid.
    slice_axis: the array axis (0, 1 or 2, as stored) to cut a volume along. series: the number of the DICOM series that is meant
    in a folder that holds several.
    Raises CdiffError, one line, for everything that cannot be segmented faithfully: unreadable or truncated files, NaN,
    values too far apart for float32, a wrong number of axes or channels, spacing that is not positive, a singular affine, more
    than 2^31 voxels, modalities that do not lie on one grid.
    """
    if isinstance(scan, list | tuple) and scan and all(isinstance(part, str | os.PathLike) for part in scan):
        return _stacked(scan, channels, slice_axis, series)
    return _one(scan, channels, slice_axis, series)  # type: ignore[arg-type]  # a str is no list of paths


def _stacked(paths: Sequence[str | os.PathLike[str]], channels: int, slice_axis: int, series: int | None) -> Scan:
    """One scan of several files, each a channel."""
    if len(paths) == 1:
        return _one(paths[0], channels, slice_axis, series)
    names = ", ".join(map(str, paths))
    if len(paths) != channels:
        raise CdiffError(f"{len(paths)} files ({names}), but the model takes {channels}; give one file per modality")
    parts = [_one(path, 1, slice_axis, series) for path in paths]
    first = parts[0]
    for part in parts[1:]:
        if reason := first.grid.differs_from(part.grid):
            raise CdiffError(f"{first.source} and {part.source} {reason}; resample the modalities to one grid first")
    digest = hashlib.sha256(b"".join(bytes.fromhex(part.sha256) for part in parts))
    warnings = [warning for part in parts for warning in part.warnings]
    if len({part.grid.header is None for part in parts}) > 1:
        warnings.append(
            "the modalities are pictures and NIfTI, which usually store a slice in different orientations: check that they match"
        )
    slices = np.concatenate([part.slices for part in parts], axis=1)
    readers = ", ".join(dict.fromkeys(part.reader for part in parts if part.reader))
    return Scan(
        slices, first.grid, names, digest.hexdigest(), first.name, tuple(dict.fromkeys(warnings)), readers, first.dicom
    )


def _one(scan: OneScan, channels: int, slice_axis: int, series: int | None) -> Scan:
    if slice_axis not in (0, 1, 2):
        raise CdiffError(f"slice axis {slice_axis} does not exist; use 0, 1 or 2, an axis of the array as stored")
    loaded = _load(scan, channels, series)
    voxels, named = loaded.voxels, loaded.source if loaded.source != "array" else "the array"
    spatial = spatial_axes(voxels.shape, channels, named)
    with np.errstate(all="ignore"):  # values too large for float32 become infinite, and are refused
        values = np.asarray(voxels, dtype=np.float32)
        low, high = float(values.min()), float(values.max())  # NaN where one voxel is
    if not np.isfinite((low, high)).all():
        finite = np.isfinite(values)
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        count = int(finite.size - np.count_nonzero(finite))
        # A file's voxels come as float32, in which a value that is too large is infinite already.
        what = "too large" if np.isfinite(voxels).all() else "NaN, infinite or too large"
        raise CdiffError(
            f"{named} holds {several(count, 'value')} not finite in float32 ({what}; the first at {first}); replace them first"
        )
    # Ones after the third axis stay in the shape of the maps; channels do not.
    shape = voxels.shape if channels == 1 else spatial
    grid = Grid(tuple(shape), slice_axis if len(spatial) == 3 else None, loaded.header, loaded.frame, loaded.series)
    notes = list(loaded.notes)
    if high - low > MOST:
        raise CdiffError(
            f"{named} holds values from {low:.3g} to {high:.3g}, a range that float32 cannot normalise; replace the value that fills its empty voxels"
        )
    if low == high:
        notes.append("every voxel has the same value: the maps say nothing about this scan")
    notes += grid.spacing_notes
    slices = grid.cut(values.reshape(*spatial, channels))
    if not isinstance(scan, str | os.PathLike) and np.may_share_memory(slices, voxels):
        slices = slices.copy()  # the caller may read the next scan into it while this one is segmented
    return Scan(slices, grid, loaded.source, loaded.sha256, loaded.name, tuple(notes), loaded.reader, loaded.dicom)


@dataclass(frozen=True)
class _Loaded:
    voxels: NDArray[Any]
    header: nib.Nifti1Header | None
    source: str
    sha256: str
    name: str = "scan"
    notes: tuple[str, ...] = ()
    reader: str = ""
    dicom: tuple[Path, ...] = ()
    frame: str = ""
    series: str = ""


def _load(scan: OneScan, channels: int, series: int | None) -> _Loaded:
    if isinstance(scan, str | os.PathLike):
        return _from_path(Path(scan), channels, series)
    if series is not None:
        raise CdiffError(f"series {series} is for a DICOM folder, but none was given; leave series out")
    if isinstance(scan, np.ndarray):
        check_kind(scan.dtype, "the array")
        check_size(scan.shape, "the array")
        if np.ma.is_masked(scan):
            raise CdiffError(
                f"the array masks {np.ma.getmaskarray(scan).sum()} of its values, and what lies behind the mask would be segmented; fill them first, such as "
                "with array.filled(0)"
            )
        digest = hashlib.sha256(f"{scan.dtype.str} {scan.shape}".encode())
        digest.update(np.ascontiguousarray(scan).tobytes())
        return _Loaded(scan, None, "array", digest.hexdigest())
    if isinstance(scan, nib.Nifti1Pair):
        named = scan.get_filename()
        source = named or "NIfTI image"
        check_header(scan.header, source, channels)
        voxels = nifti_voxels(scan, source)
        digest = hashlib.sha256(scan.header.binaryblock + voxels.tobytes())
        header = scan.header.copy()  # the caller may mend it for the next scan before this one's maps are saved
        return _Loaded(voxels, header, source, digest.hexdigest(), name_of(Path(named)) if named else "scan")
    raise CdiffError(
        f"cannot segment a {type(scan).__name__}; give a path (or one for each modality), a NumPy array or a nibabel NIfTI image"
    )


def _from_path(path: Path, channels: int, series: int | None) -> _Loaded:
    if not is_there(path):
        read_bytes(path)  # says why
    if path.name.lower() == INDEX.lower() and path.is_file():
        raise CdiffError(
            f"{path} lists what is on a disc and holds no image; name the folder that it is in, or that of a series"
        )
    if path.is_dir() or is_dicom(path):
        return _dicom(path, channels, series)
    if series is not None:
        raise CdiffError(f"series {series} is for a DICOM folder, and {path} is not one; leave series out")
    data = read_bytes(path)
    digest = hashlib.sha256(data)
    if path.name.lower().endswith(PICTURE_SUFFIXES):
        pixels, notes = read_picture(data, path, channels)
        return _Loaded(pixels, None, str(path), digest.hexdigest(), name_of(path), tuple(notes))
    image = parse_volume(data, path, channels)
    del data
    voxels, reader = nifti_voxels(image, str(path)), ""
    if path.name.lower().endswith(ITK_SUFFIXES):
        reader = f"SimpleITK {package_version('SimpleITK')}"
        digest.update(voxels.tobytes())  # they may lie in another file
    return _Loaded(voxels, image.header, str(path), digest.hexdigest(), name_of(path), reader=reader)


def _dicom(path: Path, channels: int, series: int | None) -> _Loaded:
    if path.is_dir() and not holds_dicom(path):
        raise CdiffError(f"{path} is a folder, but holds no DICOM series; name a scan")
    found = read_dicom(path, channels, series)
    voxels, name = nifti_voxels(found.image, str(path)), Path(os.path.abspath(path)).name
    name = name if path.is_dir() else name.removesuffix(path.suffix) or name
    return _Loaded(
        voxels,
        found.image.header,
        str(path),
        found.sha256,
        name,
        found.notes,
        found.reader,
        found.files,
        found.frame,
        found.series,
    )


def parse_slices(slices: str | slice | tuple[int, int] | range | None, count: int) -> range:
    """Text "A:B" (A included, B not, counted from 0, either may be left out), a pair, slice or range -> range within `count`.

    Raises CdiffError when the text is not of that form or the range is empty or reaches beyond the scan.
    """
    advice = f"give A:B with 0 <= A < B <= {count} (slices are counted from 0, B is not included)"
    if slices is None:
        return range(count)
    if isinstance(slices, str):
        first, colon, last = slices.partition(":")
        try:
            start, stop = int(first or 0), int(last or count)
        except ValueError:
            colon = ""
        if not colon:
            raise CdiffError(f"slices {slices!r} cannot be read; {advice}")
    elif isinstance(slices, slice | range):
        if slices.step not in (None, 1):
            raise CdiffError(f"slices {slices} skip some; {advice}")
        start = 0 if slices.start is None else slices.start
        stop = count if slices.stop is None else slices.stop
    else:
        try:
            start, stop = (operator.index(edge) for edge in slices)
        except (TypeError, ValueError):
            raise CdiffError(f"slices {slices!r} cannot be read; {advice}") from None
    if not 0 <= start < stop <= count:
        raise CdiffError(f"slices {start}:{stop} are not in this scan of {count}; {advice}")
    return range(start, stop)
