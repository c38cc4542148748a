"""NRRD and MetaImage files (of 3D Slicer, or of public data sets such as LUNA16) as NIfTI images in memory; SimpleITK reads them."""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.detached import must_be_own, voxel_files
from cdiff.runtime.scans.grid import NIFTI1_LONGEST
from cdiff.runtime.scans.metaimage import MOST_AXES, check_metaimage, files_of, must_be_whole
from cdiff.runtime.scans.nifti import check_header
from cdiff.runtime.scans.shapes import check_kind, check_size
from cdiff.runtime.scans.sources import ITK_SUFFIXES, any_bytes, optional
from cdiff.runtime.scans.stored import must_not_hold_more, unpacked_size
from cdiff.runtime.words import one_line

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
"""ITK's axes point left, back and up, NIfTI's right, front and up."""
HEADER_ENDS = 2**20
"""Most bytes of a NRRD's header."""
LONGEST = 500
"""Most bytes of a line of a NRRD's header, and of its path: ITK writes them, however long, into messages of some thousand bytes."""


IN_THE_PATIENT = {
    "left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las",
}  # fmt: skip
"""NRRD's spaces whose axes are the patient's. With "-time" or a T appended they have a fourth axis."""
WITH_TIME = {
    "right-anterior-superior-time": (-1, -1, 1), "rast": (-1, -1, 1), "left-anterior-superior-time": (1, -1, 1), "last": (1, -1, 1),
}  # fmt: skip
"""The signs of ITK's axes in those of NRRD's spaces with time that are not its own: it turns images in the same spaces without time to its own
axes, and leaves these as they are."""
LENGTHS = {"m", "dm", "cm", "um", "µm", "μm", "micron", "microns", "nm", "in", "inch", "inches"}
"""Units of length other than millimetres; an axis of a NRRD may also have a unit of another kind, such as seconds."""


def itk_shape(data: bytes, path: Path) -> tuple[int, ...]:
    """The array's shape, channels last, from the header alone. Raises CdiffError when the header cannot be read."""
    reader = _opened(data, path)
    components = reader.GetNumberOfComponents()
    return (*reader.GetSize(), *([components] if components > 1 else []))


def parse_itk(data: bytes, path: Path, channels: int) -> nib.Nifti1Image:
    """The image in the file at `path`: voxels float32 in the file's order of axes, channels last, and where they lie.

    data: the file's bytes, for checks; SimpleITK reads the file itself, and the one with the voxels if that is another.
    Raises CdiffError for a damaged file, a size or type that cannot be a scan, and lengths that are not in millimetres.
    """
    fields = _nrrd_fields(data, path)
    shape = itk_shape(data, path)
    check_size(shape, str(path))
    _must_be_in_mm(fields, path)
    if not fields:
        check_metaimage(data, path)
    image, array = _voxels(data, path)
    if fields:
        _check_nrrd(data, path, array)
    check_kind(array.dtype, str(path))
    spatial = image.GetDimension()
    voxels = np.transpose(array, (*reversed(range(spatial)), *range(spatial, array.ndim))).astype(np.float32)
    # A NRRD without a space, or whose space is a scanner's or nobody's, has lengths, but axes without a direction in the patient.
    space = fields.get("space", "").lower()
    oriented = not fields or space.removesuffix("-time").removesuffix("t") in IN_THE_PATIENT
    affine = _affine(image, WITH_TIME.get(space, (1, 1, 1)))
    return _placed(voxels, affine, str(path), channels, oriented=oriented)


def itk_bytes(path: Path) -> bytes:
    """The voxels of the image at `path` as they are stored, be it in another file. Raises CdiffError for a damaged file."""
    return bytes(_voxels(any_bytes(path), path)[1].tobytes())


def detached(path: Path) -> list[Path]:
    """The files with the voxels of an image whose own file is a text that names them; [] for other images, and for one that cannot be read."""
    if path.name.lower().endswith(ITK_SUFFIXES[1::2]):
        with contextlib.suppress(CdiffError):
            return _files_of(any_bytes(path), path)
    return []


