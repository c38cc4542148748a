"""The GPU suite's stop-watches: steps at a batch size, a whole protocol or a stated share of it, memory, noise."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cdiff.benchmarks.gpu_subjects import SEED, Subject
from cdiff.benchmarks.memory import peak_memory
from cdiff.benchmarks.plain_loop import plain_loop
from cdiff.export.torch_chain import wait
from cdiff.runtime.engines.base import ChainBinding, Engine, Float32, Rows
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import most_rows_of, rows_per_batch, segment_windows
from cdiff.runtime.sampling.chain import Chain, Timings
from cdiff.runtime.sampling.framing import Framing, Windows
from cdiff.runtime.sampling.noise import INITIAL, Noise, normal
from cdiff.runtime.sampling.sampler import SamplerTable, sampler_table
from cdiff.train.diffusion import Diffusion
from cdiff.train.network import ConsensusNet

FEW, MORE = 2, 6
"""Steps of the two chains whose difference is the time of a step."""

ENOUGH, MOST = 1.0, 25
"""A step's time is the median of such differences: at least one, and more until they have taken ENOUGH seconds or there are MOST."""


class DeviceMemory:
    """`peak`: the most memory in use during a `with` block, bytes: on a GPU all of the device's, read every 10 ms; else this process's.

    0 where the driver does not tell, since measured times must not be lost for that. What PyTorch has cached from earlier batch sizes is
    given back first. Time nothing inside the block: reading takes the driver's time.
    """

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> None:
        with contextlib.suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info(self.device)
            self.peak = max(self.peak, total - free)

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._look()

    def __enter__(self) -> DeviceMemory:
        if self.device != "cpu":
            torch.cuda.empty_cache()
            self._look()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cpu":
            self.peak = peak_memory()
            return
        self._stop.set()
        self._thread.join()
        self._look()


def windows_of(image: Float32, slices: int = 1) -> Windows:
    """`slices` copies of one window [1,channels,H,W] as slices of a scan that need no resampling."""
    return Framing("resize", (image.shape[2], image.shape[3])).frame(np.repeat(image, slices, axis=0))


def some_rows(model: Subject, batch: int) -> Rows:
    """The first `batch` rows of a slice for that model, its levels in turn."""
    number = np.arange(batch)
    zeros = np.zeros(batch, np.int64)
    size = model.config.network.image_size
    levels = model.config.network.levels
    return Rows(
        batch, zeros, zeros, np.zeros((batch, 2), np.int64), number % levels + 1, number // levels, (size, size)
    )


def table_of(model: Subject, steps: int) -> SamplerTable:
    return sampler_table("ddpm", model.schedule, steps)


def chain(engine: Engine, image: Float32, rows: Rows, table: SamplerTable, seed: int = 0) -> Float32:
    """The last x of one batch [rows,1,H,W], a copy: by the engine's own chain, or where it has none by the runtime's."""
    binding = engine.bind(len(rows.level), 1)
    binding.encode(0, image[0])
    if isinstance(binding, ChainBinding):
        return np.array(binding.run_chain(rows, table, seed))
    size = (image.shape[2], image.shape[3])
    return np.array(Chain(binding, size, table, Noise(seed), Timings()).run(rows, None))


def step_seconds(engine: Engine, model: Subject, image: Float32, batch: int) -> float:
    """Seconds of one step of a batch, noise and update included: a quarter of what four more steps of a chain take; a median.

    Raises CdiffError when a longer chain took no longer than a short one: then nothing was measured.
    """
    rows = some_rows(model, batch)
    few = min(FEW, model.config.network.T - 1)
    more = min(MORE, model.config.network.T)

    def took(steps: int) -> float:
        start = time.perf_counter()
        chain(engine, image, rows, table_of(model, steps))
        return time.perf_counter() - start

    took(few)  # warm-up: builds, captures, fills caches
    gaps: list[float] = []
    spent = 0.0
    # A step of a small model takes less than a millisecond, and a single difference would show the machine's jitter.
    while not gaps or (spent < ENOUGH and len(gaps) < MOST):
        short, longer = took(few), took(more)
        gaps.append(longer - short)
        spent += short + longer
    step = float(np.median(gaps)) / (more - few)
    if step <= 0:
        raise CdiffError(
            f"a chain of {more} steps took no longer than one of {few}, so the time of a step is not known"
        )
    return step


