"""What the GPU suite measures where its best way does not run, breaks, hangs or gives other maps; and what a broken check leaves behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cdiff.benchmarks import gpu_checks, gpu_machine, gpu_measure, gpu_report, gpu_suite
from cdiff.benchmarks.gpu_checks import TORCH_PATHS, WAYS, Settings
from cdiff.benchmarks.gpu_plan import Check, chosen, next_check, plan
from cdiff.benchmarks.gpu_report import NAMES, markdown
from cdiff.benchmarks.gpu_suite import Suite, in_a_process
from cdiff.benchmarks.gpu_targets import targets
from tests.benchmarks.tiny import CPU, TINY

GOOD = {"status": "done", "result": {"maps": {"mean": 1e-4, "dice": 1.0}}, "seconds": 1}
OFF = {"status": "done", "result": {"maps": {"mean": 0.02, "dice": 1.0}}, "seconds": 1}
REFUSED = {"status": "refused", "message": "a step could not be captured", "seconds": 1}
HUNG = {"status": "failed", "message": "took longer than 150 s and was ended", "seconds": 150}


def ran(faults: dict[str, dict[str, Any]], outcomes: dict[str, dict[str, Any]], words: str | None = None) -> list[str]:
    """The checks of a GPU's plan in the order in which they run, those of a way in `faults` (the beginning of a name) with that outcome."""
    before, waiting, order = dict(outcomes), chosen(plan("cuda:0", False), words), []
    while check := next_check(waiting, outcomes, before):
        waiting.remove(check)
        if outcomes.get(check.name, {}).get("status") == "done":
            continue
        order.append(check.name)
        fault = next((found for name, found in faults.items() if check.name.startswith(name)), GOOD)
        tries = before.get(check.name, {}).get("tries", 0) + (fault["status"] == "failed")
        outcomes[check.name] = fault | {"tries": tries}
    return order


def of_targets(way: str) -> list[str]:
    return [f"protocol:{way}:paper", f"parity:{way}:shipped", f"scaling:{way}:shipped"]


def test_where_all_is_well_nothing_stands_in() -> None:
    order = ran({}, {})
    assert order[:5] == ["machine", "published:published:paper", *of_targets("graph")]
    assert order == [check.name for check in plan("cuda:0", False) if not check.spare]


def test_a_refused_kernel_brings_the_next_way_forward() -> None:
    """As without a C compiler: all of the targets of PyTorch's own GroupNorm, before anything else of `graph` is refused too."""
    order = ran(dict.fromkeys(("protocol:graph:", "parity:graph:", "scaling:graph:"), REFUSED), {})
    assert order[2:6] == ["protocol:graph:paper", *of_targets("graph-plain")]
    assert not [name for name in order if "launched" in name]
    assert order.index("tests") < order.index("parity:graph:shipped")


def test_a_step_that_cannot_be_captured_is_measured_without() -> None:
    faults = dict.fromkeys(("protocol:graph", "parity:graph", "scaling:graph", "replay"), REFUSED)
    order = ran(faults, {})
    assert order[2:7] == ["protocol:graph:paper", "protocol:graph-plain:paper", *of_targets("launched")]
    assert not [name for name in order if "launched-plain" in name]
    order = ran(faults | {"protocol:launched:": REFUSED}, {})
    assert order[4:8] == ["protocol:launched:paper", *of_targets("launched-plain")]


def test_maps_that_are_too_far_off_bring_the_next_way_forward() -> None:
    order = ran({"parity:graph:shipped": OFF}, {})
    assert order[2:7] == ["protocol:graph:paper", "parity:graph:shipped", *of_targets("graph-plain")]


def test_a_way_that_hangs_costs_its_limit_once_a_run_until_it_hung_twice() -> None:
    """Three checks that hang one after another would take most of eight minutes, in every run."""
    faults = dict.fromkeys(
        ("protocol:graph:", "parity:graph:", "scaling:graph:", "noise:graph:", "replay:graph:"), HUNG
    )
    outcomes: dict[str, dict[str, Any]] = {}
    order = ran(faults, outcomes, "machine,published,protocol,parity,scaling")
    assert order[2:6] == ["protocol:graph:paper", *of_targets("graph-plain")]
    # The first run came no further; what hung may do with what it compiled by now.
    outcomes = {name: outcomes[name] for name in order[:6]}
    again = ran(faults, outcomes)
    assert again[0] == "protocol:graph:paper"
    others = [name for name in again if ":graph:" not in name]
    assert again[1 : 1 + len(others)] == others, "all else comes before what is left of it"
    third = ran(faults, {name: found for name, found in outcomes.items() if found["tries"]})
    assert ":graph:" not in third[0]