def _files_of(data: bytes, path: Path) -> list[Path]:
    """The files that the header in `data` names for its voxels, [] where they follow it. Raises CdiffError as `voxel_files` does."""
    if not _is_nrrd(data):
        return files_of(data, path)
    fields = _nrrd_fields(data, path)
    named = fields.get("data file", fields.get("datafile"))
    return voxel_files(named, _nrrd_text(data, path).partition(named)[2].split("\n")[1:], path) if named else []


def _voxels(data: bytes, path: Path) -> tuple[Any, Any]:
    """SimpleITK's image, and a view of its voxels, last axis first, which the image must outlive."""
    try:
        image = _opened(data, path).Execute()
        return image, optional("SimpleITK", "SimpleITK", path, "NRRD or MetaImage").GetArrayViewFromImage(image)
    except RuntimeError as error:
        raise CdiffError(f"{path} is truncated or damaged ({_reason(error)}); copy it again") from None


def _opened(data: bytes, path: Path) -> Any:
    """A reader that has read the header, after checks that ITK may."""
    _must_be_harmless(data, path)
    itk = optional("SimpleITK", "SimpleITK", path, "NRRD or MetaImage")
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = itk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if _is_nrrd(data) else "MetaImageIO")  # else ITK would take any of its formats
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CdiffError(f"{path} is not a NRRD or MetaImage file that can be read ({_reason(error)})") from None
    return reader


def _must_be_harmless(data: bytes, path: Path) -> None:
    """Raise CdiffError for a header that ITK must not follow: the module `detached` says why, and what ITK has no room for ends the process."""
    if not _is_nrrd(data):
        must_be_whole(data, path)
        must_be_own(_files_of(data, path), path)
        return
    if len(os.fsencode(path)) > LONGEST:
        raise CdiffError(f"{path} has a path of more than {LONGEST} bytes; move it to a folder with a shorter path")
    text = _nrrd_text(data, path)
    if "\r" in text:  # which ends a line for the library, and not for us
        raise CdiffError(f"{path} has lines in its header that end in a carriage return alone; save it again")
    free = ("#", "content: ")
    lines = [line for line in text.split("\n") if not line.startswith(free) and not _is_added(line)]
    if long := [line for line in lines if len(line.encode()) > LONGEST]:
        raise CdiffError(
            f"{path} has a line of more than {LONGEST} bytes in its header ({long[0][:50]!r}); it is damaged: copy it again"
        )
    fields = _nrrd_fields(data, path)
    if (axes := fields.get("dimension", "")).isdecimal() and int(axes) > MOST_AXES:
        raise CdiffError(f"{path} has {int(axes)} axes where 2-D or 3-D is meant; give one volume of it")
    must_be_own(_files_of(data, path), path)


def _is_nrrd(data: bytes) -> bool:
    return data.startswith(b"NRRD")


def _nrrd_text(data: bytes, path: Path) -> str:
    """A NRRD's header as text. Raises CdiffError where it does not end within HEADER_ENDS, since what lies beyond would go unchecked."""
    text, blank, _ = data[:HEADER_ENDS].replace(b"\r\n", b"\n").partition(b"\n\n")
    if not blank and len(data) > HEADER_ENDS:
        raise CdiffError(f"{path} has a header of more than {HEADER_ENDS} bytes; save it again")
    return text.decode("utf-8", "replace")


def _nrrd_fields(data: bytes, path: Path) -> dict[str, str]:
    """The fields of a NRRD's header, their names in lower case; {} for another format. What its writer added (key:=value) is left out."""
    lines = _nrrd_text(data, path).split("\n") if _is_nrrd(data) else []
    found = (line.partition(": ") for line in lines if not _is_added(line))
    return {name.strip().lower(): value.strip() for name, colon, value in found if colon}


