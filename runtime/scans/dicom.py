"""A DICOM series as a NIfTI image in memory, converted by dcm2niix, so that voxels and axes are those of training files made with it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib

from cdiff.runtime.data.case import is_output, listed, natural
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import temporary_folder
from cdiff.runtime.scans.dicom_pixels import TAGS as VALUES
from cdiff.runtime.scans.dicom_pixels import must_agree, must_hold_pixels
from cdiff.runtime.scans.dicom_planes import TAGS as PLACE
from cdiff.runtime.scans.dicom_planes import laid, planes_of, values_asked
from cdiff.runtime.scans.nifti import parse_nifti
from cdiff.runtime.scans.sources import PICTURE_SUFFIXES, VOLUME_SUFFIXES, any_bytes, must_be_text, optional
from cdiff.runtime.switches import without_warnings
from cdiff.runtime.words import one_line, several

BY_HAND = "convert it with dcm2niix (dcm2niix -z y -o OUT FOLDER) and segment the image that you mean"
MARK = b"DICM"
MARK_AT = 128
"""Offset in bytes of the mark in a DICOM file (DICOM PS3.10, 7.1)."""
SUFFIX = ".dcm"
INDEX = "DICOMDIR"
"""The file that lists what is on a disc; it holds no image."""
TAGS = [
    *PLACE, *VALUES, "FrameOfReferenceUID", "Modality", "PhotometricInterpretation", "SOPClassUID", "SamplesPerPixel", "SeriesDescription",
    "SeriesInstanceUID", "SeriesNumber",
]  # fmt: skip
INVERTED = "MONOCHROME1"
PALETTE = "PALETTE COLOR"
SEGMENTATION = "SEG"
"""The modality of masks, which may lie beside their images."""
DEFLATED = "1.2.840.10008.1.2.1.99"
"""The transfer syntax of a file that is compressed as a whole (PS3.5, A.5)."""
STANDARD = "1.2.840.10008."
"""The prefix of the standard's own identifiers (PS3.5, chapter 9): one that begins so and is in none of its lists was cut off or changed."""
UNEVEN = "Interslice distance varies"
TILTED = "gantry tilt of"
MISSING = "Missing images?"
"""Parts of those messages of dcm2niix that say that its volume is not what it seems."""
TROUBLE = re.compile(r"error|unable|unsupported|fail|corrupt|varies|not large enough|too large|no valid", re.IGNORECASE)
"""What is in dcm2niix's reasons for making no image, and not in its other messages."""
LONGEST = 1800.0
"""Seconds after which dcm2niix, which normally takes seconds, is taken to hang: the other scans of a folder are still to come."""
OVERLAYS = "image_ROI*"
"""How dcm2niix names a volume of the marks that were drawn on the images (overlays, 60xx,3000)."""


@dataclass(frozen=True)
class Converted:
    """One series as dcm2niix converted it.

    files: the series', without copies. sha256: of their SHA-256 digests joined in the order of the files' names. reader: the converter's
    version and the series. notes: what a user of the result should know. frame, series: the UIDs of the frame of reference and of the
    series; empty where the headers do not say.
    """

    image: nib.Nifti1Image
    files: tuple[Path, ...]
    sha256: str
    reader: str
    notes: tuple[str, ...] = ()
    frame: str = ""
    series: str = ""


@dataclass(frozen=True)
class Series:
    """The images of one series: its number (0020,0011) or "without a number", its description, its files and their pydicom headers."""

    number: str
    description: str
    files: tuple[Path, ...]
    headers: tuple[Any, ...]

    def __str__(self) -> str:
        return (
            f"{self.number} ({f'{self.description}, ' if self.description else ''}{several(len(self.files), 'image')})"
        )


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by the mark in it or by its suffix; a disc's index is not."""
    name = path.name.lower()
    if name == INDEX.lower() or name.endswith(VOLUME_SUFFIXES + PICTURE_SUFFIXES) or not path.is_file():
        return False
    return name.endswith(SUFFIX) or _beginning(path)[MARK_AT:] == MARK


