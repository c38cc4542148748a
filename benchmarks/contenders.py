"""One contender of the benchmark in its own process, so that its peak memory is its own. It answers requests, each a line of JSON.

Started by `benchmarks.benchmark` as `python -m cdiff.benchmarks.contenders SPEC`; stdin carries the requests, stdout the answers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np

from cdiff.benchmarks.memory import peak_memory
from cdiff.benchmarks.processes import end_with_parent
from cdiff.runtime.bundle import Bundle, open_bundle
from cdiff.runtime.engines.base import Engine
from cdiff.runtime.engines.registry import open_engine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.chain import Timings
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.scans.scan import parse_slices, read_scan
from cdiff.runtime.segmenter import Segmenter

PUBLISHED, PYTORCH, COMPILED, EXPORTED = "published", "pytorch", "compiled", "exported"
LEAST_CALLS, LEAST_SECONDS = 5, 0.5


def torch_engine(bundle: Bundle, device: str, compiled: bool) -> Engine:
    """PyTorch behind the runtime's protocol, eager or through torch.compile."""
    import torch

    from cdiff.export.reference import TorchEngine, load_network

    class CompiledEngine(TorchEngine):
        name = "pytorch, compiled"

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._encoder, self._denoiser = torch.compile(self._encoder), torch.compile(self._denoiser)  # type: ignore[assignment]

    make = CompiledEngine if compiled else TorchEngine
    return make(load_network(bundle, device), bundle.manifest.noise_schedule, device)


class Through:
    """A contender behind the runtime's own loop: batched rows, each slice encoded once."""

    def __init__(self, spec: dict[str, Any]) -> None:
        bundle = open_bundle(spec["bundle"])
        if spec["kind"] == EXPORTED:
            engine = open_engine(bundle, spec["engine"], spec["device"], threads=spec["threads"])
        else:
            engine = torch_engine(bundle, spec["device"], spec["kind"] == COMPILED)
        self.spec, self.segmenter = spec, Segmenter(bundle, engine)

    def about(self) -> dict[str, Any]:
        engine = self.segmenter.engine
        return {"engine": engine.name, "version": engine.version, "device": engine.device}

    def end_to_end(self, steps: int, maps: str | None) -> dict[str, Any]:
        """Segment the scan from its file once; `maps` names a file for the soft maps."""
        spec = self.spec
        result = self.segmenter.segment(
            spec["scan"],
            runs=spec["runs"],
            steps=steps,
            sampler="ddpm",
            slices=spec["slices"],
            seed=0,
            mirror=False,
            zooms=(1,),
        )
        if maps:
            np.save(maps, result.stack.soft)
        timings = result.report["timings"]
        parts = {"read": timings["read"] + timings["frame"]}
        parts |= {part: timings[part] for part in ("encode", "denoise", "noise", "update", "collect")}
        return {"parts": parts, "calls": timings["calls"], "batch": result.report["batch"]}

    def write(self) -> dict[str, Any]:
        """Seconds for the files of a result, preview included; measured on a one-step result, whose files are as large."""
        spec = self.spec
        result = self.segmenter.segment(spec["scan"], runs=1, steps=1, slices=spec["slices"])
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            result.save(folder, "benchmark")
            return {"seconds": time.perf_counter() - start}

    def call(self, rows: int) -> dict[str, Any]:
        """Milliseconds of several denoiser calls of `rows` rows of one slice, after two that do not count."""
        manifest, engine = self.segmenter.manifest, self.segmenter.engine
        rng = np.random.default_rng(0)
        image = rng.uniform(-1, 1, (1, manifest.image_channels, *manifest.image_size)).astype(np.float32)
        features = engine.encode(image)
        x = rng.normal(size=(rows, 1, *manifest.image_size)).astype(np.float32)
        t = np.linspace(1, manifest.T, rows).round().astype(np.int64)
        level = np.arange(rows) % manifest.conditions + 1
        return {"ms": _repeat(lambda: engine.denoise(x, features, np.zeros(rows, np.int64), t, level))}

    def encode(self) -> dict[str, Any]:
        """Milliseconds of several encodings of one slice."""
        manifest = self.segmenter.manifest
        image = np.zeros((1, manifest.image_channels, *manifest.image_size), np.float32)
        return {"ms": _repeat(lambda: self.segmenter.engine.encode(image))}

    def floor(self) -> dict[str, Any]:
        """The network's FLOPs and parameters, the machine's rate of matrix products, and a description of the machine."""
        import torch

        from cdiff.benchmarks.floor import measure_floor
        from cdiff.export.reference import load_network
        from cdiff.train.machine import describe_machine

        network = load_network(self.segmenter.bundle, self.spec["device"])
        return {
            **asdict(measure_floor(network)),
            "parameters": sum(p.numel() for p in network.parameters()),
            "machine": describe_machine(torch.device(self.spec["device"])),
        }