def whole_protocol(
    engine: Engine, model: Subject, image: Float32, batch: int, seconds: float, slices: int = 1
) -> dict[str, Any]:
    """Times a scan of `slices` slices with all levels, runs and T steps; where that would take longer than `seconds`, with fewer steps.

    In the result `share` is the part of the steps that was run. Below 1, `seconds` and `host_share` are extrapolated in proportion to
    the steps; the encoder, and what happens once per slice, count as measured.
    """
    T, batches = model.config.network.T, -(-slices * model.rows // batch)
    a_step = step_seconds(engine, model, image, batch)
    steps = int(np.clip(seconds / (a_step * batches), 2, T))

    def run(steps: int, timings: Timings) -> float:
        start = time.perf_counter()
        found = segment_windows(
            engine, windows_of(image, slices), table_of(model, steps), levels=model.config.network.levels, runs=model.runs,
            seed=SEED, batch=batch, timings=timings,
        )  # fmt: skip
        assert len(list(found)) == slices
        return time.perf_counter() - start

    run(min(FEW, T), Timings())  # binds, and captures graphs, for as many slots as this scan needs
    with DeviceMemory(engine.device) as memory:
        run(min(FEW, T), Timings())
    timings = Timings()
    wall = run(steps, timings)
    host_loop = timings.noise + timings.update
    once = max(wall - timings.encode - timings.denoise - host_loop, 0.0)
    more = T / steps
    whole = timings.encode + once + (timings.denoise + host_loop) * more
    return {
        "seconds": whole, "seconds_a_slice": whole / slices, "share": steps / T, "measured_seconds": wall, "steps": steps,
        "batch": batch, "batches": batches, "host_share": (once + host_loop * more) / whole,
        "parts": {"encode": timings.encode, "chains": timings.denoise * more, "noise and update on the host": host_loop * more, "once a slice": once},
        "peak_bytes": memory.peak,
    }  # fmt: skip


def evened(model: Subject, most: int) -> int:
    """Rows per batch, at most `most`, with which a slice's batches are equally full."""
    return -(-model.rows // -(-model.rows // most))


def usual_batch(engine: Engine, model: Subject) -> int:
    """Rows per batch that the runtime itself would choose for a slice. To be called before anything is bound, as the runtime does."""
    network = model.config.network
    most = most_rows_of([engine], network.base_channels, (network.image_size, network.image_size))
    return rows_per_batch(model.rows, engine.device, model.rows, most)


def published(
    model: Subject, network: ConsensusNet, image: Float32, device: str, seconds: float, *, by_row: bool = False
) -> dict[str, Any]:
    """Times the published way, float32 by PyTorch's own settings: one run after another, its levels in one batch, or one at a time if
    `by_row`, and the encoder for each row. A share that takes about `seconds` is run, the rest is in proportion. network: the model's, on
    `device`."""
    diffusion = Diffusion(model.schedule, model.config.network.target, device, outside=model.config.network.outside)
    T, chains = model.config.network.T, model.config.network.levels

    def took(steps: int) -> float:
        wait(device)
        start = time.perf_counter()
        plain_loop(network, diffusion, windows_of(image), table_of(model, steps), 1, Timings(), by_row=by_row)
        return time.perf_counter() - start

    few = min(FEW, T - 1)
    took(few)  # warm-up
    with DeviceMemory(device) as memory:
        took(few)
    short = took(few)
    more = min(T, max(few + 1, MORE))
    longer = took(more)
    steps = int(np.clip((seconds - longer - short) / max((longer - short) / (more - few), 1e-9), more, T))
    if steps > more:
        more, longer = steps, took(steps)
    a_step = (longer - short) / (more - few) / chains
    a_chain = max(short / chains - few * a_step, 0.0)
    whole = model.rows * (a_chain + T * a_step)
    return {
        "seconds": whole, "seconds_a_slice": whole, "share": more / T / model.runs, "measured_seconds": short + longer,
        "batch": 1 if by_row else chains, "ms_a_row": 1e3 * a_step, "ms_a_row_encoder_and_copy": 1e3 * a_chain, "peak_bytes": memory.peak,
        "tf32_convolutions": device != "cpu" and bool(torch.backends.cudnn.allow_tf32),
        "tf32_products": device != "cpu" and bool(torch.backends.cuda.matmul.allow_tf32),
    }  # fmt: skip


def noise_of(engine: Engine, model: Subject, image: Float32, batch: int, seed: int) -> dict[str, Any]:
    """How far the noise that an engine's own chain draws is from the NumPy form, seen in what the chain ends with.

    A table of one row with a = b = c = 0 and d = 1 makes the chain end with its noise of step 0; one with a = 1 and the rest 0, with x_T.
    """
    rows, zero, one = some_rows(model, batch), np.zeros(1), np.ones(1)
    tables = {
        INITIAL: SamplerTable("ddpm", np.ones(1, np.int64), one, zero, zero, zero),
        0: SamplerTable("ddpm", np.ones(1, np.int64), zero, zero, zero, one),
    }
    gaps, equal, total = [], 0, 0
    for step, table in tables.items():
        found = chain(engine, image, rows, table, seed)
        for row in range(batch):
            expected = normal(seed, 0, int(rows.level[row]), int(rows.run[row]), step, rows.canvas)
            gaps.append(np.abs(found[row, 0] - expected).max())
            equal += int(np.count_nonzero(found[row, 0] == expected))
            total += expected.size
    return {"max": float(np.max(gaps)), "equal_share": equal / total, "values": total}


def kernel_times(engine: Engine, model: Subject, image: Float32, batch: int) -> dict[str, Any]:
    """Milliseconds and calls per step of each kernel (on a CPU: operator), as PyTorch's profiler sees it; the longest first, and their sum.

    Only what a longer chain has beyond a short one is counted: drawing x_T, and bringing x to the host, belong to a chain, not to a step.
    Raises CdiffError where the engine runs no chain on the device, or no kernel is seen.
    """
    from torch.profiler import ProfilerActivity, profile

    rows, binding = some_rows(model, batch), engine.bind(batch, 1)
    binding.encode(0, image[0])
    if not isinstance(binding, ChainBinding):
        raise CdiffError("this engine runs no chain on the device, whose kernels could be listed")
    cpu = engine.device == "cpu"
    few = min(FEW, model.config.network.T - 1)
    more = min(MORE, model.config.network.T)

    def seen(steps: int) -> dict[str, tuple[float, int]]:
        """Microseconds and calls by kernel."""
        with profile(activities=[ProfilerActivity.CPU if cpu else ProfilerActivity.CUDA]) as found:
            binding.run_chain(rows, table_of(model, steps), 0)
        return {
            e.key: (e.self_cpu_time_total if cpu else e.self_device_time_total, e.count) for e in found.key_averages()
        }

    binding.run_chain(rows, table_of(model, few), 0)  # warm-up
    short, longer = seen(few), seen(more)
    kernels: list[dict[str, Any]] = []
    for name, (spent, calls) in longer.items():
        spent_before, calls_before = short.get(name, (0.0, 0))
        if calls > calls_before and spent > spent_before:
            ms, a_step = (spent - spent_before) / 1e3, 1 / (more - few)
            kernels.append({"name": name, "ms_a_step": ms * a_step, "calls_a_step": (calls - calls_before) * a_step})
    if not kernels:
        raise CdiffError("PyTorch's profiler saw no kernel here")
    kernels.sort(key=lambda one: one["ms_a_step"], reverse=True)
    return {"batch": batch, "kernels": kernels, "ms_a_step": sum(one["ms_a_step"] for one in kernels)}


def least(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of three calls, after one that does not count. The call must wait for what it does."""
    call()
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)


def matmul_rates(device: str) -> dict[str, float]:
    """FLOP/s of products of square random matrices, a mean over many of the best size: half precision (on a GPU) and true float32."""
    sizes = (4096, 8192) if device != "cpu" else (512,)
    kinds = {"float16": torch.float16, "float32": torch.float32} if device != "cpu" else {"float32": torch.float32}
    found = {}
    for name, dtype in kinds.items():
        best = 0.0
        for n in sizes:
            a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)
            for _ in range(3):
                torch.mm(a, b, out=out)
            wait(device)
            start, times = time.perf_counter(), 0
            while time.perf_counter() - start < 0.5:
                for _ in range(5):
                    torch.mm(a, b, out=out)
                wait(device)
                times += 5
            best = max(best, times * 2 * n**3 / (time.perf_counter() - start))
        found[name] = best
    return found


def flops(model: Subject) -> dict[str, float]:
    """FLOPs of an encoding, of a row's step, and of the whole protocol, counted without computing anything."""
    from cdiff.benchmarks.floor import count_flop

    with torch.device("meta"):
        network = ConsensusNet(model.config.network)
    encoder, denoiser = count_flop(network.eval().requires_grad_(False))
    return {
        "encoder": encoder, "denoiser": denoiser, "protocol": encoder + float(denoiser) * model.rows * model.config.network.T
    }  # fmt: skip
