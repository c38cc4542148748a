"""What a check sees in one case: its files one by one, what they hold, and what is odd."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.case import Case
from cdiff.runtime.data.dicom_mask import NoImage, Opened
from cdiff.runtime.data.masks import Mask, mask_slices, read_mask
from cdiff.runtime.data.oddities import holds_a_picture, is_above, is_negative, marks_the_background, misplaced, outside
from cdiff.runtime.data.turned import gains
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.lie import Lie, lie_of
from cdiff.runtime.scans.scan import Scan, read_scan
from cdiff.runtime.scoring.metrics import dice
from cdiff.runtime.words import by

SEVERITIES = ("error", "warning", "note")
"""An error makes training impossible, a warning should be looked at, a note is good to know."""
SHOWN_VALUES = 6


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed: how bad, what kind, in which case (empty: the whole data set), in a line; and the case's split, since
    several splits may have a case of that name."""

    severity: str
    kind: str
    case: str
    text: str
    split: str = ""


@dataclass
class Look:
    """What was seen of one case; `row` is its entry in the report, `shape` its image's.

    image: a hash of the image's voxels; empty where it was not read, or has one value everywhere.
    at_least: the shares of pixels that at least 1, 2 ... of the annotators marked; None unless all files could be read.
    scores: for each slice that anyone marked the mean Dice over the pairs of annotators; scores_all: of slices that all marked.
    with_others: by annotator, for each slice that anyone marked the mean Dice with the others.
    turned: by annotator, what `turned.gains` says. lie: how the image's slices lie in the patient.
    """

    case: Case
    split: str
    row: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    image: str = ""
    at_least: NDArray[np.float64] | None = None
    scores: list[float] = field(default_factory=list)
    scores_all: list[float] = field(default_factory=list)
    with_others: dict[str, list[float]] = field(default_factory=dict)
    turned: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    best_slice: int = 0
    lie: Lie | None = None

    @property
    def readable(self) -> bool:
        """Whether training could read it."""
        return self.at_least is not None

    def tell(self, severity: str, kind: str, text: str) -> None:
        """Add a finding of this case."""
        self.findings.append(Finding(severity, kind, self.case.name, text, self.split))


def look_at(case: Case, split: str, channels: int, slice_axis: int, severity: str) -> Look:
    """Read a case's files one by one and note what is odd. severity: of a file that cannot be used."""
    look = Look(case, split)
    look.row |= {"case": case.name, "split": split, "annotators": len(case.masks), "raters": list(case.raters)}
    scan: Scan | None = None
    try:
        scan = read_scan(case.scan, channels=channels, slice_axis=slice_axis)
    except CdiffError as error:
        look.tell(severity, "unreadable", str(error))
    drawn, read = [], {}
    opened: Opened = {}
    grid = scan.grid if scan is not None else None
    for path in case.masks:
        try:
            mask = read[path] = read_mask(path, grid, opened)
            for note in mask.notes:
                look.tell("warning", "contours", f"{path.name} {note}")
            if scan is not None:
                drawn.append(mask_slices(mask, scan.grid, case, path))
                _place(look, path, mask, scan)
        except NoImage:  # the image's own error is told already
            continue
        except CdiffError as error:
            look.tell(severity, "shape" if " has shape " in str(error) else "unreadable", str(error))
    _values(look, read)
    if scan is not None:
        _kinds(look, read, scan)
        _describe(look, scan)
        if len(drawn) == len(case.masks):
            _measure(look, np.stack(drawn, axis=1))
    return look


