"""The report folder: its tables say what the JSON says, its plots are pictures, a sweep over steps resumes; the paper's tables."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.data.cases import Case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.scoring.evaluate import Protocol
from cdiff.runtime.scoring.paper import PUBLISHED, paper_notes, paper_rows, read_beside
from cdiff.runtime.scoring.plots import write_curve
from cdiff.runtime.scoring.publish import check_steps, sweep_steps, write_report
from cdiff.runtime.scoring.tables import csv_text
from cdiff.runtime.segmenter import Segmenter
from tests.runtime.known_maps import KnownMaps, run

FILES = {"scores.json", *(f"{name}.csv" for name in ("scores", "cases", "slices", "reliability", "expected", "runs"))}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_schedule(segmenter: KnownMaps) -> Any:
    segmenter.manifest = replace(
        segmenter.manifest,
        T=25,
        schedule=NoiseSchedule(T=25).to_json(),
        fast={"sampler": "ddim", "steps": 2, "runs": 2},
    )
    segmenter.sampling = partial(Segmenter.sampling, segmenter)  # type: ignore[attr-defined]
    return segmenter


@pytest.fixture
def report(cases: list[Case], tmp_path: Path) -> dict[str, Any]:
    return run(KnownMaps(tmp_path / "b", 3, shift=1, noise=0.5), cases, group="case0[1-4]")


def test_the_tables_say_what_the_report_says(report: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "report"
    write_report(folder / "scores.json", report)
    assert {path.name for path in folder.iterdir()} == FILES | {"reliability.png", "expected.png", "runs.png"}
    assert json.loads((folder / "scores.json").read_text()) == report

    scores = {(row["score"], row["at"]): row for row in table(folder / "scores.csv")}
    assert float(scores["soft_dice_5", ""]["low"]) == pytest.approx(report["soft_dice_5"]["low"])
    assert float(scores["hd95_mm_per_level", "level 2"]["mean"]) == pytest.approx(
        report["hd95_mm_per_level"][1]["mean"]
    )
    assert scores["hd95_mm_per_level", "level 3"]["n"] == "12"
    assert scores["volume_error_ml_per_level", "level 1, absolute"]["n"] == "4"
    assert float(scores["dice_per_threshold", "threshold 0.3"]["mean"]) == pytest.approx(
        report["dice_per_threshold"][2]["mean"], rel=1e-8
    )

    slices = table(folder / "slices.csv")
    assert len(slices) == 16
    assert np.mean([float(row["soft_dice_9"]) for row in slices]) == pytest.approx(report["soft_dice_9"]["mean"])
    assert [row["empty_level_3"] for row in slices[:4]] == ["neither"] * 3 + ["annotators"]
    assert slices[3]["hd95_mm_level_3"] == ""
    assert slices[0]["group"] == "case01"

    cases = table(folder / "cases.csv")
    assert [row["case"] for row in cases] == ["case01", "case02", "case03", "case04"]
    errors = [float(row["predicted_ml_level_2"]) - float(row["true_ml_level_2"]) for row in cases]
    assert [float(row["volume_error_ml_level_2"]) for row in cases] == pytest.approx(errors)
    for row, case in zip(cases, report["cases"], strict=True):
        for kind in ("predicted", "true"):
            counts = case["volumes"][f"{kind}_voxels"]
            assert [int(row[f"{kind}_voxels_level_{c}"]) for c in (1, 2, 3)] == counts
            assert float(row[f"{kind}_ml_level_3"]) == pytest.approx(counts[2] * case["volumes"]["voxel_ml"])
    assert np.mean(errors) == pytest.approx(report["volume_error_ml_per_level"][1]["signed"]["mean"])

    bins = table(folder / "reliability.csv")
    assert [row["region"] for row in bins] == ["whole"] * 10 + ["near"] * 10
    whole = [row for row in bins[:10] if row["pixels"] != "0"]
    pixels = np.array([int(row["pixels"]) for row in whole])
    gaps = [abs(float(row["predicted"]) - float(row["observed"])) for row in whole]
    assert pixels.sum() == 16 * 24 * 20
    assert (pixels * gaps).sum() / pixels.sum() == pytest.approx(report["ece"]["mean"])
    for row, point in zip(table(folder / "runs.csv"), report["by_runs"], strict=True):
        assert row["runs"] == str(point["runs"])
        ends = [float(row[f"soft_dice_9{end}"]) for end in ("", "_low", "_high")]
        assert ends == pytest.approx([point["soft_dice_9"][end] for end in ("mean", "low", "high")])
        assert ends[1] < ends[0] < ends[2]


def test_the_plots_show_something(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(tmp_path / "scores.json", report)
    for name in ("reliability.png", "expected.png", "runs.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 600
            colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
        assert (0, 114, 178) in {tuple(colour) for colour in colours.tolist()}


def test_plots_of_what_is_hardly_there(tmp_path: Path) -> None:
    """No interval (a single case), and bins without pixels: still a plot."""
    rows = [{"runs": r, "soft_dice_5": 0.5, "soft_dice_9": 0.6} for r in (1, 40)]
    ends = {f"soft_dice_{n}_{end}": None for n in (5, 9) for end in ("low", "high")}
    write_curve([row | ends for row in rows], "runs", "runs", tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 5000


def test_one_run_has_no_curve_to_plot(cases: list[Case], tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "runs.png").write_text("of an earlier evaluation")
    write_report(folder / "scores.json", run(KnownMaps(tmp_path / "b", 3, R=1), cases[:1]))
    assert {path.name for path in folder.iterdir()} == FILES | {"reliability.png", "expected.png"}


def test_a_report_without_runs_leaves_no_table_of_anothers(report: dict[str, Any], tmp_path: Path) -> None:
    """As of maps in files, written where a model's report was."""
    write_report(tmp_path / "scores.json", report)
    write_report(tmp_path / "scores.json", report | {"by_runs": []})
    assert {path.name for path in tmp_path.glob("*.*")} == FILES - {"runs.csv"} | {"reliability.png", "expected.png"}


