"""The GPU suite's page, and its targets."""

from __future__ import annotations

from typing import Any

from cdiff.benchmarks.gpu_report import markdown
from cdiff.benchmarks.gpu_targets import BASELINES, targets
from tests.benchmarks.tiny import CPU


def test_the_page_says_what_float32_meant() -> None:
    plain = {"seconds_a_slice": 2.0, "share": 1.0, "flop": 1.0, "peak_bytes": 0, "tf32_products": False}
    for used, said in ((True, "(TF32 in convolutions)"), (False, "(no TF32)")):
        checks = {"published:published:paper": {"status": "done", "result": plain | {"tf32_convolutions": used}}}
        page = markdown({"settings": vars(CPU), "targets": [], "plan": [], "checks": checks})
        assert f"encoder for each row {said} | 2.00 | all of it |" in page


def test_the_published_way_row_by_row_and_without_tf32_stand_beside_it() -> None:
    """Twice as fast as the published way, three times as it row by row, five times as it without TF32; the target is of the first."""
    shared = {"share": 1.0, "flop": 1.0, "peak_bytes": 0, "tf32_products": False}
    exact = shared | {"seconds_a_slice": 10.0, "tf32_convolutions": False}
    by_row = shared | {"seconds_a_slice": 6.0, "tf32_convolutions": True, "batch": 1}
    plain = shared | {
        "seconds_a_slice": 4.0,
        "tf32_convolutions": True,
        "batch": 7,
        "by_row": by_row,
        "without_tf32": exact,
    }
    own = {"seconds_a_slice": 2.0, "share": 1.0, "flop": 1.0, "peak_bytes": 0, "batch": 8, "sweep": {}}
    # As a run lists them that went on, and measured the baseline last.
    checks = {
        "protocol:graph:paper": {"status": "done", "result": own},
        "protocol:graph-tuned:paper": {"status": "done", "result": own},
        "published:published:paper": {"status": "done", "result": plain},
    }
    found = targets(checks, small=False)
    faster = [(one["found"], one["state"]) for one in found if "8 times" in one["target"]]
    assert faster == [("2.0 times (3.0 times it row by row, 5.0 times it without TF32)", "missed")] * 2
    page = markdown({"settings": vars(CPU), "targets": found, "plan": [], "checks": checks})
    lines = page[page.index("## Whole protocol") :].splitlines()[4:7]
    assert "encoder for each row (TF32 in convolutions) | 4.00 | all of it | 1.0 |" in lines[0]
    assert "one row after another, encoder for each (TF32 in convolutions) | 6.00 | all of it | 0.7 |" in lines[1]
    assert "encoder for each row (no TF32) | 10.00 | all of it | 0.4 |" in lines[2]


def test_targets_are_met_missed_or_not_measured() -> None:
    def checks(maps: float, dice: float, seconds: float, host: float, four: float) -> dict[str, Any]:
        return {
            "machine": {"result": {"matmul_flop_per_s": {"float16": 800e12}}},
            "published:published:paper": {"result": {"seconds_a_slice": 200.0}},
            "parity:tensorrt:shipped": {"result": {"maps": {"mean": maps, "dice": dice}}},
            "protocol:tensorrt:paper": {"result": {"seconds_a_slice": seconds, "flop_per_s": 10e15 / seconds, "host_share": host}},
            "scaling:tensorrt:shipped": {"result": {"seconds_a_slice": {"1": 1.0, "2": 1.0, "4": four}}},
            "protocol:eager16:paper": {"result": {"seconds_a_slice": 50.0}},
        }  # fmt: skip

    good = targets(checks(0.01, 0.995, 25.0, 0.0199, 1.0499), small=False)
    assert {one["path"] for one in good} == {"tensorrt"}, "baselines have no targets"
    assert [one["state"] for one in good] == ["met"] * 6
    assert good[2]["found"] == "8.0 times"
    assert good[3]["found"] == "50%"
    assert targets(checks(0.005, 0.999, 20.0, 0.01, 0.8), small=False)[5]["state"] == "met", "less than 4 times as long"
    bad = targets(checks(0.0101, 0.9949, 25.1, 0.02, 1.0501), small=False)
    assert [one["state"] for one in bad] == ["missed"] * 6
    small = targets(checks(0, 1, 1, 0, 1), small=True)
    assert {(one["path"], one["state"]) for one in small} == {("tensorrt", "not measured")}
    only = targets({"parity:tensorrt:shipped": {"status": "refused", "message": "no"}}, small=False)
    assert {one["state"] for one in only} == {"not measured"}
    assert "tensorrt" not in BASELINES


def test_the_batch_that_a_user_gets_is_marked_among_those_measured() -> None:
    cell = {"ms_a_step": 5.0, "ms_a_row": 0.5}
    result: dict[str, Any] = {
        "seconds_a_slice": 1.0,
        "share": 1.0,
        "flop": 1.0,
        "peak_bytes": 0,
        "batch": 88,
        "runtime_batch": 59,
    }
    result["sweep"] = {"59": cell, "88": cell}
    checks = {"protocol:graph:paper": {"status": "done", "result": result}}
    page = markdown({"settings": vars(CPU), "targets": [], "plan": [], "checks": checks})
    assert "| 59 (the runtime's own) | 5" in page
    assert "| 88 | 5" in page
