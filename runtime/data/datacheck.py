"""What a data set holds and what is wrong with it, before hours of training: `cdiff data check` (no PyTorch needed)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdiff import __version__
from cdiff.runtime.data.case import ARRAY, listed
from cdiff.runtime.data.cases import DataSet, find_cases
from cdiff.runtime.data.look import SEVERITIES, Finding, Look, look_at
from cdiff.runtime.data.oddities import better_axis
from cdiff.runtime.data.partition import count_annotators, count_channels, none_has, partition, training_cases
from cdiff.runtime.data.turned import how_turned
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.lie import otherwise, usual
from cdiff.runtime.scoring.metrics import bootstrap_over_cases
from cdiff.runtime.words import by, several

AVERAGED = (
    "mean over the pairs of annotators in a slice, then over the slices that at least one annotator marked (a mask beside "
    "an empty one scores 0); interval: bootstrap over cases"
)


@dataclass(frozen=True)
class Check:
    """The report, as `--json` writes it, the cases that were looked at, for the contact sheet, and the table that names them, if one does."""

    report: dict[str, Any]
    looks: list[Look]
    channels: int
    table: Path | None = None

    @property
    def possible(self) -> bool:
        """Whether `cdiff train` would start on this data with its default settings."""
        return bool(self.report["training"]["possible"])


def check_data(
    root: Path,
    task: str | None = None,
    *,
    layout: str = "auto",
    labels: tuple[int, ...] = (),
    masks_by: str = ARRAY,
    slice_axis: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Check:
    """Read every file of a data set and say what is there; arguments as for `find_cases`.

    A file that cannot be read is a finding, and the others are still checked. progress: called as progress(done, total) in
    cases. Raises CdiffError when there is nothing to check or what is meant is not clear.
    """
    found = find_cases(root, task, layout=layout, labels=labels, masks_by=masks_by, strict=False)
    everything = [(split, case) for split, cases in found.items() for case in cases]
    trained = found.get("train") or found.get("all") or [case for _, case in everything]
    C, channels = count_annotators(trained), count_channels(trained)
    looks = []
    for done, (split, case) in enumerate(everything, start=1):
        # Training leaves out a case with another number of masks before reading it, and never opens the test split.
        stops = split != "test" and len(case.masks) == C
        looks.append(look_at(case, split, channels, slice_axis, "error" if stops else "warning"))
        if progress is not None:
            progress(done, len(everything))
    findings = [Finding("note", "layout", "", note) for note in found.notes]
    findings += [Finding("error", "layout", problem.case, problem.text, problem.split) for problem in found.problems]
    training = _training(found, root, looks, C, channels)
    findings += [Finding("error", "training", "", reason) for reason in training["reasons"]]
    findings += [finding for look in looks for finding in look.findings] + _over_cases(looks, C)
    findings += [*_shared(looks), *_across(looks, slice_axis)]
    report = {
        "cdiff": __version__,
        "data": str(root.resolve()),
        "layout": found.layout,
        "task": found.task,
        "labels": list(labels),
        "masks_by": masks_by,
        "splits": _splits(found, looks),
        "annotators": {
            "levels": C,
            "cases_by_number": _counted(len(look.case.masks) for look in looks),
            "names": sorted({rater for look in looks for rater in look.case.raters}),
        },
        "image": {
            "channels": channels,
            "modalities": list(found.modalities),
            "sizes": _counted(look.row["size"] for look in looks if "size" in look.row),
            "spacings_mm": _counted(look.row["spacing_mm"] for look in looks if "size" in look.row),
        },
        "class_balance": _balance(looks, C),
        "pairwise_dice": _pairwise(looks),
        "training": training,
        "findings": [asdict(f) for severity in SEVERITIES for f in findings if f.severity == severity],
        "cases": [look.row for look in looks],
    }
    return Check(report, looks, channels, found.table)


def _over_cases(looks: list[Look], C: int) -> list[Finding]:
    """Findings that take all cases to see, such as an annotator whom some cases lack, or a level that nothing reaches."""
    out = []
    usual = Counter(rater for look in looks for rater in look.case.raters)
    for look in looks:
        if len(look.case.masks) != C:
            lacking = [
                rater for rater, count in usual.items() if count * 2 > len(looks) and rater not in look.case.raters
            ]
            fewer = len(look.case.masks) < C
            without = f" ({', '.join(lacking)} missing)" if lacking and fewer else ""
            unless = " unless missing_raters says otherwise" if fewer else ""  # no setting uses only some of the masks
            text = (
                f"{several(len(look.case.masks), 'mask')}{without}, the others have {C}; training leaves it out{unless}"
            )
            out.append(Finding("warning", "annotators", look.case.name, text, look.split))
    same = [look for look in looks if look.at_least is not None and len(look.case.masks) == C]
    if same and not any(look.at_least[-1] for look in same if look.at_least is not None) and C > 1:
        out.append(Finding("warning", "classes", "", f"no pixel of any case was marked by all {C} annotators"))
    for rater in sorted(usual):
        if how := how_turned([look.turned[rater] for look in looks if rater in look.turned]):
            text = f"the masks of {rater} would fit the others' better {how}: are they stored as the others are?"
            out.append(Finding("warning", "turned", "", text))
    if C == 1:
        out.append(
            Finding(
                "note", "annotators", "", "only one annotator: there is no disagreement to learn, and only one level"
            )
        )
    if twice := [name for name, count in Counter(look.case.name for look in looks).items() if count > 1]:
        out.append(
            Finding(
                "note", "names", "", f"the same name in several splits: {listed(twice)}; are they different patients?"
            )
        )
    return out


def _shared(looks: list[Look]) -> list[Finding]:
    """Images that several cases share: where each annotator has a folder, which reads as a case, or a copy lies in two splits."""
    by_image: dict[str, list[Look]] = {}
    for look in looks:
        by_image.setdefault(look.image, []).append(look)
    shared = [members for image, members in by_image.items() if image and len(members) > 1]
    groups = [f"({listed([f'{look.case.name} in {look.split}' for look in members], 3)})" for members in shared]
    if not groups:
        return []
    advice = "put all masks of an image in one case, and no image in two splits"
    return [Finding("warning", "duplicated", "", f"cases with the same image: {listed(groups)}; {advice}")]


def _across(looks: list[Look], slice_axis: int) -> list[Finding]:
    """Volumes that are cut into strips, such as QUBIQ's of the pancreas along any axis but the first; and images whose slices lie in the
    patient otherwise than most."""
    strips: dict[int, list[Look]] = {}
    most = usual(look.lie for look in looks)
    for look in looks:
        axis = better_axis(look.shape, slice_axis) if look.readable else None
        if axis is not None:
            strips.setdefault(axis, []).append(look)
    out = []
    for axis, members in strips.items():
        shape = members[0].shape
        now, then = (by(shape[:cut] + shape[cut + 1 :]) for cut in (slice_axis, axis))
        which = f"{len(members)} volumes are" if len(members) > 1 else f"{members[0].case.name} is"
        text = (
            f"{which} cut into strips ({now} of {by(shape)}); along axis {axis} the slices would be {then}: "
            f"give --slice-axis {axis} here, and --set slice_axis={axis} to cdiff train"
        )
        out.append(Finding("warning", "slices", "", text))
    for look in looks:
        if lies := otherwise(look.lie, most, "those of most images"):
            out.append(Finding("warning", "slices", look.case.name, f"the image's {lies}, by its header", look.split))
    return out


def _training(found: DataSet, root: Path, looks: list[Look], C: int, channels: int) -> dict[str, Any]:
    """What `cdiff train` would do with its default settings, or why it would not."""
    plan: dict[str, Any] = {"levels": C, "image_channels": channels, "missing_raters": "skip", "notes": []}
    seen = {id(look.case): look for look in looks}
    reasons = []
    if found.problems:
        reasons.append(
            f"{several(len(found.problems), 'case')} cannot be used with the files as they are (named in the findings)"
        )
    blocked = sum(f.severity == "error" for look in looks for f in look.findings)
    if blocked:
        reasons.append(
            f"{several(blocked, 'file')} of training or validation cases cannot be used (named in the findings)"
        )
    try:
        training_cases(found, root)
        split = partition(found, root, levels=C)
        plan["notes"] = list(split.notes)
        for name, cases in (("train", split.train), ("val", split.val)):
            used = [seen[id(case)] for case in cases if len(case.masks) == C]
            slices = sum(look.row.get("slices", 0) for look in used)
            plan[name] = {"cases": len(used), "cases_found": len(cases), "slices": slices}
            if not blocked and not slices:
                reasons.append(f"no usable {name} slice: {none_has(name, cases, C)}")
        if used and not blocked and not any(look.row.get("marked_slices") for look in used):
            reasons.append("no validation slice has anything drawn on it; validation would score nothing")
    except CdiffError as error:
        reasons.append(str(error))
    return {"possible": not reasons, "reasons": reasons, **plan}


def _splits(found: DataSet, looks: list[Look]) -> dict[str, Any]:
    out = {}
    for split in dict.fromkeys([*found, *found.unlabelled]):
        here = [look for look in looks if look.split == split]
        out[split] = {
            "cases": len(here),
            "unlabelled": len(found.unlabelled.get(split, [])),
            **{
                key: sum(look.row.get(key, 0) for look in here)
                for key in ("slices", "marked_slices", "slices_all_marked")
            },
            "pairwise_dice": bootstrap_over_cases([look.scores for look in here]).to_json(),
        }
    return out


def _balance(looks: list[Look], C: int) -> dict[str, Any]:
    """The share of pixels that at least c annotators marked, for each c: the mean over all slices of the readable cases with C masks."""
    same = [look for look in looks if look.at_least is not None and len(look.case.masks) == C]
    weights = [look.row["slices"] for look in same]
    shares = np.average([look.at_least for look in same], axis=0, weights=weights).tolist() if same else []
    return {"averaged": "over all slices", "pixels_at_least": shares, "cases": len(same)}


def _pairwise(looks: list[Look]) -> dict[str, Any]:
    every = bootstrap_over_cases([look.scores for look in looks]).to_json()
    strict = bootstrap_over_cases([look.scores_all for look in looks]).to_json()
    raters = sorted({rater for look in looks for rater in look.with_others if rater in look.case.raters})
    with_others = {rater: [score for look in looks for score in look.with_others.get(rater, [])] for rater in raters}
    by_annotator = {rater: float(np.mean(scores)) for rater, scores in with_others.items()}
    return {"averaged": AVERAGED, **every, "slices_all_marked": strict, "by_annotator": by_annotator}


def _counted(values: Iterable[Any]) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    return {str(value): count for value, count in Counter(values).most_common()}