def _beginning(path: Path) -> bytes:
    """A file's first bytes, up to the end of DICOM's mark; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MARK_AT + len(MARK))
    except OSError:
        return b""


def holds_dicom(folder: Path) -> bool:
    """Whether a folder holds DICOM files, and no NIfTI, NRRD or MetaImage file that may be the same scan (our own maps are not)."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    volumes = (path for path in files if path.name.lower().endswith(VOLUME_SUFFIXES) and not is_output(path))
    return not any(volumes) and any(map(is_dicom, files))


def holds_images(folder: Path) -> bool:
    """Whether any DICOM file in a folder is an image, rather than a report, contours or a segmentation such as our own.

    True also where that cannot be told, so that reading the folder says why.
    """
    try:
        return any(_image_header(path) is not None for path in sorted(folder.iterdir()) if _may_be_image(path))
    except CdiffError:
        return True


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    """Puts `where` before the text of a CdiffError in the block."""
    try:
        yield
    except CdiffError as error:
        raise CdiffError(f"{where} {error}") from None


def read_dicom(path: Path, channels: int = 1, series: int | None = None) -> Converted:
    """Convert the series in a folder (folders below it are not read), or the one in a file.

    series: its number, for a folder that holds several.
    Raises CdiffError when dcm2niix or pydicom is missing, a file is empty or damaged, there is no image, or there are several series and
    none is named; and for a series that is not one even volume: slices that are missing, a tilted gantry, several echoes.
    """
    program = _program(path)
    chosen = _choose(series_at(path), path, series)
    where = f"{path}, series {chosen}:"
    _must_be_grey(chosen, where)
    files: dict[bytes, Path] = {}
    headers: list[Any] = []
    for file, header in zip(chosen.files, chosen.headers, strict=True):
        data = any_bytes(file)
        if (digest := hashlib.sha256(data).digest()) not in files:  # a copy would be a second image at the same place
            with _said_of(where):
                must_hold_pixels(file, header, data)
            files[digest] = file
            headers.append(header)
    kept = [*files.values()]
    with _said_of(where):
        must_agree(kept, headers)
        planes = planes_of(headers)
    with temporary_folder() as folder:
        # Links to these files alone: dcm2niix would say what is wrong with everything else in the folder too.
        source, made = folder / "source", folder / "made"
        source.mkdir()
        made.mkdir()
        for file in kept:
            (source / file.name).symlink_to(file.absolute())
        # Without compression, sidecars, and the defaults in a file in the user's home; errors join the other messages.
        command = [program, "-g", "i", "-d", "0", "-z", "n", "-b", "n", "-f", "image", "-o", str(made), str(source)]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            raise CdiffError(
                f"{where} dcm2niix did not finish within {LONGEST / 60:g} minutes, as happens with damaged files; {BY_HAND}"
            ) from None
        said = done.stdout.replace(str(source), str(path if path.is_dir() else path.parent))
        overlays = set(made.glob(OVERLAYS))
        images = sorted(set(made.glob("*.nii")) - overlays)
        if done.returncode < 0:
            raise CdiffError(f"{where} dcm2niix crashed (signal {-done.returncode}); look for damaged files")
        _must_be_one(images, said, where)
        image, laid_notes = laid(parse_nifti(images[0].read_bytes(), path, channels), planes, where)
    version = re.search(r"\bv[\d.]+", said)
    notes = [
        f"dcm2niix says: {line.strip().removeprefix('Warning: ')}" for line in said.splitlines() if MISSING in line
    ]
    if len(files) < len(chosen.files):
        notes.append(
            f"{len(chosen.files) - len(files)} of {len(chosen.files)} DICOM files are copies of others: left out"
        )
    if below := _below(path):
        notes.append(
            f"DICOM images in folders below {path} were not read: {listed(below)}; to read them, name those folders"
        )
    if any(header.get("PhotometricInterpretation") == INVERTED for header in chosen.headers):
        notes.append(
            f"the DICOM images are {INVERTED} (low values are bright): values are used as stored, not inverted"
        )
    return Converted(
        image,
        tuple(files.values()),
        hashlib.sha256(b"".join(files)).hexdigest(),
        " ".join(["dcm2niix", *([version.group()] if version else []), "series", chosen.number]),
        (*notes, *laid_notes),
        *(str(chosen.headers[0].get(uid) or "") for uid in ("FrameOfReferenceUID", "SeriesInstanceUID")),
    )


