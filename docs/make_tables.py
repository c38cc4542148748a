"""Fills the tables of README.md and docs/*.md from benchmarks/results/*.json, so that no number is typed by hand.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Run `python docs/make_tables.py` after a measurement;
`--check` changes nothing and exits 1 when a page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from export_tables import builds_table, graphs_table, half_table
from peer_tables import ANY, FOUR, peers_full_table, peers_table, seeds_table
from table_cells import (
    GED,
    GLUE,
    NOT_MEASURED,
    Scores,
    difference,
    distance,
    interval,
    markdown,
    mean,
    not_measured,
    read,
    read_peer,
    unmeasured,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SOFT_UNET = "unet-soft"
"""The peer beside the shipped model."""
READERS = "_annotators"
"""How the keys of the human reference end."""
MODEL_ROWS = (  # slices, method, result file, how its keys end
    ("four marked", "cdiff `--fast`", "lidc_testing_all_raters_zooms", ""),
    ("four marked", "cdiff `--fast --levels vote`", "lidc_testing_all_raters_zooms_vote", ""),
    ("four marked", "cdiff, one size", "lidc_testing_all_raters_fast", ""),
    ("four marked", "cdiff, one size, `--levels vote`", "lidc_testing_all_raters_fast_vote", ""),
    ("four marked", "plain U-Net on the soft label", "unet_testing_all_raters", ""),
    ("four marked", "a radiologist against the other three", "lidc_testing_all_raters_zooms", READERS),
    ("any marked", "cdiff `--fast`", "lidc_testing_marked_zooms", ""),
    ("any marked", "cdiff `--fast --levels vote`", "lidc_testing_marked_zooms_vote", ""),
    ("any marked", "cdiff, one size", "lidc_testing_marked_fast", ""),
    ("any marked", "cdiff, one size, `--levels vote`", "lidc_testing_marked_fast_vote", ""),
    ("any marked", "plain U-Net on the soft label", "unet_testing_marked", ""),
    ("any marked", "a radiologist against the other three", "lidc_testing_marked_zooms", READERS),
    ("middle slices", "cdiff `--fast`", "lidc_testing_middle_zooms", ""),
    ("middle slices", "cdiff `--fast --levels vote`", "lidc_testing_middle_zooms_vote", ""),
    ("middle slices", "cdiff, one size", "lidc_testing_middle_fast", ""),
    ("middle slices", "cdiff, one size, `--levels vote`", "lidc_testing_middle_fast_vote", ""),
    ("middle slices", "cdiff, one size, 25 runs x 100 steps", "lidc_testing_middle", ""),
    ("middle slices", "plain U-Net on the soft label", "unet_testing_middle", ""),
    ("middle slices", "a radiologist against the other three", "lidc_testing_middle_zooms", READERS),
)


NODULE_ROWS = tuple(row for row in MODEL_ROWS if row[0] != "middle slices" and not row[2].startswith("unet_"))
"""Those whose results hold every nodule as a whole."""


def model_table(results: Path) -> str:
    """Scores on LIDC Testing: soft Dice at five and nine thresholds, Dice at each level, energy distance."""
    return lidc_table("Testing slices", MODEL_ROWS, "", results)


def nodules_table(results: Path) -> str:
    """The same of each nodule as a whole, means over nodules; there is no such energy distance."""
    return lidc_table("Testing slices (nodules)", NODULE_ROWS, "case_", results)


def lidc_table(corner: str, chosen: tuple[tuple[str, str, str, str], ...], start: str, results: Path) -> str:
    """One row a method on some slices. start: how keys begin, "case_" for nodules as a whole, "" for slices."""
    levels = range(1, 5)
    last = [] if start else [GED]
    header = [corner, "method", "soft Dice, 5", "soft Dice, 9", *[f"level {c}" for c in levels], *last]
    rows = []
    for slices, method, name, ending in chosen:
        scores = read_peer(name, SOFT_UNET, results) if name.startswith("unet_") else read(name, results)
        if scores is None or f"{start}soft_dice_5" not in scores:
            rows.append([slices, method, NOT_MEASURED, *["-"] * (len(header) - 3)])
            continue
        by_level = {} if ending else {e["level"]: e for e in scores.get(f"{start}dice_per_level", [])}
        rows.append(
            [
                f"{slices} ({scores['case_soft_dice_5']['n_cases'] if start else scores['n_slices']})",
                method,
                *[interval(scores.get(f"{start}soft_dice_{n}{ending}")) for n in (5, 9)],
                *[f"{by_level[c]['mean']:.3f}" if c in by_level else "-" for c in levels],
                *[distance(scores) if not ending and scores.get("ged") else "-" for _ in last],
            ]
        )
    return markdown(header, rows, words=2)


HEADLINE_ROWS = (  # method, result files of the slices that all four marked and that any marked, how their keys end
    ("cdiff `--fast`", "lidc_testing_all_raters_zooms", "lidc_testing_marked_zooms", ""),
    ("cdiff `--fast --levels vote`", "lidc_testing_all_raters_zooms_vote", "lidc_testing_marked_zooms_vote", ""),
    ("plain U-Net on the soft label", "unet_testing_all_raters", "unet_testing_marked", ""),
    ("a radiologist against the other three", "lidc_testing_all_raters_zooms", "lidc_testing_marked_zooms", READERS),
)


def headline_table(results: Path) -> str:
    """The model in short: soft Dice at five thresholds on both sets of slices; level 4, energy distance and calibration on the first."""
    header = ["LIDC-IDRI, Testing", "soft Dice, all four marked", "soft Dice, any marked", "level 4", GED, "ECE near"]
    rows = []
    for method, four, anybody, ending in HEADLINE_ROWS:
        scores, others = (
            read_peer(name, SOFT_UNET, results) if name.startswith("unet_") else read(name, results)
            for name in (four, anybody)
        )
        if scores is None:
            rows.append([method, *unmeasured(header)])
            continue
        by_level = {entry["level"]: entry for entry in scores["dice_per_level"]}
        dice = [interval(one[f"soft_dice_5{ending}"]) if one else NOT_MEASURED for one in (scores, others)]
        more = ["-"] * 3 if ending else [mean(by_level[4]), distance(scores), mean(scores["ece_near"])]
        rows.append([method, *dice, *more])
    return markdown(header, rows)


SPEED_ROWS = {  # as in the report of `cdiff benchmark`
    "published": "PyTorch, one run after another, as published",
    "pytorch": "PyTorch, batched, encoder once a slice",
    "compiled": "PyTorch compiled, batched, encoder once a slice",
    "exported": "cdiff, exported engine",
}


def speed_table(results: Path) -> str:
    """What `cdiff benchmark` measured on a CPU: end to end, a denoiser call at each batch size, and the floor."""
    report = read("benchmark_cpu", results)
    if report is None:
        return f"{NOT_MEASURED}\n"
    calls, floor = report["denoiser_call"], report["floor"]
    sizes = list(next(iter(calls.values())))
    rows = []
    for kind, found in report["end_to_end"].items():
        ratio = report["ratios"].get(f"{kind}_over_published")
        speed = [f"{found['slices_a_minute']:.2f}", "1" if ratio is None else f"{ratio['median']:.2f}"]
        spent = [f"{calls[kind][n]['ms']:.1f}" if kind in calls else "-" for n in sizes]
        rows.append([SPEED_ROWS[kind], *speed, *spent, f"{found['peak_bytes'] / 2**20:.0f}"])
    rate = 60 * report["protocol"]["slices"] / floor["end_to_end_seconds"]
    least = [f"{int(n) * floor['ms_a_row']:.1f}" for n in sizes]
    rows.append(["floor: FLOPs over the measured matrix-product rate", f"{rate:.2f}", "-", *least, "-"])
    header = ["", "slices per minute", "times as fast", *[f"ms per call of {n}" for n in sizes], "peak MiB"]
    return f"{speed_setting(report)}\n\n{markdown(header, rows)}"


def speed_setting(report: Scores) -> str:
    """On what and for what the speed table was measured, one sentence."""
    machine, model, protocol = report["machine"], report["model"], report["protocol"]
    versions = machine["versions"]
    onnxruntime = next((versions[name] for name in ("onnxruntime", "onnxruntime-gpu") if name in versions), "-")
    return (
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}, "
        f"ONNX Runtime {onnxruntime}; {model['parameters'] / 1e6:.2f} M parameters, "
        f"{'x'.join(map(str, model['image_size']))}, {model['levels']} levels x {protocol['runs']} runs x "
        f"{protocol['steps']} steps per slice, {model['precision']}; medians of {protocol['repeats']} rounds, "
        "ratios within a round."
    )


PAIRED = {  # columns: what was compared with the U-Net, the output of `cdiff.benchmarks.paired`
    "four marked, `mean`": "paired_unet_mean",
    "four marked, `vote`": "paired_unet_vote",
    "any marked, `mean`": "paired_unet_marked",
    "middle slices, 25 runs x 100 steps": "paired_unet_middle_all",
}
PAIRED_ROWS = {
    "soft_dice_5": "soft Dice, 5",
    "soft_dice_9": "soft Dice, 9",
    **{f"dice_level_{c}": f"level {c}" for c in range(1, 5)},
    "ged": "GED (less is better)",
    "ged_no_diagonal": "GED without the diagonal (less is better)",
    "brier_near": "Brier near the structure (less is better)",
}


STEPS = {  # columns: what one step was compared with, on Validation
    "2 steps": "paired_steps_1_2",
    "5 steps": "paired_steps_1_5",
    "all 100 (DDPM)": "paired_steps_1_all",
}
WHOLE = {"25 runs x 100 steps": "paired_middle_all"}
"""What one step was compared with on the middle slices of Testing."""
ZOOMS = {  # columns: where two sizes were compared with one
    "Validation, four marked": "paired_zooms_validation",
    "Validation, four marked, `vote`": "paired_zooms_validation_vote",
    "Validation, any marked": "paired_zooms_validation_marked",
    "Testing, four marked": "paired_zooms_testing",
    "Testing, four marked, `vote`": "paired_zooms_testing_vote",
    "Testing, any marked": "paired_zooms_marked",
}


def paired_table(corner: str, columns: Mapping[str, str], results: Path) -> str:
    """Differences slice by slice, with intervals. `columns`: words to the result file of `cdiff.benchmarks.paired`.

    A score that no file has, as the energy distance without the diagonal where one side has a single mask, has no row.
    """
    found = {words: read(name, results) for words, name in columns.items()}
    rows = []
    for key, words in PAIRED_ROWS.items():
        scores = [report["all"].get(key) if report else None for report in found.values()]
        if any(score and score["mean"] is not None for score in scores) or not any(found.values()):
            rows.append([words, *map(difference, scores)])
    return markdown([corner, *found], rows)


EACH = {
    "Testing, four marked": "lidc_testing_all_raters_zooms",
    "Testing, four marked, `vote`": "lidc_testing_all_raters_zooms_vote",
    "Testing, any marked": "lidc_testing_marked_zooms",
    "Validation, four marked": "lidc_validation_all_raters_zooms",
    "Validation, four marked, `vote`": "lidc_validation_all_raters_zooms_vote",
}
EACH_COLUMNS = {
    "dice_each": "cdiff `--fast`",
    "dice_each_annotators": "two of the other three",
    "dice_each_difference": "difference",
}


def each_table(results: Path) -> str:
    """Dice with one reader: the shipped model's and the other readers' majority."""
    rows = []
    for words, name in EACH.items():
        scores = read(name, results)
        if scores is None or "dice_each" not in scores:
            rows.append([words, NOT_MEASURED, *["-"] * (len(EACH_COLUMNS) - 1)])
            continue
        *each, between = (scores[key] for key in EACH_COLUMNS)
        rows.append([f"{words} ({scores['n_slices']})", *map(interval, each), difference(between)])
    return markdown(["Dice with one reader", *EACH_COLUMNS.values()], rows)


def scans_table(results: Path) -> str:
    """Whole CT scans of another source: how the label's slices fared in each."""
    header = ["scan", "", "slices", "widest, pixels", "Dice of the mask", *(f"level {c}" for c in range(1, 5))]
    report = read("whole_scans", results)
    if report is None:
        return not_measured(header)
    rows = []
    for scan in report["scans"]:
        for part in scan["found"]:
            slices = part["slices"]
            rows.append([
                scan["scan"].partition("_")[0],
                "as it is" if part["shrink"] == 1 else f"`--shrink {part['shrink']}`",
                str(len(slices)),
                str(max(scan["extent"])),
                average([row["dice_mask"] for row in slices]),
                *(average([row["dice_levels"][c] for row in slices]) for c in range(len(slices[0]["dice_levels"]))),
            ])  # fmt: skip
    return markdown(header, rows, words=2)


