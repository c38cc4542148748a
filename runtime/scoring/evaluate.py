"""Scores a bundle on case folders: every marked slice or all, resumable, in bounded memory (docs/metrics.md)."""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdiff import __version__
from cdiff.runtime.data.case import ARRAY, listed
from cdiff.runtime.data.cases import Case, DataSet, read_case, read_masks
from cdiff.runtime.data.oddities import Oddities
from cdiff.runtime.data.partition import HELD_OUT, held_out_of
from cdiff.runtime.data.structures import parted
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256, write_json
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.scans.itk import itk_bytes
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scans.sources import ITK_SUFFIXES
from cdiff.runtime.scoring.journal import Journal, fingerprint
from cdiff.runtime.scoring.scores import CaseTally, evenly, marked_slices
from cdiff.runtime.scoring.summary import ROW_KEYS, Row, joined_twins, summarise
from cdiff.runtime.words import one_line, several

if TYPE_CHECKING:
    from cdiff.runtime.segmenter import Segmenter

Notice = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called as progress(done, total) in thousandths of a slice."""
FORMAT = 7
"""Of a row, and of what its scores mean: rows of another format are not gone on from."""
RUNS_AT_ONCE = 2**28
"""Bytes of kept runs in memory at once: a longer scan is segmented part by part. One slice is the least."""


@dataclass(frozen=True)
class Protocol:
    """What decides the scores besides model and data. None and `fast` mean what they mean to `Segmenter.segment`.

    all_raters: score only the slices that every annotator of the case marked; all_slices: also those that nobody marked; neither:
    those that at least one marked. slices_per_case: only so many of those, spread evenly over the case, the middle one of 1: for what
    takes too long on all. raters: what happens to a case that has another number of annotators than the model has levels: "skip" it,
    or "use" it with level c read as the share c / C. Raises CdiffError for all_raters and all_slices together.
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
                "--all-raters leaves slices out that --all-slices would score; give one of the two, or neither"
            )

    @property
    def chain(self) -> dict[str, Any]:
        """The arguments of `Segmenter.segment`."""
        keys = ("runs", "steps", "sampler", "fast", "combine", "mirror", "zooms", "seed")
        return {key: getattr(self, key) for key in keys}

    def slices(self, masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The slices to score of a case's masks [S,n,H,W]. Raises CdiffError when slices_per_case is less than 1."""
        chosen = np.arange(len(masks)) if self.all_slices else marked_slices(masks, self.all_raters)
        return evenly(chosen, self.slices_per_case)


@dataclass(frozen=True)
class _Job:
    case: Case
    slices: NDArray[np.int64]

    @property
    def work(self) -> int:
        """Slices to compute, in thousandths."""
        return 1000 * len(self.slices)

    def parts(self, most: int) -> Iterator[slice]:
        """The slices to score, as stretches without a gap of at most so many."""
        for stretch in np.split(self.slices, np.flatnonzero(np.diff(self.slices) > 1) + 1):
            end = int(stretch[-1]) + 1
            for first in range(int(stretch[0]), end, most):
                yield slice(first, min(first + most, end))


def choose_split(
    found: Mapping[str, list[Case]], wanted: str | None = None, held: list[Case] | None = None
) -> tuple[str, list[Case]]:
    """The split to score: the one asked for, else test, else val, else all; "all" joins the splits there are,
    and cases of one name in two of them are called split/name. held: what the model's training held out of this data, where that
    has no split val: they are it.

    Raises CdiffError when the one asked for is not there, or none is asked for and only a training split is.
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
    raise CdiffError(f"the data has only the split {there}; name it with --split to score what was trained on")


def held_out(found: DataSet, root: Path, manifest: Manifest) -> list[Case]:
    """What the model's training held out of this very data to validate on; none where the data has cases for that, or is other."""
    told = _data_of(manifest).get("held_out")
    return held_out_of(found, root, told) if isinstance(told, Mapping) and not found.get("val") else []


def may_be_too_good(manifest: Manifest, split: str, count: int) -> str | None:
    """That the cases to score may be those that the model learned from; None unless neither they nor its training name splits.

    Asked where those that the training held out are not found: the data is other, or the bundle older than that word.
    """
    if split != "all" or HELD_OUT not in str(_data_of(manifest)):
        return None
    return (
        f"no split is named, so all {count} cases are scored; the model was trained on data without a validation split: where they "
        "are the same, these scores are too good; put cases that it never saw in a folder Testing, or name them test in a table"
    )


def _data_of(manifest: Manifest) -> Mapping[str, Any]:
    """What the bundle says of the data that the model was trained on."""
    data = manifest.training.get("data")
    return data if isinstance(data, Mapping) else {}


def labelled_as_trained(
    cases: list[Case], manifest: Manifest, asked: tuple[int, ...], tell: Notice
) -> tuple[list[Case], tuple[int, ...]]:
    """The cases with the mask values inside that were `asked` for or, where none were, that the model was trained on; and those values.

    Empty values leave to each case's layout what is inside. tell: called with a line where the two differ.
    """
    trained = manifest.labels_inside
    if asked and trained and set(asked) != set(trained):
        tell(f"labels {_numbers(asked)} are scored as inside, and the model was trained on {_numbers(trained)}")
    inside = asked or trained
    return ([replace(case, labels=inside) for case in cases] if inside else cases), inside


def laid_as_trained(cases: list[Case], manifest: Manifest, asked: str | None) -> list[Case]:
    """The cases with their masks laid as `asked` (one of MASKS_BY) or, where nothing was, as the model was trained."""
    return [replace(case, masks_by=asked or manifest.masks_by) for case in cases]


def trained_task(manifest: Manifest) -> str | None:
    """The structure that a model was trained on, such as task02, where its bundle names it so; None where it says it in other words."""
    last = manifest.task.rpartition("/")[2]
    return last if re.fullmatch(r"task\d+", last) else None


def _numbers(labels: tuple[int, ...]) -> str:
    return ",".join(map(str, labels))


def evaluate(
    segmenter: Segmenter,
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
    """Segment and score every case; returns the report that `cdiff evaluate --json` writes.

    data: what to say of the data in the report (folder, split, task). group: a regular expression, `summary.group_names`; cases
    of one group are resampled together. out: the report's file; finished cases are kept in NAME.partial.jsonl beside it until
    it is written, so that an interrupted evaluation resumes; the cases of a report that is there are kept too. Rows of another
    protocol, bundle, engine, data set or format are not used. write: called as write(out, report), to write more than that
    file. notice: called with one line for each thing that a reader of the scores must know. Raises CdiffError for a case that
    cannot be read, a group that cannot be found, fewer than one slice a case, and when nothing is left to score.
    """
    tell = notice or (lambda line: None)
    jobs, left_out = _plan(segmenter, cases, protocol, tell)
    if doubt := joined_twins([job.case.name for job in jobs], group):
        tell(doubt)
    header = _header(segmenter, protocol, data or {})
    inputs = [case_sha256(job.case) for job in jobs]
    journal = Journal(out, header, ROW_KEYS, inputs, tell) if out else None
    known = journal.rows if journal else {}
    total, done = sum(job.work for job in jobs), 0
    tick = progress or (lambda done, total: None)
    rows: list[Row] = []
    for job, files in zip(jobs, inputs, strict=True):
        row = known.get(files)
        if row is None:

            def within(part: int, whole: int, before: int = done, work: int = job.work) -> None:
                tick(before + work * part // max(whole, 1), total)

            row = _score(segmenter, job, protocol, within) | {"inputs": files}
            if journal:
                journal.add(row)
        rows.append(row | {"case": job.case.name})
        done += job.work
        tick(done, total)
    try:
        report = summarise(rows, header | {"made_with": fingerprint(header)}, left_out, group)
        if out and journal:
            write(out, report)
            journal.remove()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if not journal or not known:
            raise
        raise CdiffError(
            f"the cases that were computed before, in {out} or {journal.path}, are damaged ({one_line(error)[:200]}); "
            "move both away to compute them anew"
        ) from error
    return report


def _plan(
    segmenter: Segmenter, cases: Iterable[Case], protocol: Protocol, tell: Notice
) -> tuple[list[_Job], dict[str, Any]]:
    """Reads every mask first: what is wrong with the data is said before hours are spent on it."""
    manifest, jobs = segmenter.manifest, []
    other: dict[str, int] = {}
    empty: list[str] = []
    odd = Oddities(manifest)
    for case in cases:
        if len(case.masks) != manifest.levels:
            other[case.name] = len(case.masks)
            if protocol.raters == "skip":
                continue
        if case.others:  # several files: those that the model was trained on, in its order
            case = case.with_modalities(manifest.modalities)
        masks = read_case(case, manifest.slice_axis, manifest.image_channels, odd)[1]
        slices = protocol.slices(masks)
        if slices.size:
            jobs.append(_Job(case, slices))
        else:
            empty.append(case.name)
    for line in (*_notes(other, empty, manifest.levels, protocol), *odd.told()):
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


def _named(cases: list[str]) -> str:
    return f"{several(len(cases), 'case')} ({listed(cases)})"


def _score(segmenter: Segmenter, job: _Job, protocol: Protocol, progress: Progress) -> Row:
    started = time.monotonic()
    manifest = segmenter.manifest
    scan = read_scan(job.case.scan, channels=manifest.image_channels, slice_axis=manifest.slice_axis)
    masks = read_masks(job.case, scan.grid)
    tally = CaseTally(masks, job.slices, protocol.combine)
    pixels, runs = masks.shape[2] * masks.shape[3], segmenter.runs(protocol.runs, protocol.fast)
    chain: dict[str, Any] = {}
    finished = 0
    for part in job.parts(max(1, RUNS_AT_ONCE // max(1, pixels * manifest.levels * runs))):

        def within(done: int, total: int, before: int = finished, now: int = part.stop - part.start) -> None:
            # In thousandths of the parts together, for a bar that does not start anew with each.
            progress(int(1000 * (before + now * done / max(total, 1))), job.work)

        result = segmenter.segment(
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
        del result  # or two parts' runs were in memory while the next is made
    return {
        "case": job.case.name,
        "annotators": len(job.case.masks),
        "seconds": round(time.monotonic() - started, 2),
        "chain": chain,
        **tally.row(),
    }


def _header(segmenter: Segmenter, protocol: Protocol, data: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the scores depend on: the report states it, and a resumed evaluation must agree in all of it."""
    return {
        "protocol": asdict(protocol),
        "model": {
            "name": segmenter.manifest.name,
            "variant": segmenter.manifest.variant,
            "levels": segmenter.manifest.levels,
            "bundle_sha256": segmenter.manifest_sha256,
        },
        "engine": {"name": segmenter.engine.name, "device": segmenter.engine.device},
        "data": dict(data),
        "cdiff": __version__,
        "format": FORMAT,
    }


def case_sha256(case: Case) -> str:
    """SHA-256 over what the image's and masks' files hold, which structures and values are inside and how masks are laid: a case that was edited since is scored again."""
    digest = hashlib.sha256()
    named = [parted(path) for path in case.files]
    for path in dict.fromkeys(path for path, _ in named):
        # A folder is a DICOM series.
        for file in sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]:
            digest.update(bytes.fromhex(sha256(file)))
        if path.name.lower().endswith(ITK_SUFFIXES):
            digest.update(itk_bytes(path))  # they may lie in another file
    for path, structure in named:
        if structure:
            digest.update(f"{path.name} {structure}".encode())
    if case.labels:
        digest.update(repr(case.labels).encode())
    if case.masks_by != ARRAY:
        digest.update(case.masks_by.encode())
    return digest.hexdigest()
