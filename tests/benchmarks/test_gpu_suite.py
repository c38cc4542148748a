"""The GPU suite on a machine without one: plan, processes, resumption, report and targets; its numbers are tried on tiny networks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cdiff.benchmarks import gpu_checks, gpu_measure, gpu_suite
from cdiff.benchmarks.gpu_checks import KINDS, Settings
from cdiff.benchmarks.gpu_measure import DeviceMemory, flops, noise_of, published, step_seconds, whole_protocol
from cdiff.benchmarks.gpu_parity import call_errors, map_errors
from cdiff.benchmarks.gpu_report import markdown
from cdiff.benchmarks.gpu_subjects import PAPER, SHIPPED, demo_slices, shipped_config, subject
from cdiff.benchmarks.gpu_suite import Check, Suite, chosen, in_a_process, main, plan
from cdiff.benchmarks.gpu_targets import BASELINES, targets
from cdiff.export.reference import TorchEngine
from cdiff.export.torch_engine import TorchChainEngine
from cdiff.runtime.bundle import open_bundle, shipped_bundle
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scan import read_scan
from tests.conftest import REPOSITORY

TINY = subject(SHIPPED, small=True)
CPU = Settings("cpu", small=True, seconds=0.1)


@pytest.fixture(scope="module")
def engine() -> TorchChainEngine:
    return TorchChainEngine(TINY.network(), TINY.schedule, "cpu")


def test_paper_is_the_protocol_of_the_paper() -> None:
    model = subject(PAPER, small=False)
    network = model.config.network
    assert (network.levels, model.runs, network.T, network.image_size, network.base_channels) == (7, 25, 100, 256, 128)
    counted = flops(model)
    # 0.773 and 0.557 TFLOP, 9.7 PFLOP a slice.
    assert counted["encoder"] == pytest.approx(0.773e12, rel=0.02)
    assert counted["denoiser"] == pytest.approx(0.557e12, rel=0.02)
    assert counted["protocol"] == pytest.approx(9.7e15, rel=0.02)


def test_the_shipped_model_and_scan_are_read_without_their_packages() -> None:
    network = shipped_config().network
    manifest = open_bundle(shipped_bundle()).manifest
    assert (network.levels, network.T, network.target) == (manifest.levels, manifest.T, manifest.target)
    assert (network.image_size, network.image_size) == manifest.image_size
    scan = REPOSITORY / "cdiff" / "demo" / "image.nii.gz"
    np.testing.assert_array_equal(demo_slices(), read_scan(scan).slices)


def test_imports_need_numpy_and_pytorch_alone() -> None:
    """As on a machine where nothing but PyTorch came with it; also without cdiff being installed."""
    program = (
        "import sys, importlib.abc, importlib.metadata as m\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {['typer', 'rich', 'nibabel', 'pycuda', 'tensorrt', 'tensorrt_rtx', 'matplotlib', 'PIL', 'monai', 'safetensors', 'diffusers', 'scipy', 'onnx', 'onnxscript']!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "m.version = lambda name, real=m.version: (_ for _ in ()).throw(m.PackageNotFoundError(name)) if name == 'cdiff' else real(name)\n"
        "import cdiff.benchmarks.gpu_suite as s, cdiff.benchmarks.gpu_checks as c, cdiff.benchmarks.gpu_parity, cdiff.benchmarks.gpu_measure\n"
        "import cdiff; assert cdiff.__version__ == '0+clone'\n"
        "found = c.run_check('parity:graph:shipped', c.Settings('cpu'))\n"
        "assert (found['status'], 'safetensors' in found['message']) == ('refused', True), found\n"
        "found = c.run_check('noise:graph:paper', c.Settings('cpu', small=True))\n"
        "assert found['status'] == 'done', found\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_check_of_every_plan_exists() -> None:
    for device, small in (("cuda:0", False), ("cpu", True)):
        names = [check.name for check in plan(device, small)]
        assert len(names) == len(set(names))
        for name in names:
            assert name == "machine" or name.split(":")[0] in KINDS
    whole = plan("cuda:0", False)
    for wanted in (
        "published:published:paper",
        "protocol:eager16:paper",
        "protocol:compiled:paper",
        "protocol:graph:paper",
        "parity:graph:shipped",
    ):
        assert any(check.name == wanted for check in whole)
    assert [c.name for c in chosen(whole, "machine,protocol:graph")] == [
        "machine",
        "protocol:graph:paper",
        "protocol:graph:shipped",
    ]
    with pytest.raises(CdiffError, match="--checks nonsense"):
        chosen(whole, "machine,nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "nothing was measured: PyTorch" in said
    assert "sees no NVIDIA GPU here" in said
    assert "protocol:graph:paper" in said
    assert not (tmp_path / "out").exists()
    assert main(["--checks", "nonsense"]) == 2


def test_noise_check_finds_a_wrong_stream(engine: TorchChainEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    image = TINY.images()["random"]
    right = noise_of(engine, TINY, image, 3, 2**63 + 5)
    assert right["max"] < 1e-6
    assert right["values"] == 2 * 3 * 16 * 16
    noise = engine.noise
    monkeypatch.setattr(engine, "noise", lambda seed, *rest: noise(seed + 1, *rest))
    assert noise_of(engine, TINY, image, 3, 2**63 + 5)["max"] > 1


def test_parity_is_near_nought_for_the_same_weights_and_not_for_others(engine: TorchChainEngine) -> None:
    network, images = TINY.network(), TINY.images()
    reference = TorchEngine(network, TINY.schedule)
    for image in images.values():
        assert max(call_errors(engine, reference, image, TINY).values()) < 1e-4
    same = map_errors(engine, reference, images["real"], TINY)
    assert same["mean"] < 1e-5
    assert same["dice"] == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        network.denoiser.last.bias.add_(0.5)
    other = TorchEngine(network, TINY.schedule)
    assert call_errors(engine, other, images["real"], TINY)["x0"] > 0.1
    assert map_errors(engine, other, images["real"], TINY)["mean"] > 0.01


class Clock:
    """A clock that stands still unless a chain moves it: 2 ms a chain and `step` a step, and every fifth chain is held up for 50 ms."""

    def __init__(self, step: float) -> None:
        self.now, self.step, self.calls = 0.0, step, 0

    def perf_counter(self) -> float:
        return self.now

    def chain(self, engine: Any, model: Any, image: Any, rows: Any, table: Any, seed: int = 0) -> None:
        self.calls += 1
        self.now += 2e-3 + self.step * len(table) + (50e-3 if self.calls % 5 == 3 else 0)


def test_a_step_is_a_median_and_no_jitter(engine: TorchChainEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5e-4, 0.0):
        clock = Clock(step)
        monkeypatch.setattr(gpu_measure, "time", clock)
        monkeypatch.setattr(gpu_measure, "chain", clock.chain)
        if step:
            assert step_seconds(engine, TINY, TINY.images()["real"], 4) == pytest.approx(step)
        else:
            with pytest.raises(CdiffError, match="the time of a step is not known"):
                step_seconds(engine, TINY, TINY.images()["real"], 4)


def test_memory_is_looked_at_apart_from_the_clock_and_without_leftovers(
    engine: TorchChainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU of 100 bytes: 10 are used, 30 more were kept from an earlier batch size."""
    kept, watched, steps = [30], [0], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90 - kept[0], 100))
    with DeviceMemory("cuda:0") as memory:
        pass
    assert memory.peak == 10

    class Watch(DeviceMemory):
        def __enter__(self) -> DeviceMemory:
            watched[0] += 1
            return super().__enter__()

        def __exit__(self, *rest: object) -> None:
            super().__exit__(*rest)
            watched[0] -= 1

    def seen(name: str, table: int) -> None:
        real = getattr(gpu_measure, name)

        def call(*args: Any, **named: Any) -> Any:
            steps.append((len(args[table]), watched[0]))
            return real(*args, **named)

        monkeypatch.setattr(gpu_measure, name, call)

    monkeypatch.setattr(gpu_measure, "DeviceMemory", Watch)
    seen("segment_windows", 2)
    seen("plain_loop", 3)
    image = TINY.images()["real"]
    whole_protocol(engine, TINY, image, 6, seconds=1e9)
    published(TINY, image, "cpu", seconds=0)
    T = TINY.config.network.T
    assert steps == [(2, 0), (2, 1), (T, 0), (2, 0), (2, 1), (2, 0), (6, 0)], (
        "steps, and whether the memory was watched"
    )


