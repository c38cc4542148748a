"""Which scans a path names - a file, a folder of scans or of case folders, a table - and what each is called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cdiff.runtime.data.case import SPLITS, Entry, arranged, is_output, listed, name_of, stem
from cdiff.runtime.data.layouts import IMAGE, OWN_MASK, TASK_MASK, Files, Inside, brats_in, cases_in, contents, descend
from cdiff.runtime.data.table import SUFFIXES, read_table
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.dicom import holds_dicom, holds_images
from cdiff.runtime.scans.sources import VOLUME_SUFFIXES, is_there


@dataclass(frozen=True)
class NamedScan:
    """A scan's file (or folder of DICOM), or files when each holds a modality, and the name that its outputs begin with."""

    name: str
    path: Path | tuple[Path, ...]


def must_exist(path: Path) -> Path:
    """Return `path`. Raises CdiffError when nothing is there, which is worth knowing before a model is loaded."""
    if not is_there(path):
        raise CdiffError(f"{path} does not exist; give a scan (.nii.gz, .nii, .png ...) or a folder of them")
    return path


def scans_at(
    path: Path, channels: int = 1, modalities: Sequence[str] = (), left: list[Path] | None = None
) -> list[NamedScan]:
    """The scans that `path` names: those of a folder in the order of their names, those of a table in its order.

    A file is taken whatever its suffix (reading it says what is wrong with it) and is called by its own name. In a folder:
    every volume's file or picture, called by its name, and every case folder with an image or folder of DICOM files, called by the
    folder's name, with those above it where it lies deeper (patient7_scan1). A table (CSV): its images, called as their cases are.
    Annotators' masks and what an earlier `cdiff segment` wrote there are left out.
    channels: what the model takes; with more than one, a case's `image_t1`, `image_t2` ... or BraTS's files are one scan, its
    modalities in the order of `modalities` (what the model was trained on) where that is known.
    left: gets the folders below `path` whose scans are passed over, because they are no case folders or a split's, and the scans beside
    the image of `path` where that is a case folder itself.
    Raises CdiffError when nothing is there, a modality is missing, or two scans would write the same files.
    """
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        scans = [_scan(entry, entry.name.replace("/", "_"), modalities) for entry in read_table(path, [], masks=False)]
    elif must_exist(path) and not path.is_dir():  # also a pipe, which reading refuses
        return [NamedScan(name_of(path), path)]
    else:
        left = [] if left is None else left
        scans = list(_scans_in(path, channels, modalities, left))
        if not scans:
            raise CdiffError(_nothing_in(path, left))
    must_differ(scans)
    return scans


def scans_named(
    paths: Sequence[Path], channels: int = 1, modalities: Sequence[str] = (), notes: list[str] | None = None
) -> list[NamedScan]:
    """The scans that several paths name, path by path, as `scans_at` finds them for each.

    Of several paths those are left out whose names say that they are a benchmark's masks or results of ours (or a folder of results
    alone), or masks of the case whose image is named with them: a shell's `*` takes them too. notes: gets a line on what was left out.
    Raises CdiffError as `scans_at` does, and where only such files are named.
    """
    notes = [] if notes is None else notes
    cases = {path.parent for path in paths if IMAGE.match(stem(path) or "")}
    masks = [path for path in paths if _is_no_scan(path, cases)] if len(paths) > 1 else []
    if masks:
        notes.append(
            f"{listed([path.name for path in masks])}: left out, since their names say that they are masks or results"
        )
    scans: list[NamedScan] = []
    for path in paths:
        left: list[Path] = []
        scans += [] if path in masks else scans_at(path, channels, modalities, left)
        notes += passed_over(path, left)
    if not scans:
        raise CdiffError(
            f"only masks or results are named ({listed([path.name for path in masks])}); name the scan alone"
        )
    must_differ(scans)
    return scans


def must_differ(scans: Iterable[NamedScan]) -> None:
    """Raise CdiffError when two scans would write the same files."""
    seen: dict[str, NamedScan] = {}
    for scan in scans:
        if scan.name in seen:
            raise CdiffError(
                f"{_first(seen[scan.name])} and {_first(scan)} would both write {scan.name}_soft.nii.gz; rename one"
            )
        seen[scan.name] = scan


def passed_over(root: Path, left: Sequence[Path]) -> list[str]:
    """The notes that the scans of some folders below `root`, or beside its image, are not taken, and how to have them taken."""
    files = [path.name for path in left if not path.is_dir()]
    left = [path for path in left if path.is_dir()]
    splits = [path.relative_to(root).as_posix() for path in left if path.name.lower() in SPLITS]
    names = [path.relative_to(root).as_posix() for path in left if path.name.lower() not in SPLITS]
    notes = []
    if splits:
        was, one = ("were", "one of them") if len(splits) > 1 else ("was", "it")
        notes.append(f"{_splits(splits)} below {root} {was} left out; name {one}")
    if names:
        notes.append(
            f"scans in folders below {root} are taken only if called image.nii.gz; left out: {listed(names)}; name such a folder itself, or a table"
        )
    if files:
        notes.append(
            f"{root} is taken for a case folder, because of the image in it; files beside that, left out: {listed(files)}; name such a file itself"
        )
    return notes


