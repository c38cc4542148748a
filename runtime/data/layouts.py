"""Readers of folder layouts: each looks at one folder's file names and says which cases lie in it. No file is opened here.

A layout is a small function, and `walk` carries it over a tree, with or without split folders (QUBIQ's Training and
Validation, or train and val) and data sets (QUBIQ's prostate, kidney ...) above the cases.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from cdiff.runtime.data.case import SPLITS, Entry, stem
from cdiff.runtime.data.leftover import Leftover
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.sources import VOLUME_SUFFIXES

DEPTH = 8
"""How many folders below the given one are looked into; a circle of links ends there."""

IMAGE = re.compile(r"image(?:[_-](?P<modality>.+))?$", re.IGNORECASE)
TASK_MASK = re.compile(r"(?:(?:(?P<task>task\d+)|case[\d-]+)_)?(?P<rater>seg\d+)$", re.IGNORECASE)
CASE_TASK = "task01"
"""The structure of a mask whose name has its case in the structure's place, as of some in QUBIQ 2021 (`case05_seg01.nii.gz`), or nothing."""
SCAN_OF_PATIENT = re.compile(r"(?P<patient>case\d{1,3})-\d{1,2}$", re.IGNORECASE)
"""The name of a case that is one of several of a patient, as of QUBIQ 2021's pancreas (`case1-1`, `case1-2`), whose own split keeps them
together. Longer numbers may be years."""
OWN_MASK = re.compile(r"mask(?:[_-]?(?P<rater>.+))?$", re.IGNORECASE)
BRATS = re.compile(r"(?P<head>(?:.+_)?)(?P<kind>t1ce|t1|t2|flair|seg)(?P<tail>(?:_\d+)?(?:_w)?)$", re.IGNORECASE)
BRATS_MODALITIES = ("t1", "t1ce", "t2", "flair")
"""In the order in which the implicit-ensemble code (Wolleb et al. 2022) stacks them."""
BRATS_TUMOUR = (1, 2, 3, 4)
"""The whole tumour, as that code takes it: every label (1 necrosis, 2 oedema, 3 or 4 enhancing, by year)."""
OWN_TASK = "mask"
"""The structure's name where files are called mask_ANNOTATOR."""

Found = TypeVar("Found")
Files = Sequence[Path]
Reader = Callable[[Path, Files], list[Entry]]


def cases_in(folder: Path, files: Files) -> list[Entry]:
    """The case of a folder with `image.EXT` or `image_MODALITY.EXT`, and `taskNN_segKK.EXT`, `segKK.EXT` or `mask_ANNOTATOR.EXT`.

    EXT is a volume's (NIfTI, NRRD, MetaImage) or a picture's. Modalities are ordered by name; a number is not one, since `image_001.png`
    and `image_002.png` are more likely several images. Empty when the folder holds no such image.
    """
    images: dict[str, Path] = {}
    tasks: dict[str, dict[str, Path]] = {}
    clashes: dict[str, str] = {}

    def place(slots: dict[str, Path], slot: str, file: Path, task: str, what: str) -> Path:
        """The slot's first file, which keeps it; a second volume is a clash, since nothing says which is meant."""
        first = slots.setdefault(slot, file)
        if first != file and all(path.name.lower().endswith(VOLUME_SUFFIXES) for path in (first, file)):
            clashes.setdefault(task, f"{first.name} and {file.name} in {folder} are both {what}; remove or rename one")
        return first

    for file in sorted(files, key=lambda f: (not f.name.lower().endswith(VOLUME_SUFFIXES), f.name)):
        name = stem(file) or ""
        if (match := IMAGE.match(name)) and not (match["modality"] or "").isdigit():
            place(images, match["modality"] or "", file, "", "the case's image")
        elif match := TASK_MASK.match(name):
            task = two_digits(match["task"] or CASE_TASK)
            place(tasks.setdefault(task, {}), two_digits(match["rater"]), file, task, "one annotator's mask")
        elif match := OWN_MASK.match(name):
            first = place(tasks.setdefault(OWN_TASK, {}), match["rater"] or "1", file, OWN_TASK, "one annotator's mask")
            if (stem(first) or "").lower() != name.lower():
                text = f"{first.name} and {file.name} in {folder} are masks of one annotator; rename one of them"
                clashes.setdefault(OWN_TASK, text)
    if not images:
        return []
    if "" in images:  # one file that holds everything
        images = {"": images[""]}
    elif len(images) > 1 and all(_has_masks(name, tasks.get(OWN_TASK, {})) for name in images):
        name = min(images)
        clashes[OWN_TASK] = (
            f"{folder} holds several images with masks of their own (image_{name}, mask_{name} ...); give each a folder, "
            "or name them in a table"
        )
    return [Entry(_called(folder), dict(sorted(images.items())), tasks, clashes=clashes)]


