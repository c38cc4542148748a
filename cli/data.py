"""`cdiff data`: what lies in a folder of cases, before anything is trained on it."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cdiff.cli import options
from cdiff.cli.base import Command, Group
from cdiff.cli.console import USER_ERROR, Meter, facts, fail, number, out, written
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import several

if TYPE_CHECKING:
    from cdiff.runtime.data.datacheck import Check

app = typer.Typer(cls=Group, no_args_is_help=True, help="Look at several annotators' masks before training on them.")
COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
MOST = 6
MOST_NAMES = 12


@app.callback()
def group() -> None:
    """Look at several annotators' masks before training on them."""


@app.command("check", cls=Command)
def check(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Case folders with or without split folders above them, a QUBIQ or BraTS tree, or a table (.csv) of files.",
            show_default=False,
        ),
    ],
    task: options.TaskOption = None,
    layout: options.LayoutOption = "auto",
    labels: options.LabelsOption = None,
    masks_by: options.MasksByOption = None,
    slice_axis: Annotated[
        int, options.option("--slice-axis 0|1|2", "Axis that volumes are cut along.", min=0, max=2)
    ] = 2,
    json_: Annotated[
        Path | None,
        options.output_option("--json OUT", "Write everything here: each case and each finding."),
    ] = None,
    sheet: Annotated[
        Path | None,
        options.output_option(
            "--sheet OUT.png",
            "The contact sheet: image, outlines and soft label of up to 12 cases.",
            default="NAME_sheet.png in the current folder",
        ),
    ] = None,
    no_sheet: Annotated[bool, options.output_option("--no-sheet", "Write no contact sheet.")] = False,
    quiet: options.QuietOption = False,
) -> None:
    """Report what a data set holds and what is wrong with it, and draw a contact sheet.

    Cases, annotators, sizes, spacing, modalities, class balance, empty and
    identical masks, shapes that disagree, unreadable files, pairwise Dice.
    Every file is read. The exit code is 2 when there is nothing to check,
    or training could not start.

    Example:

    cdiff data check my_data --json check.json --sheet check.png
    """
    from cdiff.runtime.data.datacheck import check_data
    from cdiff.runtime.data.structures import files_read
    from cdiff.runtime.files import must_not_be_read, must_take, write_json

    if sheet and no_sheet:
        raise CdiffError(f"--sheet {sheet} and --no-sheet contradict each other; leave one out")
    name = data.resolve().name.removesuffix(data.suffix if data.is_file() else "")
    target = sheet or Path(f"{name}_sheet.png")
    given = [path for path in (json_, sheet) if path]
    for path in given:
        must_take(path)
        must_not_be_read([path], [data])
    if sheet and sheet.suffix.lower() != ".png":
        raise CdiffError(f"--sheet {sheet} would hold a PNG; give it a name that ends in .png")
    if json_ and not no_sheet and json_.resolve() == target.resolve():
        raise CdiffError(f"the report and the contact sheet would both be {json_}; give --json and --sheet two names")
    with Meter("data check", quiet) as meter:
        checked = check_data(
            data,
            task,
            layout=layout,
            labels=options.parse_labels(labels),
            masks_by=masks_by or "array",
            slice_axis=slice_axis,
            progress=meter,
        )
    results = filter(None, (json_, None if no_sheet else target))
    files = (file for look in checked.looks for file in files_read(look.case))
    must_not_be_read(results, itertools.chain(filter(None, [checked.table]), files))
    try:  # neither waits for the other: a reader of the tables may end early (`| head`), and a disk be full
        if json_:
            write_json(json_, checked.report)
        if sheet_made := not no_sheet and any(look.readable for look in checked.looks):
            from cdiff.runtime.pictures.sheet import write_sheet

            dice = checked.report["pairwise_dice"]["mean"]
            first = "; outlines on the first channel" if checked.channels not in (1, 3) else ""
            note = f"{checked.report['layout']} layout; pairwise Dice {number(dice)}; frame: the part that the other pictures show{first}"
            write_sheet(target, checked.looks, checked.channels, slice_axis, name, note)
    finally:
        _print(checked)
    if json_:
        written(json_)
    if sheet_made:
        written(target)
    if not checked.possible:
        fail(f"training cannot start: {'; '.join(checked.report['training']['reasons'])}")
        raise typer.Exit(USER_ERROR)


