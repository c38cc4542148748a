"""docs/make_tables.py: what a result file becomes in the pages' tables, and what stands there where none is."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_docs import prose


def test_a_result_reaches_the_headline_table(tables: ModuleType, tmp_path: Path) -> None:
    def score(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.0625, "high": mean + 0.0625}

    def result(dice: float, reader: float) -> dict[str, object]:
        return {
            "soft_dice_5": score(dice),
            "soft_dice_5_annotators": score(reader),
            "ged": score(0.25),
            "ged_samples": {"model": 16},
            "ece_near": score(0.0625),
            "dice_per_level": [{"level": c, **score(1 - c / 8)} for c in (1, 2, 3, 4)],
        }

    assert all(tables.NOT_MEASURED in row for row in tables.headline_table(tmp_path).splitlines()[2:])
    (tmp_path / "lidc_testing_all_raters_zooms.json").write_text(json.dumps(result(0.75, 0.625)))
    own, _, unet, reader = rows = tables.headline_table(tmp_path).splitlines()[2:]
    assert [cell.strip() for cell in own.split("|")[2:-1]] == [
        "0.750 (0.688\xa0to\xa00.812)", tables.NOT_MEASURED, "0.500", "0.250 (16)", "0.062",
    ]  # fmt: skip
    assert [cell.strip() for cell in reader.split("|")[2:-1]] == [
        "0.625 (0.562\xa0to\xa00.688)",
        tables.NOT_MEASURED,
        *"---",
    ]
    (tmp_path / "unet_testing_marked.json").write_text(json.dumps({"peers": {"unet-soft": result(0.5, 0.625)}}))
    assert tables.NOT_MEASURED in unet
    assert len({row.count("|") for row in rows}) == 1


def test_every_table_is_as_wide_in_every_row(tables: ModuleType, tmp_path: Path) -> None:
    """With nothing measured, as with everything."""
    for results in (tmp_path, tables.RESULTS):
        for name, table in tables.TABLES.items():
            rows = [line for line in table(results).splitlines() if line.startswith("|")]
            assert len({row.count("|") for row in rows}) <= 1, name


def test_a_page_is_written_or_only_said_to_be_out_of_date(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "docs").mkdir()
    pages = [tmp_path / "docs" / "a.md", tmp_path / "README.md"]
    for page in pages:
        page.write_text("before\n<!-- table: memory -->\n| old |\n<!-- end -->\nafter\n")

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["make_tables.py", *options])
        return tables.main(), capsys.readouterr().out

    old = pages[0].read_text()
    assert run("--check") == (1, "README.md: out of date\ndocs/a.md: out of date\n")
    assert pages[0].read_text() == old
    assert run() == (0, "README.md: written\ndocs/a.md: written\n")
    new = f"before\n<!-- table: memory -->\n{tables.memory_table(tmp_path)}<!-- end -->\nafter\n"
    assert [page.read_text() for page in pages] == [new] * 2
    assert run("--check") == run() == (0, "")


def test_a_result_reaches_the_model_table(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.NOT_MEASURED in tables.model_table(tmp_path)

    def score(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}

    result = {
        "n_slices": 351,
        "soft_dice_5": score(0.8125),
        "soft_dice_9": score(0.7),
        "soft_dice_5_annotators": score(0.7625),
        "ged": score(0.25),
        "ged_samples": {"model": 16},
        "dice_per_level": [{"level": c, **score(0.9 - c / 10)} for c in (1, 2, 3, 4)],
    }
    for name in ("lidc_testing_middle", "lidc_testing_all_raters_zooms"):  # the readers' row comes from the second
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    beside = {"peers": {"unet-soft": result | {"soft_dice_5": score(0.5)}}}
    (tmp_path / "unet_testing_all_raters.json").write_text(json.dumps(beside))
    rows = tables.model_table(tmp_path).splitlines()
    (own,) = [row for row in rows if "25 runs" in row and "351" in row]
    assert "0.812 (0.802\xa0to\xa00.823)" in own
    assert [cell.strip() for cell in own.split("|")][5:10] == ["0.800", "0.700", "0.600", "0.500", "0.250 (16)"]
    (reader,) = [row for row in rows if "radiologist" in row and "351" in row]
    assert "0.762" in reader
    assert "0.800" not in reader
    (unet,) = [row for row in rows if "U-Net" in row and "351" in row]
    assert "0.500 (0.490\xa0to\xa00.510)" in unet


def test_the_reader_and_the_panel_stand_beside_the_model(tables: ModuleType, tmp_path: Path) -> None:
    old = {
        "n_slices": 485,
        "soft_dice_5": {"mean": 0.5, "low": 0.4, "high": 0.6},
    }  # measured before there was such a score
    (tmp_path / "lidc_testing_marked_zooms.json").write_text(json.dumps(old))
    scores = {key: {"mean": m, "low": m - 0.125, "high": m + 0.125} for key, m in zip(tables.EACH_COLUMNS, (0.75, 0.5, 0.25), strict=True)}  # fmt: skip
    (tmp_path / "lidc_testing_all_raters_zooms.json").write_text(json.dumps({"n_slices": 351} | scores))
    four, vote, anybody, *validation = tables.each_table(tmp_path).splitlines()[2:]
    assert [cell.strip() for cell in four.split("|")[1:-1]] == [
        "Testing, four marked (351)",
        *("0.750 (0.625\xa0to\xa00.875)", "0.500 (0.375\xa0to\xa00.625)", "+0.250 (+0.125\xa0to\xa0+0.375)"),
    ]
    assert tables.NOT_MEASURED in vote
    assert tables.NOT_MEASURED in anybody
    assert [tables.NOT_MEASURED in row for row in validation] == [True, True]


def test_the_peers_stand_best_first_and_all_have_a_row(
    tables: ModuleType, peer_tables: ModuleType, tmp_path: Path
) -> None:
    from cdiff.benchmarks.peers.__main__ import NAMES

    assert set(peer_tables.PEERS) == set(NAMES)
    for table in ("peers", "peers-four", "peers-any"):
        rows = tables.TABLES[table](tmp_path).splitlines()[2:]
        alone = 4 if table == "peers" else 0  # the short table has those of two losses once
        assert len(rows) == len(NAMES) - alone
        assert all(tables.NOT_MEASURED in row for row in rows)
        assert {row.count("|") for row in tables.TABLES[table](tmp_path).splitlines()} == {rows[0].count("|")}

    def score(mean: float | None) -> dict[str, float | None]:
        return {"mean": mean, "low": mean, "high": mean}

    def peer(dice: float, share: float, **protocol: int) -> dict[str, object]:
        keys = ("soft_dice_9", "ged", "ece_near", "brier_near", "soft_dice_9_annotators")
        return {key: score(0.25) for key in keys} | {
            "soft_dice_5": score(dice),
            "soft_dice_5_annotators": score(0.7625),
            "dice_per_level": [score(0.9), score(0.8), score(0.7), score(0.6)],
            "ged_samples": {"model": 16},
            "training": {"parameters": 1_980_000, "steps": 123, "cpu_seconds": 3600.0},
            "cpu_seconds_a_slice": 0.125,
            "share_of_budget": share,
            "protocol": {"seed": 0} | protocol,
        }

    found = {
        "peers": {"consensus": peer(0.5, 1.0, steps=1), "unet-heads": peer(0.75, 0.5), "unet-soft": peer(0.625, 1.0)}
    }
    (tmp_path / "peers_testing_all_raters.json").write_text(json.dumps(found))
    rows = tables.TABLES["peers-four"](tmp_path).splitlines()[2:]
    names = [row.split("|")[1].strip() for row in rows]
    heads, soft, consensus = (peer_tables.PEERS[name] for name in ("unet-heads", "unet-soft", "consensus"))
    assert names[:3] == [f"{heads} (50% of its budget)", soft, f"{consensus}, 1 step"]
    assert tables.NOT_MEASURED in rows[3]
    assert names[-1] == "a radiologist against the other three"
    assert "0.762 (0.762\xa0to\xa00.762)" in rows[-1]
    cells = [cell.strip() for cell in rows[1].split("|")[2:-1]]
    assert cells[0] == "0.625 (0.625\xa0to\xa00.625)"
    assert cells[2] == "0.250 (16)"
    assert cells[5:] == ["0.900", "0.800", "0.700", "0.600", "1.98", "123", "60", "0.12"]
    assert all(tables.NOT_MEASURED in row for row in tables.TABLES["peers-any"](tmp_path).splitlines()[2:])
    assert tables.TABLES["peers"](tmp_path).splitlines()[2].startswith(f"| {heads} (50%"), "until it has a Dice term"
    later = {"peers": {"unet-heads-dice": peer(0.875, 1.0) | {"cpu_seconds_a_slice": 7.0}}}
    (tmp_path / "peers_testing_all_raters_dice.json").write_text(json.dumps(later))
    with_dice = peer_tables.PEERS["unet-heads-dice"]
    tops = {name: tables.TABLES[name](tmp_path).splitlines()[2:5] for name in ("peers", "peers-four")}
    firsts = {name: [row.split("|")[1].strip() for row in rows] for name, rows in tops.items()}
    assert firsts["peers"] == [with_dice, soft, f"{consensus}, 1 step"]
    assert tops["peers"][0].endswith("| 0.12 |"), "of the same network, measured without other work beside it"
    assert firsts["peers-four"] == [with_dice, f"{heads} (50% of its budget)", soft]

    assert tables.NOT_MEASURED in tables.TABLES["seeds"](tmp_path)
    again = {"peers": {"consensus": peer(0.625, 1.0, steps=5), "unet-heads": peer(0.5, 1.0)}}
    (tmp_path / "peers_testing_all_raters_seed_1.json").write_text(json.dumps(again))
    twice = tables.TABLES["seeds"](tmp_path).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in twice] == [heads, consensus], "those that were trained twice alone"
    assert [cell.strip() for cell in twice[0].split("|")[2:6]] == ["123, 123", "0.750", "0.500", "0.250"]
    assert {row.count("|") for row in tables.TABLES["seeds"](tmp_path).splitlines()} == {12}


def test_a_benchmark_reaches_the_speed_table(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.NOT_MEASURED in tables.speed_table(tmp_path)
    report = {
        "machine": {"cpu": "a processor", "threads": 2, "torch": "2.13.0", "versions": {"onnxruntime": "1.31.1"}},
        "model": {"parameters": 2.1e6, "image_size": [128, 128], "levels": 4, "precision": "float32"},
        "protocol": {"slices": 2, "runs": 4, "steps": 100, "repeats": 3},
        "floor": {"ms_a_row": 3.0, "end_to_end_seconds": 60.0},
        "denoiser_call": {"exported": {"1": {"ms": 12.34}, "8": {"ms": 56.78}}},
        "end_to_end": {
            "published": {"slices_a_minute": 0.5, "peak_bytes": 500 * 2**20},
            "exported": {"slices_a_minute": 1.25, "peak_bytes": 300 * 2**20},
        },
        "ratios": {"exported_over_published": {"median": 2.5}},
    }
    (tmp_path / "benchmark_cpu.json").write_text(json.dumps(report))
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in rows_of(tables, tmp_path)}
    assert cells["cdiff, exported engine"] == ["1.25", "2.50", "12.3", "56.8", "300"]
    assert cells["PyTorch, one run after another, as published"] == ["0.50", "1", "-", "-", "500"]
    assert cells["floor: FLOPs over the measured matrix-product rate"] == ["2.00", "-", "3.0", "24.0", "-"]
    for name in ("onnxruntime", "onnxruntime-gpu"):
        machine = {**report["machine"], "versions": {name: "1.31.1"}}
        assert "ONNX Runtime 1.31.1;" in tables.speed_setting({**report, "machine": machine})


def rows_of(tables: ModuleType, results: Path) -> list[str]:
    return [line for line in tables.speed_table(results).splitlines() if line.startswith("|")]


def test_whole_scans_are_told_slice_by_slice(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.NOT_MEASURED in tables.scans_table(tmp_path)
    slices = [
        {"dice_mask": 0.5, "dice_levels": [0.25, 0.5, 0.75, 1]},
        {"dice_mask": 0.75, "dice_levels": [0.75, 0.5, 0.25, 0]},
    ]
    found = [{"shrink": 1, "slices": slices}, {"shrink": 2, "slices": slices[1:]}]
    scan = {"scan": "lung1_image.nrrd", "extent": [3, 12], "found": found}
    (tmp_path / "whole_scans.json").write_text(json.dumps({"scans": [scan]}))
    row, shrunk = tables.scans_table(tmp_path).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:5] == ["lung1", "as it is", "2", "12", "0.625 (0.50\xa0to\xa00.75)"]
    assert shrunk.startswith("| lung1 | `--shrink 2` | 1 | 12 | 0.750 (0.75\xa0to\xa00.75) |")
    assert cells[5:] == [
        "0.500 (0.25\xa0to\xa00.75)",
        *["0.500 (0.50\xa0to\xa00.50)"],
        "0.500 (0.25\xa0to\xa00.75)",
        "0.500 (0.00\xa0to\xa01.00)",
    ]


def test_pointing_beside_the_middle_is_told_by_its_distance(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.NOT_MEASURED in tables.beside_table(tmp_path)
    score, none, less = (
        {"mean": mean, "low": mean - 0.125, "high": mean + 0.125, "n_slices": 9} for mean in (0.5, 0, -0.25)
    )
    found = [
        {"pixels": 0, "soft_dice_5": score, "difference": none, "missed": 0},
        {"pixels": 8, "soft_dice_5": score, "difference": less, "missed": 0.0625},
    ]
    (tmp_path / "off_centre.json").write_text(json.dumps({"found": found}))
    assert tables.beside_table(tmp_path).splitlines()[2:] == [
        "| 0 | 0.500 (0.375\xa0to\xa00.625) | - | 0.0% |",
        "| 8 | 0.500 (0.375\xa0to\xa00.625) | -0.250 (-0.375\xa0to\xa0-0.125) | 6.2% |",
    ]


def test_what_maps_expect_beside_the_structure(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.NOT_MEASURED in tables.expected_beside_table(tmp_path)
    expected, found = ({"mean": mean, "low": mean - 0.125, "high": mean + 0.125} for mean in (0.5, 0.25))
    report = {"found": [{"pixels": 24, "empty": 0.125, "expected_dice": expected, "dice_each": found}]}
    (tmp_path / "off_centre_expected.json").write_text(json.dumps(report))
    (row,) = tables.expected_beside_table(tmp_path).splitlines()[2:]
    assert row == "| 24 | 12% | 0.500 (0.375\xa0to\xa00.625) | 0.250 (0.125\xa0to\xa00.375) |"


def test_what_maps_expect_stands_beside_what_was_found(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.NOT_MEASURED in tables.expected_table(tmp_path)
    bins = [{"slices": 0, "expected": None, "found": None} for _ in range(10)]
    bins[2], bins[4] = ({"slices": n, "expected": x, "found": x + 0.25} for n, x in ((1, 0.25), (3, 0.45)))
    bins[9] = {"slices": 7, "expected": 0.9375, "found": 0.875}
    for name in tables.EXPECTED.values():
        (tmp_path / f"{name}.json").write_text(json.dumps({"expected_bins": bins}))
    rows = tables.expected_table(tmp_path).splitlines()[2:]
    assert rows[0] == "| below 0.5 | 4 | 0.400 | 0.650 | 4 | 0.400 | 0.650 |"
    assert rows[1] == "| 0.5 to 0.6 | 0 | - | - | 0 | - | - |"
    assert rows[-1] == "| 0.9 to 1.0 | 7 | 0.938 | 0.875 | 7 | 0.938 | 0.875 |"
    assert len(rows) == 6


def test_whole_nodules_stand_beside_the_reader(tables: ModuleType, tmp_path: Path) -> None:
    def score(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125, "n_cases": 67}

    result = {
        **{f"case_soft_dice_{n}": score(1 - n / 16) for n in (5, 9)},
        **{f"case_soft_dice_{n}_annotators": score(0.5) for n in (5, 9)},
        "case_dice_per_level": [{"level": c, **score(0.9 - c / 10)} for c in (1, 2, 3, 4)],
    }
    (tmp_path / "lidc_testing_all_raters_zooms.json").write_text(json.dumps(result))
    (tmp_path / "lidc_testing_marked_zooms.json").write_text(json.dumps({"n_slices": 485}))  # of before there were such
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tables.nodules_table(tmp_path).splitlines()[2:]]
    own, vote, one_size, _, reader, *anybody = rows
    levels = ["0.800", "0.700", "0.600", "0.500"]
    assert own == [
        "four marked (67)",
        "cdiff `--fast`",
        "0.688 (0.562\xa0to\xa00.812)",
        "0.438 (0.312\xa0to\xa00.562)",
        *levels,
    ]
    assert reader[1:] == ["a radiologist against the other three", *["0.500 (0.375\xa0to\xa00.625)"] * 2, *["-"] * 4]
    assert vote[2] == tables.NOT_MEASURED
    assert one_size[2] == tables.NOT_MEASURED
    assert [row[2] for row in anybody] == [tables.NOT_MEASURED] * 5


def test_a_difference_that_no_comparison_has_gets_no_row(tables: ModuleType, tmp_path: Path) -> None:
    """The energy distance without the diagonal is not there for a model of one mask, nor in files older than it."""
    columns = {"one": "first", "two": "second"}
    score = {"mean": 0.25, "low": -0.125, "high": 0.5}
    every = dict.fromkeys(tables.PAIRED_ROWS, score)
    old = {key: value for key, value in every.items() if key != "ged_no_diagonal"}
    (tmp_path / "first.json").write_text(json.dumps({"all": old}))
    undefined = dict.fromkeys(score)
    (tmp_path / "second.json").write_text(json.dumps({"all": old | {"ged_no_diagonal": undefined}}))
    assert "without the diagonal" not in tables.paired_table("", columns, tmp_path)
    (tmp_path / "second.json").write_text(json.dumps({"all": every}))
    (row,) = [line for line in tables.paired_table("", columns, tmp_path).splitlines() if "diagonal" in line]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [tables.NOT_MEASURED, "+0.250 (-0.125\xa0to\xa0+0.500)"]
    (tmp_path / "first.json").write_text(json.dumps({"all": old | {"ged_no_diagonal": undefined}}))
    assert "| - | +0.250" in tables.paired_table("", columns, tmp_path)
    assert all(f"| level {c} |" in tables.paired_table("", columns, tmp_path) for c in range(1, 5))


def test_each_row_and_column_is_of_the_file_that_its_words_say(tables: ModuleType) -> None:
    sets = {"four": "all_raters", "any": "marked", "middle": "middle"}

    def file(words: str, split: str = "testing") -> str:
        chosen = next(name for word, name in sets.items() if word in words)
        if "U-Net" in words:
            return f"unet_{split}_{chosen}"
        size = "" if "25 runs" in words else "_fast" if "one size" in words else "_zooms"
        return f"lidc_{split}_{chosen}{size}{'_vote' if 'vote' in words else ''}"

    for slices, method, name, ending in tables.MODEL_ROWS:
        assert name == file(f"{slices} {method}")
        assert ending == (tables.READERS if "radiologist" in method else "")
    for method, four, anybody, _ in tables.HEADLINE_ROWS:
        assert (four, anybody) == (file(f"four {method}"), file(f"any {method}"))
    for words, name in tables.EACH.items():
        assert name == file(words, words.split(",")[0].lower())
    for words, name in tables.EXPECTED.items():
        assert name == file("any", words.lower())
    # Comparisons are of as many slices as the scores, and no two columns are one file.
    for columns in (tables.PAIRED, tables.STEPS, tables.ZOOMS, tables.WHOLE):
        assert len(set(columns.values())) == len(columns)
        for words, name in columns.items():
            assert ("vote" in words) == ("vote" in name)
            assert ("all" in words or "x 100 steps" in words) == name.endswith("_all")
            if columns is not tables.STEPS:
                split = "validation" if "Validation" in words else "testing"
                scores = tables.read(
                    file(words if columns is not tables.WHOLE else "middle", split).removesuffix("_vote"),
                    tables.RESULTS,
                )
                assert tables.read(name, tables.RESULTS)["all"]["n_slices"] == scores["n_slices"], words


def test_a_training_steps_memory_stands_as_it_was_printed(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.NOT_MEASURED in tables.memory_table(tmp_path)
    lines = [{"settings": [], "peak": 3 * 2**30, "kept": 2**29}, {"settings": ["a=1", "b=2"], "peak": 2**30, "kept": 0}]
    (tmp_path / "training_memory.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert tables.memory_table(tmp_path).splitlines()[2:] == [
        "| the preset | 3.0 | 0.5 |",
        "| `a=1` `b=2` | 1.0 | 0.0 |",
    ]


def test_the_export_tables_have_a_row_for_every_result(tables: ModuleType, tmp_path: Path) -> None:
    made = (tables.graphs_table, tables.half_table, tables.builds_table)
    assert all(tables.NOT_MEASURED in table(tmp_path) for table in made)
    for name, table, rows in (
        ("export_choices", tables.graphs_table, "speed"),
        ("export_choices", tables.half_table, "precision"),
    ):
        found = json.loads((tables.RESULTS / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
        assert len(table(tmp_path).splitlines()) == 2 + len(found[rows]), "a form that was measured and is not shown"
    build = {"cpu_seconds": 2.25, "bytes": {"encoder": 1, "denoiser": 12_500_000}}
    builds = {network: {"float32": build, "float16": build} for network in ("shipped", "paper-reduced")}
    (tmp_path / "engine_builds.json").write_text(json.dumps({"builds": builds}))
    last = tables.builds_table(tmp_path).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")][2:4] == ["2.2", "12.5"]


def test_the_shares_of_the_profile_are_those_measured(tables: ModuleType) -> None:
    page = prose("docs/export.md")
    speed = tables.read("export_choices", tables.RESULTS)["speed"]
    shares, folded = speed["opset 20"]["profile"], speed["embeddings folded"]["bytes"] / speed["opset 21"]["bytes"]
    assert f"makes the file {folded - 1:.0%} larger".replace("%", " %") in page
    assert f"The 10 joins are {shares['Concat']:.0%} of".replace("%", " %") in page
    assert f"{shares['Gemm']:.1%} of the time of a call".replace("%", " %") in page