def _values(look: Look, masks: dict[Path, Mask]) -> None:
    """Tell which values the masks hold: 0 and 1, or 0 and one other, are plain; the rest is read by a rule that a user should know."""
    labels = look.case.labels
    odd: dict[tuple[str, str], list[str]] = {}
    for path, mask in masks.items():
        values = np.unique(mask.values)
        some = ", ".join(f"{value:g}" for value in values[:SHOWN_VALUES]) + " ..." * (len(values) > SHOWN_VALUES)
        if is_negative(mask.values):
            text = f"{some}, nothing above 0: no pixel counts as inside; store what was drawn as 1"
            odd.setdefault(("warning", text), []).append(path.name)
        elif labels and mask.values.dtype != np.bool_:
            if is_above(mask.values, labels):
                text = f"{some}, and none of the labels that count as inside ({', '.join(map(str, labels))}): no pixel counts"
                odd.setdefault(("warning", text), []).append(path.name)
            elif not np.isin(np.rint(values), (0, *labels)).all():
                text = f"{some}; of these {', '.join(map(str, labels))} count as inside"
                odd.setdefault(("note", text), []).append(path.name)
        elif len(values) > 2 or (len(values) == 2 and values[0] != 0):
            rule = "values above half of the largest count as inside; if these are labels, choose with --labels"
            odd.setdefault(("warning", f"{some}, not 0 and 1: {rule}"), []).append(path.name)
        elif len(values) == 1 and values[0] > 0:
            odd.setdefault(("warning", f"{some} everywhere: every pixel counts as inside"), []).append(path.name)
        elif len(values) and values[-1] not in (0, 1):
            odd.setdefault(("note", f"{some}, not 0 and 1: read as 0 and 1"), []).append(path.name)
    for (severity, text), names in odd.items():
        # No names where it is true of all: cases of which the same is said share a line of the report.
        everyone = "all masks" if len(masks) > 1 else "the mask"
        whose = everyone if len(names) == len(masks) else ", ".join(names)
        look.tell(severity, "values", f"{whose} hold{'s' * (len(names) == 1)} {text}")


def _place(look: Look, path: Path, mask: Mask, scan: Scan) -> None:
    """Tell of a mask that its header puts elsewhere than its image, read voxel by voxel all the same, or laid by it partly outside."""
    if mask.is_laid(look.case):
        if share := outside(mask, look.case, path, scan.grid):
            look.tell("warning", "grid", f"{share} of what {path.name} marks lies outside its image, by their headers")
    elif reason := misplaced(mask, scan.grid):
        look.tell(
            "warning", "grid", f"{path.name} and its image {reason}; --masks-by header lays it where its header says"
        )


def _kinds(look: Look, masks: dict[Path, Mask], scan: Scan) -> None:
    """Tell of masks of another kind of file than the image: the one is usually stored turned against the other."""
    picture = scan.grid.header is None
    if other := [path.name for path, mask in masks.items() if (mask.header is None) != picture]:
        kinds = "a NIfTI and its image a picture" if picture else "a picture and its image a NIfTI"
        which = "each mask is" if len(other) == len(masks) else f"{', '.join(other)} is"
        look.tell(
            "warning",
            "grid",
            f"{which} {kinds}: the two usually store a slice in different orientations, see the sheet",
        )


def _describe(look: Look, scan: Scan) -> None:
    spacing = scan.grid.spacing
    look.shape, look.lie = scan.grid.spatial, lie_of(scan.grid)
    words = "unknown" if spacing is None else " x ".join(f"{zoom:.3g}" for zoom in spacing)
    look.row |= {"size": by(scan.grid.spatial), "spacing_mm": words, "slices": len(scan.slices)}
    look.row["spacing_is_placeholder"] = scan.grid.is_placeholder
    if scan.grid.is_placeholder:
        look.tell(
            "note",
            "spacing",
            "the spacing is 1 along every axis, often a placeholder: if so, volumes in ml mean nothing",
        )
    for warning in scan.warnings:
        if "spacing" not in warning:
            look.tell("note", "image", warning)
    flat = [c for c in range(scan.slices.shape[1]) if scan.slices[:, c].min() == scan.slices[:, c].max()]
    if len(flat) < scan.slices.shape[1]:
        look.image = hashlib.sha256(f"{scan.slices.shape}".encode() + scan.slices.tobytes()).hexdigest()
    if flat and scan.slices.shape[1] > 1:
        look.tell("warning", "image", f"channel {flat[0] + 1} has the same value everywhere")