def series_at(path: Path) -> list[Series]:
    """The series in a folder, or the one of a file, in the order of their numbers; reports, contours and segmentations are left out.

    Raises CdiffError where there is no image, where a file is empty or damaged, and where pydicom is missing.
    """
    found: dict[str, tuple[str, str, list[Path], list[Any]]] = {}
    for file in [path] if path.is_file() else sorted(one for one in path.iterdir() if _may_be_image(one)):
        if (header := _image_header(file)) is not None:
            number = "" if header.get("SeriesNumber") is None else _plain(str(header.SeriesNumber))
            described = _plain(str(header.get("SeriesDescription") or ""))
            one = found.setdefault(str(header.get("SeriesInstanceUID")), (number, described, [], []))
            one[2].append(file)
            one[3].append(header)
    if not found:
        raise CdiffError(f"{path} holds no DICOM image; name the folder of a series")
    if path.is_dir():
        _must_leave_none(path, {_pattern(file.name) for one in found.values() for file in one[2]})
    series = [
        Series(number or "without a number", described, tuple(files), tuple(headers))
        for number, described, files, headers in found.values()
    ]
    return sorted(series, key=lambda one: natural(one.number))


def _pattern(name: str) -> str:
    """A name with every number as 0: a series' files differ by their numbers."""
    return re.sub(r"\d+", "0", name)


def _must_leave_none(folder: Path, patterns: set[str]) -> None:
    """Raise CdiffError for a file in a series' folder that is named like its images, but for numbers, and has lost DICOM's mark."""
    for file in sorted(folder.iterdir()):
        alike = "0" in (pattern := _pattern(file.name)) and pattern in patterns
        if alike and file.is_file() and not _may_be_image(file):
            raise CdiffError(
                f"{file} is named like the images beside it but is not a DICOM file; it is damaged: copy it again, or take it out of the folder"
            )


def _image_header(file: Path) -> Any:
    """The header of a file that is an image; None for others. Raises CdiffError where the file is empty or damaged."""
    header = _header(file)
    if "Rows" not in header:
        _must_be_no_image(header, file)
        return None
    return None if header.get("Modality") == SEGMENTATION else header


def _may_be_image(file: Path) -> bool:
    """Whether a file in a series' folder is one of its images, or may have been: it is empty, begins with zeros, or is a broken link.

    Such a file may be a slice whose absence nothing else would show.
    """
    if file.name.startswith(".") or file.name.lower() == INDEX.lower():
        return False
    other = file.name.lower().endswith(VOLUME_SUFFIXES + PICTURE_SUFFIXES)
    if file.is_symlink() and not file.exists():
        return not other
    if not file.is_file():
        return False
    # Zeros up to the mark's place, and no mark: cut off there, or a copy that was broken off and has its full length.
    blank = not other and not any(_beginning(file)[:MARK_AT])
    return is_dicom(file) or file.stat().st_size == 0 or blank


def _below(path: Path) -> list[str]:
    """The names of the folders within a series' folder that hold DICOM images too."""
    folders = (
        sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")) if path.is_dir() else []
    )
    return [one.name for one in folders if os.access(one, os.R_OK | os.X_OK) and holds_dicom(one) and holds_images(one)]


