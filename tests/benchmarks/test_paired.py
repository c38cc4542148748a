"""Two reports on the same slices: the differences by hand, the split by size, reports that do not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cdiff.benchmarks.paired import compare, main
from cdiff.runtime.errors import CdiffError


def report(scores: list[list[float]], sizes: list[int], ged: float | None = 0.5) -> dict[str, Any]:
    """A report of one case for each list of slices' soft Dice; level c's Dice is that minus c / 100."""
    cases = []
    for number, (slices, size) in enumerate(zip(scores, sizes, strict=True)):
        rows = [
            {
                "slice": k,
                "soft_dice_5": value,
                "soft_dice_9": value / 2,
                "ged": ged,
                "brier_near": 0.1,
                "dice_per_level": [value - 0.01, value - 0.02, value - 0.03],
            }
            for k, value in enumerate(slices)
        ]
        volumes = {"true_voxels": [size * len(slices), size * len(slices)]}
        name = f"patient-{number // 2}_nodule-{number}"
        cases.append({"case": name, "inputs": f"hash{number}", "slices": rows, "volumes": volumes})
    return {"model": {"name": "one"}, "cases": cases}


A = report([[0.5, 0.7], [0.6], [0.9]], [30, 10, 20])


def test_the_difference_is_the_mean_over_slices_and_a_constant_one_has_no_width() -> None:
    b = report([[0.6, 0.8], [0.7], [1.0]], [30, 10, 20], ged=0.2)
    found = compare(A, b)["all"]
    assert (found["n_cases"], found["n_slices"]) == (3, 4)
    assert [key for key in found if key.startswith("dice")] == ["dice_level_1", "dice_level_2", "dice_level_3"]
    assert found["soft_dice_5"]["a"] == pytest.approx(0.675)
    assert [found["soft_dice_5"][key] for key in ("mean", "low", "high")] == pytest.approx([0.1] * 3)
    assert found["soft_dice_9"]["mean"] == pytest.approx(0.05)
    assert found["dice_level_2"]["mean"] == pytest.approx(0.1)
    assert [found[f"dice_level_{c}"]["a"] for c in (1, 2, 3)] == pytest.approx([0.665, 0.655, 0.645])
    assert found["ged"]["mean"] == pytest.approx(-0.3)


def test_the_sign_is_b_minus_a_and_the_interval_is_over_cases() -> None:
    b = report([[0.4, 0.6], [0.8], [0.9]], [30, 10, 20])
    dice = compare(A, b)["all"]["soft_dice_5"]
    assert dice["mean"] == pytest.approx(0.0)
    assert dice["low"] == pytest.approx(-0.1)
    assert dice["high"] == pytest.approx(0.2)


def test_cases_are_split_by_what_the_annotators_drew() -> None:
    a = report([[0.5, 0.7], [0.6], [0.9], [0.5]], [30, 10, 20, 12])
    a["cases"][1]["volumes"] = {"true_voxels": [20, 10, 1]}
    a["cases"][0]["volumes"] = {"true_voxels": [62, 61, 62]}
    b = report([[0.6, 0.8], [0.4], [0.9], [0.5]], [30, 10, 20, 12])
    thirds = compare(a, b)["by_size"]
    assert [third["voxels_a_slice"] for third in thirds.values()] == [[10.3, 12], [20, 20], [30.8, 30.8]]
    assert [third["soft_dice_5"]["mean"] for third in thirds.values()] == pytest.approx([-0.1, 0.0, 0.1])


def test_a_slice_without_a_score_in_one_report_is_left_out() -> None:
    b = report([[0.6, 0.8], [0.7], [1.0]], [30, 10, 20], ged=0.2)
    b["cases"][0]["slices"][0]["ged"] = None
    assert compare(A, b)["all"]["ged"]["n_slices"] == 3


def test_both_means_are_of_the_slices_of_the_difference() -> None:
    a, b = report([[0.5, 0.7], [0.9]], [30, 10]), report([[0.5, 0.8], [0.9]], [30, 10])
    b["cases"][1]["slices"][0]["soft_dice_5"] = None
    found = compare(a, b)["all"]["soft_dice_5"]
    assert [found[key] for key in ("a", "b", "mean")] == pytest.approx([0.6, 0.65, 0.05])


def test_the_cases_of_a_group_are_drawn_together() -> None:
    a = report([[0.5], [0.5], [0.5], [0.5]], [1, 2, 3, 4])
    b = report([[0.4], [0.6], [0.4], [0.6]], [1, 2, 3, 4])
    alone, together = compare(a, b)["all"], compare(a, b, "patient-[0-9]+")["all"]
    assert alone["soft_dice_5"]["low"] < -0.01 < 0.01 < alone["soft_dice_5"]["high"]
    # Both patients differ by 0 on average, so every draw of patients does.
    assert together["n_groups"] == 2
    assert (compare(a, b)["difference"], compare(a, b, "patient-[0-9]+")["group"]) == ("b - a", "patient-[0-9]+")
    assert not {"group", "n_groups"} & {*compare(a, b), *alone}
    assert [together["soft_dice_5"][key] for key in ("mean", "low", "high")] == pytest.approx([0, 0, 0])


def test_groups_are_those_of_the_cases_of_each_size() -> None:
    sizes = [1, 5, 2, 6, 3, 4]
    a, b = report([[0.5]] * 6, sizes), report([[0.5], [0.5], [0.5], [0.5], [0.4], [0.6]], sizes)
    thirds = compare(a, b, "patient-[0-9]+")["by_size"]
    assert [third["n_groups"] for third in thirds.values()] == [2, 1, 2]
    middle = thirds["middle third"]["soft_dice_5"]
    assert (middle["mean"], middle["low"], middle["high"]) == (pytest.approx(0), None, None), "of one patient"


def test_cases_of_one_name_that_are_drawn_together_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, a = tmp_path / "a.json", report([[0.5], [0.5], [0.5]], [1, 2, 3])
    for case, name in zip(a["cases"], ("train/case01", "val/case01", "val/case02"), strict=True):
        case["case"] = name
    one.write_text(json.dumps(a))
    assert main([str(one), str(one), "--group", r"case\d+"]) == 0
    line = r"note: --group 'case\\d+' joins cases of one name in several folders (case01); are they of one patient?"
    assert capsys.readouterr().err == f"{line}\n"
    for group in ([], ["--group", "^.*$"]):
        assert main([str(one), str(one), *group]) == 0
        assert capsys.readouterr().err == ""


def test_a_size_without_a_scored_slice_is_written_without_numbers(tmp_path: Path) -> None:
    """As a case that nobody marked has it, scored with --all-slices."""
    one, out = tmp_path / "a.json", tmp_path / "out.json"
    a = report([[0.5, 0.7], [0.6], [0.9]], [30, 0, 20])
    a["cases"][1]["slices"][0] |= dict.fromkeys(("soft_dice_5", "soft_dice_9", "ged", "brier_near"))
    a["cases"][1]["slices"][0]["dice_per_level"] = [None] * 3
    one.write_text(json.dumps(a))
    assert main([str(one), str(one), "--json", str(out)]) == 0
    smallest = json.loads(out.read_text())["by_size"]["smallest third"]["soft_dice_5"]
    assert smallest == {"a": None, "b": None, "mean": None, "low": None, "high": None, "n_slices": 0}


@pytest.mark.parametrize("other", [report([[0.5, 0.7], [0.6]], [30, 10]), report([[0.5], [0.6], [0.9]], [30, 10, 20])])
def test_reports_of_other_slices_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(CdiffError, match="not of the same slices"):
        compare(A, other)


def test_the_command_prints_and_writes_and_says_what_is_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = tmp_path / "a.json", tmp_path / "out.json"
    one.write_text(json.dumps(A))
    assert main([str(one), str(one), "--json", str(out)]) == 0
    assert "soft_dice_5" in capsys.readouterr().out
    other = tmp_path / "b.json"
    other.write_text(json.dumps(report([[0.6, 0.8], [0.7], [1.0]], [30, 10, 20])))
    assert main([str(one), str(other)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["all: 3 cases, 4 slices", "  soft_dice_5    0.675 0.775  +0.100 (+0.100 to +0.100)"]
    assert [line for line in said if "cases" in line][1:] == [
        f"{size} third: 1 cases, {n} slices" for size, n in (("smallest", 1), ("middle", 1), ("largest", 2))
    ]
    assert json.loads(out.read_text())["all"]["soft_dice_5"]["mean"] == 0
    one.write_text("{}")
    assert main([str(one), str(one)]) == 2
    assert "the first report has no cases" in capsys.readouterr().err
    one.write_text("not json")
    assert main([str(one), str(one)]) == 2
    assert "cannot be read as a report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("cases", 1),
        ("cases", [1]),
        ("slices", None),
        ("slices", [{}]),
        ("volumes", {"true_voxels": [[1], 2]}),
        ("volumes", {}),
        ("case", {"name": "x"}),
    ],
)
def test_a_report_of_another_form_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, value: object
) -> None:
    broken = copy.deepcopy(A)
    (broken if part == "cases" else broken["cases"][0])[part] = value
    (tmp_path / "a.json").write_text(json.dumps(broken))
    assert main([str(tmp_path / "a.json")] * 2) == 2
    said = capsys.readouterr().err
    assert "does not hold what cdiff evaluate --json writes" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_report_with_what_is_no_number_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    """A mean of it would be none either, and no report could hold that."""
    (tmp_path / "a.json").write_text(json.dumps(A).replace("0.9", number))
    out = tmp_path / "out.json"
    assert main([str(tmp_path / "a.json")] * 2 + ["--json", str(out)]) == 2
    assert "cannot be read as a report" in capsys.readouterr().err
    assert not out.exists()