class Published:
    """The contender that samples as the published code does: `plain_loop`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from cdiff.export.reference import load_network
        from cdiff.train.diffusion import Diffusion

        self.spec, self.bundle = spec, open_bundle(spec["bundle"])
        self.network = load_network(self.bundle, spec["device"])
        config = self.network.config
        self.diffusion = Diffusion(
            self.bundle.manifest.noise_schedule, config.target, spec["device"], outside=config.outside
        )

    def about(self) -> dict[str, Any]:
        import torch

        return {"engine": "pytorch, plain loop", "version": str(torch.__version__), "device": self.spec["device"]}

    def end_to_end(self, steps: int, maps: str | None) -> dict[str, Any]:
        """Read the scan as the runtime does, then one run after another."""
        from cdiff.benchmarks.plain_loop import plain_loop

        manifest, spec, start = self.bundle.manifest, self.spec, time.perf_counter()
        read = read_scan(spec["scan"], channels=manifest.image_channels, slice_axis=manifest.slice_axis)
        chosen = parse_slices(spec["slices"], len(read.slices))
        images = manifest.normalisation.apply(read.slices)[chosen.start : chosen.stop]
        windows = manifest.slice_framing.frame(images)
        reading, timings = time.perf_counter() - start, Timings()
        table = sampler_table("ddpm", manifest.noise_schedule, steps)
        soft = plain_loop(self.network, self.diffusion, windows, table, spec["runs"], timings)
        if maps:
            np.save(maps, soft)
        spent = asdict(timings)
        parts = {part: spent[part] for part in ("encode", "denoise", "noise", "update", "collect")}
        return {"parts": {"read": reading, **parts}, "calls": timings.calls, "batch": manifest.conditions}


def _repeat(call: Any) -> list[float]:
    times: list[float] = []
    call(), call()
    while len(times) < LEAST_CALLS or sum(times) < 1e3 * LEAST_SECONDS:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def answer(contender: Through | Published, request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks; wall and processor seconds and the peak so far go with every answer."""
    arguments = {key: value for key, value in request.items() if key != "do"}
    wall, cpu = time.perf_counter(), time.process_time()
    found = getattr(contender, request["do"])(**arguments)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return {**spent, "peak_bytes": peak_memory(), **found}


def _compiling() -> AbstractContextManager[None]:
    from cdiff.train.compiled import compiling

    return compiling("it needs a C++ compiler (g++) and room for temporary files; or leave --compile out")


def main() -> None:
    """Answer until stdin closes, or the benchmark is killed. A CdiffError is an answer too."""
    end_with_parent()
    # Libraries may print: the real stdout is kept for the answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    contender: Through | Published | None = None
    for line in sys.stdin:
        try:
            if contender is None:
                if spec["kind"] != EXPORTED:  # the exported engine is measured as it is used: without PyTorch in memory
                    import torch

                    torch.set_num_threads(spec["threads"])
                contender = Published(spec) if spec["kind"] == PUBLISHED else Through(spec)
            with _compiling() if spec["kind"] == COMPILED else nullcontext():
                found = answer(contender, json.loads(line))
        except CdiffError as error:
            found = {"error": str(error)}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
