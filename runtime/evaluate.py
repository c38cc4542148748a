"""Scores a bundle on case folders: every marked slice, bootstrap intervals over cases, resumable (docs/metrics.md)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.cases import Case, read_case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256, write_json
from cdiff.runtime.journal import Journal
from cdiff.runtime.manifest import NAME as MANIFEST
from cdiff.runtime.metrics import bootstrap_over_cases
from cdiff.runtime.scores import PER_SLICE, marked_slices, score_slices

if TYPE_CHECKING:
    from cdiff.runtime.segmenter import Segmenter

Notice = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called as progress(done, total) in thousandths of a slice."""
Row = dict[str, Any]
"""One case: name, annotators, hash of its files, seconds, the chain as it was resolved, and its slices' scores."""

CASE_KEYS = ("case", "annotators", "inputs", "seconds")


@dataclass(frozen=True)
class Protocol:
    """What decides the scores besides model and data. None and `fast` mean what they mean to `Segmenter.segment`.

    all_raters: score only the slices that every annotator of the case marked. raters: what happens to a case that has
    another number of annotators than the model has levels: "skip" it, or "use" it with level c read as the share c / C.
    """

    runs: int | None = None
    steps: int | None = None
    sampler: str | None = None
    fast: bool = False
    combine: str = "mean"
    mirror: bool | None = None
    seed: int = 0
    all_raters: bool = False
    raters: str = "skip"


@dataclass(frozen=True)
class _Job:
    case: Case
    masks: int
    slices: NDArray[np.int64]

    @property
    def span(self) -> slice:
        return slice(int(self.slices[0]), int(self.slices[-1]) + 1)

    @property
    def work(self) -> int:
        """Slices to compute, in thousandths."""
        return 1000 * int(self.slices[-1] - self.slices[0] + 1)


def choose_split(found: Mapping[str, list[Case]], wanted: str | None = None) -> tuple[str, list[Case]]:
    """The split to score: the one asked for, else test, else val, else all; "all" joins the splits there are.

    Raises CdiffError when the one asked for is not there, or none is asked for and only a training split is.
    """
    if wanted == "all":
        return "all", [case for cases in found.values() for case in cases]
    for split in (wanted,) if wanted else ("test", "val", "all"):
        if split in found:
            return split, found[split]
    there = ", ".join(found)
    if wanted:
        raise CdiffError(f"there is no split {wanted!r} in this data, which has {there}; choose one with --split")
    raise CdiffError(f"the data has only the split {there}; name it with --split to score what was trained on")