def _measure(look: Look, masks: NDArray[np.bool_]) -> None:
    """Marked slices, empty and equal masks, pairwise Dice; masks bool [S, n, H, W]."""
    case, n = look.case, masks.shape[1]
    raters = case.raters or tuple(path.name for path in case.masks)
    drawn: NDArray[np.bool_] = np.any(masks, axis=(2, 3))
    marked, by_all = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.all(axis=1))
    empty = [rater for i, rater in enumerate(raters) if not drawn[:, i].any()]
    pairs = [(i, j) for i in range(n) for j in range(i)]
    equal = [(raters[j], raters[i]) for i, j in pairs if drawn[:, i].any() and (masks[:, i] == masks[:, j]).all()]
    if len(empty) == n:
        look.tell("warning", "empty", "nobody marked anything")
    elif empty:
        look.tell("note", "empty", f"{', '.join(empty)} marked nothing")
    if equal:
        look.tell("warning", "duplicated", f"identical masks: {'; '.join(' and '.join(pair) for pair in equal)}")
    full: NDArray[np.bool_] = np.all(masks, axis=(0, 2, 3))  # `_values` has told of these
    if around := [rater for i, rater in enumerate(raters) if not full[i] and marks_the_background(masks[:, i])]:
        verb = "marks" if len(around) == 1 else "mark"
        text = f"{', '.join(around)} {verb} the corners of every slice and most of it: are the values swapped, with 0 where something was drawn?"
        look.tell("warning", "inverted", text)
    if pictures := [rater for i, rater in enumerate(raters) if holds_a_picture(masks[:, i])]:
        verb = "marks" if len(pictures) == 1 else "mark"
        text = f"{', '.join(pictures)} {verb} all of the fourth slice of four: are these a picture's colours and transparency? If so, save one colour alone"
        look.tell("warning", "colours", text)
    votes = masks.sum(axis=1)
    if apart := [rater for i, rater in enumerate(raters) if _is_apart(masks[:, i], votes)]:
        verb, which = ("shares", "is it") if len(apart) == 1 else ("share", "are they")
        text = f"{', '.join(apart)} {verb} no pixel with any other mask: {which} of this case, and stored as the others are?"
        look.tell("warning", "apart", text)
    look.at_least = np.array([np.count_nonzero(votes >= c, axis=(1, 2)).sum() for c in range(1, n + 1)]) / votes.size
    look.best_slice = int(votes.sum(axis=(1, 2)).argmax()) if len(marked) else len(votes) // 2
    if pairs:
        whole = set(by_all.tolist())
        for s in marked.tolist():
            between = {pair: dice(masks[s, pair[0]], masks[s, pair[1]]) for pair in pairs}
            score = float(np.mean(list(between.values())))
            look.scores.append(score)
            if s in whole:
                look.scores_all.append(score)
            for i, rater in enumerate(raters):
                mine = float(np.mean([value for pair, value in between.items() if i in pair]))
                look.with_others.setdefault(rater, []).append(mine)
        look.turned = dict(zip(raters, gains(masks), strict=True))
    look.row |= {
        "marked_slices": len(marked),
        "slices_all_marked": len(by_all),
        "pixels_at_least": [round(float(share), 8) for share in look.at_least],
        "pairwise_dice": float(np.mean(look.scores)) if look.scores else None,
        "empty": empty,
        "identical": [list(pair) for pair in equal],
    }


def _is_apart(mask: NDArray[np.bool_], votes: NDArray[np.int64]) -> bool:
    """Whether a mask has no pixel in common with what the others drew: another case's, or stored turned. votes: of all masks, this one too."""
    others = votes > mask
    return bool(mask.any() and others.any() and not (mask & others).any())