def beside_table(results: Path) -> str:
    """How exactly a structure must be pointed at."""
    header = ["pixels beside the middle", "soft Dice, 5", "difference from the middle", "slices missed"]
    report = read("off_centre", results)
    if report is None:
        return not_measured(header)
    rows = []
    for found in report["found"]:
        apart = difference(found["difference"]) if found["pixels"] else "-"
        rows.append([str(found["pixels"]), interval(found["soft_dice_5"]), apart, f"{found['missed']:.1%}"])
    return markdown(header, rows)


def expected_beside_table(results: Path) -> str:
    """What maps expect of their masks where the structure is not where the model looks."""
    header = ["pixels beside the middle", "masks that are empty", "the others: expected Dice", "found"]
    report = read("off_centre_expected", results)
    if report is None:
        return not_measured(header)
    rows = [
        [str(one["pixels"]), f"{one['empty']:.0%}", interval(one["expected_dice"]), interval(one["dice_each"])]
        for one in report["found"]
    ]
    return markdown(header, rows)


EXPECTED = {
    "Validation": "lidc_validation_marked_zooms",
    "Testing": "lidc_testing_marked_zooms",
}
FEW = 0.5
"""Below this expected Dice all slices are one row: they are few."""


def expected_table(results: Path) -> str:
    """What maps expect of their masks beside what was found: tenths of the expected Dice, then all slices."""
    header = ["expected Dice", *(f"{words}: {what}" for words in EXPECTED for what in ("slices", "expected", "found"))]
    reports = [read(name, results) for name in EXPECTED.values()]
    if any(report is None or "expected_bins" not in report for report in reports):
        return not_measured(header)
    tables = [report["expected_bins"] for report in reports if report]
    rows = []
    for first, end, label in (
        (0, 5, f"below {FEW}"),
        *((i, i + 1, f"{i / 10} to {(i + 1) / 10}") for i in range(5, 10)),
    ):
        row = [label]
        for table in tables:
            part = [one for one in table[first:end] if one["slices"]]
            count = sum(one["slices"] for one in part)
            sums = (sum(one["slices"] * one[what] for one in part) for what in ("expected", "found"))
            row += [str(count), *(f"{value / count:.3f}" if count else "-" for value in sums)]
        rows.append(row)
    return markdown(header, rows)


