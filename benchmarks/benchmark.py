"""What `cdiff benchmark` measures: the exported engine, PyTorch with the same weights and the machine's floor, in one run.

Every contender has a process of its own and they take turns, so that a busy moment hits all alike; see docs/benchmarks.md.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cdiff import __version__
from cdiff.benchmarks.contenders import COMPILED, EXPORTED, PUBLISHED, PYTORCH
from cdiff.benchmarks.tables import summary
from cdiff.runtime.bundle import open_bundle
from cdiff.runtime.device.gpu import parse_device
from cdiff.runtime.engines.registry import must_run
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256
from cdiff.runtime.host import physical_cores
from cdiff.runtime.manifest import NAME as MANIFEST
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.sampling.batching import rows_per_batch
from cdiff.runtime.sampling.sampler import kept_timesteps
from cdiff.runtime.scans.inputs import scans_at
from cdiff.runtime.scans.scan import parse_slices, read_scan

__all__ = ["benchmark", "summary"]

RUNS = 25  # what a whole segmentation takes, for the estimate
BUSY = 0.5  # processors that others may keep busy before a reader is told
PACKAGES = "numpy", "onnxruntime", "onnxruntime-gpu"  # the last two install one module, and one of them is enough


class Worker:
    """A contender's process. `ask` sends one request and waits for its answer; raises CdiffError when the process cannot give one."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.kind = spec["kind"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        threads = str(spec["threads"])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cdiff.benchmarks.contenders", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["no message; is there enough memory?"]
            raise CdiffError(f"the benchmark of {self.kind} stopped at {do!r}: {last[0]}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise CdiffError(found["error"])
        return found

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()


def benchmark(
    bundle: str | Path,
    *,
    scan: str | Path | None = None,
    engine: str = "auto",
    device: str = "cpu",
    batches: Sequence[int] = (1, 8, 32),
    slices: str | None = None,
    runs: int = 4,
    steps: int | None = None,
    repeats: int = 3,
    compiled: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure and return everything, in JSON values; docs/benchmarks.md says what each is.

    scan: a file, or a case's folder, by default the demo scan. slices: "A:B" of it, its middle one by default. batches: rows of the single
    denoiser calls. steps: of ddpm, all T by default. repeats: rounds of the end-to-end measurement. compiled: measure torch.compile too.
    threads: of every contender, the physical cores by default. progress: called with the requests answered and their total. notice: called
    with lines for the user.
    Raises CdiffError for a bundle, scan, engine or device that cannot be used, and when a contender's process dies.
    """
    if (number := parse_device(device)) is not None:  # checked once, for all contenders
        from cdiff.train.fabric import must_have

        must_have(device, number)
    must_run(engine, device)
    opened = open_bundle(bundle)
    manifest = opened.manifest
    say, tick = notice or (lambda line: None), progress or (lambda done, total: None)
    threads, files = threads or physical_cores(), scan_files(scan, manifest)
    read = read_scan(files, channels=manifest.image_channels, slice_axis=manifest.slice_axis)
    middle = len(read.slices) // 2
    chosen = parse_slices(slices or f"{middle}:{middle + 1}", len(read.slices))
    windows = len(manifest.slice_framing.frame(read.slices[chosen.start : chosen.stop]))
    spec = {
        "bundle": str(Path(bundle).resolve()), "scan": [str(file.resolve()) for file in files], "slices": f"{chosen.start}:{chosen.stop}",
        "runs": runs, "engine": engine, "device": device, "threads": threads,
    }  # fmt: skip
    steps = manifest.T if steps is None else steps
    kept_timesteps(manifest.T, steps)  # an error now, not after the warm-up
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > BUSY:
        say(f"the machine is busy (load {load:.1f} before this run): times are longer than on an idle one")
    if manifest.precision != "float32":
        say(
            f"the bundle is in {manifest.precision}, but PyTorch runs in float32: the two do not have the same precision"
        )
    if device != "cpu":
        say("memory figures are the host's alone; they leave out what lies on the GPU")

    kinds = [PUBLISHED, PYTORCH, *([COMPILED] if compiled else []), EXPORTED]
    done, total = 0, len(kinds) * (1 + repeats) + 2 + (len(kinds) - 1) * (len(batches) + 1)

    def asked(worker: Worker, do: str, **arguments: Any) -> dict[str, Any]:
        nonlocal done
        found = worker.ask(do, **arguments)
        done += 1
        tick(done, total)
        return found

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {kind: stack.enter_context(Worker({**spec, "kind": kind})) for kind in kinds}
        about = {kind: worker.ask("about") for kind, worker in workers.items()}
        for worker in workers.values():  # warm-up: one step of the same batch; compiles and fills caches
            asked(worker, "end_to_end", steps=1, maps=None)
        rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(repeats):
            for kind, worker in workers.items():
                rounds[kind].append(asked(worker, "end_to_end", steps=steps, maps=str(folder / f"{kind}.npy")))
        through = {kind: worker for kind, worker in workers.items() if kind != PUBLISHED}
        calls: dict[str, dict[str, Any]] = {kind: {} for kind in through}
        for rows in batches:
            for kind, worker in through.items():
                calls[kind][str(rows)] = _times(asked(worker, "call", rows=rows)["ms"], rows)
        encode = {kind: _times(asked(worker, "encode")["ms"], 1) for kind, worker in through.items()}
        floor = asked(workers[PYTORCH], "floor")
        write = asked(workers[EXPORTED], "write")["seconds"]
        maps = {kind: np.load(folder / f"{kind}.npy") for kind in kinds}

    calls_of_rows = windows * manifest.conditions * runs * steps
    least = (windows * floor["encoder_flop"] + calls_of_rows * floor["denoiser_flop"]) / floor["rate"]
    return {
        "machine": {
            **floor["machine"], "threads": threads, "load_before": round(load, 2),
            "versions": versions(),
        },
        "model": {
            "name": manifest.name, "manifest_sha256": sha256(opened.path / MANIFEST), "parameters": floor["parameters"],
            "image_size": list(manifest.image_size), "levels": manifest.levels, "T": manifest.T, "precision": manifest.precision,
        },
        "protocol": {
            "scan": ", ".join(file.name for file in files), "slices": len(chosen), "windows": windows, "runs": runs, "steps": steps, "sampler": "ddpm",
            "repeats": repeats, "batch": rows_per_batch(windows * manifest.conditions * runs, device, manifest.conditions * runs),
        },
        "contenders": {kind: {key: about[kind][key] for key in ("engine", "version", "device")} for kind in kinds},
        "floor": {
            "matmul_flop_per_s": floor["rate"], "encoder_flop": floor["encoder_flop"], "denoiser_flop": floor["denoiser_flop"],
            "ms_a_row": 1e3 * floor["denoiser_flop"] / floor["rate"], "end_to_end_seconds": least,
        },
        "denoiser_call": calls,
        "encoder_call": encode,
        "end_to_end": {
            kind: _end_to_end(found, about[kind], len(chosen), _whole(found, runs, steps, manifest.T, len(chosen)))
            for kind, found in rounds.items()
        },
        "write_seconds": write,
        "ratios": {
            f"{kind}_over_{slower}": _ratio(rounds[slower], rounds[kind])
            for slower in (PUBLISHED, PYTORCH) for kind in kinds if kind not in (PUBLISHED, slower)
        },
        "agreement": {
            kind: {"max": float(gap.max()), "mean": float(gap.mean())}
            for kind in through if kind != PYTORCH for gap in [np.abs(maps[kind] - maps[PYTORCH])]
        },
    }  # fmt: skip


def _end_to_end(found: list[dict[str, Any]], about: dict[str, Any], slices: int, whole: float) -> dict[str, Any]:
    """Medians over the rounds; `parts` are those of the median round, `other` what no part counted."""
    middle = sorted(found, key=lambda one: one["wall"])[len(found) // 2]
    seconds = statistics.median(one["wall"] for one in found)
    return {
        "seconds": seconds,
        "all_seconds": [one["wall"] for one in found],
        "cpu_seconds": statistics.median(one["cpu"] for one in found),
        "slices_a_minute": 60 * slices / seconds,
        "parts": {**middle["parts"], "other": middle["wall"] - sum(middle["parts"].values())},
        "calls": middle["calls"],
        "batch": middle["batch"],
        "peak_bytes": max(one["peak_bytes"] for one in found),
        "loaded_bytes": about["peak_bytes"],
        "estimate_25_runs_all_steps_seconds_a_slice": whole,
    }


def _whole(found: list[dict[str, Any]], runs: int, steps: int, T: int, slices: int) -> float:
    """Seconds per slice for 25 runs and all T steps, by proportion: an estimate where fewer were measured."""
    measured: float = statistics.median(one["wall"] for one in found)
    return measured / slices * (RUNS / runs) * (T / steps)


def _ratio(slower: list[dict[str, Any]], faster: list[dict[str, Any]]) -> dict[str, float]:
    """How many times faster: the median, least and most over the rounds, each round compared with itself."""
    ratios = [a["wall"] / b["wall"] for a, b in zip(slower, faster, strict=True)]
    cpu = [a["cpu"] / b["cpu"] for a, b in zip(slower, faster, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "cpu": statistics.median(cpu)}


def _times(ms: list[float], rows: int) -> dict[str, Any]:
    quarters = np.percentile(ms, (25, 50, 75))
    return {
        "ms": float(quarters[1]), "ms_a_row": float(quarters[1]) / rows, "ms_low": float(quarters[0]),
        "ms_high": float(quarters[2]), "repeats": len(ms),
    }  # fmt: skip


def scan_files(scan: str | Path | None, manifest: Manifest) -> tuple[Path, ...]:
    """The scan's file, or one for each modality of the model. Raises CdiffError unless just one scan is named."""
    if scan is None:
        return (_demo_scan(manifest.image_channels),)
    found = scans_at(Path(scan), manifest.image_channels, manifest.modalities)
    if len(found) > 1:
        raise CdiffError(f"{scan} holds {len(found)} scans; name one of them")
    path = found[0].path
    return (path,) if isinstance(path, Path) else path


def _demo_scan(channels: int) -> Path:
    """The scan that comes with the package. Raises CdiffError for a model of several channels, and when this installation has none."""
    if channels > 1:
        raise CdiffError(f"the demo scan has one channel, but the model takes {channels}; give a scan with --scan")
    path = Path(str(importlib.resources.files("cdiff") / "demo" / "image.nii.gz"))
    if not path.is_file():
        raise CdiffError(f"this installation has no demo scan in {path.parent}; give one with --scan")
    return path


def versions() -> dict[str, str]:
    """Versions by package: cdiff's, and those of PACKAGES that are installed."""
    found = {"cdiff": __version__}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