def test_a_protocol_in_part_is_extrapolated_and_says_so(engine: TorchChainEngine) -> None:
    image = TINY.images()["real"]
    whole = whole_protocol(engine, TINY, image, 4, seconds=1e9)
    assert (whole["share"], whole["steps"], whole["batches"]) == (1.0, TINY.config.network.T, 2)
    assert whole["seconds"] == pytest.approx(whole["measured_seconds"], rel=0.05)
    part = whole_protocol(engine, TINY, image, 4, seconds=0)
    assert part["steps"] == 2
    assert part["share"] == pytest.approx(2 / TINY.config.network.T)
    assert part["seconds"] > part["measured_seconds"]
    assert part["seconds"] == pytest.approx(sum(part["parts"].values()))
    assert 0 <= part["host_share"] < 1
    plain = published(TINY, image, "cpu", seconds=0)
    assert 0 < plain["share"] < 1
    assert plain["seconds"] > plain["measured_seconds"]


def test_a_broken_process_costs_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "settings_json", lambda settings: "not json")
    broken = in_a_process("machine", CPU, 60)
    assert broken["status"] == "failed"
    assert "JSONDecodeError" in broken["message"]
    ended = in_a_process("machine", CPU, 0.01)
    assert "was ended" in ended["message"]


def test_what_an_engine_refuses_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise CdiffError("this card is not for me")

    monkeypatch.setitem(KINDS, "replay", refuse)
    assert gpu_checks.run_check("replay:tensorrt-rtx:shipped", CPU) | {"seconds": 0} == {
        "status": "refused", "message": "this card is not for me", "seconds": 0
    }  # fmt: skip
    monkeypatch.setitem(KINDS, "replay", lambda *_: 1 / 0)
    assert gpu_checks.run_check("replay:tensorrt:shipped", CPU)["status"] == "failed"


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def outcome(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        ran.append(name)
        return (
            {"status": "refused", "message": "no", "seconds": 0}
            if "graph" in name
            else {"status": "failed", "message": "it broke", "seconds": 1}
        )

    monkeypatch.setattr(gpu_suite, "in_a_process", outcome)
    checks = chosen(plan("cpu", True), "noise,published")
    suite = Suite(tmp_path, CPU, checks, fresh=False)
    suite.run(checks, minutes=0)
    assert not ran
    assert {found["status"] for found in suite.report["checks"].values()} == {"not measured"}
    Suite(tmp_path, CPU, checks, fresh=False).run(checks, minutes=5)
    assert ran == [check.name for check in checks]
    ran.clear()
    again = Suite(tmp_path, CPU, checks, fresh=False)
    again.run(checks, minutes=5)
    assert ran == [name for name in (check.name for check in checks) if "graph" not in name] + [
        "noise:graph:shipped"
    ], "what broke is tried again, and after it what was refused"
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "| noise:graph:shipped | refused | no |" in page
    with pytest.raises(CdiffError, match="other settings; give --fresh"):
        Suite(tmp_path, Settings("cpu"), checks, fresh=False)
    elsewhere = Suite(tmp_path, replace(CPU, work="elsewhere"), checks, fresh=False)
    assert elsewhere.report["checks"].keys() == {"noise:graph:shipped"}, "graphs in another folder measure the same"
    (tmp_path / "gpu_suite.json").write_text("{")
    with pytest.raises(CdiffError, match="give --fresh"):
        Suite(tmp_path, CPU, checks, fresh=False)


def test_what_was_refused_is_tried_again_after_what_was_never_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package may be there by now; what is done stays, and a refusal that there is no time to try again stays too."""
    now, installed, ran = [0.0], [False], []
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def outcome(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        ran.append(name)
        now[0] += 30
        if "tensorrt" in name and not installed[0]:
            return {"status": "refused", "message": "needs tensorrt", "seconds": 30}
        return {"status": "done", "result": {"note": "nothing to replay"}, "seconds": 30}

    monkeypatch.setattr(gpu_suite, "in_a_process", outcome)
    names = ["replay:tensorrt:shipped", "replay:graph:shipped", "replay:tensorrt:paper", "replay:graph:paper"]

    def states(minutes: float) -> list[str]:
        ran.clear()
        checks = [Check(name, "", 40, 1) for name in names]
        suite = Suite(tmp_path, CPU, checks, fresh=False)
        suite.run(checks, minutes)
        return [suite.report["checks"][name]["status"] for name in names]

    assert states(1.5) == ["refused", "done", "refused", "not measured"]
    installed[0] = True
    assert states(1) == ["done", "done", "refused", "done"]
    assert ran == ["replay:graph:paper", "replay:tensorrt:shipped"]
    assert "needs tensorrt" in (tmp_path / "gpu_suite.md").read_text()
    assert states(1) == ["done"] * 4
    assert ran == ["replay:tensorrt:paper"]


def test_a_check_that_the_suite_cuts_short_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--minutes` ends a check that did not come to its own limit: nothing broke, and the same command measures it."""
    now = [0.0]
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
        now[0] += seconds
        return {"status": "failed", "message": f"took longer than {seconds:.0f} s and was ended", "seconds": seconds}

    monkeypatch.setattr(gpu_suite, "in_a_process", slow)
    checks = [Check(name, "", 40, 1) for name in ("noise:graph:shipped", "noise:graph:paper")]
    suite = Suite(tmp_path, CPU, checks, fresh=False)
    suite.run(checks, minutes=1)
    found = suite.report["checks"]
    assert found["noise:graph:shipped"]["message"] == "took longer than 40 s and was ended"
    assert found["noise:graph:paper"]["status"] == "not measured"
    assert "the time was up" in found["noise:graph:paper"]["message"]


def test_ending_the_suite_ends_its_check(tmp_path: Path) -> None:
    """As by `timeout`: a check left behind would keep the GPU that the next ones are measured on."""
    check, begun = tmp_path / "check", tmp_path / "pid"
    check.write_text(f"#!/bin/sh\necho $$ > {begun}.part; mv {begun}.part {begun}; exec sleep 600\n")
    check.chmod(0o755)
    program = (
        f"import sys, runpy; sys.argv[1:] = ['--device', 'cpu', '--small', '--out', {str(tmp_path / 'out')!r}, '--checks', 'machine']\n"
        f"sys.executable = {str(check)!r}\n"
        "runpy.run_module('cdiff.benchmarks.gpu_suite', run_name='__main__')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as suite:
        while not begun.exists():
            assert suite.poll() is None
            time.sleep(0.1)
        suite.terminate()
        _, said = suite.communicate()
    pid = int(begun.read_text())
    try:
        assert suite.returncode == 130, said
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_no_room_for_the_parts_of_a_step_costs_no_measured_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> Any:
        raise OutOfMemory("PyTorch has no room on the GPU")

    monkeypatch.setattr(gpu_checks, "step_parts", no_room)
    name = "protocol:graph:paper"
    found = gpu_checks.run_check(name, CPU)
    assert found["status"] == "done"
    page = markdown({"settings": vars(CPU), "targets": [], "plan": [], "checks": {name: found}})
    assert f"| {name} | done but for a step's parts | PyTorch has no room on the GPU |" in page
    assert "| cdiff, PyTorch float16, captured |" in page


def test_values_that_are_not_finite_are_said_and_not_compared(
    engine: TorchChainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = TorchEngine(TINY.network(), TINY.schedule)
    denoise = engine.denoise
    monkeypatch.setattr(engine, "denoise", lambda *arrays: (denoise(*arrays)[0] * np.float32(np.nan), None))
    with pytest.raises(CdiffError, match="the denoiser on torch returned a value that is not finite"):
        call_errors(engine, reference, TINY.images()["real"], TINY)


def test_the_page_says_what_float32_meant() -> None:
    plain = {"seconds_a_slice": 2.0, "share": 1.0, "flop": 1.0, "peak_bytes": 0, "tf32_products": False}
    for used, said in ((True, "(TF32 in convolutions)"), (False, "(no TF32)")):
        checks = {"published:published:paper": {"status": "done", "result": plain | {"tf32_convolutions": used}}}
        page = markdown({"settings": vars(CPU), "targets": [], "plan": [], "checks": checks})
        assert f"encoder for each {said} | 2.00 | all of it |" in page


def test_targets_are_met_missed_or_not_measured() -> None:
    def checks(maps: float, dice: float, seconds: float, host: float, four: float) -> dict[str, Any]:
        return {
            "machine": {"result": {"matmul_flop_per_s": {"float16": 800e12}}},
            "published:published:paper": {"result": {"seconds_a_slice": 200.0}},
            "parity:tensorrt:shipped": {"result": {"maps": {"mean": maps, "dice": dice}}},
            "protocol:tensorrt:paper": {"result": {"seconds_a_slice": seconds, "flop_per_s": 9.7e15 / seconds, "host_share": host}},
            "scaling:tensorrt:shipped": {"result": {"seconds_a_slice": {"1": 1.0, "2": 1.0, "4": four}}},
            "protocol:eager16:paper": {"result": {"seconds_a_slice": 50.0}},
        }  # fmt: skip

    good = targets(checks(0.005, 0.999, 20.0, 0.01, 1.02), small=False)
    assert {one["path"] for one in good} == {"tensorrt"}, "baselines have no targets"
    assert [one["state"] for one in good] == ["met"] * 6
    assert good[2]["found"] == "10.0 times"
    assert good[3]["found"] == "61%"
    bad = targets(checks(0.02, 0.9, 50.0, 0.1, 1.3), small=False)
    assert [one["state"] for one in bad] == ["missed"] * 6
    assert {one["state"] for one in targets(checks(0, 1, 1, 0, 1), small=True)} == {"not measured"}
    only = targets({"parity:tensorrt:shipped": {"status": "refused", "message": "no"}}, small=False)
    assert {one["state"] for one in only} == {"not measured"}
    assert "tensorrt" not in BASELINES


@pytest.mark.slow
def test_the_suite_on_tiny_networks(tmp_path: Path) -> None:
    """A check of most kinds, each in its own process, through the command."""
    checks = "machine,noise:graph,published:published:paper,parity:onnxruntime,protocol:graph:shipped,scaling:graph"
    command = [sys.executable, "-m", "cdiff.benchmarks.gpu_suite", "--device", "cpu", "--small", "--out", str(tmp_path)]
    command += ["--protocol-seconds", "1", "--minutes", "60", "--checks", checks]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert {found["status"] for found in report["checks"].values()} == {"done"}, done.stdout
    assert report["checks"]["parity:onnxruntime:shipped"]["result"]["maps"]["mean"] < 1e-4
    assert report["checks"]["noise:graph:shipped"]["result"]["max"] < 1e-6
    page = (tmp_path / "gpu_suite.md").read_text()
    assert page == markdown(report)
    assert "tried the suite itself" in page
    assert "## Not measured" not in page
    for title in (
        "Engines",
        "Targets",
        "Whole protocol",
        "Batch sizes",
        "Against PyTorch float32",
        "Noise",
        "Seconds a slice",
    ):
        assert f"## {title}" in page
