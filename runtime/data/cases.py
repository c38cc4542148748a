"""The one entry to data on disk: from any layout to cases by split (`find_cases`), and from a case to slices (`read_case`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.case import ARRAY, MASKS_BY, SPLITS, Case, Entry, listed, natural
from cdiff.runtime.data.dicom_mask import Opened
from cdiff.runtime.data.layouts import LAYOUTS, OWN_TASK, READERS, TABLE, two_digits, walk
from cdiff.runtime.data.leftover import BESIDE, Leftover
from cdiff.runtime.data.masks import mask_slices, read_mask
from cdiff.runtime.data.oddities import Oddities
from cdiff.runtime.data.table import SUFFIXES, is_table, names_scans, read_table
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scans.sources import is_there
from cdiff.runtime.words import several

__all__ = ["Case", "DataSet", "Problem", "find_cases", "read_case", "read_masks"]

EXPECTED = (
    "folders with image.nii.gz and task01_seg01.nii.gz, task01_seg02.nii.gz ..., or a table of them (docs/own-data.md)"
)
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
EXAMPLE = "task01_seg01.nii.gz ..."
MOST = 12
"""Most data sets that a message names."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one case as its files are laid out."""

    split: str
    case: str
    text: str


class DataSet(dict[str, list[Case]]):
    """The cases by split: "train", "val", "test" where the data says, else "all". Each case has at least one mask.

    layout: the reader that found them. task: the structure that was chosen or is the only one. modalities: the
    names of the images' files, in the order of the channels; empty for one image file per case. unlabelled: cases without a
    mask, by split. problems: cases that cannot be used. notes: what a user should know, one line each. table: the file that names the
    cases, where one does.
    """

    def __init__(self, layout: str = "cases", task: str | None = None) -> None:
        super().__init__()
        self.layout, self.task = layout, task
        self.modalities: tuple[str, ...] = ()
        self.unlabelled: dict[str, list[Case]] = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.table: Path | None = None


def find_cases(
    root: Path,
    task: str | None = None,
    *,
    layout: str = "auto",
    labels: tuple[int, ...] = (),
    masks_by: str = ARRAY,
    strict: bool = True,
) -> DataSet:
    """The cases below `root`, a folder at any level of the data or a table of them.

    task: which structure, when there are several (`task01`), or which data set of a benchmark (`prostate`), or both
    (`prostate/task01`); needed only then. layout: one of `LAYOUTS`, or "auto". labels: the values of the masks that are
    inside. masks_by: how masks are laid on their image, one of MASKS_BY. strict: raise for the first case that cannot be used;
    otherwise such cases are left out and listed in `problems`.
    Raises CdiffError when there is no case, none has a mask, or what is meant is not clear.
    """
    if masks_by not in MASKS_BY:
        raise CdiffError(f"masks_by={masks_by} is not known; use {' or '.join(MASKS_BY)}")
    notes: list[str] = []
    layout, entries, table = _entries(root, layout, notes)
    asked = task = (task or "").strip("/") or None  # a shell's completion ends a folder's name with a slash
    entries, task = _one_data_set(root, entries, task, notes)
    chosen = _one_task(root, entries, task, asked if task is None else None)
    found = DataSet(layout, chosen)
    found.notes, found.table = notes, table
    found.modalities = _modalities([entry for entry in entries if OWN_TASK not in entry.clashes] or entries)
    for entry in entries:
        _sort_in(found, entry.case(chosen, labels, masks_by), entry)
    if strict and found and found.problems:
        raise CdiffError(found.problems[0].text)
    if "all" in found and len(found) > 1:
        stray = found.pop("all")
        found.notes.append(
            f"{several(len(stray), 'case')} beside the split folders ({listed([c.name for c in stray])}): left out"
        )
    if not found:
        many = f"none of the {len(entries)} cases in {root} has a mask and can be used"
        reason = found.problems[0].text if found.problems else "there is nothing to learn from or to compare with"
        # Files beside the cases may be masks under other names.
        beside = "".join(f"; {note}" for note in notes if note.startswith(BESIDE))
        raise CdiffError(f"{many if len(entries) > 1 else f'the case in {root} cannot be used'}: {reason}{beside}")
    for split, cases in found.unlabelled.items():
        names = listed([case.name for case in cases])
        found.notes.append(
            f"{several(len(cases), f'{split} case')} without a mask{f' of {chosen}' if task else ''} ({names}): left out"
        )
    return found


