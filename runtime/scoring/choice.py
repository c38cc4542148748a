"""Which cases are scored, and how their masks are read: as asked or else as in the model's training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdiff.runtime.data.case import SPLITS
from cdiff.runtime.data.cases import Case, DataSet
from cdiff.runtime.data.partition import HELD_OUT, held_out_of
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest


def choose_split(
    found: Mapping[str, list[Case]], wanted: str | None = None, held: list[Case] | None = None
) -> tuple[str, list[Case]]:
    """The name and cases of the split to score: the one asked for, else test, else val, else all.

    "all" joins the splits that there are; cases with the same name in two of them are called split/name. held: the cases that the
    model's training held out of this data, which serve as val where the data has none.
    Raises CdiffError when the data lacks the split asked for, or none is asked for and there is only a training split.
    """
    if wanted == "all":
        names = Counter(case.name for cases in found.values() for case in cases)
        return "all", [
            replace(case, name=f"{split}/{case.name}") if names[case.name] > 1 else case
            for split, cases in found.items()
            for case in cases
        ]
    splits = {**found, "val": held} if held else found
    for split in (wanted,) if wanted else ("test", "val", "all"):
        if split in splits:
            return split, splits[split]
    there = ", ".join(found)
    if wanted:
        raise CdiffError(f"there is no split {wanted} in this data, which has {there}; choose one with --split")
    raise CdiffError(
        f"the data has only the split {there}; name it with --split to score cases that may have been trained on"
    )


def held_out(found: DataSet, root: Path, manifest: Manifest) -> list[Case]:
    """The cases that the model's training held out of this very data for validation; [] where the data has a split val, or is other data."""
    told = _data_of(manifest).get("held_out")
    return held_out_of(found, root, told) if isinstance(told, Mapping) and not found.get("val") else []


def may_be_too_good(manifest: Manifest, split: str, count: int, root: Path) -> str | None:
    """A warning that the cases to score, from `root`, may include those that the model learned from; None where they or its training name
    splits.

    For use where `held_out` finds none: the data is other data, or the bundle is too old to list the cases that were held out.
    """
    if split != "all":
        return None
    if SPLITS.get(root.resolve().name.lower()) == "train":
        return (
            f"{root} has the name of a training split: if the model learned from these cases, the scores are too good"
        )
    if HELD_OUT not in str(_data_of(manifest)):
        return None
    return (
        f"no split is named, so {'the only case is' if count == 1 else f'all {count} cases are'} scored; the model was trained on data without a validation split: if these are "
        "the same cases, the scores are too good; put cases that it never saw in a folder Testing, or name them test in a table"
    )


def _data_of(manifest: Manifest) -> Mapping[str, Any]:
    """What the bundle says about the data that the model was trained on."""
    data = manifest.training.get("data")
    return data if isinstance(data, Mapping) else {}


def labelled_as_trained(
    cases: list[Case], manifest: Manifest, asked: tuple[int, ...], tell: Callable[[str], None]
) -> tuple[list[Case], tuple[int, ...]]:
    """The cases, set to count as inside the mask values `asked` for or else those of the model's training; and these values.

    Without any values, each case's layout decides what is inside. tell: called with a line where the two sets differ.
    """
    trained = manifest.labels_inside
    if asked and trained and set(asked) != set(trained):
        tell(f"labels {_numbers(asked)} are scored as inside, but the model was trained with {_numbers(trained)}")
    inside = asked or trained
    return ([replace(case, labels=inside) for case in cases] if inside else cases), inside


def laid_as_trained(cases: list[Case], manifest: Manifest, asked: str | None) -> list[Case]:
    """The cases, with their masks aligned as `asked` (one of MASKS_BY) or else as in the model's training."""
    return [replace(case, masks_by=asked or manifest.masks_by) for case in cases]


def trained_task(manifest: Manifest) -> str | None:
    """The structure that a model was trained on, such as task02; None where its bundle does not name it in this form."""
    last = manifest.task.rpartition("/")[2]
    return last if re.fullmatch(r"task\d+", last) else None


def _numbers(labels: tuple[int, ...]) -> str:
    return ",".join(map(str, labels))