def _plain(text: str) -> str:
    """A header's text, made safe to show on a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _must_be_no_image(header: Any, file: Path) -> None:
    """Raise CdiffError for the header of an image, or of nothing known, that ends before it says how large the image is."""
    try:
        with values_asked():
            kind = header.get("SOPClassUID") or getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID")
    except CdiffError:
        kind = None
    name = str(getattr(kind, "name", ""))
    cut = name == kind and STANDARD.startswith(kind[: len(STANDARD)])
    if not name or cut or "Image Storage" in name:
        raise CdiffError(f"{file} is truncated or damaged (its DICOM header ends early); copy it again")


def _must_be_grey(chosen: Series, where: str) -> None:
    """Raise CdiffError for colours, which are no intensities, and for signed bytes, which dcm2niix takes for unsigned."""
    for file, header in zip(chosen.files, chosen.headers, strict=True):
        kind = str(header.get("PhotometricInterpretation") or "")
        if (header.get("SamplesPerPixel") or 1) != 1 or kind == PALETTE:
            raise CdiffError(
                f"{where} {file.name} is in colour ({kind}), but only grey DICOM is read; export it as PNG, or name a grey series"
            )
        if header.get("BitsAllocated") == 8 and header.get("PixelRepresentation") == 1:
            raise CdiffError(
                f"{where} {file.name} holds signed bytes, which dcm2niix takes for unsigned; save it with 16 bits a pixel"
            )


def _header(file: Path) -> Any:
    """A file's header (`TAGS`) as a pydicom data set. Raises CdiffError where it cannot be read."""
    pydicom = optional("pydicom", "pydicom", file, "DICOM")
    must_be_text(file)
    any_bytes(file)
    try:
        # pydicom warns of values that the standard does not allow; those that cannot be used are refused where they are needed.
        with without_warnings():
            # dcm2niix does not read these, and pydicom unpacks them whole: up to a thousand times their bytes.
            if pydicom.filereader.read_file_meta_info(file).get("TransferSyntaxUID") == DEFLATED:
                raise CdiffError(
                    f"{file} is compressed as a whole (deflated), which cdiff does not read; inflate it: dcmconv +te IN OUT"
                )
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
            # pydicom decodes a value whenever it is asked for, and would say each time what is wrong with it.
            for tag in TAGS:
                try:
                    header.get(tag)
                except Exception:  # the library raises types of its own too
                    del header[tag]
            return header
    except CdiffError:
        raise
    except Exception as error:  # the library raises types of its own too
        raise CdiffError(
            f"{file} is not a DICOM file that can be read ({one_line(error)[:200]}); copy it again"
        ) from None


def _program(path: Path) -> str:
    """The path of dcm2niix: the system's, else that of its Python package."""
    if found := shutil.which("dcm2niix"):
        return found
    return str(optional("dcm2niix", "dcm2niix", path, "DICOM").bin)


def _choose(found: list[Series], path: Path, series: int | None) -> Series:
    """The only series found, or the one with the number `series`. Raises CdiffError where there is none, or more than one."""
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
    raise CdiffError(f"{path} holds several series with the same number: {there}; give each series its own folder")


def _must_be_one(made: list[Path], said: str, where: str) -> None:
    """Raise CdiffError unless dcm2niix made one volume and said nothing that casts doubt on it."""
    if TILTED in said:
        raise CdiffError(f"{where} the gantry was tilted; {BY_HAND} (its name ends in _Tilt_1 or _Tilt_Eq_1)")
    if UNEVEN in said:
        raise CdiffError(
            f"{where} the distance between slices varies: one may be missing; copy the files again, or {BY_HAND}"
        )
    if not made:
        # dcm2niix is "unable" to tell the manufacturer of nearly every image.
        told = [line.strip() for line in said.splitlines() if TROUBLE.search(line) and "manufacturer" not in line]
        raise CdiffError(f"{where} it cannot be converted ({told[0] if told else 'dcm2niix does not say why'})")
    if len(made) > 1:
        raise CdiffError(
            f"{where} dcm2niix makes {len(made)} images of it, as it does with several echoes or orientations; {BY_HAND}"
        )