def _entries(root: Path, layout: str, notes: list[str]) -> tuple[str, list[Entry], Path | None]:
    """The layout, its cases and the table that names them, if one does. Raises CdiffError when several layouts are there, or none."""
    if layout not in (*LAYOUTS, "auto"):
        raise CdiffError(f"the layout {layout!r} is not known; use auto, {', '.join(LAYOUTS)}")
    there = is_there(root)
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES or layout not in (TABLE, "auto"):
            raise CdiffError(
                f"{root} is a file; give a folder of case folders, or a table (.csv) that names images and masks"
            )
        return TABLE, read_table(root, notes), root
    if not root.is_dir():
        raise CdiffError(
            f"{root} {'is not a folder' if there else 'does not exist'}; give a folder of case folders, or a table (.csv) of files (docs/own-data.md)"
        )
    by_layout: dict[str, list[Entry]] = {}
    left = Leftover()
    for name, entry in walk(root, [layout] if layout in READERS else list(READERS) if layout == "auto" else [], left):
        by_layout.setdefault(name, []).append(entry)
    named = (
        [path for path in sorted(root.iterdir()) if path.suffix.lower() in SUFFIXES]
        if layout in (TABLE, "auto")
        else []
    )
    tables = [path for path in named if is_table(path)]
    if len(by_layout) + len(tables) > 1:
        tables = [path for path in tables if names_scans(path)]
    if by_layout and len(tables) == 1 and _names_all(tables[0], by_layout.values()):
        by_layout = {}
    if len(by_layout) + bool(tables) > 1 or len(tables) > 1:
        what = [f"{name} ({several(len(entries), 'case')})" for name, entries in by_layout.items()]
        what += [f"the table {path.name}" for path in tables]
        raise CdiffError(
            f"{root} can be read in several ways: {', '.join(what)}; choose with --layout, or give one folder or table"
        )
    if tables:
        return TABLE, read_table(tables[0], notes), tables[0]
    if not by_layout:
        raise CdiffError(
            f"no case in {root}: expected {EXPECTED}{left.lacking_image()}{_why_no_table(named)}{_packed(root)}"
        )
    notes += left.told(root)
    return *next(iter(by_layout.items())), None


def _names_all(table: Path, layouts: Iterable[Sequence[Entry]]) -> bool:
    """Whether a table names every image that other layouts found: the table then decides how files belong together."""
    try:
        told = {image.resolve() for entry in read_table(table, []) for image in entry.images.values()}
    except CdiffError:
        return False
    return all(i.resolve() in told for entries in layouts for entry in entries for i in entry.images.values())


def _why_no_table(files: Sequence[Path]) -> str:
    """Why a folder's only CSV is not a table of cases, to end a message with; "" where there are none or several."""
    if len(files) == 1:
        try:
            read_table(files[0], [])
        except CdiffError as error:
            return f"; {error}"
    return ""


def _packed(root: Path) -> str:
    """A hint that a folder without cases holds archives, or files with Windows paths for names, to end a message with; else ""."""
    names = sorted(path.name for path in root.iterdir())
    if paths := [name for name in names if "\\" in name]:
        return f"; {listed(paths, 2)} should lie in folders: unpack the archive again with a program that takes \\ for /, such as unzip"
    archives = [name for name in names if name.lower().endswith(ARCHIVES)]
    return f"; unpack {listed(archives)} first" if archives else ""