def two_digits(name: str) -> str:
    """The name of a structure or an annotator as QUBIQ writes it: `Task1` and `task01` are one, and so are `seg1` and `seg01`."""
    return re.sub(r"\d+", lambda number: number[0].lstrip("0").zfill(2), name.lower())


def _has_masks(image: str, raters: Iterable[str]) -> bool:
    """Whether masks are named after one of several images, `mask_p1` or `mask_p1_anna` after `image_p1`: a modality has none of its own."""
    return any(re.match(rf"{re.escape(image)}([\W_]|$)", rater) for rater in raters)


def brats_in(folder: Path, files: Files) -> list[Entry]:
    """BraTS slices as the implicit-ensemble code lays them out, `brats_train_001_t1_080_w.nii.gz` beside `_t1ce_`, `_t2_`,
    `_flair_` and, where known, `_seg_`; also whole BraTS volumes, `BraTS20_Training_001_t1.nii.gz` and so on.

    The label map becomes one annotator's mask: the whole tumour unless labels are chosen. `image_t1.nii.gz` beside
    `image_flair.nii.gz` is a case folder's (`cases_in`).
    """
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for file in files:
        name = stem(file) or ""
        if file.name.lower().endswith(VOLUME_SUFFIXES) and (match := BRATS.match(name)) and not IMAGE.match(name):
            found.setdefault((match["head"], match["tail"]), {}).setdefault(match["kind"].lower(), file)
    entries = []
    for (head, tail), kinds in sorted(found.items()):
        images = {name: kinds[name] for name in BRATS_MODALITIES if name in kinds}
        if len(images) < 2:  # one such name alone is a scan that somebody named so
            continue
        tasks = {"seg": {"seg": kinds["seg"]}} if "seg" in kinds else {}
        patient = head.strip("_")
        name = _called(folder) if len(found) == 1 else f"{patient}{tail}"
        entries.append(Entry(name, images, tasks, patient=patient, labels=BRATS_TUMOUR))
    return entries


def _is_mask(name: str) -> bool:
    return bool(TASK_MASK.match(name) or OWN_MASK.match(name))


def _called(folder: Path) -> str:
    """A folder's name as it is given, also for `.`; a link has its own, not that of what it leads to."""
    return Path(os.path.abspath(folder)).name


READERS: dict[str, Reader] = {"cases": cases_in, "brats": brats_in}
TABLE = "table"
LAYOUTS = (*READERS, TABLE)


