"""`cdiff evaluate`: scores of a model on case folders, beside those of the annotators themselves."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cdiff.cli import options
from cdiff.cli.console import Meter, out, say, warn
from cdiff.cli.engines import builder

DATA = "Data"


class Split(StrEnum):
    """The splits that find_cases knows."""

    train = "train"
    val = "val"
    test = "test"
    all = "all"


class Raters(StrEnum):
    """What happens to a case whose number of annotators is not the model's."""

    skip = "skip"
    use = "use"


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Case folders with image.nii.gz and task01_seg01.nii.gz ..., or a folder that holds "
            "Training/Validation/Testing or train/val/test.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    json_: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="OUT",
            help="Write everything here: scores, intervals, protocol, each case. Until it is whole, finished cases are "
            "kept in NAME.partial.jsonl beside it and an interrupted evaluation goes on from there.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    split: Annotated[
        Split | None,
        typer.Option(
            "--split",
            metavar="train|val|test|all",
            help="Which split to score.",
            show_default="test, else val, else all",
            rich_help_panel=DATA,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="taskNN",
            help="Which structure, when the masks carry several.",
            show_default="the only one",
            rich_help_panel=DATA,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, help="Only the first N cases.", show_default="all", rich_help_panel=DATA
        ),
    ] = None,
    all_raters: Annotated[
        bool,
        typer.Option(
            "--all-raters",
            help="Only slices that all annotators marked, instead of those that at least one marked.",
            rich_help_panel=DATA,
        ),
    ] = False,
    raters: Annotated[
        Raters,
        typer.Option(
            "--raters",
            metavar="skip|use",
            help="A case with another number of annotators than the model has levels: leave it out, or score it with "
            "level c of C read as the share c/C of its annotators.",
            rich_help_panel=DATA,
        ),
    ] = Raters.skip,
    model: options.ModelOption = None,
    engine: options.EngineOption = "auto",
    device: options.DeviceOption = "cpu",
    runs: options.RunsOption = None,
    steps: options.StepsOption = None,
    sampler: options.SamplerOption = None,
    fast: options.FastOption = False,
    levels: options.CombineOption = options.Combine.mean,
    mirror: options.MirrorOption = None,
    seed: options.SeedOption = 0,
    quiet: options.QuietOption = False,
) -> None:
    """Score a model against several annotators' masks, with 95 % intervals by bootstrap over cases.

    What each score means is in docs/metrics.md.

    Example:

    cdiff evaluate --data my_data --model my_bundle --json scores.json
    """
    from cdiff import load
    from cdiff.runtime.cases import find_cases
    from cdiff.runtime.evaluate import Protocol, choose_split
    from cdiff.runtime.evaluate import evaluate as score

    found = find_cases(data, task)
    chosen, cases = choose_split(found, split)
    cases = cases[:limit]
    segmenter = load(model, engine=engine, device=device, build=builder(quiet))
    say(f"split {chosen} of {', '.join(found)}: {len(cases)} cases", quiet)
    say(f"model {segmenter.manifest.name}, engine {segmenter.engine.name} on {segmenter.engine.device}", quiet)
    with Meter("evaluate", quiet) as meter:
        report = score(
            segmenter,
            cases,
            Protocol(runs, steps, sampler, fast, levels, mirror, seed, all_raters, raters),
            data={"folder": data.resolve().name, "split": chosen, "task": task},
            out=json_,
            progress=meter,
            notice=warn,
        )
    out.print(_table(report))
    if json_:
        out.print(str(json_), soft_wrap=True)


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['n_slices']} slices of {report['n_cases']} cases", title_justify="left")
    for name in ("score", "mean", "95 % interval"):
        table.add_column(name, justify="left" if name == "score" else "right")
    rows = [
        ("soft Dice, five thresholds", report["soft_dice_5"]),
        ("soft Dice, nine thresholds", report["soft_dice_9"]),
        *((f"Dice, at least {row['level']}", row) for row in report["dice_per_level"]),
        ("energy distance (GED)", report["ged"]),
        ("  its floor for nested maps", report["ged_floor"]),
        ("annotators: soft Dice, one against the others", report["soft_dice_5_annotators"]),
        ("annotators: pairwise Dice", report["pairwise_dice_annotators"]),
    ]
    for label, value in rows:
        table.add_row(label, _number(value["mean"]), f"{_number(value['low'])} to {_number(value['high'])}")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
