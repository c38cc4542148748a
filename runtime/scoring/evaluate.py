"""Scores a model's maps, or maps in files, on case folders: every marked slice or all, resumable, in bounded memory (docs/metrics.md)."""

from __future__ import annotations

import hashlib
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdiff import __version__
from cdiff.runtime.data.case import ARRAY, listed
from cdiff.runtime.data.cases import Case, read_case, read_masks
from cdiff.runtime.data.oddities import Oddities
from cdiff.runtime.data.structures import parted
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256, write_json
from cdiff.runtime.scans.itk import itk_bytes
from cdiff.runtime.scans.scan import Scan, read_scan
from cdiff.runtime.scans.sources import ITK_SUFFIXES
from cdiff.runtime.scoring.changed import stamps_of, unchanged
from cdiff.runtime.scoring.journal import Journal, fingerprint, sealed
from cdiff.runtime.scoring.scores import CaseTally, evenly, marked_slices
from cdiff.runtime.scoring.summary import ROW_KEYS, Row, joined_twins, summarise
from cdiff.runtime.words import several

if TYPE_CHECKING:
    from cdiff.runtime.segmenter import Segmenter

Notice = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called as progress(done, total) in thousandths of a slice."""
FORMAT = 9
"""The format of a row, and of what its scores mean. Rows of another format are not used when an evaluation resumes."""
RUNS_AT_ONCE = 2**28
"""The most bytes of kept runs in memory at once: longer scans are segmented in parts, of at least one slice."""


@dataclass(frozen=True)
class Protocol:
    """What determines the scores besides model and data. The fields in CHAIN are arguments of `Segmenter.segment`.

    all_raters: score only the slices that every annotator of the case marked. all_slices: score also those that nobody marked. With
    neither, those that at least one marked. slices_per_case: only this many of them, spread evenly over the case (1 is the middle
    one), where all would take too long. raters: what to do with a case whose number of annotators is not the model's number of levels:
    "skip" it, or "use" it with level c read as the share c / C. Raises CdiffError for all_raters and all_slices together.
    """

    runs: int | None = None
    steps: int | None = None
    sampler: str | None = None
    fast: bool = False
    combine: str = "mean"
    mirror: bool | None = None
    zooms: tuple[float, ...] | None = None
    seed: int = 0
    all_raters: bool = False
    all_slices: bool = False
    slices_per_case: int | None = None
    raters: str = "skip"

    def __post_init__(self) -> None:
        if self.all_raters and self.all_slices:
            raise CdiffError(
                "--all-raters leaves out slices that --all-slices would score; give one of the two, or neither"
            )

    @property
    def chain(self) -> dict[str, Any]:
        """The arguments of `Segmenter.segment`."""
        return {key: getattr(self, key) for key in CHAIN}

    @property
    def choice(self) -> dict[str, Any]:
        """What determines which cases and slices are scored."""
        return {key: value for key, value in asdict(self).items() if key not in CHAIN}

    def slices(self, masks: NDArray[np.bool_], drawn: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """The numbers of the slices to score, given a case's masks [S,n,H,W]. drawn [S]: which slices have maps; by default all.

        Raises CdiffError when slices_per_case is less than 1.
        """
        chosen = np.arange(len(masks)) if self.all_slices else marked_slices(masks, self.all_raters)
        return evenly(chosen if drawn is None else chosen[drawn[chosen]], self.slices_per_case)


CHAIN = ("runs", "steps", "sampler", "fast", "combine", "mirror", "zooms", "seed")
"""The fields of a protocol that say how maps are drawn."""


@dataclass(frozen=True)
class Job:
    """A case and the numbers of its slices to score."""

    case: Case
    slices: NDArray[np.int64]

    @property
    def work(self) -> int:
        """The number of slices to score, in thousandths."""
        return 1000 * len(self.slices)

    def parts(self, most: int) -> Iterator[slice]:
        """The slices to score as runs of consecutive slices, each of at most `most`."""
        for stretch in np.split(self.slices, np.flatnonzero(np.diff(self.slices) > 1) + 1):
            end = int(stretch[-1]) + 1
            for first in range(int(stretch[0]), end, most):
                yield slice(first, min(first + most, end))


class Source(typing.Protocol):
    """Where the maps to score come from."""

    @property
    def levels(self) -> int:
        """C, the number of levels of the maps."""

    @property
    def name(self) -> str:
        """What is scored, for a picture's title."""

    def about(self) -> dict[str, Any]:
        """What the scores depend on besides data and protocol, for a report's header."""

    def drawing(self, protocol: Protocol) -> dict[str, Any]:
        """How the maps are drawn, for a report's protocol."""

    def odd(self) -> Oddities:
        """A new collector for oddities of the data."""

    def read(self, case: Case, odd: Oddities) -> tuple[Case, NDArray[np.bool_], NDArray[np.bool_] | None]:
        """The case as it is scored, its masks [S,n,H,W], and which slices have maps [S], None for all. `odd` collects what is odd about it."""

    def row(self, job: Job, protocol: Protocol, progress: Progress) -> Row:
        """The scores of a case, with its name, its number of annotators and the settings of the chain that was run."""

    def soft(self, case: Case, number: int, protocol: Protocol, progress: Progress) -> tuple[Scan, NDArray[np.float32]]:
        """The scan of a case, and the soft map [H,W] that was scored for its slice `number`."""