def average(values: list[float]) -> str:
    """A mean with its range."""
    return f"{sum(values) / len(values):.3f} ({min(values):.2f}{GLUE}to{GLUE}{max(values):.2f})"


def memory_table(results: Path) -> str:
    """A training step's memory: one row a line of what `cdiff.benchmarks.training_memory` printed."""
    header = ["settings", "float32, GiB at the peak of a step", "of it from step to step"]
    path = results / "training_memory.jsonl"
    if not path.is_file():
        return not_measured(header)
    rows = []
    for found in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        words = " ".join(f"`{setting}`" for setting in found["settings"]) or "the preset"
        rows.append([words, *(f"{found[key] / 2**30:.1f}" for key in ("peak", "kept"))])
    return markdown(header, rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "model": model_table,
    "headline": headline_table,
    "nodules": nodules_table,
    "each": each_table,
    "expected": expected_table,
    "expected_beside": expected_beside_table,
    "speed": speed_table,
    "paired": lambda results: paired_table("cdiff - U-Net", PAIRED, results),
    "steps": lambda results: paired_table("1 step -", STEPS, results),
    "zooms": lambda results: paired_table("two sizes - one", ZOOMS, results),
    "whole": lambda results: paired_table("4 runs x 1 step -", WHOLE, results),
    "peers": peers_table,
    "peers-four": lambda results: peers_full_table(FOUR, results),
    "peers-any": lambda results: peers_full_table(ANY, results),
    "seeds": seeds_table,
    "scans": scans_table,
    "beside": beside_table,
    "memory": memory_table,
    "graphs": graphs_table,
    "half": half_table,
    "builds": builds_table,
}


def filled(text: str) -> str:
    """A page's text with every marked region rewritten. Raises KeyError for a table that does not exist."""
    return REGION.sub(lambda m: f"{m[1]}{TABLES[m['name']](RESULTS)}{m[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which pages are out of date")
    options = parser.parse_args()
    stale = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new == text:
            continue
        stale += 1
        print(f"{page.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
        if not options.check:
            page.write_text(new, encoding="utf-8")
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
