"""NRRD and MetaImage files, as 3D Slicer and public data sets (LUNA16) have them, as NIfTI images in memory; read by SimpleITK."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import NIFTI1_LONGEST
from cdiff.runtime.scans.metaimage import check_metaimage
from cdiff.runtime.scans.nifti import check_header
from cdiff.runtime.scans.shapes import check_kind, check_size
from cdiff.runtime.scans.sources import optional
from cdiff.runtime.words import one_line

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
"""ITK's axes point left, back and up, NIfTI's right, front and up."""
HEADER_ENDS = 2**16
"""A NRRD's text lies within so many bytes."""


IN_THE_PATIENT = {
    "left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las",
}  # fmt: skip
"""NRRD's spaces whose axes are the patient's. With "-time" or a T behind they have a fourth."""
LENGTHS = {"m", "dm", "cm", "um", "µm", "μm", "micron", "microns", "nm", "in", "inch", "inches"}
"""Units of length that are no millimetres; an axis of a NRRD may have one of another kind, such as seconds."""


def itk_shape(path: Path) -> tuple[int, ...]:
    """The array's shape, channels last, from the header alone. Raises CdiffError when there is no such header."""
    reader = _opened(path)
    components = reader.GetNumberOfComponents()
    return (*reader.GetSize(), *([components] if components > 1 else []))


def parse_itk(data: bytes, path: Path, channels: int) -> nib.Nifti1Image:
    """The image in the file at `path`: voxels float32 in the file's order of axes, channels last, and where they lie.

    data: the file's bytes, of which only the text is looked at; SimpleITK reads the file, and the one with the voxels if that is another.
    Raises CdiffError for a damaged file, a size or type that cannot be a scan, and lengths that are not in millimetres.
    """
    fields = _nrrd_fields(data)
    _must_be_a_file(fields, path)  # before ITK opens a pipe that never begins
    shape = itk_shape(path)
    check_size(shape, str(path))
    _must_be_in_mm(fields, path)
    if not fields:
        check_metaimage(data, path)
    image, array = _voxels(path)
    check_kind(array.dtype, str(path))
    spatial = image.GetDimension()
    voxels = np.transpose(array, (*reversed(range(spatial)), *range(spatial, array.ndim))).astype(np.float32)
    # A NRRD without a space has lengths, and its axes point nowhere in the patient; as of one whose space is a scanner's or nobody's.
    oriented = not fields or fields.get("space", "").lower().removesuffix("-time").removesuffix("t") in IN_THE_PATIENT
    return _placed(voxels, _affine(image), str(path), channels, oriented=oriented)


def itk_bytes(path: Path) -> bytes:
    """The voxels of the file at `path` as they are stored, also where they lie in another. Raises CdiffError for a damaged file."""
    return bytes(_voxels(path)[1].tobytes())


def _voxels(path: Path) -> tuple[Any, Any]:
    """SimpleITK's image, which must outlive its array, the last axis first."""
    try:
        image = _opened(path).Execute()
        return image, optional("SimpleITK", "SimpleITK", path, "NRRD or MetaImage").GetArrayViewFromImage(image)
    except RuntimeError as error:
        raise CdiffError(f"{path} is truncated or damaged ({_reason(error)}); copy it again") from None


def _opened(path: Path) -> Any:
    """A reader that has read the header."""
    itk = optional("SimpleITK", "SimpleITK", path, "NRRD or MetaImage")
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CdiffError(f"{path} is not a NRRD or MetaImage file that can be read ({_reason(error)})") from None
    return reader


def _nrrd_fields(data: bytes) -> dict[str, str]:
    """The fields of a NRRD's header, their names in lower case; none for another format. What its writer added (key:=value) is none."""
    if not data.startswith(b"NRRD"):
        return {}
    text = data[:HEADER_ENDS].replace(b"\r", b"").partition(b"\n\n")[0].decode("utf-8", "replace")
    found = (line.partition(": ") for line in text.splitlines() if ":=" not in line.partition(": ")[0])
    return {name.strip().lower(): value.strip() for name, colon, value in found if colon}


def _must_be_in_mm(fields: dict[str, str], path: Path) -> None:
    """ITK takes every length for millimetres, whatever a NRRD says of its unit, for all axes or for each."""
    units = set(fields.get("space units", "").replace('"', " ").lower().split()) - {
        "mm",
        "millimeter",
        "millimetre",
        "???",
    }
    units |= set(fields.get("units", "").replace('"', " ").lower().split()) & LENGTHS
    if units:
        raise CdiffError(f"{path} gives its lengths in {' '.join(sorted(units))}; save it in millimetres")


def _must_be_a_file(fields: dict[str, str], path: Path) -> None:
    """Raise CdiffError where a NRRD's voxels should come from a device or a pipe."""
    named = path.parent / fields.get("data file", fields.get("datafile", path.name))
    if named.exists() and not named.is_file():
        raise CdiffError(f"{path} has its voxels in {named}, which is no file; copy them into one")


def _affine(image: Any) -> NDArray[np.float64] | None:
    """Voxel indices to millimetres in NIfTI's space; None where the file says nothing of it: spacing 1, origin 0, axes along the space's."""
    axes = image.GetDimension()
    n = min(axes, 3)  # of time the place in space is the same
    edges = (np.asarray(image.GetDirection()).reshape(axes, axes) * np.asarray(image.GetSpacing()))[:n, :n]
    origin = np.asarray(image.GetOrigin())[:n]
    affine = np.eye(4)
    if np.array_equal(edges, np.eye(n)) and not origin.any():
        return None
    affine[:n, :n], affine[:n, 3] = edges, origin
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return affine


def _placed(
    voxels: NDArray[np.float32], affine: NDArray[np.float64] | None, where: str, channels: int, *, oriented: bool
) -> nib.Nifti1Image:
    """A NIfTI image of the voxels; without an affine its spacing is 1 and nothing says how the patient lies."""
    kind: Any = nib.Nifti2Image if max(voxels.shape) > NIFTI1_LONGEST else nib.Nifti1Image
    image = kind(voxels, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    code = "scanner" if oriented and affine is not None else "unknown"
    image.set_sform(image.affine, code=code)
    with contextlib.suppress(HeaderDataError):  # axes that are not at right angles have a sform alone
        image.set_qform(image.affine, code=code, strip_shears=False)
    if affine is not None:  # without the rounding of a way through quaternions
        image.header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    check_header(image.header, where, channels)
    return image  # type: ignore[no-any-return]


def _reason(error: RuntimeError) -> str:
    """The last sentence of ITK's message, or of the library's below it, which begins with places in their source."""
    return one_line(error).rpartition("ERROR: ")[2].rpartition("[nrrd] ")[2][-200:]
