"""What training settles about a data set before it reads the cases: levels, channels, and which cases are kept for validation.

Here, not in the trainer, so that `cdiff data check` (which needs no PyTorch) says what training will do.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cdiff.runtime.data.case import HEADER, Case, listed
from cdiff.runtime.data.cases import DataSet
from cdiff.runtime.data.masks import counted, read_mask
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.picture import read_picture
from cdiff.runtime.scans.shapes import without_ones
from cdiff.runtime.scans.sources import PICTURE_SUFFIXES, read_bytes
from cdiff.runtime.scans.volume import volume_shape
from cdiff.runtime.variants import ANNOTATOR, CONSENSUS, Variant
from cdiff.runtime.words import several

VAL_FRACTION = 0.1
HELD_OUT = "held out"
"""These words are in the note of a training whose data names no cases to validate on."""
LOOKED_AT = 4
"""Most cases that are opened to count the channels."""


@dataclass(frozen=True)
class Partition:
    """The cases to train on and those to validate on, and notes, a line each, on what a user should know of the choice.

    held_out: where the data names no validation cases, how they were chosen. It is kept in the bundle, for `held_out_of` to find them.
    """

    train: list[Case]
    val: list[Case]
    notes: tuple[str, ...] = ()
    held_out: Mapping[str, Any] | None = None


def partition(
    found: DataSet, root: Path, val_fraction: float = VAL_FRACTION, seed: int = 0, levels: int | None = None
) -> Partition:
    """The data's own split; without a validation split, `val_fraction` of the training cases (by patient, seeded).

    levels: how many masks a case must have to be used; where any case has as many, at least one such is held out.
    Raises CdiffError without training cases, with a single one, or where that share is all of them.
    """
    train, val = training_cases(found, root), found.get("val", [])
    why = "the validation cases have no masks" if found.unlabelled.get("val") else "no validation folder"
    split = Partition(train, val) if val else _hold_out(root, train, val_fraction, seed, why, levels)
    return replace(split, notes=(*split.notes, *_torn(found)))


def _torn(found: DataSet) -> list[str]:
    """A line on patients whom the data has in several splits, where it names them."""
    splits = Counter(patient for cases in found.values() for patient in {case.patient for case in cases} if patient)
    torn = [patient for patient, count in splits.items() if count > 1]
    return (
        [f"patients in several splits ({listed(torn)}): if they are the same people, scores are too good"]
        if torn
        else []
    )


def held_out_of(found: DataSet, root: Path, told: Mapping[str, Any]) -> list[Case]:
    """The cases that a training held out of this very data, by what its bundle says of them (`told`); none where the data is other.

    A case is recognised by its name, the number of its masks and the length of its image's file: so the data may have been moved, no
    voxel is read, and other data whose cases have the same names is told apart.
    """
    try:
        fraction, seed, levels, cases = (told[key] for key in ("val_fraction", "seed", "levels", "cases"))
        split = partition(found, root, fraction, int(seed), levels)  # not None, for which NumPy would draw one
    except (KeyError, TypeError, ValueError, OverflowError, CdiffError):  # what is told may come from anywhere
        return []
    return split.val if split.held_out and split.held_out["cases"] == cases else []


def training_cases(found: DataSet, root: Path) -> list[Case]:
    """The training split, or all cases where there are no splits. Raises CdiffError when there are none."""
    cases = found.get("train", found.get("all", []))
    if not cases:
        raise CdiffError(f"{root} has no training cases (found {', '.join(found)}); name the folder Training or train")
    return cases


def _hold_out(root: Path, cases: list[Case], fraction: float, seed: int, why: str, levels: int | None) -> Partition:
    if len(cases) < 2:
        raise CdiffError(
            f"{root} has one training case, and that is not enough: at least two are needed, one of them for validation"
        )
    groups: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        groups.setdefault(case.patient or f"case {i}", []).append(i)
    notes = []
    if len(groups) < 2:
        groups = {str(i): [i] for i in range(len(cases))}
        notes.append(
            f"all {len(cases)} training cases are of one patient ({cases[0].patient}): validation sees the same patient, "
            "and its scores are too good"
        )
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    members = list(groups.values())
    number = max(1, round(fraction * len(groups)))
    if number >= len(groups):
        raise CdiffError(
            f"val_fraction={fraction:g} of {several(len(cases), 'case')} leaves none to train on; lower it, or name the validation cases"
        )
    usable = [place for place in order if any(levels in (None, len(cases[i].masks)) for i in members[place])]
    if usable and not set(usable) & set(order[:number]):
        order.insert(0, usable[0])
    held = {i for place in order[:number] for i in members[place]}
    notes.insert(0, f"{why}: {HELD_OUT} {len(held)} of {len(cases)} cases for validation")
    train, val = ([case for i, case in enumerate(cases) if (i in held) == kept] for kept in (False, True))
    told = {"val_fraction": fraction, "seed": seed, "levels": levels, "cases": _fingerprint(train, val)}
    return Partition(train, val, tuple(notes), told)


def _fingerprint(*parts: list[Case]) -> str:
    """SHA-256 of what the cases are recognised by, part by part."""
    known = [sorted((case.name, len(case.masks), _length(case.image)) for case in part) for part in parts]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _length(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def count_annotators(cases: Sequence[Case]) -> int:
    """C as the data has it: the largest number of masks that at least half of the cases have."""
    counts = Counter(len(case.masks) for case in cases)
    return max(n for n in counts if sum(k for m, k in counts.items() if m >= n) * 2 >= len(cases))


def none_has(name: str, cases: Sequence[Case], levels: int, variant: Variant = CONSENSUS) -> str:
    """The message that no case of a split has as many masks as levels, and which setting takes them all the same."""
    counts = sorted({len(case.masks) for case in cases})
    if counts[-1] >= levels:
        remedy = f"--set levels={counts[-1]} matches them"
    elif variant is ANNOTATOR:
        remedy = "variant annotator learns each annotator's masks and needs them all; another variant with --set missing_raters=as-is does not"
    else:
        remedy = "--set missing_raters=as-is uses the masks that there are"
    return f"no {name} case has {several(levels, 'mask')} (they have {' or '.join(map(str, counts))}); {remedy}"


def count_channels(cases: Sequence[Case]) -> int:
    """How many channels the images have, at most, in the first few cases: as many as a case has files; or the last axis of a
    NIfTI, where its masks lack it (QUBIQ's tumour files); or 3 for a picture whose colours differ.

    A file that cannot be read counts as one channel here; reading it for use says what is wrong.
    """
    return max((_channels(case) for case in cases[:LOOKED_AT]), default=1)


def _channels(case: Case) -> int:
    if case.others:
        return 1 + len(case.others)
    try:
        if case.image.name.lower().endswith(PICTURE_SUFFIXES):
            pixels, _ = read_picture(read_bytes(case.image), case.image, 3)
            return 1 if (pixels == pixels[..., :1]).all() else 3
        image = without_ones(volume_shape(case.image))
        mask = counted(read_mask(case.masks[0]).values.shape)
    except CdiffError:
        return 1
    if case.masks_by == HEADER and len(image) == 4:  # masks may then be of any shape
        return image[-1]
    return image[-1] if len(image) > 2 and counted(image[:-1]) == mask else 1