def test_csv_cells() -> None:
    text = csv_text([{"a": 1 / 3, "b": None, "c": 'say "x, y"'}, {"a": 2, "b": True, "c": ""}])
    assert text == 'a,b,c\n0.333333333,,"say ""x, y"""\n2,True,\n'
    assert csv_text([]) == "\n"
    # Cases are called as their folders are, and a spreadsheet would compute these; numbers below zero are none of them.
    for name in ("=1+1", "+1", "-2+3", "@SUM(1)", "\t=1"):
        assert csv_text([{"case": name, "error": -0.5}]) == f"case,error\n'{name},-0.5\n"


def test_a_sweep_over_steps_resumes_and_reuses(cases: list[Case], tmp_path: Path) -> None:
    folder, protocol = tmp_path / "report", Protocol(sampler="ddim")
    known = run(KnownMaps(tmp_path / "b", 3), cases, protocol)  # resolved to 5 steps
    stopped = with_schedule(KnownMaps(tmp_path / "b", 3, stop_after=6))
    with pytest.raises(KeyboardInterrupt):
        sweep_steps(stopped, cases, protocol, [10, 2, 5, 2], folder, known=known)
    assert not (folder / "steps.csv").exists()
    rest = with_schedule(KnownMaps(tmp_path / "b", 3))
    seen: list[tuple[int, int]] = []
    reports = sweep_steps(
        rest, cases, protocol, [10, 2, 5, 2], folder, known=known, progress=lambda *now: seen.append(now)
    )
    assert [name for name, _ in rest.asked] == ["case03", "case04"]  # of 10 steps; 2 were done, 5 are known
    assert [report["protocol"]["steps"] for report in reports] == [2, 5, 10]
    assert {path.name for path in (folder / "steps").iterdir()} == {"0002.json", "0010.json"}
    rows = table(folder / "steps.csv")
    assert [(row["steps"], row["sampler"], row["soft_dice_5"]) for row in rows] == [
        (n, "ddim", "1") for n in ("2", "5", "10")
    ]
    assert [float(row["ece_near"]) for row in rows] == pytest.approx([one["ece_near"]["mean"] for one in reports])
    seconds = [sum(case["seconds"] for case in report["cases"]) for report in reports]
    assert [16 * float(row["seconds_per_slice"]) for row in rows] == pytest.approx(seconds)
    assert (folder / "steps.png").exists()
    assert seen == sorted(seen)
    assert seen[-1] == (17_000, 17_000)