def _print(checked: Check) -> None:
    report = checked.report
    raters, image, plan = report["annotators"], report["image"], report["training"]
    names = ", ".join(image["modalities"]) or ("one" if image["channels"] == 1 else "unnamed")
    by_number = ", ".join(f"{count} in {several(cases, 'case')}" for count, cases in raters["cases_by_number"].items())
    labels = f"; labels {report['labels']} count as inside" if report["labels"] else ""
    laid = "; masks laid by their headers" if report["masks_by"] == "header" else ""
    rows = [
        ("folder", report["data"]),
        ("layout", f"{report['layout']}; structure {report['task'] or 'unnamed'}{labels}{laid}"),
        ("annotators", f"{by_number} ({', '.join(raters['names'][:MOST_NAMES])})"),
        ("channels", f"{image['channels']} ({names})"),
        ("sizes", _counts(image["sizes"])),
        ("spacing, mm", _counts(image["spacings_mm"])),
    ]
    facts("Data", rows)
    out.print(_splits(report), "")
    balance = ", ".join(
        f"{100 * share:.3g} % at least {c}"
        for c, share in enumerate(report["class_balance"]["pixels_at_least"], start=1)
    )
    dice, strict = report["pairwise_dice"], report["pairwise_dice"]["slices_all_marked"]
    rows = [("pixels marked by", balance or "-")]
    if dice["n_slices"]:
        span = "" if dice["low"] is None else f" ({number(dice['low'])} to {number(dice['high'])})"
        all_marked = (
            f"; {number(strict['mean'])} over {strict['n_slices']} that all marked" if strict["n_slices"] else ""
        )
        rows.append(
            (
                "pairwise Dice",
                f"{number(dice['mean'])}{span} over {several(dice['n_slices'], 'marked slice')}{all_marked}",
            )
        )
        with_others = [f"{rater} {number(mean)}" for rater, mean in dice["by_annotator"].items()]
        if 2 < len(with_others) <= MOST_NAMES:
            rows.append(("each with the others", ", ".join(with_others)))
        rows.append(("averaged", dice["averaged"]))
    facts("Agreement", rows)
    _findings(report["findings"])
    if plan["possible"]:
        split = "; ".join(
            f"{name} {plan[name]['cases']} of {several(plan[name]['cases_found'], 'case')}, {several(plan[name]['slices'], 'slice')}"
            for name in ("train", "val")
        )
        rows = [("levels", str(plan["levels"])), ("channels", str(plan["image_channels"])), ("cases", split)]
        facts("Training with the default settings", [*rows, *(("note", note) for note in plan["notes"])])


def _splits(report: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    heads = ("split", "cases", "slices", "marked", "by all", "pairwise Dice")
    for head in heads:
        table.add_column(head, justify="left" if head == "split" else "right")
    for split, row in report["splits"].items():
        extra = f" + {row['unlabelled']} without masks" if row["unlabelled"] else ""
        numbers = (row["slices"], row["marked_slices"], row["slices_all_marked"])
        table.add_row(split, f"{row['cases']}{extra}", *map(str, numbers), number(row["pairwise_dice"]["mean"]))
    return table


def _findings(findings: list[dict[str, Any]]) -> None:
    """Findings of one kind together, the worst first; the whole list is in the JSON."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for finding in findings:
        groups.setdefault((finding["severity"], finding["kind"]), []).append(finding)
    lines = []
    for (severity, kind), members in groups.items():
        by_text: dict[str, list[tuple[str, str]]] = {}
        for one in members:
            by_text.setdefault(one["text"], []).append((one["case"], one["split"]))
        for text, cases in list(by_text.items())[:MOST]:
            lines.append((Text(severity, COLOURS[severity]), kind, f"{_where(cases)}{text}"))
        if len(by_text) > MOST:
            rest = sum(len(cases) for cases in list(by_text.values())[MOST:])
            lines.append(
                (Text(severity, COLOURS[severity]), kind, f"... and {rest} more of this kind (--json has them all)")
            )
    facts("Findings", lines or [("none", "nothing odd was found")])


def _where(cases: list[tuple[str, str]]) -> str:
    """Names of cases, to begin a line with; with the split where one name stands for several. cases: name and split."""
    names = Counter(name for name, _ in cases)
    if len(cases) > 3:
        return f"{len(cases)} cases: "
    words = ", ".join(f"{name} in {split}" if names[name] > 1 else name for name, split in cases if name)
    return f"{words}: " if words else ""


def _counts(counts: dict[str, int], most: int = 4) -> str:
    shown = [f"{value} ({count})" for value, count in list(counts.items())[:most]]
    return ", ".join(shown) + (f" and {len(counts) - most} others" if len(counts) > most else "")
