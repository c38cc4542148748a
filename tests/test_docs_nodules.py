"""The table of nodules as a whole: what it takes from a result, and what it says of one that has no such scores."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType


def test_whole_nodules_stand_beside_the_reader(tables: ModuleType, tmp_path: Path) -> None:
    def score(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125, "n_cases": 67}

    result = {
        **{f"case_soft_dice_{n}": score(0.75) for n in (5, 9)},
        **{f"case_soft_dice_{n}_annotators": score(0.5) for n in (5, 9)},
        "case_dice_per_level": [{"level": c, **score(0.9 - c / 10)} for c in (1, 2, 3, 4)],
    }
    (tmp_path / "lidc_testing_all_raters_fast.json").write_text(json.dumps(result))
    (tmp_path / "lidc_testing_marked_fast.json").write_text(json.dumps({"n_slices": 485}))  # of before there were such
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tables.nodules_table(tmp_path).splitlines()[2:]]
    own, vote, reader, *anybody = rows
    levels = ["0.800", "0.700", "0.600", "0.500"]
    assert own == ["four marked (67)", "cdiff `--fast`, 4 runs x 1 step", *["0.750 (0.625 - 0.875)"] * 2, *levels]
    assert reader[1:] == ["a radiologist against the other three", *["0.500 (0.375 - 0.625)"] * 2, *["-"] * 4]
    assert vote[2] == tables.NOT_MEASURED
    assert [row[2] for row in anybody] == [tables.NOT_MEASURED] * 2