def test_steps_that_a_model_cannot_take(tmp_path: Path) -> None:
    segmenter = cast(Segmenter, with_schedule(KnownMaps(tmp_path / "b", 3)))
    assert check_steps(segmenter, Protocol(), [5, 1, 5]) == [1, 5]
    with pytest.raises(CdiffError, match="26"):
        check_steps(segmenter, Protocol(fast=True), [5, 26])
    with pytest.raises(CdiffError, match="--steps-curve"):
        check_steps(segmenter, Protocol(), [])


def test_the_papers_tables(report: dict[str, Any]) -> None:
    """Own rows are the report's in percent and name their data; published ones name theirs and their source."""
    report["data"] = {"folder": "kidney", "split": "val", "task": "task01"}
    rows = paper_rows(report)
    assert [row.table for row in rows] == sorted(row.table for row in rows)
    first, third = rows[0], rows[-1]
    assert first.data == "kidney val task01 (16 slices of 4 cases)"
    assert first.percent == pytest.approx(100 * report["soft_dice_5"]["mean"])
    assert third.percent == pytest.approx(100 * report["pairwise_dice_annotators"]["mean"])
    assert third.low == pytest.approx(100 * report["pairwise_dice_annotators"]["low"])
    assert all(row in rows and row.source and "QUBIQ" in row.data for row in PUBLISHED)
    assert any("Tables 2 and 3" in note for note in paper_notes(rows))


def test_a_papers_row_says_how_its_maps_were_made(report: dict[str, Any]) -> None:
    """And a Dice of 0, or of 1, or one that nobody has, is a row."""
    protocol = {"runs": 2, "steps": 1, "sampler": "ddim", "combine": "vote"}
    for mean, said in ((0, 0), (1, 100), (None, None)):
        score = report["soft_dice_5"] | dict.fromkeys(("mean", "low", "high"), mean)
        drawn, written = (
            paper_rows(report | {"protocol": one, "soft_dice_5": score})[0] for one in (protocol, {"all_slices": False})
        )
        assert (drawn.percent, drawn.low, drawn.high) == (said, said, said)
        assert drawn.source == "computed now: 2 runs x 1 step, ddim, vote"
        assert written.source == "computed now: maps read from files"