def walk(root: Path, readers: Sequence[str], left: Leftover) -> Iterator[tuple[str, Entry]]:
    """Every case below `root` that one of `readers` knows, with the reader's name; folders in the order of their names.

    What is passed over is noted in `left`. Raises CdiffError for a folder that cannot be listed.
    """

    def read(folder: Path, _: tuple[str, ...], inside: Inside) -> list[tuple[str, Entry]]:
        return [(name, entry) for name in readers for entry in READERS[name](folder, inside.files)]

    def below(folder: Path, parts: tuple[str, ...]) -> list[tuple[str, Entry]]:
        try:
            return list(descend(folder, read, (*parts, folder.name)))
        except CdiffError:  # a folder below a case, which is not needed
            return []

    def look(folder: Path, parts: tuple[str, ...], inside: Inside) -> list[tuple[str, Entry]]:
        here = read(folder, parts, inside)
        if here and len(parts) < DEPTH:
            deeper = {one: [entry for _, entry in below(one, parts)] for one in inside.folders}
            drawn = any(entry.tasks for entries in deeper.values() for entry in entries)
            if drawn and not any(entry.tasks for _, entry in here):  # a figure, called image.png, of the cases below it
                left.strays += [entry.files[0] for _, entry in here]
                here = []
            else:
                left.below += [one for one, entries in deeper.items() if entries]
        # A case has a folder of its own, unless several lie in one folder or the split folder itself holds them.
        own = len(here) == 1 and not (parts and parts[-1].lower() in SPLITS)
        for _, entry in here:
            _place(entry, parts[:-1] if own else parts, parts[:-1])
            if not entry.patient and (match := SCAN_OF_PATIENT.match(entry.name)):
                entry.patient = match["patient"]
        masks = [file for file in inside.files if _is_mask(stem(file) or "")]
        left.see(folder, inside.files, [entry for _, entry in here], masks=masks)
        left.links += inside.lost
        return here

    return descend(root, look)


def descend(
    folder: Path,
    look: Callable[[Path, tuple[str, ...], Inside], Sequence[Found]],
    parts: tuple[str, ...] = (),
    closed: Container[str] = (),
) -> Iterator[Found]:
    """What `look` finds in `folder`, or, where that is nothing, in the folders in it and those below, in the order of their names.

    look: called as look(folder, parts, inside). parts: the folders' names from below the first folder down to this one. closed: names
    in lower case; a folder with such a name is looked at, but those in it are not.
    Hidden folders are left out. Raises CdiffError for a folder that cannot be listed.
    """
    inside = contents(folder)
    found = look(folder, parts, inside)
    yield from found
    if found or len(parts) == DEPTH or (parts and parts[-1].lower() in closed):
        return
    for one in inside.folders:
        yield from descend(one, look, (*parts, one.name), closed)


class Inside(NamedTuple):
    """What a folder holds, in the order of the names, hidden things left out.

    files: volumes and pictures, and links with such names to missing files (data that is fetched piece by piece has them), so that
    reading them says so. lost: other links to what is not there.
    """

    folders: list[Path]
    files: list[Path]
    lost: list[Path]


def contents(folder: Path) -> Inside:
    """List a folder. Raises CdiffError when it cannot be listed."""
    found = Inside([], [], [])
    try:
        # Raises for a folder that may be listed but not entered: from Python 3.14 on Path.is_dir and the like just say no of what is in it.
        os.stat(os.path.join(folder, os.curdir))
        for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
            if path.is_dir():
                found.folders.append(path)
            elif stem(path) is None:
                found.lost.extend([path] if path.is_symlink() and not path.exists() else [])
            elif path.is_file() or not path.exists():
                found.files.append(path)
    except OSError as error:
        raise CdiffError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from None
    return found


def _place(entry: Entry, above: tuple[str, ...], folders: tuple[str, ...]) -> None:
    """Set an entry's data set, split and patient by the folders between the root and the case.

    Where several of `folders` name one split, as when QUBIQ's archives lie in train and valid (`train/prostate/Training`), the
    last of them holds the cases. Another split's name below the first is a name like any other (a test and a retest).
    """
    first = next((part.lower() for part in above if part.lower() in SPLITS), None)
    if first is None:
        entry.data_set = "/".join(above)
        return
    entry.split = SPLITS[first]
    same = [i for i, part in enumerate(folders) if SPLITS.get(part.lower()) == entry.split]
    split = same[-1] if same else len(above) - 1
    entry.data_set = "/".join(part for part in above[:split] if part.lower() not in SPLITS)
    if below := above[split + 1 :]:
        entry.name = "/".join((*below, entry.name))
        entry.patient = entry.patient or below[0]
