"""Whether what maps expect of themselves comes true: by hand, against SciPy, in a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from cdiff.runtime.data.cases import Case, read_case
from cdiff.runtime.scoring.expectation import expectation_bins, rank_correlation
from cdiff.runtime.scoring.metrics import overlap_with_each
from tests.runtime.known_maps import KnownMaps, run


def rows(*cases: list[tuple[float | None, float | None]]) -> list[dict[str, Any]]:
    return [{"slices": [{"expected_dice": x, "dice_each": y} for x, y in case]} for case in cases]


def test_bins_by_hand() -> None:
    table = expectation_bins(rows([(0.85, 0.9), (1.0, 0.8), (None, 0.0)], [(0.81, 0.7), (0.8, 0.6), (0.3, None)]))
    assert [one["slices"] for one in table] == [0] * 8 + [3, 1]
    assert table[8] == {
        "from": 0.8,
        "to": 0.9,
        "slices": 3,
        "expected": pytest.approx((0.85 + 0.81 + 0.8) / 3),
        "found": pytest.approx((0.9 + 0.7 + 0.6) / 3),
    }
    assert table[0]["expected"] is table[0]["found"] is None


def test_the_rank_correlation_is_scipys_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(2)
    cases = []
    for size in (1, 7, 12, 20, 3, 9):
        x = rng.random(size).round(1)  # with ties
        cases.append(list(zip(x.tolist(), (x + rng.normal(0, 0.4, size)).tolist(), strict=True)))
    every = np.concatenate([np.array(case) for case in cases])
    found = rank_correlation(rows(*cases), None)
    assert found["mean"] == pytest.approx(spearmanr(every[:, 0], every[:, 1]).statistic)
    assert found["n_slices"] == 52
    assert -1 <= found["low"] < found["mean"] < found["high"] <= 1  # type: ignore[operator]
    wide, narrow = rank_correlation(rows(*cases), list("aaabbb")), found
    assert wide["mean"] == narrow["mean"]
    assert (wide["low"], wide["high"]) != (narrow["low"], narrow["high"])


@pytest.mark.parametrize(
    "cases", [[[]], [[(None, 0.4)], [(0.5, None)]], [[(0.5, 0.1), (0.5, 0.9)], [(0.5, 0.4)]], [[(0.5, 0.1)]]]
)
def test_what_does_not_vary_has_no_correlation(cases: list[Any]) -> None:
    found = rank_correlation(rows(*cases), None)
    assert found["mean"] is found["low"] is found["high"] is None


def test_one_case_has_no_interval() -> None:
    case = [(0.2, 0.1), (0.4, 0.5), (0.9, 0.6)]
    for cases in ([case], [case, [], [(None, 0.4)]]):  # nor has one beside cases without a slice that counts
        found = rank_correlation(rows(*cases), None)
        assert found == {"mean": pytest.approx(1), "low": None, "high": None, "n_slices": 3}


def test_draws_without_a_correlation_leave_the_interval_to_the_others() -> None:
    """Of these two cases a quarter of the draws hold the second alone, whose single slice varies in nothing."""
    found = rank_correlation(rows([(0.2, 0.1), (0.4, 0.6), (0.9, 0.5)], [(0.5, 0.4)]), None)
    assert -1 <= found["low"] <= found["mean"] <= found["high"] <= 1  # type: ignore[operator]
    assert found["low"] < found["high"]  # type: ignore[operator]


def expected(share: Any) -> Any:
    """Of the mask at one half of a map that is the annotators' share itself, in a slice or several."""
    mask = share >= 0.5
    return pytest.approx(2 * share[mask].sum() / (mask.sum() + share.sum()), abs=2e-3)


def test_perfect_maps_by_hand(cases: list[Case], tmp_path: Path) -> None:
    report = run(KnownMaps(tmp_path / "b", 3), cases)
    for number, case in enumerate(cases):
        drawn, row = read_case(case)[1], report["cases"][number]
        share = drawn.mean(axis=1)
        assert row["case_scores"]["case_expected_dice"] == expected(share)
        for one in row["slices"]:
            assert one["expected_dice"] == expected(share[one["slice"]])
            shared, own, other = overlap_with_each(share[one["slice"]] >= 0.5, drawn[one["slice"]]).T
            found = (2 * shared / (own + other)).mean()
            assert one["expected_dice_difference"] == pytest.approx(one["expected_dice"] - found, abs=1e-6)
    for name in ("expected_dice", "case_expected_dice"):
        found = report[name]["mean"] - report[name.replace("expected_dice", "dice_each")]["mean"]
        assert report[f"{name}_difference"]["mean"] == pytest.approx(found)
    assert sum(one["slices"] for one in report["expected_bins"]) == report["expected_dice_rank"]["n_slices"] == 16


def test_a_map_that_lies_elsewhere_does_not_know_it(cases: list[Case], tmp_path: Path) -> None:
    right, beside = (run(KnownMaps(tmp_path / str(shift), 3, shift=shift), cases) for shift in (0, 4))
    assert beside["expected_dice"]["mean"] == pytest.approx(right["expected_dice"]["mean"], abs=1e-6)
    assert beside["expected_dice_difference"]["mean"] > right["expected_dice_difference"]["mean"] + 0.1