def test_no_note_on_what_is_there(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    published = tuple(replace(PUBLISHED[0], table=table) for table in (1, 2, 3))
    monkeypatch.setattr("cdiff.runtime.scoring.paper.PUBLISHED", published)
    assert not any("no published number" in note for note in paper_notes(paper_rows(report)))


def test_other_reports_and_published_numbers_stand_beside(report: dict[str, Any], tmp_path: Path) -> None:
    """A report of another variant fills Table 2, a CSV any table; both keep their data and source, and a table with them lacks nothing."""
    report["data"] = {"folder": "kidney", "split": "val", "task": "task01"}
    other = report | {"model": report["model"] | {"name": "second", "variant": "annotator"}}
    (tmp_path / "annotator.json").write_text(json.dumps(other), encoding="utf-8")
    text = (
        "table,whose,data,percent,source,low\r\n"
        + '2,"X, 2024",kidney,91.5,"X, Table 2",\r\n3,readers,kidney,80,X,79.5\r\n'
    )
    (tmp_path / "numbers.csv").write_text(text, encoding="utf-8-sig")
    beside = [row for name in ("annotator.json", "numbers.csv") for row in read_beside(tmp_path / name)]
    rows = paper_rows(report, beside)
    second = [(row.whose.split(",")[0], row.percent) for row in rows if row.table == 2]
    score = 100 * report["soft_dice_5"]["mean"]
    assert second == [(f"{report['model']['name']}: consensus", score), ("second: annotator", score), ("X", 91.5)]
    assert [(row.percent, row.low, row.high) for row in rows if row.whose == "readers"] == [(80, 79.5, None)]
    assert next(row.source for row in rows if row.whose.startswith("second")).startswith(
        "computed before, annotator.json: "
    )
    assert not any("no published number" in note for note in paper_notes(rows))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "table,whose,percent\n1,x,3\n", "data, source"),
        ("a.csv", "table,whose,data,percent,source\n1,x,kidney,90,\n", "line 2: source is empty"),
        ("a.csv", "table,whose,data,percent,source\n1,x,kidney,96,5,X\n", "line 2 has more cells than columns"),
        ("a.csv", f"table,whose,data,percent,source\n1,x,kidney,96,{'X' * 200_000}\n", "is not a report"),
        ("a.json", "[" * 100_000, "is not a report"),
        ("a.csv", "table,whose,data,percent,source\n1,x,kidney,90%,y\n", "line 2: .*90%"),
        ("a.csv", "table,whose,data,percent,source\n1,x,kidney,0.9,y\n4,x,kidney,90,y\n", "line 3 is out of range"),
        ("a.csv", "table,whose,data,percent,source\n1,x,kidney,100,y\n1,x,kidney,100.5,y\n", "line 3 is out of range"),
        ("a.csv", "table,whose,data,percent,source\n1,x,kidney,nan,y\n", "line 2 is out of range"),
        (
            "a.csv",
            "table,whose,data,percent,source,low,high\n1,x,kidney,93,y,95,99\n",
            "line 2: percent 93 lies outside",
        ),
        ("a.csv", "table,whose,data,percent,source,high\n1,x,kidney,93,y,9.5\n", "line 2: percent 93 lies outside"),
        ("a.json", "{}", "not a report of cdiff evaluate"),
        ("a.json", "[1", "not a report of cdiff evaluate"),
        ("a.xlsx", "PK", "not a report of cdiff evaluate"),
    ],
)
def test_a_file_that_cannot_stand_beside(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CdiffError, match=said):
        read_beside(tmp_path / name)


@pytest.mark.parametrize("mean", ["0.9", 5.0, -0.1, float("nan"), True, [0.9]])
def test_a_report_whose_dice_are_none_cannot_stand_beside(mean: Any, report: dict[str, Any], tmp_path: Path) -> None:
    """They would stand in the table as percent, or end in a traceback there, after hours."""
    report["data"] = {"folder": "kidney", "split": "val", "task": "task01"}
    changed = report | {"soft_dice_5": report["soft_dice_5"] | {"mean": mean}}
    (tmp_path / "a.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(CdiffError, match="not a report of cdiff evaluate"):
        read_beside(tmp_path / "a.json")


def test_what_was_drawn_of_another_report_gives_way_with_it(cases: list[Case], tmp_path: Path) -> None:
    """worst.png and the steps are drawn after the report, and were a mixture where that is killed before it comes to them, or not asked for."""
    out = tmp_path / "report" / "scores.json"
    drawn = {out.with_name(name) for name in ("worst.png", "steps.csv", "steps.png")}
    own = out.with_name("own.txt")

    def evaluate(shift: int, chosen: list[Case], group: str | None = None) -> set[Path]:
        run(KnownMaps(tmp_path / "b", 3, shift=shift), chosen, out=out, write=write_report, group=group)
        return {path for path in drawn if path.exists()}

    assert evaluate(0, cases) == set()
    for path in (*drawn, own):
        path.touch()
    assert evaluate(0, cases) == drawn  # the same command again, for its tables
    assert evaluate(1, cases) == set()
    for shift, chosen, group in ((1, cases[:3], None), (1, cases[:3], "case0[1-4]")):
        for path in drawn:
            path.touch()
        assert evaluate(shift, chosen, group) == set()
    assert own.exists()