def _splits(names: Sequence[str]) -> str:
    return f"the split{'s' * (len(names) > 1)} {listed(names)}"


def _scans_in(root: Path, channels: int, modalities: Sequence[str], left: list[Path]) -> Iterator[NamedScan]:
    """The scan of `root` where it is a case folder, else the scans among its files and in the folders below.

    A split's folder is not entered: the user has to say which one is meant. Other folders whose scans are not taken go to `left`.
    """

    def cases(folder: Path, parts: tuple[str, ...], inside: Inside) -> list[NamedScan]:
        """The scan of a case folder or of DICOM files, or several where BraTS slices lie together; none when it is no such folder."""
        files = inside.files
        entries = cases_in(folder, files) or brats_in(folder, files)
        # DICOM need not be images: an export has folders of reports, and a disc a report above the series.
        if not entries and holds_dicom(folder) and holds_images(folder):
            return [NamedScan("_".join(parts) or Path(os.path.abspath(folder)).name, folder)]
        found = [
            _scan(entry, "_".join((*parts[:-1], entry.name)), modalities)
            for entry in entries
            if _is_one_scan(entry, files, channels, modalities, below=bool(parts))
        ]
        others = [path for path in files if _is_scan(path) and not OWN_MASK.match(stem(path) or "")]
        if found and not parts:
            # Whoever names such a folder may mean them; in those below it they were left with a case.
            used = {path for entry in entries for path in entry.files}
            left.extend(path for path in others if path not in used)
        if parts and not found and (others or (parts[-1].lower() in SPLITS and inside.folders)):
            left.append(folder)
        return found

    if here := cases(root, (), contents(root)):
        yield from here
        return
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from descend(entry, cases, (entry.name,), SPLITS)
        elif (name := stem(entry)) and _is_scan(entry):
            yield NamedScan(name, entry)


def _is_scan(path: Path) -> bool:
    """Whether a file with a scan's suffix is a scan by its name: neither a benchmark's mask nor a map of ours."""
    return not TASK_MASK.match(stem(path) or "") and not is_output(path)


def _is_no_scan(path: Path, cases: set[Path]) -> bool:
    """Whether a path is a mask or result, or a folder of results alone. cases: the folders of the cases whose images were named."""
    if path.is_file():
        return not _is_scan(path) or (path.parent in cases and OWN_MASK.match(stem(path) or "") is not None)
    try:
        inside = [found for found in path.iterdir() if not found.name.startswith(".")]
    except OSError:  # `scans_at` says why
        return False
    return bool(inside) and all(found.is_file() and is_output(found) for found in inside)


def _is_one_scan(entry: Entry, files: Files, channels: int, modalities: Sequence[str], *, below: bool) -> bool:
    """Whether a folder's images are one scan, rather than several scans that lie in one folder.

    Several files are one where the model was trained on such files, or they are as many volumes as it has channels. below: whether
    the folder lies within the one that was named; pictures of other names there (a thumbnail) are no scans.
    """
    images = list(entry.images.values())
    if "" not in entry.images:
        as_many = len(images) == channels > 1 and all(i.name.lower().endswith(VOLUME_SUFFIXES) for i in images)
        return bool(modalities) or as_many
    if images[0].name.lower().endswith(VOLUME_SUFFIXES):
        return True
    others = [path for path in files if path != images[0] and not is_output(path)]
    if any(TASK_MASK.match(name := stem(path) or "") or OWN_MASK.match(name) for path in others):
        return True
    # Without masks, an image.png beside other scans is just one of them.
    return not any(path.name.lower().startswith("image") or not below for path in others)


def _scan(entry: Entry, name: str, modalities: Sequence[str]) -> NamedScan:
    images = entry.images
    files = arranged(images, modalities, entry.name) if modalities and all(images) else tuple(images.values())
    return NamedScan(name, files if len(files) > 1 else files[0])


def _first(scan: NamedScan) -> Path:
    return scan.path if isinstance(scan.path, Path) else scan.path[0]


def _nothing_in(folder: Path, left: Sequence[Path]) -> str:
    splits = list(
        descend(folder, lambda _, parts, inside: ["/".join(parts)] if parts and parts[-1].lower() in SPLITS else [])
    )
    if splits:
        return (
            f"{folder} holds {_splits(splits)}; name {'one of them, such as ' * (len(splits) > 1)}{folder / splits[0]}"
        )
    if left:
        return "; ".join(passed_over(folder, left))
    return f"no scan in {folder}: expected .nii.gz, .nrrd, .png ... files, folders of DICOM files, or case folders with image.nii.gz"
