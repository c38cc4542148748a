"""Which scans a path names - one file, a folder of scans, or a folder of case folders - and what each is called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cdiff.runtime.cases import IMAGE_NAMES, MASK_NAME, SPLITS
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scan import NIFTI_SUFFIXES, PICTURE_SUFFIXES

OUTPUT_ENDINGS = ("_soft", "_levels", "_annotators", "_uncertainty", "_mask", "_preview")


@dataclass(frozen=True)
class NamedScan:
    """A scan's file and the name that its outputs begin with."""

    name: str
    path: Path


def stem(path: Path) -> str | None:
    """The file's name without a scan's suffix; None when it has none of them."""
    for suffix in (*NIFTI_SUFFIXES, *PICTURE_SUFFIXES):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return None


def scans_at(path: Path) -> list[NamedScan]:
    """The scans that `path` names, in the order of their names.

    A file is taken whatever its suffix (reading it says what is wrong with it) and is called by its own name. In a folder:
    every NIfTI or picture file, called by its name, and every case folder with an image.nii.gz, called by the folder's name.
    Annotators' masks and what an earlier `cdiff segment` wrote there are left out.
    Raises CdiffError when nothing is there, or when two scans would write the same files.
    """
    if path.is_file():
        return [NamedScan(stem(path) or path.stem, path)]
    if not path.exists():
        raise CdiffError(f"{path} does not exist; give a scan (.nii.gz, .nii, .png ...) or a folder of them")
    scans = [NamedScan(path.resolve().name, image)] if (image := _case_image(path)) else list(_scans_in(path))
    if not scans:
        raise CdiffError(_nothing_in(path))
    seen: dict[str, Path] = {}
    for scan in scans:
        if scan.name in seen:
            raise CdiffError(f"{seen[scan.name]} and {scan.path} would both write {scan.name}_soft.nii.gz; rename one")
        seen[scan.name] = scan.path
    return scans


def _scans_in(folder: Path) -> Iterator[NamedScan]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if image := _case_image(entry):
                yield NamedScan(entry.name, image)
        elif (name := stem(entry)) and not MASK_NAME.match(entry.name) and not _is_output(entry, name):
            yield NamedScan(name, entry)


def _case_image(folder: Path) -> Path | None:
    return next((folder / name for name in IMAGE_NAMES if (folder / name).is_file()), None)


def _is_output(path: Path, name: str) -> bool:
    """A map or picture of ours: it ends like one, and the report of its scan lies beside it."""
    return any(
        name.endswith(ending) and (path.parent / f"{name.removesuffix(ending)}.json").is_file()
        for ending in OUTPUT_ENDINGS
    )


def _nothing_in(folder: Path) -> str:
    splits = sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name.lower() in SPLITS)
    if splits:
        return f"{folder} holds the splits {', '.join(splits)}; name one of them, such as {folder / splits[0]}"
    return f"no scan in {folder}: expected .nii.gz, .nii, .png ... files, or case folders with image.nii.gz"