def _is_added(line: str) -> bool:
    """Whether a line of a NRRD's header is one that its writer added, key:=value."""
    return ":=" in line.partition(": ")[0]


def _must_be_in_mm(fields: dict[str, str], path: Path) -> None:
    """Raise CdiffError where a NRRD names another unit of length, for all axes or for one: ITK takes every length for millimetres."""
    units = set(fields.get("space units", "").replace('"', " ").lower().split()) - {
        "mm",
        "millimeter",
        "millimetre",
        "???",
    }
    units |= set(fields.get("units", "").replace('"', " ").lower().split()) & LENGTHS
    if units:
        raise CdiffError(f"{path} gives its lengths in {' '.join(sorted(units))}; save it in millimetres")


def _affine(image: Any, signs: tuple[int, int, int]) -> NDArray[np.float64] | None:
    """[4, 4]: from voxel indices to mm in NIfTI's space; None where the file says nothing of it: spacing 1, origin 0, axes not turned.

    signs: of left, back and up along the axes of the space in which ITK has left the image.
    """
    axes = image.GetDimension()
    n = min(axes, 3)  # a fourth axis is time, along which the place in space is the same
    edges = (np.asarray(image.GetDirection()).reshape(axes, axes) * np.asarray(image.GetSpacing()))[:n, :n]
    to_own = np.diag(signs[:n])
    edges, origin = to_own @ edges, to_own @ np.asarray(image.GetOrigin())[:n]
    affine = np.eye(4)
    if np.array_equal(edges, np.eye(n)) and not origin.any():
        return None
    affine[:n, :n], affine[:n, 3] = edges, origin
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return affine


def _placed(
    voxels: NDArray[np.float32], affine: NDArray[np.float64] | None, where: str, channels: int, *, oriented: bool
) -> nib.Nifti1Image:
    """A NIfTI image of the voxels; without an affine its spacing is 1 and nothing says how the patient lies.

    oriented: whether the affine's axes are the patient's. Raises CdiffError as `check_header` does.
    """
    kind: Any = nib.Nifti2Image if max(voxels.shape) > NIFTI1_LONGEST else nib.Nifti1Image
    image = kind(voxels, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    code = "scanner" if oriented and affine is not None else "unknown"
    image.set_sform(image.affine, code=code)
    with contextlib.suppress(HeaderDataError):  # axes that are not at right angles have only a sform
        image.set_qform(image.affine, code=code, strip_shears=False)
    if affine is not None:  # set_qform has rounded the spacing on its way through quaternions
        image.header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    check_header(image.header, where, channels)
    return image  # type: ignore[no-any-return]


def _check_nrrd(data: bytes, path: Path, array: Any) -> None:
    """Raise CdiffError where the stored voxels of a NRRD, read as `array`, fail their check sum or are more than the header promises.

    array: the voxels as read. The library that reads them stops at the last one that it expects, before the check sum.
    """
    fields = _nrrd_fields(data, path)
    skipped = [fields.get(name, fields.get(name.replace(" ", ""), "0")) for name in ("line skip", "byte skip")]
    encoding = fields.get("encoding", "").lower()
    packed = encoding in ("gz", "gzip")
    if not (packed or encoding == "raw") or skipped != ["0", "0"]:
        return
    files = _files_of(data, path)
    blank, held = re.search(rb"\r?\n\r?\n", data), 0
    for file in files or [path]:
        stored = any_bytes(file) if files else data[blank.end() :] if blank else b""
        try:
            held += unpacked_size(stored, 2 * array.nbytes) if packed else len(stored)
        except (zlib.error, EOFError) as error:
            raise CdiffError(f"{file} is truncated or damaged ({error}); copy it again") from None
    must_not_hold_more(held, array.nbytes, array.shape, path)


def _reason(error: RuntimeError) -> str:
    """The end of ITK's message, or of the library's below it, without the places in their source that it begins with."""
    return one_line(error).rpartition("ERROR: ")[2].rpartition("[nrrd] ")[2][-200:]
