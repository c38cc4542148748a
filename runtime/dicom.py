"""A DICOM series as a NIfTI image in memory, converted by dcm2niix: the same voxels and axes as the files that it makes for training."""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib

from cdiff.runtime.case import is_output, natural
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.nifti import parse_nifti
from cdiff.runtime.shapes import one_line
from cdiff.runtime.sources import PICTURE_SUFFIXES, VOLUME_SUFFIXES, any_bytes, must_be_text, optional

BY_HAND = "convert it with dcm2niix (dcm2niix -z y -o OUT FOLDER) and segment the image that you mean"
MARK = b"DICM"
MARK_AT = 128
"""Where a DICOM file has its mark (DICOM PS3.10, 7.1)."""
SUFFIX = ".dcm"
INDEX = "DICOMDIR"
"""A list of what lies on a disc; it holds no image."""
TAGS = ["Modality", "Rows", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber"]
SEGMENTATION = "SEG"
"""The modality of masks, which lie beside the images that they are of."""
UNEVEN = "Interslice distance varies"
TILTED = "gantry tilt of"
MISSING = "Missing images?"
"""Of dcm2niix's messages those that say that its volume is not what it seems."""


@dataclass(frozen=True)
class Converted:
    """One series as dcm2niix converted it.

    files: the series'. sha256: of their hashes, one after another, in the order of the files' names. reader: the converter's version
    and the series. notes: what a reader of the result should know.
    """

    image: nib.Nifti1Image
    files: tuple[Path, ...]
    sha256: str
    reader: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Series:
    """The images of one series in a folder: its number (0020,0011) where it has one, its description, and its files."""

    number: str
    description: str
    files: tuple[Path, ...]

    def __str__(self) -> str:
        images = f"{len(self.files)} image{'s' if len(self.files) > 1 else ''}"
        return f"{self.number} ({f'{self.description}, ' if self.description else ''}{images})"


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM's, by the mark in it or by its suffix; a disc's index is not."""
    name = path.name.lower()
    if name == INDEX.lower() or name.endswith(VOLUME_SUFFIXES + PICTURE_SUFFIXES) or not path.is_file():
        return False
    if name.endswith(SUFFIX):
        return True
    try:
        with path.open("rb") as file:
            return file.read(MARK_AT + len(MARK))[MARK_AT:] == MARK
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Whether DICOM files lie in a folder, and no NIfTI, NRRD or MetaImage file that may be the same scan; our own maps are not."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    volumes = (path for path in files if path.name.lower().endswith(VOLUME_SUFFIXES) and not is_output(path))
    return not any(volumes) and any(map(is_dicom, files))


def read_dicom(path: Path, channels: int = 1, series: int | None = None) -> Converted:
    """Convert the series in a folder (not in those below it), or in one file.

    series: its number, for a folder that holds several.
    Raises CdiffError when dcm2niix or pydicom is missing, a file is empty or damaged, no image or several series are there and none
    of them is named, and for a series that is not one even volume: slices that are missing, a tilted gantry, several echoes.
    """
    program = _program(path)
    chosen = _choose(series_at(path), path, series)
    digest = hashlib.sha256(b"".join(hashlib.sha256(any_bytes(file)).digest() for file in chosen.files))
    with tempfile.TemporaryDirectory(prefix="cdiff-") as folder:
        # Of these files alone: dcm2niix says of everything in a folder what is wrong with it.
        source, made = Path(folder) / "source", Path(folder) / "made"
        source.mkdir()
        made.mkdir()
        for file in chosen.files:
            (source / file.name).symlink_to(file.absolute())
        # Neither compression nor sidecars; errors join the other messages.
        command = [program, "-d", "0", "-z", "n", "-b", "n", "-f", "image", "-o", str(made), str(source)]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        said = done.stdout.replace(str(source), str(path if path.is_dir() else path.parent))
        images = sorted(made.glob("*.nii"))
        _must_be_one(images, said, f"{path}, series {chosen}:")
        image = parse_nifti(images[0].read_bytes(), path, channels)
    version = re.search(r"\bv[\d.]+", said)
    return Converted(
        image,
        chosen.files,
        digest.hexdigest(),
        " ".join(["dcm2niix", *([version.group()] if version else []), "series", chosen.number]),
        tuple(
            f"dcm2niix says: {line.strip().removeprefix('Warning: ')}" for line in said.splitlines() if MISSING in line
        ),
    )


def series_at(path: Path) -> list[Series]:
    """The series in a folder, or of one file, in the order of their numbers; what holds no image (reports, contours, segmentations) is left out.

    Raises CdiffError where a file is empty or damaged, and where pydicom is missing.
    """
    found: dict[str, tuple[str, str, list[Path]]] = {}
    for file in [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file()):
        # An empty file may be a slice whose absence nothing else would show.
        if file == path or (not file.name.startswith(".") and (is_dicom(file) or file.stat().st_size == 0)):
            header = _header(file)
            if "Rows" in header and header.get("Modality") != SEGMENTATION:
                number = "" if header.get("SeriesNumber") is None else str(header.SeriesNumber)
                described = " ".join(str(header.get("SeriesDescription") or "").split())
                found.setdefault(str(header.get("SeriesInstanceUID")), (number, described, []))[2].append(file)
    if not found:
        raise CdiffError(f"{path} holds no DICOM image; name the folder of a series")
    listed = [
        Series(number or "without a number", described, tuple(files)) for number, described, files in found.values()
    ]
    return sorted(listed, key=lambda one: natural(one.number))


def _header(file: Path) -> Any:
    """What pydicom reads of a file without its pixels."""
    pydicom = optional("pydicom", "pydicom", file, "DICOM")
    must_be_text(file)
    any_bytes(file)
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
    except (
        pydicom.errors.InvalidDicomError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        struct.error,
    ) as error:
        raise CdiffError(
            f"{file} is not a DICOM file that can be read ({one_line(error)[:200]}); copy it again"
        ) from None


def _program(path: Path) -> str:
    """dcm2niix, the system's or that of its Python package."""
    if found := shutil.which("dcm2niix"):
        return found
    return str(optional("dcm2niix", "dcm2niix", path, "DICOM").bin)


def _choose(found: list[Series], path: Path, series: int | None) -> Series:
    """The one series that is there, or the one that is named."""
    wanted = found if series is None else [one for one in found if one.number == str(series)]
    if len(wanted) == 1:
        return wanted[0]
    there = ", ".join(map(str, found))
    if not wanted:
        raise CdiffError(f"{path} has no series {series}; it holds {there}")
    if len({one.number for one in wanted}) == len(wanted):
        raise CdiffError(
            f"{path} holds {len(found)} DICOM series: {there}; name one with --series NUMBER (in Python, series)"
        )
    raise CdiffError(f"{path} holds several series of one number: {there}; give each a folder")


def _must_be_one(made: list[Path], said: str, where: str) -> None:
    """Raise CdiffError where dcm2niix did not make one volume that is what it seems."""
    if TILTED in said:
        raise CdiffError(f"{where} the gantry was tilted; {BY_HAND} (its name ends in _Tilt_1 or _Tilt_Eq_1)")
    if UNEVEN in said:
        raise CdiffError(
            f"{where} the distance between slices varies: one may be missing; copy them again, or {BY_HAND}"
        )
    if not made:
        told = [line.strip() for line in said.splitlines() if re.search(r"warning|error|unable", line, re.IGNORECASE)]
        raise CdiffError(f"{where} it cannot be converted ({told[-1] if told else 'dcm2niix does not say why'})")
    if len(made) > 1:
        raise CdiffError(
            f"{where} dcm2niix makes {len(made)} images of it, as of several echoes or orientations; {BY_HAND}"
        )
