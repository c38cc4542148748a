"""One case, whatever layout it lies in: the files of a scan and of its annotators' masks; and the names that all layouts share."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.outputs import cut_short
from cdiff.runtime.scans.sources import PICTURE_SUFFIXES, VOLUME_SUFFIXES, is_there

SPLITS = {
    "training": "train", "train": "train",
    "validation": "val", "valid": "val", "val": "val",
    "testing": "test", "test": "test",
}  # fmt: skip
"""What a folder above the cases, or a table's split column, may say."""
ARRAY, HEADER = "array", "header"
MASKS_BY = (ARRAY, HEADER)
"""How masks are laid on their image: voxel by voxel, whatever their headers say, or each where its header puts it."""
OUTPUT_ENDINGS = ("_soft", "_levels", "_annotators", "_uncertainty", "_mask", "_preview")
"""How the names of what `cdiff segment` writes end."""


@dataclass(frozen=True)
class Case:
    """One scan and the masks that its annotators drew.

    image: the scan's file; others: further files on the same grid, one modality each, which become its channels after the
    first. modalities: their names, where the layout names them. masks: one for each annotator, a file or one structure of a
    file (`structures.parted`); raters: the annotators' names, in the same order. labels: the mask values that are inside; if empty,
    those above half of the largest. masks_by: one of MASKS_BY. patient: the same for all scans of one person, so that no split
    separates them; empty when not known.
    """

    name: str
    image: Path
    masks: tuple[Path, ...]
    others: tuple[Path, ...] = ()
    modalities: tuple[str, ...] = ()
    raters: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    patient: str = ""
    masks_by: str = ARRAY

    @property
    def scan(self) -> Path | tuple[Path, ...]:
        """What `read_scan` and `Segmenter.segment` take: the image, or one file per modality."""
        return (self.image, *self.others) if self.others else self.image

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the case, images first."""
        return (self.image, *self.others, *self.masks)

    def with_modalities(self, wanted: Sequence[str]) -> Case:
        """The case with the modalities that a model was trained on, in its order; unchanged where either side names none.

        Raises CdiffError naming those that are missing.
        """
        if not wanted or not self.modalities or tuple(wanted) == self.modalities:
            return self
        images = arranged(dict(zip(self.modalities, (self.image, *self.others), strict=True)), wanted, self.name)
        return dataclasses.replace(self, image=images[0], others=images[1:], modalities=tuple(wanted))


def arranged(images: dict[str, Path], wanted: Sequence[str], where: str) -> tuple[Path, ...]:
    """The files of `wanted` modalities in that order. Raises CdiffError naming the missing ones."""
    if missing := [name for name in wanted if name not in images]:
        raise CdiffError(
            f"{where} has no {', '.join(missing)} (it has {', '.join(images)}); the model was trained on {', '.join(wanted)}"
        )
    return tuple(images[name] for name in wanted)


def must_be_in_order(paths: Sequence[str | os.PathLike[str]], wanted: Sequence[str]) -> None:
    """Raise CdiffError where the files' names say that they are the `wanted` modalities in another order.

    Only names that say it beyond doubt count: each file's holds one of them as a word, and no two the same.
    """
    said = [_modality(Path(path).name.lower(), wanted) for path in paths]
    if sorted(said) == sorted(wanted) and said != list(wanted):
        raise CdiffError(
            f"judging by their names, the files are {', '.join(said)}, but the model was trained on {', '.join(wanted)}; give them in that order"
        )


def _modality(name: str, wanted: Sequence[str]) -> str:
    """The modality that is a word of a file's name (t1_post before t1); empty where none is, or several are."""
    words = [one for one in wanted if re.search(rf"(?<![a-z0-9]){re.escape(one.lower())}(?![a-z0-9])", name)]
    longest = max(words, key=len, default="")
    return longest if all(one in longest for one in words) else ""


@dataclass
class Entry:
    """A case as a reader found it, before one structure is chosen.

    data_set: the folders above the split folder ("" when there are none); split: "train", "val", "test" or "" where nothing
    says. tasks: for each structure its masks, as (annotator, file). images: for each modality its file; the name is "" for a
    lone unnamed image. labels: the mask values that are inside unless the user says otherwise. clashes: for each structure ("" for the
    image), in words, why its files cannot be told apart.
    """

    name: str
    images: dict[str, Path]
    tasks: dict[str, dict[str, Path]] = field(default_factory=dict)
    data_set: str = ""
    split: str = ""
    patient: str = ""
    labels: tuple[int, ...] = ()
    clashes: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the case, images first, the masks of all structures."""
        return (*self.images.values(), *(path for masks in self.tasks.values() for path in masks.values()))

    def case(self, task: str | None, labels: tuple[int, ...], masks_by: str) -> Case:
        """The case with the masks of one structure (none when it lacks them)."""
        masks = self.tasks.get(task, {}) if task is not None else {}
        order = sorted(masks, key=natural)
        first, *others = self.images.values()
        return Case(
            self.name,
            first,
            tuple(masks[rater] for rater in order),
            others=tuple(others),
            modalities=tuple(name for name in self.images if name),
            raters=tuple(order),
            labels=labels or self.labels,
            patient=self.patient,
            masks_by=masks_by,
        )


def stem(path: Path) -> str | None:
    """The file's name without a scan's suffix; None when it has none of them."""
    for suffix in (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return None


def name_of(path: Path) -> str:
    """What a scan is called by its file."""
    return stem(path) or path.stem


def is_output(path: Path) -> bool:
    """Whether a file is a map, picture, page or report of ours: its name ends like one, and beside it lies its scan's report (beside a
    report the soft map).

    Also where the report has a temporary name, because the command that wrote it was killed.
    """
    if path.suffix == ".json":
        return is_there(path.with_name(f"{path.stem}_soft.nii.gz"))
    scan = stem(path)
    name, endings = (scan, OUTPUT_ENDINGS) if scan else (path.name, ("_page.html", "_levels.dcm"))
    reports = [path.parent / f"{name.removesuffix(ending)}.json" for ending in endings if name.endswith(ending)]
    return any(report.is_file() for report in reports) or (bool(reports) and path.name in cut_short(path.parent))


def natural(text: str) -> list[tuple[int, str]]:
    """A sorting key that puts seg2 before seg10, and takes seg02 for seg2."""
    parts = re.split(r"(\d+)", text)
    # Numbers are compared by length, then digits: `int` refuses more than some thousands of digits.
    return [(len(digits := part.lstrip("0")), digits) if part.isdecimal() else (-1, part.lower()) for part in parts]


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names in words, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