def evaluate(
    segmenter: Segmenter,
    cases: list[Case],
    protocol: Protocol,
    *,
    data: Mapping[str, Any] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> dict[str, Any]:
    """Segment and score every case; returns the report that `cdiff evaluate --json` writes.

    data: what to say of the data in the report (folder, split, task). out: the report's file; finished cases are kept
    in NAME.partial.jsonl beside it until it is written, so that an interrupted evaluation resumes. Rows of another
    protocol, bundle, engine or data set are not used. notice: called with one line for each thing that a reader of the
    scores must know. Raises CdiffError for a case that cannot be read, and when nothing is left to score.
    """
    tell = notice or (lambda line: None)
    jobs, left_out = _plan(segmenter, cases, protocol, tell)
    header = _header(segmenter, protocol, data or {})
    journal = Journal(out.with_name(f"{out.stem}.partial.jsonl"), header, tell) if out else None
    known = journal.rows if journal else {}
    total, done = sum(job.work for job in jobs), 0
    tick = progress or (lambda done, total: None)
    rows: list[Row] = []
    for job in jobs:
        inputs = _fingerprint(job.case)
        row = known.get(inputs)
        if row is None:

            def within(part: int, whole: int, before: int = done, work: int = job.work) -> None:
                tick(before + work * part // max(whole, 1), total)

            row = _score(segmenter, job, protocol, within) | {"inputs": inputs}
            if journal:
                journal.add(row)
        rows.append(row | {"case": job.case.name})
        done += job.work
        tick(done, total)
    report = _report(rows, header, left_out)
    if out and journal:
        write_json(out, report)
        journal.remove()
    return report


def _plan(
    segmenter: Segmenter, cases: Iterable[Case], protocol: Protocol, tell: Notice
) -> tuple[list[_Job], dict[str, Any]]:
    """Reads every mask first: what is wrong with the data is said before hours are spent on it."""
    manifest, jobs = segmenter.manifest, []
    other: dict[str, int] = {}
    empty: list[str] = []
    for case in cases:
        if len(case.masks) != manifest.levels:
            other[case.name] = len(case.masks)
            if protocol.raters == "skip":
                continue
        masks = read_case(case, manifest.slice_axis, manifest.image_channels)[1]
        slices = marked_slices(masks, protocol.all_raters)
        if slices.size:
            jobs.append(_Job(case, len(case.masks), slices))
        else:
            empty.append(case.name)
    for line in _notes(other, empty, manifest.levels, protocol):
        tell(line)
    if not jobs:
        hint = "score them with --raters use" if other and protocol.raters == "skip" else "look at the masks"
        raise CdiffError(
            f"no case is left to score: {len(other)} have another number of annotators than the model's "
            f"{manifest.levels} levels, {len(empty)} no marked slice; {hint}"
        )
    return jobs, {"other_number_of_annotators": other if protocol.raters == "skip" else {}, "no_marked_slice": empty}


def _notes(other: dict[str, int], empty: list[str], levels: int, protocol: Protocol) -> Iterator[str]:
    """What a reader of the scores must know of the cases that are not like the others."""
    if other:
        counts = " or ".join(map(str, sorted(set(other.values()))))
        fate = (
            "left out; --raters use would score them"
            if protocol.raters == "skip"
            else f"scored with level c read as the share c/{levels} of their annotators"
        )
        yield f"{_named(list(other))}: {counts} annotators, and the model has {levels} levels; {fate}"
    if empty:
        by = "all annotators" if protocol.all_raters else "any annotator"
        yield f"{_named(empty)}: no slice marked by {by}; left out"


def _named(cases: list[str], most: int = 5) -> str:
    more = f" and {len(cases) - most} more" if len(cases) > most else ""
    return f"{len(cases)} case{'s' * (len(cases) > 1)} ({', '.join(cases[:most])}{more})"


def _score(segmenter: Segmenter, job: _Job, protocol: Protocol, progress: Progress) -> Row:
    started = time.monotonic()
    manifest = segmenter.manifest
    masks = read_case(job.case, manifest.slice_axis, manifest.image_channels)[1]
    result = segmenter.segment(
        job.case.image,
        runs=protocol.runs,
        steps=protocol.steps,
        sampler=protocol.sampler,
        fast=protocol.fast,
        combine=protocol.combine,
        mirror=protocol.mirror,
        seed=protocol.seed,
        slices=job.span,
        keep_runs=True,
        progress=progress,
    )
    return {
        "case": job.case.name,
        "annotators": job.masks,
        "seconds": round(time.monotonic() - started, 2),
        "chain": {key: result.report[key] for key in ("sampler", "steps", "runs", "mirror")},
        "slices": list(score_slices(result.stack, job.span.start, masks, job.slices)),
    }


def _header(segmenter: Segmenter, protocol: Protocol, data: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the scores depend on: the report states it, and a resumed evaluation must agree in all of it."""
    return {
        "protocol": asdict(protocol),
        "model": {
            "name": segmenter.manifest.name,
            "variant": segmenter.manifest.variant,
            "levels": segmenter.manifest.levels,
            "bundle_sha256": sha256(segmenter.bundle.path / MANIFEST),
        },
        "engine": {"name": segmenter.engine.name, "device": segmenter.engine.device},
        "data": dict(data),
        "cdiff": version("cdiff"),
    }


def _fingerprint(case: Case) -> str:
    """SHA-256 over the image's and masks' own: a case that was edited since is scored again."""
    digest = hashlib.sha256()
    for path in (case.image, *case.masks):
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def _report(rows: list[Row], header: dict[str, Any], left_out: dict[str, Any]) -> dict[str, Any]:
    levels = header["model"]["levels"]
    by_case = [{name: _column(row, name) for name in PER_SLICE} for row in rows]
    per_level = [[[scores["dice_per_level"][c] for scores in row["slices"]] for row in rows] for c in range(levels)]
    return {
        "n_slices": sum(len(row["slices"]) for row in rows),
        "n_cases": len(rows),
        **{name: bootstrap_over_cases([case[name] for case in by_case]).to_json() for name in PER_SLICE},
        "dice_per_level": [
            {"level": c, **bootstrap_over_cases(scores).to_json()} for c, scores in enumerate(per_level, start=1)
        ],
        **header,
        "protocol": header["protocol"] | rows[0]["chain"],
        "left_out": left_out,
        "cases": [
            {key: row[key] for key in CASE_KEYS} | {"means": _means(row), "slices": row["slices"]} for row in rows
        ],
    }


def _column(row: Row, name: str) -> list[float]:
    """One score of a case's slices; NaN where it is not defined."""
    return [float("nan") if scores[name] is None else scores[name] for scores in row["slices"]]


def _means(row: Row) -> dict[str, Any]:
    """A case's own means over its slices, for whoever reads the rows."""
    means = {name: bootstrap_over_cases([_column(row, name)]).mean for name in PER_SLICE}
    return means | {"dice_per_level": np.mean([s["dice_per_level"] for s in row["slices"]], axis=0).tolist()}