def _one_data_set(
    root: Path, entries: list[Entry], task: str | None, notes: list[str]
) -> tuple[list[Entry], str | None]:
    """The entries of the one data set that is meant, and what is left of `task` (the structure).

    Where only one data set has masks, folders without any, such as those whose masks a benchmark keeps back, are left out with a note.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.data_set, []).append(entry)
    groups = _joined(groups)
    head, _, tail = (task or "").rpartition("/")
    drawn = [name for name, group in groups.items() if any(entry.tasks for entry in group)]
    if len(groups) > 1 and len(drawn) == 1 and not groups.keys() & ({task, head} - {""}):
        bare = [
            f"{name or 'the folder itself'} ({several(len(groups[name]), 'case')})"
            for name in groups
            if name != drawn[0]
        ]
        notes.append(f"folders of cases without masks, left out: {listed(bare)}")
        groups = {drawn[0]: groups[drawn[0]]}
    if len(groups) == 1:
        ((name, group),) = groups.items()
        if name and task in (name, name.rpartition("/")[2]):
            return group, None
        return group, tail if head and head in (name, name.rpartition("/")[2]) else task
    if task in groups:
        return groups[task], None
    if head and head in groups:
        return groups[head], tail
    kinds = listed(
        [f"{name or 'the folder itself'} ({several(len(group), 'case')})" for name, group in groups.items()], MOST
    )
    name = next(filter(None, [*drawn, *groups]))
    patients = "if each is a patient of one data set, put them in a split folder, such as Training"
    together = "to use all as one data set, put their cases in one folder" if "" in groups else patients
    raise CdiffError(
        f"{root} holds several data sets: {kinds}; name one, such as --task {name}, or give its folder; {together}"
    )


def _joined(groups: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """Data sets joined by their last folder's name: QUBIQ ships training and validation in two trees, with the same names in both.

    Trees without a split folder, as 2021's training cases of the pancreas have none, are the splits that words of the folders above
    them name (`training_data_v3_QC`); one that nothing names is the training split beside a tree with another split. Trees that hold
    the same split stay apart.
    """
    by_name: dict[str, list[str]] = {}
    for path in groups:
        by_name.setdefault(path.rpartition("/")[2], []).append(path)
    joined: dict[str, list[Entry]] = {}
    for name, paths in by_name.items():
        held = {path: {entry.split for entry in groups[path]} for path in paths}
        bare = [path for path in paths if held[path] == {""}] if len(paths) > 1 else []
        told = {path: _told_by_words(path) for path in bare}
        if (
            len(bare) == 1
            and not told[bare[0]]
            and all(held[path].isdisjoint({"", "train"}) for path in {*paths} - {*bare})
        ):
            told[bare[0]] = "train"
        if all(told.values()):
            held |= {path: {split} for path, split in told.items()}
        if max(Counter(split for splits in held.values() for split in splits).values()) > 1:
            joined |= {path: groups[path] for path in paths}
            continue
        for path in bare:
            for entry in groups[path]:
                entry.split = told[path]
        joined[name] = [entry for path in paths for entry in groups[path]]
    return joined


def _told_by_words(path: str) -> str:
    """The one split that words of the folders above a data set name; "" where none does, or several do."""
    words = re.findall("[a-z]+", path.rpartition("/")[0].lower())
    found = {SPLITS[word] for word in words if word in SPLITS}
    return found.pop() if len(found) == 1 else ""


def _one_task(root: Path, entries: list[Entry], task: str | None, data_set: str | None) -> str | None:
    """The structure that is meant; None when no case has any mask. data_set: the one that the user has named already."""
    counts = Counter(name for entry in entries for name, masks in entry.tasks.items() if masks)
    kinds = ", ".join(f"{name} (in {several(counts[name], 'case')})" for name in sorted(counts, key=natural))
    if task is not None:
        for known in (task, two_digits(task)):
            if known in counts:
                return known
        raise CdiffError(
            f"no case in {root} has masks of the task {task!r}; {f'its masks are of {kinds}' if kinds else 'it holds no mask at all'}"
        )
    if len(counts) > 1:
        example = "/".join(filter(None, (data_set, min(counts, key=natural))))
        raise CdiffError(f"{root} has masks of several tasks: {kinds}; name one, such as --task {example}")
    return next(iter(counts), None)


def _modalities(entries: Iterable[Entry]) -> tuple[str, ...]:
    """The modalities that most cases have, in their order; of equally frequent lists the longest."""
    counts = Counter(tuple(entry.images) for entry in entries)
    return tuple(name for name in max(counts, key=lambda names: (counts[names], len(names))) if name)


def _sort_in(found: DataSet, case: Case, entry: Entry) -> None:
    task, split = found.task, entry.split or "all"
    if clash := entry.clashes.get("") or entry.clashes.get(task or ""):
        found.problems.append(Problem(split, case.name, clash))
    elif case.modalities != found.modalities:
        lacking = [name for name in found.modalities if name not in case.modalities]
        what = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(case.modalities)} as well"
        others = f"other cases have {', '.join(found.modalities) or 'one image'}"
        found.problems.append(Problem(split, case.name, f"{case.image.parent} {what}, but {others}; make them alike"))
    elif case.masks:
        found.setdefault(split, []).append(case)
    elif split in ("val", "test") or entry.tasks:  # benchmarks keep such masks back; a case may show one structure only
        found.unlabelled.setdefault(split, []).append(case)
    else:
        wanted = f" {task or 'task01'}_seg01.nii.gz" if found.layout == "cases" else ""
        remedy = "add its masks or remove the case"
        if found.layout == "brats":
            first = case.modalities[0]
            wanted = f" (its name must have seg in place of {first})"
            remedy += f"; with several annotators' masks ({EXAMPLE}), call the modalities image_{first} and so on"
        text = f"{case.name} ({case.image.parent}) has an image but no mask{wanted}; {remedy}"
        found.problems.append(Problem(split, case.name, text))


def read_case(
    case: Case, slice_axis: int = 2, channels: int = 1, odd: Oddities | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Image and masks as slices: float32 [S, channels, H, W] (raw intensities) and bool [S, C_case, H, W].

    2-D files make one slice. Channels are the case's files, or with channels > 1 and one file its last axis (as in QUBIQ's
    tumour files) or a picture's colours. odd: collects what the user should be told.
    Raises CdiffError for an unreadable file, a wrong number of dimensions or files, files of different grids, a non-finite
    image, or a mask of another shape, or one that its header puts outside the image (see `mask_slices`).
    """
    scan = read_scan(case.scan, channels=channels, slice_axis=slice_axis)
    if odd is not None:
        odd.see_grid(case, scan.grid)
    return scan.slices, read_masks(case, scan.grid, odd)


def read_masks(case: Case, grid: Grid, odd: Oddities | None = None) -> NDArray[np.bool_]:
    """The masks of a case whose image is read, as slices of its grid: bool [S, C_case, H, W].

    odd: collects what the user should be told. Raises CdiffError for an unreadable file, a mask of another shape than the image or
    that its header puts outside it (see `mask_slices`), and a case without a mask.
    """
    masks = []
    opened: Opened = {}
    for path in case.masks:
        mask = read_mask(path, grid, opened)
        drawn = mask_slices(mask, grid, case, path)
        masks.append(drawn)
        if odd is not None:
            odd.see_mask(case, path, mask, drawn, grid)
    if not masks:
        raise CdiffError(f"{case.name} has no mask; add one for each annotator")
    return np.stack(masks, axis=1)