def evaluate(segmenter: Segmenter, cases: list[Case], protocol: Protocol, **more: Any) -> dict[str, Any]:
    """Segment and score every case: `score_cases` with a model's maps."""
    return score_cases(Segmented(segmenter), cases, protocol, **more)


def score_cases(
    source: Source,
    cases: list[Case],
    protocol: Protocol,
    *,
    data: Mapping[str, Any] | None = None,
    group: str | None = None,
    out: Path | None = None,
    write: Callable[[Path, dict[str, Any]], None] = write_json,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> dict[str, Any]:
    """Score the maps of every case; returns the report that `cdiff evaluate --json` writes.

    data: what the report should say about the data (folder, split, task). group: a regular expression for `summary.group_names`;
    cases of one group are resampled together. out: the report's file. Until it is written, finished cases are kept in
    NAME.partial.jsonl beside it, so that an interrupted evaluation resumes; the cases of an existing report are reused too. Rows of
    another protocol, source of maps, data set or format are not used. write: called as write(out, report) in place of writing that
    file alone. progress: called as progress(done, total). notice: called with one line for each thing that a reader of the scores
    must know. Raises CdiffError for a case that cannot be read or changes meanwhile, a group that cannot be found, fewer than one
    slice per case, and when nothing is left to score.
    """
    tell = notice or (lambda line: None)
    stamps = {case.name: stamps_of(case) for case in cases}
    jobs, left_out = _plan(source, cases, protocol, tell)
    if doubt := joined_twins([job.case.name for job in jobs], group):
        tell(doubt)
    header = {
        "protocol": source.drawing(protocol) | protocol.choice,
        **source.about(),
        "data": dict(data or {}),
        "cdiff": __version__,
        "format": FORMAT,
    }
    made_with = fingerprint(header)
    inputs = [case_sha256(job.case) for job in jobs]
    total, done = sum(job.work for job in jobs), 0
    tick = progress or (lambda done, total: None)
    rows: list[Row] = []
    with Journal(out, header, ROW_KEYS, inputs, tell) if out else nullcontext() as journal:
        known = journal.rows if journal else {}
        for job, files in zip(jobs, inputs, strict=True):
            row = known.get(files)
            if row is None:

                def within(part: int, whole: int, before: int = done, work: int = job.work) -> None:
                    tick(before + work * part // max(whole, 1), total)

                began = time.monotonic()
                with unchanged(job.case, stamps[job.case.name]):
                    row = source.row(job, protocol, within) | {"inputs": files}
                row = sealed(row | {"seconds": round(time.monotonic() - began, 2)}, made_with)
                if journal:
                    journal.add(row)
            rows.append(row | {"case": job.case.name})
            done += job.work
            tick(done, total)
        report = summarise(rows, header | {"made_with": made_with}, left_out, group)
        if out and journal:
            write(out, report)
            journal.remove()
    return report


def _plan(source: Source, cases: Iterable[Case], protocol: Protocol, tell: Notice) -> tuple[list[Job], dict[str, Any]]:
    """The jobs, and the cases left out with the reasons. Reads every mask first, so that errors in the data show before hours are spent on it."""
    jobs = []
    other: dict[str, int] = {}
    empty: list[str] = []
    undrawn: dict[str, int] = {}
    odd = source.odd()
    for case in cases:
        if len(case.masks) != source.levels:
            other[case.name] = len(case.masks)
            if protocol.raters == "skip":
                continue
        case, masks, drawn = source.read(case, odd)
        slices = protocol.slices(masks, drawn)
        wanted = slices if drawn is None else protocol.slices(masks)
        if wanted.size > slices.size:
            undrawn[case.name] = int(wanted.size - slices.size)
        if slices.size:
            jobs.append(Job(case, slices))
        elif not wanted.size:
            empty.append(case.name)
    for line in (*_notes(other, empty, undrawn, source.levels, protocol), *odd.told()):
        tell(line)
    if not jobs:
        hint = "score them with --raters use" if other and protocol.raters == "skip" else "look at the masks"
        if undrawn:
            hint = f"the maps of {several(len(undrawn), 'case')} are NaN on every slice to score"
        raise CdiffError(
            f"no case is left to score: the number of annotators differs from the model's "
            f"{source.levels} levels in {several(len(other), 'case')}, and no slice is marked in {several(len(empty), 'case')}; {hint}"
        )
    left_out = {"other_number_of_annotators": other if protocol.raters == "skip" else {}, "no_marked_slice": empty}
    return jobs, left_out | ({"slices_without_maps": undrawn} if undrawn else {})


def _notes(
    other: dict[str, int], empty: list[str], undrawn: dict[str, int], levels: int, protocol: Protocol
) -> Iterator[str]:
    """What a reader of the scores must know about the cases that are unlike the others."""
    if other:
        counts = " or ".join(map(str, sorted(set(other.values()))))
        fate = (
            "left out; --raters use would score them"
            if protocol.raters == "skip"
            else f"scored with level c read as the share c/{levels} of their annotators"
        )
        yield f"{_named(list(other))}: {counts} annotators, but the model has {levels} levels; {fate}"
    if empty:
        by = "all annotators" if protocol.all_raters else "any annotator"
        yield f"{_named(empty)}: no slice marked by {by}; left out"
    if undrawn:
        yield f"{_named(list(undrawn))}: no map (NaN) on {several(sum(undrawn.values()), 'slice')} to score; left out"


def _named(cases: list[str]) -> str:
    return f"{several(len(cases), 'case')} ({listed(cases)})"


class Segmented:
    """The maps that a model draws, as a `Source`."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter, self._manifest = segmenter, segmenter.manifest
        self.levels, self.name = self._manifest.levels, f"model {self._manifest.name}"

    def about(self) -> dict[str, Any]:
        """The model and the engine."""
        return {
            "model": {
                "name": self._manifest.name,
                "variant": self._manifest.variant,
                "levels": self.levels,
                "bundle_sha256": self._segmenter.manifest_sha256,
            },
            "engine": {"name": self._segmenter.engine.name, "device": self._segmenter.engine.device},
        }

    def drawing(self, protocol: Protocol) -> dict[str, Any]:
        """The arguments of `Segmenter.segment`."""
        return protocol.chain

    def odd(self) -> Oddities:
        """A collector for data unlike those of the training."""
        return Oddities(self._manifest)

    def read(self, case: Case, odd: Oddities) -> tuple[Case, NDArray[np.bool_], None]:
        """The case, with the modalities that the model was trained on in its order, and its masks."""
        case = self._ordered(case)
        return case, read_case(case, self._manifest.slice_axis, self._manifest.image_channels, odd)[1], None

    def row(self, job: Job, protocol: Protocol, progress: Progress) -> Row:
        """Segment and score the scan, one part after another."""
        scan = self._scan(job.case)
        masks = read_masks(job.case, scan.grid)
        tally = CaseTally(masks, job.slices, protocol.combine)
        pixels, runs = masks.shape[2] * masks.shape[3], self._segmenter.runs(protocol.runs, protocol.fast)
        chain: dict[str, Any] = {}
        finished = 0
        for part in job.parts(max(1, RUNS_AT_ONCE // max(1, pixels * self.levels * runs))):

            def within(done: int, total: int, before: int = finished, now: int = part.stop - part.start) -> None:
                # In thousandths of all parts together, so that the bar does not restart with each part.
                progress(int(1000 * (before + now * done / max(total, 1))), job.work)

            result = self._segmenter.segment(
                scan,  # read once for all parts
                **protocol.chain,
                slices=part,
                keep_runs=True,
                progress=within,
            )
            tally.add(result.stack, part.start, result.grid)
            finished += part.stop - part.start
            chain = {key: result.report[key] for key in ("sampler", "steps", "runs", "mirror")}
            chain["zooms"] = result.report.get("zooms", [1.0])
            del result  # else two parts' runs would be in memory while the next is computed
        return {"case": job.case.name, "annotators": len(job.case.masks), "chain": chain, **tally.row()}

    def soft(self, case: Case, number: int, protocol: Protocol, progress: Progress) -> tuple[Scan, NDArray[np.float32]]:
        """Segment the slice again."""
        scan = self._scan(self._ordered(case))
        part = slice(number, number + 1)
        return scan, self._segmenter.segment(scan, **protocol.chain, slices=part, progress=progress).stack.soft[0]

    def _ordered(self, case: Case) -> Case:
        return case.with_modalities(self._manifest.modalities) if case.others else case

    def _scan(self, case: Case) -> Scan:
        return read_scan(case.scan, channels=self._manifest.image_channels, slice_axis=self._manifest.slice_axis)


def case_sha256(case: Case) -> str:
    """SHA-256 over the contents of the image's and masks' files, the structures and values that count as inside, and how masks are aligned: a
    case that was edited since is scored again."""
    digest = hashlib.sha256()
    named = [parted(path) for path in case.files]
    for path in dict.fromkeys(path for path, _ in named):
        # A folder is a DICOM series.
        for file in sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]:
            digest.update(bytes.fromhex(sha256(file)))
        if path.name.lower().endswith(ITK_SUFFIXES):
            digest.update(itk_bytes(path))  # the voxels may lie in another file
    for path, structure in named:
        if structure:
            digest.update(f"{path.name} {structure}".encode())
    if case.labels:
        digest.update(repr(case.labels).encode())
    if case.masks_by != ARRAY:
        digest.update(case.masks_by.encode())
    return digest.hexdigest()
