"""`cdiff evaluate`: scores of a model, or of maps in files, on case folders, beside those of the annotators themselves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cdiff.cli import options
from cdiff.cli.console import Meter, out, say, warn, written
from cdiff.cli.score_tables import paper_tables, score_tables
from cdiff.runtime.errors import CdiffError

if TYPE_CHECKING:
    from cdiff.runtime.data.cases import Case, DataSet
    from cdiff.runtime.manifest import Manifest


@options.spread
def evaluate(
    data: Annotated[
        Path,
        options.data_option(
            "--data DIR",
            "Case folders with image.nii.gz and task01_seg01.nii.gz ..., a folder that holds "
            "Training/Validation/Testing or train/val/test of them, or a table (.csv).",
        ),
    ],
    maps: Annotated[
        Path | None,
        options.data_option(
            "--maps DIR",
            "Score the maps in DIR, of `cdiff segment` or another program, in place of a model: for each case NAME the share of annotators, 0 to 1, "
            "as NAME_soft.nii.gz or NAME.nii.gz.",
            default="a model draws them",
        ),
    ] = None,
    json_: Annotated[
        Path | None,
        options.output_option(
            "--json OUT",
            "Write everything here: scores, intervals, protocol, each case. Until it is whole, finished cases are "
            "kept in NAME.partial.jsonl beside it and an interrupted evaluation goes on from there.",
        ),
    ] = None,
    report_: Annotated[
        Path | None,
        options.output_option(
            "--report DIR",
            "Write scores.json, tables (CSV: scores, cases, slices) and plots (reliability, soft Dice against the "
            "number of runs) into this folder.",
        ),
    ] = None,
    steps_curve: Annotated[
        str | None,
        options.output_option(
            "--steps-curve N,N...",
            "Evaluate again with each of these numbers of steps, such as 1,2,5,10,25, and add soft Dice against them to "
            "the report.",
        ),
    ] = None,
    worst: Annotated[
        int | None,
        options.output_option(
            "--worst N",
            "Draw the N slices with the lowest soft Dice, at most one per case and segmented again, beside what the annotators "
            "drew, into the report's worst.png.",
            default="none",
            min=1,
            max=40,
        ),
    ] = None,
    paper_table: Annotated[
        bool,
        options.output_option(
            "--paper-table",
            "Print Tables 1 to 3 of Amit et al. 2023 for this data, beside the published numbers known here.",
        ),
    ] = False,
    beside: Annotated[
        list[Path] | None,
        options.output_option(
            "--beside FILE",
            "For --paper-table; may be repeated: another evaluation's report (.json), to compare variants, or published "
            "numbers (.csv with the columns table, whose, data, percent, source).",
        ),
    ] = None,
    split: Annotated[
        Literal["train", "val", "test", "all"] | None,
        options.data_option("--split train|val|test|all", "Which split to score.", default="test, else val, else all"),
    ] = None,
    task: options.TaskOption = None,
    layout: options.LayoutOption = "auto",
    labels: Annotated[
        str | None,
        options.data_option(
            "--labels N,N,...",
            "Which values of the masks are inside, such as 1,4 of a label map.",
            default="as the model was trained",
        ),
    ] = None,
    masks_by: Annotated[
        options.MasksBy | None,
        options.data_option(
            "--masks-by array|header",
            "How masks are laid on their image: voxel by voxel, or each where its header puts it.",
            default="as the model was trained",
        ),
    ] = None,
    limit: Annotated[
        int | None, options.data_option("--limit N", "Only the first N cases.", default="all", min=1)
    ] = None,
    all_raters: Annotated[
        bool,
        options.data_option(
            "--all-raters", "Only slices that all annotators marked, instead of those that at least one marked."
        ),
    ] = False,
    all_slices: Annotated[
        bool,
        options.data_option(
            "--all-slices",
            "Also slices that nobody marked: what the model marks there counts in the scores of whole cases. Not with "
            "--all-raters.",
        ),
    ] = False,
    slices_per_case: Annotated[
        int | None,
        options.data_option(
            "--slices-per-case N",
            "Only N of a case's slices, spread evenly (1: the middle one), for a protocol that takes too long on all.",
            default="all",
            min=1,
        ),
    ] = None,
    raters: Annotated[
        Literal["skip", "use"],
        options.data_option(
            "--raters skip|use",
            "A case with another number of annotators than the model has levels: leave it out, or score it with "
            "level c of C read as the share c/C of its annotators.",
        ),
    ] = "skip",
    group: Annotated[
        str | None,
        options.data_option(
            "--group REGEX",
            "Intervals over groups of cases, such as patients: what the expression matches in a case's name (its first bracket, if "
            "it has one) names the group.",
            default="cases",
        ),
    ] = None,
    *,
    model: options.Model,
    chain: options.Chain,
    quiet: options.QuietOption = False,
) -> None:
    """Score a model, or maps, against several annotators' masks, with 95 % intervals by bootstrap over cases.

    What each score means is in docs/metrics.md.

    Examples:

    cdiff evaluate --data my_data --model my_bundle --json scores.json
    cdiff evaluate --data my_data --report scores --steps-curve 1,2,5,10,25
    cdiff evaluate --data my_data --report scores --worst 12
    cdiff evaluate --data my_data --maps maps_of_another_program --json theirs.json
    cdiff evaluate --data my_data --group "patient[0-9]+" --paper-table --beside annotator.json
    """
    from cdiff.runtime.data.cases import find_cases
    from cdiff.runtime.data.structures import files_read
    from cdiff.runtime.files import must_not_be_read, must_take, write_json
    from cdiff.runtime.pictures.drawing import must_draw
    from cdiff.runtime.scoring.evaluate import Protocol, Segmented, Source, score_cases
    from cdiff.runtime.scoring.paper import read_beside
    from cdiff.runtime.scoring.publish import OF_A_REPORT, SCORES, WORST, check_steps, sweep_steps, write_report
    from cdiff.runtime.scoring.worst import worst_slices, write_worst
    from cdiff.runtime.scoring.written import WrittenMaps

    steps = None if steps_curve is None else options.whole_numbers("--steps-curve", steps_curve, "1,2,5,10,25")
    if steps and report_ is None:
        raise CdiffError("--steps-curve needs a folder to write to; add --report DIR")
    if worst and report_ is None:
        raise CdiffError("--worst needs a folder to draw into; add --report DIR")
    if maps:
        _must_be_drawn(model, chain, steps_curve)
    if beside and not paper_table:
        raise CdiffError("--beside adds rows to the paper's tables; add --paper-table")
    if report_:
        must_draw()
    if json_:
        must_take(json_)
    others = [row for path in beside or () for row in read_beside(path)]  # before hours are spent
    asked = options.parse_labels(labels)
    protocol = Protocol(
        **chain.arguments(),
        all_raters=all_raters,
        all_slices=all_slices,
        slices_per_case=slices_per_case,
        raters=raters,
    )
    found = find_cases(data, task, layout=layout, labels=asked)
    results = ([json_] if json_ else []) + ([report_ / name for name in OF_A_REPORT] if report_ else [])
    files = (file for cases in found.values() for case in cases for file in files_read(case))
    must_not_be_read(results, itertools.chain(beside or (), filter(None, [found.table]), files))
    for note in found.notes:
        warn(note)
    told: set[str] = set()

    def once(line: str) -> None:
        if line not in told:
            told.add(line)
            warn(line)

    source: Source
    if maps:
        chosen, cases = _choose(found, data, None, split, limit, quiet)
        cases, read = _read(cases, None, asked, masks_by, quiet)
        source = WrittenMaps(maps, cases, once)
    else:
        segmenter = model.load(quiet)
        chosen, cases = _choose(found, data, segmenter.manifest, split, limit, quiet)
        cases, read = _read(cases, segmenter.manifest, asked, masks_by, quiet)
        source = Segmented(segmenter)
        if steps:
            check_steps(segmenter, protocol, steps)
    about = {"folder": data.resolve().name, "split": chosen, "task": task} | read
    with Meter("evaluate", quiet) as meter:
        report = score_cases(
            source,
            cases,
            protocol,
            data=about,
            group=group,
            out=report_ / SCORES if report_ else json_,
            write=write_report if report_ else write_json,
            progress=meter,
            notice=once,
        )
    if report_ and json_:
        write_json(json_, report)
    if report_ and steps:
        with Meter("steps", quiet) as meter:
            sweep_steps(
                segmenter, cases, protocol, steps, report_,
                data=about, group=group, known=report, progress=meter, notice=once,
            )  # fmt: skip
    if report_ and worst:
        with Meter("worst", quiet) as meter:
            write_worst(report_ / WORST, source, worst_slices(report, cases, worst), protocol, meter)
    out.print(score_tables(report))
    if paper_table:
        out.print()
        out.print(paper_tables(report, others))
    for path in (json_, report_):
        if path:
            written(path)


def _must_be_drawn(model: options.Model, chain: options.Chain, steps_curve: str | None) -> None:
    """Raise CdiffError where an option is given that says how a model draws maps, and maps are given."""
    given = {**vars(model), **vars(chain), "steps_curve": steps_curve}
    plain = {**vars(options.Model()), **vars(options.Chain()), "steps_curve": None}
    if drawn := [name for name, value in given.items() if value != plain[name]]:
        raise CdiffError(
            f"--{drawn[0].replace('_', '-')} says how a model draws maps, but --maps names maps that are drawn already; leave one of the two out"
        )


def _choose(
    found: DataSet, data: Path, manifest: Manifest | None, split: str | None, limit: int | None, quiet: bool
) -> tuple[str, list[Case]]:
    """The split to score and its first cases, once it is said which they are and why the scores of a model may mislead."""
    from cdiff.runtime.data.case import natural
    from cdiff.runtime.scoring.choice import choose_split, held_out, may_be_too_good, trained_task
    from cdiff.runtime.words import several

    held = held_out(found, data, manifest) if manifest else None
    chosen, cases = choose_split(found, split, held)
    whence = " (held out of this data when the model was trained)"
    if cases is not held:
        others = [name for name in found if name != chosen]
        whence = f" ({' and '.join(others)} left out)" if others else ""
    cases = cases[:limit]
    say(f"split {chosen}{whence}: {several(len(cases), 'case')}", quiet)
    if manifest is None:
        return chosen, cases
    if found.task and (trained := trained_task(manifest)) and natural(trained) != natural(found.task):
        warn(f"the model was trained on {trained}, but {found.task} is scored")
    if split is None and (doubt := may_be_too_good(manifest, chosen, len(cases), data)):
        warn(doubt)
    return chosen, cases


def _read(
    cases: list[Case], manifest: Manifest | None, labels: tuple[int, ...], masks_by: str | None, quiet: bool
) -> tuple[list[Case], dict[str, Any]]:
    """The cases with their masks read as asked or, where nothing was, as a model was trained; and what the report says of that."""
    from dataclasses import replace

    from cdiff.runtime.scoring.choice import labelled_as_trained, laid_as_trained

    if manifest is None:
        inside, laid = labels, masks_by or "array"
        cases = [replace(case, masks_by=laid) for case in cases]
    else:
        cases, inside = labelled_as_trained(cases, manifest, labels, warn)
        if inside and not labels:
            say(f"labels {','.join(map(str, inside))} count as inside, as when the model was trained", quiet)
        cases = laid_as_trained(cases, manifest, masks_by)
        if (laid := masks_by or manifest.masks_by) == "header" and not masks_by:
            say("masks are laid where their headers put them, as when the model was trained", quiet)
    return cases, ({"labels": list(inside)} if inside else {}) | ({"masks_by": laid} if laid != "array" else {})