def test_a_baseline_that_hung_is_tried_again_after_all_else() -> None:
    """torch.compile, say, whose limit is half of a run; what the targets need is tried again where it stands."""
    names = ("machine", "published:published:paper", "protocol:graph:paper", "protocol:compiled:paper")
    outcomes = {name: HUNG | {"tries": 1} for name in names}
    order = ran({}, outcomes)
    assert order[:2] == ["machine", "published:published:paper"]
    assert order.index("protocol:graph:paper") < order.index("tests") < order.index("protocol:compiled:paper")


def test_a_spare_way_runs_where_it_is_named() -> None:
    assert ran({}, {}, "parity:launched") == ["parity:launched:shipped"]
    assert not [name for name in ran({}, {}, "parity") if "launched" in name]
    assert set(WAYS) <= TORCH_PATHS.keys() & NAMES.keys()


def test_the_page_says_which_way_was_measured_in_place_of_which() -> None:
    checks = {
        "protocol:graph:paper": REFUSED,
        "protocol:graph-plain:paper": {"status": "done", "result": {}, "seconds": 1},
    }
    report = {
        "settings": vars(CPU),
        "targets": targets(checks, small=False),
        "plan": [{"name": "machine", "spare": False}],
        "checks": {},
    }
    page = markdown(report | {"checks": checks | {"protocol:graph-plain:paper": {"status": "done"}}})
    assert f"- {NAMES['graph']}: protocol:graph:paper refused: a step could not be captured." in page
    assert f"- Measured in place of these: {NAMES['graph-plain']}." in page
    late = {"protocol:graph-plain:paper": {"status": "not measured", "message": "the time was up"}}
    assert "- Measured in place of these: nothing yet." in markdown(report | {"checks": checks | late})
    line = next(line for line in page.splitlines() if line.startswith(f"| {NAMES['graph']} |"))
    assert "| protocol:graph:paper refused, machine not run |" in line, "of what was planned"


def test_a_number_that_nobody_foresaw_costs_its_part_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Suite(tmp_path, CPU, [], fresh=False)
    suite.report["checks"] = {"tests": {"status": "done", "result": {"passed": 3}}}
    monkeypatch.setattr(gpu_suite, "targets", lambda *_: 1 / 0)
    suite.save()
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "A part of this page could not be written (KeyError: 'skipped')" in page
    assert "The machine is not described (the check `machine`: not run)." in page
    broke = {"machine": {"status": "failed", "message": "no driver"}}
    assert "The machine is not described (the check `machine`: failed)." in markdown(suite.report | {"checks": broke})
    assert json.loads((tmp_path / "gpu_suite.json").read_text())["checks"]["tests"]["result"] == {"passed": 3}


