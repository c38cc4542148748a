"""`cdiff benchmark`: the contenders do the same work, in processes of their own, and the report holds together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdiff import __version__
from cdiff.benchmarks.benchmark import Worker, benchmark, scan_files, versions
from cdiff.benchmarks.floor import count_flop
from cdiff.benchmarks.plain_loop import plain_loop
from cdiff.export.reference import TorchEngine, load_network
from cdiff.runtime.bundle import open_bundle
from cdiff.runtime.engines.registry import open_engine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.chain import Timings
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.noise import INITIAL, normal
from cdiff.runtime.sampling.sampler import SamplerTable, sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.diffusion import Diffusion
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset
from tests.export.networks import BASE, random_network
from tests.layouts import write_brats

CDIFF = Path(sys.executable).with_name("cdiff")


@pytest.fixture(scope="module")
def scan(tiny_data: Path) -> Path:
    return tiny_data / "Validation" / "case01" / "image.nii.gz"


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, scan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the command prints and writes."""
    out = tmp_path_factory.mktemp("benchmark") / "b.json"
    arguments = ["--model", str(tiny_bundle), "--scan", str(scan), "--batch", "1,3", "--runs", "2", "--steps", "4"]
    done = subprocess.run(
        [str(CDIFF), "benchmark", *arguments, "--repeats", "2", "--threads", "1", "--json", str(out), "-q"],
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "120", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.fixture(scope="module")
def report(measured: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return measured[1]


def with_the_runtime_s_noise(
    monkeypatch: pytest.MonkeyPatch, windows: int, levels: int, table: SamplerTable, by_row: bool = False
) -> Iterator[tuple[Any, ...]]:
    """Let PyTorch draw, in the plain loop's order of two runs, what the runtime draws with the seed 7. Returns the keys still to come."""
    steps = [INITIAL, *map(int, np.flatnonzero(table.d > 0))]
    every = list(range(1, levels + 1))
    batches = [[c] for c in every] if by_row else [every]
    keys = iter([(w, batch, r, step) for w in range(windows) for r in range(2) for batch in batches for step in steps])

    def drawn(x: torch.Tensor) -> torch.Tensor:
        w, batch, r, step = next(keys)
        assert len(x) == len(batch)
        return torch.from_numpy(np.stack([normal(7, w, c, r, step, (x.shape[-2], x.shape[-1])) for c in batch]))[
            :, None
        ]

    monkeypatch.setattr(torch, "randn_like", drawn)
    return keys


@pytest.mark.parametrize(("sampler", "by_row"), [("ddpm", False), ("ddpm", True), ("ddim", False), ("dpm++2m", False)])
def test_plain_loop_is_the_same_method(
    tiny_bundle: Path, sampler: str, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the runtime's noise, one run after another in PyTorch ends at the maps of the batched exported engine."""
    bundle = open_bundle(tiny_bundle)
    network, schedule = load_network(bundle, "cpu"), bundle.manifest.noise_schedule
    images = np.random.default_rng(0).uniform(-1, 1, (2, 1, 32, 32)).astype(np.float32)
    windows = Framing("resize", (32, 32)).frame(images)
    table = sampler_table(sampler, schedule, 5)

    timings, keys = Timings(), with_the_runtime_s_noise(monkeypatch, 2, bundle.manifest.levels, table, by_row)
    diffusion = Diffusion(schedule, network.config.target)
    plain = plain_loop(network, diffusion, windows, table, 2, timings, by_row=by_row)
    found = segment_windows(open_engine(bundle), windows, table, levels=bundle.manifest.levels, runs=2, seed=7)
    batched = np.stack([one.level_means.mean(axis=0) for one in found])
    assert np.ptp(batched) > 0.01, "a flat map would agree with anything"
    np.testing.assert_allclose(plain, batched, atol=1e-4)
    assert timings.calls == 2 * 2 * 5 * (bundle.manifest.levels if by_row else 1)
    assert timings.rows == 2 * 2 * bundle.manifest.levels
    assert next(keys, None) is None


def test_plain_loop_s_maps_of_masks_of_zero_and_one_are_the_runtime_s(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(BASE, levels=1, outside=0)
    network, schedule = random_network(config), NoiseSchedule(config.T)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 1, 16, 16)).astype(np.float32)
    windows, table = Framing("resize", (16, 16)).frame(images), sampler_table("ddim", schedule, 3)

    with_the_runtime_s_noise(monkeypatch, 2, 1, table)
    diffusion = Diffusion(schedule, config.target, outside=0)
    plain = plain_loop(network, diffusion, windows, table, 2, Timings())
    found = segment_windows(TorchEngine(network, schedule), windows, table, levels=1, runs=2, seed=7)
    batched = np.stack([one.for_masks_from_zero().level_means[0] for one in found])
    assert 0.1 < np.mean(batched == 0) < 0.9, "x below 0 and above"
    np.testing.assert_allclose(plain, batched, rtol=0, atol=1e-4)


def test_plain_loop_interpolates_a_learned_variance_as_the_runtime_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its ends too, where the network says so."""
    config = replace(BASE, levels=1, variance="learned")
    network, schedule = random_network(config), NoiseSchedule(config.T)
    network.denoiser.last.bias.data[1] = 1.5  # type: ignore[index]
    windows = Framing("resize", (16, 16)).frame(np.zeros((1, 1, 16, 16), np.float32))
    table = sampler_table("ddpm", schedule, 3)

    with_the_runtime_s_noise(monkeypatch, 1, 1, table)
    plain = plain_loop(network, Diffusion(schedule, config.target), windows, table, 2, Timings())
    (found,) = segment_windows(TorchEngine(network, schedule), windows, table, levels=1, runs=2, seed=7)
    assert np.ptp(found.level_means) > 0.01
    np.testing.assert_allclose(plain[0], found.level_means[0], rtol=0, atol=1e-4)


def test_flop_of_a_network_that_can_be_counted_by_hand() -> None:
    """The encoder of one 3x3 convolution: two operations a multiply-add; and FLOPs grow with the area."""
    config = preset("tiny").network
    single = replace(config, rrdbs=0)
    encoder, denoiser = count_flop(ConsensusNet(single))
    assert encoder == 2 * 9 * single.image_channels * single.base_channels * single.image_size**2
    _, larger = count_flop(ConsensusNet(replace(single, image_size=64, attention_depths=())))
    _, smaller = count_flop(ConsensusNet(replace(single, attention_depths=())))
    assert larger > 3.9 * smaller
    assert denoiser > smaller


@pytest.mark.parametrize("installed", [["onnxruntime"], ["onnxruntime-gpu"], []])
def test_versions_name_the_onnx_runtime_that_is_there(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("numpy", *installed):
            return f"{len(package)}.0"
        raise PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", version)
    wanted = {name: f"{len(name)}.0" for name in ("numpy", *installed)}
    assert versions() == {"cdiff": __version__, **wanted}


@pytest.mark.slow
def test_report_holds_together(report: dict[str, Any]) -> None:
    end = report["end_to_end"]
    assert set(end) == {"published", "pytorch", "exported"}
    assert report["protocol"]["steps"] == 4
    # The same rows through the same steps: a run's levels a call as published, all in one batch otherwise.
    levels = report["model"]["levels"]
    assert end["published"]["calls"] == 2 * 4
    assert end["published"]["batch"] == levels
    assert end["pytorch"]["calls"] == end["exported"]["calls"] == 4
    assert end["exported"]["batch"] == 2 * levels
    for found in end.values():
        assert found["parts"]["other"] >= 0, "no part was counted twice"
        assert any(sum(found["parts"].values()) == pytest.approx(wall) for wall in found["all_seconds"]), "one round's"
        assert found["peak_bytes"] >= found["loaded_bytes"] > 10 * 2**20
        assert found["slices_a_minute"] == pytest.approx(60 / found["seconds"])
    assert set(report["denoiser_call"]["exported"]) == {"1", "3"}
    assert report["machine"]["versions"] == versions()
    assert report["agreement"]["exported"]["max"] < 1e-3


@pytest.mark.slow
def test_ratios_compare_a_round_with_itself(report: dict[str, Any]) -> None:
    slow, fast = (report["end_to_end"][kind]["all_seconds"] for kind in ("published", "exported"))
    by_hand = np.median([a / b for a, b in zip(slow, fast, strict=True)])
    assert report["ratios"]["exported_over_published"]["median"] == pytest.approx(by_hand)


@pytest.mark.slow
def test_floor_is_below_what_was_measured(report: dict[str, Any]) -> None:
    assert report["floor"]["matmul_flop_per_s"] > 1e8
    for calls in report["denoiser_call"].values():
        assert calls["3"]["ms_a_row"] > report["floor"]["ms_a_row"]


@pytest.mark.slow
def test_the_exported_engine_is_measured_without_torch_in_memory(report: dict[str, Any]) -> None:
    memory = {kind: found["loaded_bytes"] for kind, found in report["end_to_end"].items()}
    assert memory["exported"] < memory["pytorch"]


def test_the_scan_of_a_model_of_several_files_is_a_case(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    assert scan_files(None, manifest)[0].name == "image.nii.gz"
    manifest = replace(manifest, image_channels=2, training={"data": {"modalities": ["flair", "t1"]}})
    root = write_brats(tmp_path, slices=2)
    files = scan_files(root / "000002", manifest)
    assert [file.name for file in files] == ["brats_train_001_flair_081_w.nii.gz", "brats_train_001_t1_081_w.nii.gz"]
    with pytest.raises(CdiffError, match=r"holds 2 scans; name one"):
        scan_files(root, manifest)
    with pytest.raises(CdiffError, match=r"one channel, but the model takes 2; give a scan with --scan"):
        scan_files(None, manifest)


def test_a_contender_that_dies_is_named(tmp_path: Path, scan: Path) -> None:
    spec = {
        "kind": "exported", "bundle": str(tmp_path), "scan": str(scan), "slices": "0:1", "runs": 1,
        "engine": "auto", "device": "cpu", "threads": 1,
    }  # fmt: skip
    with pytest.raises(CdiffError, match="not a bundle"), Worker(spec) as worker:
        worker.ask("about")
    with Worker(spec) as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(CdiffError, match="exported stopped at 'about'"):
            worker.ask("about")


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_anything_starts(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdiff.benchmarks.benchmark.Worker", lambda spec: pytest.fail("a contender was started"))
    with pytest.raises(CdiffError, match="--device cuda:0: PyTorch sees no CUDA device here"):
        benchmark(tiny_bundle, device="cuda:0")


@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "cuda:first"])
def test_a_device_that_is_not_one_is_refused_before_anything_runs(device: str, tiny_bundle: Path) -> None:
    with pytest.raises(CdiffError, match=rf"device '{device}' is not known; use cpu, cuda or cuda:N"):
        benchmark(tiny_bundle, device=device)


@pytest.mark.parametrize(
    ("asked", "says"),
    [({"engine": "x"}, "engine 'x' is not known; use one of auto"), ({"steps": 26}, "trained with 25: use 1 to 25")],
)
def test_what_no_contender_can_do_is_said_before_one_starts(
    asked: dict[str, Any], says: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdiff.benchmarks.benchmark.Worker", lambda spec: pytest.fail("a contender was started"))
    with pytest.raises(CdiffError, match=says):
        benchmark(tiny_bundle, **asked)


@pytest.mark.slow
def test_command_prints_tables(measured: tuple[str, dict[str, Any]]) -> None:
    for words in ("End to end", "One denoiser call", "Where the time goes", "one run after another", "onnxruntime"):
        assert words in measured[0]


def test_command_refuses_a_batch_that_is_no_number(tiny_bundle: Path) -> None:
    done = subprocess.run(
        [str(CDIFF), "benchmark", "--model", str(tiny_bundle), "--batch", "1,x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--batch 1,x" in done.stderr