def test_what_was_measured_before_a_check_broke_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest batch leaves the GPU unusable for what comes after it in the same process."""
    lost: list[int] = []

    def step_seconds(engine: Any, model: Any, image: Any, size: int) -> float:
        if size == 6 or lost:
            lost.append(size)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 0.5

    monkeypatch.setattr(gpu_measure, "step_seconds", step_seconds)
    found = gpu_checks.run_check("protocol:graph:paper", CPU)
    assert (found["status"], "illegal memory access" in found["message"]) == ("failed", True)
    T, rows = TINY.config.network.T, TINY.rows
    assert found["result"]["seconds_a_slice"] == pytest.approx(rows * T * 0.5)
    assert found["result"]["share"] == 0
    checks = {
        "protocol:graph:paper": found,
        "published:published:paper": {"result": {"seconds_a_slice": 4.0 * rows * T}},
    }
    states = {one["target"]: (one["found"], one["state"], *one["lacks"]) for one in targets(checks, small=False)}
    left = ("not measured", "protocol:graph:paper")
    assert states["at least 8 times the published way"] == ("8.0 times by single steps", *left)
    assert states["host below 2 % of the time"] == ("-", *left)
    page = markdown({"settings": vars(CPU), "targets": [], "plan": [], "checks": {"protocol:graph:paper": found}})
    assert "| single steps; all else extrapolated |" in page
    assert "| protocol:graph:paper | failed, measured in part | CUDA error" in page


def test_the_matmul_rate_is_known_whatever_breaks_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target is a share of it; the driver, the copies and the engines are told beside."""
    about = SimpleNamespace(name="H200", major=9, minor=0, total_memory=2**37, multi_processor_count=132)
    monkeypatch.setattr(gpu_measure, "matmul_rates", lambda device: {"float16": 7e14})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: about)

    def breaks(*_: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(gpu_machine, "copy_rate", breaks)
    for called in ("copy_rate", "driver"):
        monkeypatch.setattr(gpu_machine, called, breaks)
        found = gpu_checks.run_check("machine", Settings("cuda:0"))
        assert (found["status"], found["result"]["matmul_flop_per_s"]) == ("failed", {"float16": 7e14})
        page = markdown({"settings": vars(CPU), "cdiff": "1", "targets": [], "plan": [], "checks": {"machine": found}})
        assert ("- H200, compute capability 9.0, 128 GiB" in page) is (called == "copy_rate")
        assert "- matrix products: float16 700.00 TFLOP/s" in page
        assert "| machine | failed, measured in part | CUDA error: unspecified launch failure |" in page


def test_a_package_is_missing_only_where_none_that_provides_the_same_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TensorRT for RTX's wheels bear other names than the module."""
    monkeypatch.setattr(gpu_measure, "matmul_rates", lambda device: {"float32": 1e11})
    there = {"onnxruntime": "1.31.1", "tensorrt-rtx-cu13-bindings": "1.7.1.116"}
    monkeypatch.setattr(gpu_machine, "installed", there.get)
    found = gpu_machine.describe_machine("cpu", lambda known: None)
    assert found["packages"] == there
    assert {"tensorrt-cu13", "pycuda"} <= set(found["missing"])
    assert not [name for name in found["missing"] if "onnxruntime" in name or "rtx" in name]


def test_a_check_that_is_ended_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "check"
    program.write_text(
        '#!/bin/sh\nfor out; do :; done\nprintf \'{"status": "running", "result": {"calls": 1}}\' > "$out"\n[ -e hang ] && exec sleep 600\n'
        "echo Fatal Python error: Aborted\necho Extension modules: many\nexit 3\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.chdir(tmp_path)
    for message in ("its process ended with 3: Fatal Python error: Aborted", "took longer than 2 s and was ended"):
        found = in_a_process("parity:graph:shipped", replace(CPU, work=str(tmp_path)), 2)
        assert (found["status"], found["message"], found["result"]) == ("failed", message, {"calls": 1})
        (tmp_path / "hang").touch()


def test_a_process_that_does_not_end_is_said_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits within a driver that hangs takes no signal."""

    def wait(timeout: float) -> int:
        raise subprocess.TimeoutExpired("check", timeout)

    monkeypatch.setattr(gpu_suite.os, "killpg", lambda *_: None)
    monkeypatch.setattr(gpu_suite.subprocess, "Popen", lambda *_, **__: SimpleNamespace(pid=0, wait=wait))
    found = in_a_process("machine", replace(CPU, work=str(tmp_path)), 5)
    assert found["message"].endswith("was ended; its process does not end, and may keep the GPU from what comes next")


def test_a_folder_that_stays_in_use_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network's disk what an open file was stays in its folder under another name, and the folder is not empty."""
    program = tmp_path / "check"
    program.write_text('#!/bin/sh\nfor out; do :; done\nprintf \'{"status": "done"}\' > "$out"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def in_use(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as during:
        during.setattr(os, "rmdir", in_use)
        assert in_a_process("machine", replace(CPU, work=str(tmp_path / "work")), 60) == {"status": "done"}


def test_a_later_try_that_comes_less_far_keeps_what_an_earlier_one_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter([HUNG | {"result": {"calls": {}}}, HUNG, HUNG])
    monkeypatch.setattr(gpu_suite, "in_a_process", lambda *_: next(tries))
    checks = [Check("parity:graph:shipped", "", 40, 1)]
    for number in (1, 2, 3):
        suite = Suite(tmp_path, CPU, checks, fresh=False)
        suite.run(checks, minutes=1)
        found = suite.report["checks"]["parity:graph:shipped"]
        assert (found["result"], found["tries"]) == ({"calls": {}}, number)
    Suite(tmp_path, CPU, checks, fresh=False).run(checks, minutes=0)
    assert json.loads(suite.path.read_text())["checks"]["parity:graph:shipped"]["tries"] == 3, "no time changes nothing"
    assert gpu_report.markdown(suite.report)
