"""The reverse chain of one padded batch in PyTorch on a device: x' = a x + b x0 + c x0_prev + d z, a step replayed as a CUDA graph."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.device.graph import nothing_collected
from cdiff.runtime.engines.base import Float32, Int64, Prediction, Rows, features_not_finite
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.noise import INITIAL
from cdiff.runtime.sampling.sampler import SamplerTable
from cdiff.runtime.switches import for_all_threads
from cdiff.runtime.words import first_line
from cdiff.train.machine import no_room, own_attention, thread_as_it_starts

if TYPE_CHECKING:
    from cdiff.export.torch_engine import TorchChainEngine

COLUMNS = ("a", "b", "c", "d", "low", "high")
WARM_UPS = 3
"""Steps launched plainly before a capture: libraries choose and set up their kernels in the first ones."""
MOST_GRAPHS = 16
"""Most captured steps kept: each kind of table and each slice size has its own, and a program may see scans of any size for months."""

P = ParamSpec("P")
R = TypeVar("R")


@for_all_threads
@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block float32 convolutions and products use neither TF32 nor bfloat16, and products of float16 add up in float32, whatever
    the program around it has set."""
    backends: Any = torch.backends  # not every switch is known to mypy
    cuda, cudnn, cpu = backends.cuda, backends.cudnn, backends.mkldnn
    # PyTorch has older and newer switches. Reading an older one raises where a newer one contradicts it: it has then no value to restore.
    switches: list[tuple[Callable[[], Any], Callable[[Any], object], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (lambda: cudnn.allow_tf32, functools.partial(setattr, cudnn, "allow_tf32"), False),
    ]
    name = "allow_fp16_accumulation"  # of cuBLAS alone: cuDNN's convolutions of float16 always add up in float32
    switches.append(
        (functools.partial(getattr, cuda.matmul, name), functools.partial(setattr, cuda.matmul, name), False)
    )
    name = "fp32_precision"
    for part in (cuda.matmul, cudnn.conv, cpu.matmul, cpu.conv):
        switches.append((functools.partial(getattr, part, name), functools.partial(setattr, part, name), "ieee"))
    before = []
    for get, switch, exactly in switches:
        with suppress(RuntimeError):
            before.append((switch, get(), exactly))
    for switch, _, exactly in before:
        switch(exactly)
    try:
        yield
    finally:
        for switch, value, _ in before:
            switch(value)


def within_memory(function: Callable[P, R]) -> Callable[P, R]:
    """An error of PyTorch's for want of memory is raised as `OutOfMemory`, so that whoever chose the batch can choose a smaller one."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if not no_room(error):
                raise
            said = first_line(error)
        # Raised outside the except block: otherwise the new error would keep the old one's frames, and the tensors in them.
        raise OutOfMemory(f"PyTorch ran out of memory on the GPU ({said}); use a smaller batch")

    return call


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients, and without TF32 or a caller's autocast, which would silently lose precision; includes `within_memory`.

    PyTorch's default type, one for all threads, stays as the program set it: `function` must make no tensor of the default type.
    """

    @within_memory
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with thread_as_it_starts(), torch.inference_mode(), full_precision(), own_attention():
            return function(*args, **kwargs)

    return call


class TorchBinding:
    """Buffers on the device for batches of `rows` rows over `slots` sets of features. Implements `Binding` and `ChainBinding`."""

    def __init__(self, engine: TorchChainEngine, rows: int, slots: int) -> None:
        self._engine, self.rows, self.slots = weakref.ref(engine), rows, slots
        size = engine.config.image_size
        device = engine.device

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.size = (size, size)
        # Zeros until used, so that a padding row never reads a NaN left in memory.
        width = engine.config.base_channels
        self.features = torch.zeros(slots, size, size, width, dtype=engine.dtype, device=device)
        self.x = torch.zeros(rows, 1, size, size, dtype=torch.float32, device=device)
        self.previous = torch.zeros_like(self.x)
        self.slot, self.slice_id, self.run_number = whole(rows), whole(rows), whole(rows)
        self.level, self.origin = whole(rows) + 1, whole(rows, 2)
        self.seed, self.step = whole(1), whole(1)
        self.t = whole(engine.schedule.T) + 1
        self.table = torch.zeros(len(COLUMNS), engine.schedule.T, dtype=torch.float32, device=device)
        self.graphs: dict[tuple[Any, ...], Captured] = {}

    @property
    def engine(self) -> TorchChainEngine:
        """The engine, referenced weakly: it holds its last binding, and in a cycle both would keep their GPU memory until the garbage
        collector runs. Whoever uses a binding must keep the engine."""
        engine = self._engine()
        assert engine is not None, "the engine was let go of before its binding"
        return engine

    @exact
    def encode(self, slot: int, image: Float32) -> None:
        """See `Binding.encode`."""
        features = self.engine.features(torch.from_numpy(image)[None].to(self.engine.device))
        if not torch.isfinite(features).all():
            raise features_not_finite()
        self.features[slot] = features[0].permute(1, 2, 0)

    @exact
    def run(self, x: Float32, slot: Int64, t: Int64, level: Int64) -> Prediction:
        """See `Binding.run`."""
        arrays = (torch.from_numpy(np.ascontiguousarray(v)).to(self.engine.device) for v in (x, slot, t, level))
        x_, slot_, t_, level_ = arrays
        x0, mix = self.engine.predict(x_, self.features, slot_, t_, level_)
        return x0.cpu().numpy(), None if mix is None else mix.cpu().numpy()

    @exact
    def run_chain(self, rows: Rows, table: SamplerTable, seed: int) -> Float32:
        """See `ChainBinding.run_chain`."""
        step = self._prepare(rows, table, seed)
        self._start(rows.canvas)
        for _ in range(len(table)):
            step()
        return np.asarray(self.x.cpu().numpy())

    @exact
    def parts(self, rows: Rows, table: SamplerTable, seed: int) -> dict[str, float]:
        """Seconds of each part of one step, launched plainly and waited for: noise, denoise, update; and `replay`, the whole step as
        `run_chain` makes it. For measurements only: x is meaningless afterwards."""
        step = self._prepare(rows, table, seed)
        self._start(rows.canvas)
        z, (x0, mix) = self._draw(rows.canvas), self._predict()
        calls: dict[str, Callable[[], Any]] = {
            "noise": lambda: self._draw(rows.canvas),
            "denoise": self._predict,
            "update": lambda: self._update(x0, mix, z, True),
            "replay": step,
        }
        return {part: _seconds(call, self.step, self.engine.device) for part, call in calls.items()}

    def _prepare(self, rows: Rows, table: SamplerTable, seed: int) -> Callable[[], None]:
        """Fill the inputs; returns the function that makes one step."""
        for buffer, array in (
            (self.slot, rows.slot), (self.slice_id, rows.slice_id), (self.level, rows.level),
            (self.run_number, rows.run), (self.origin, rows.origin), (self.t[: len(table)], table.t),
        ):  # fmt: skip
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        nothing = np.zeros(len(table))
        low, high = table.log_variance_min, table.log_variance_max
        learned = self.engine.graph.learned and low is not None
        columns = (
            table.a,
            table.b,
            table.c,
            table.d,
            nothing if low is None else low,
            nothing if high is None else high,
        )
        self.table[:, : len(table)].copy_(torch.from_numpy(np.stack(columns).astype(np.float32)))
        self.seed.fill_(seed - 2**64 if seed >> 63 else seed)
        noisy, second = bool(table.d.any()), bool(table.c.any())

        def plain() -> None:
            self._step(rows.canvas, noisy, second, learned)

        if not self.engine.capture:
            return plain
        key = (rows.canvas, noisy, second, learned)
        if key not in self.graphs:
            self.step.zero_()
            self.graphs[key] = captured(plain, self.engine.device, next(iter(self.graphs.values()), None))
            while len(self.graphs) > MOST_GRAPHS:
                del self.graphs[next(iter(self.graphs))]
        self.graphs[key] = self.graphs.pop(key)  # to the end: the least recently used is dropped first
        replay: Callable[[], None] = self.graphs[key].replay
        return replay

    def _start(self, canvas: tuple[int, int]) -> None:
        """Draw x_T, and go to the first row of the table."""
        self.step.fill_(INITIAL)
        self.x.copy_(self._draw(canvas))
        self.previous.zero_()
        self.step.zero_()

    def _step(self, canvas: tuple[int, int], noisy: bool, second: bool, learned: bool) -> None:
        x0, mix = self._predict()
        self._update(x0, mix if learned else None, self._draw(canvas) if noisy else None, second)
        self.step += 1

    def _draw(self, canvas: tuple[int, int]) -> Tensor:
        return self.engine.noise(
            self.seed, self.slice_id, self.level, self.run_number, self.step, self.origin, self.size, canvas
        )

    def _row(self) -> Tensor:
        """The table's row, int64 [1]; kept within the table when warm-ups or a measurement step past its end."""
        return self.step.clamp(0, self.engine.schedule.T - 1)

    def _predict(self) -> tuple[Tensor, Tensor | None]:
        t = self.t.index_select(0, self._row()).expand(self.rows)
        return self.engine.predict(self.x, self.features, self.slot, t, self.level)

    def _update(self, x0: Tensor, mix: Tensor | None, z: Tensor | None, second: bool) -> None:
        """x' = a x + b x0 + c x0_prev + d z; every coefficient is read on the device, so a replay takes the next row."""
        a, b, c, d, low, high = self.table.index_select(1, self._row()).view(len(COLUMNS), 1, 1, 1, 1).unbind(0)
        x = a * self.x + b * x0
        if second:
            x = x + c * self.previous
            self.previous.copy_(x0)
        if z is not None:
            if mix is not None:
                # Nichol & Dhariwal 2021, equation 15; where the table has no noise there is none here either.
                d = torch.where(d > 0, torch.exp((low + mix * (high - low)) / 2), 0.0)
            x = x + d * z
        self.x.copy_(x)


@dataclass(frozen=True)
class Captured:
    """A CUDA graph and the stream that it was captured on."""

    graph: Any
    stream: Any

    def replay(self) -> None:
        """Queue it on the current stream."""
        self.graph.replay()


def captured(step: Callable[[], None], device: str, earlier: Captured | None = None) -> Captured:
    """The CUDA graph of one call of `step`, which may only queue work on tensors that stay where they are.

    earlier: a capture whose memory this one shares, so that the captures for scans of many sizes take no more memory than one: no step
    needs another's intermediate results, and no two are replayed at once. Memory can be shared only on one stream.
    Raises CdiffError, with CUDA's own words, when the step cannot be captured. An error of the plain launches before the capture is
    passed on unchanged, since it would occur without a capture too; so is one for want of memory.
    """
    broke: list[Exception] = []

    def told() -> None:
        try:
            step()
        except Exception as error:
            broke.append(error)
            raise

    # A capture that fails leaves PyTorch on the capture's stream: the outer block restores the current one.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()), nothing_collected():
        aside = torch.cuda.Stream() if earlier is None else earlier.stream  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()  # an error of a launch is raised here at the latest
        graph, pool = torch.cuda.CUDAGraph(), None if earlier is None else earlier.graph.pool()
        try:
            # On a stream of this GPU: PyTorch's own capture stream stays on the GPU of the process's first capture, and a graph captured
            # there would be empty. thread_local: other threads may query the memory meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                told()
        except RuntimeError as error:
            # Ending a failed capture raises an error too, which says less than the first one.
            broke[:] = [broke[0] if broke else error]
    if broke:
        # Raised outside the except block, and `cause` deleted: otherwise the two errors would keep each other's frames, with all that the step had
        # on the GPU, until the garbage collector runs, and a smaller batch would find no room.
        cause = broke.pop()
        try:
            if no_room(cause):  # also where CUDA makes a graph of what was captured
                raise cause
            raise CdiffError(
                f"a step could not be captured as a CUDA graph ({first_line(cause)}); name another engine, in a new process"
            ) from cause
        finally:
            del cause
    return Captured(graph, aside)


def _seconds(call: Callable[[], Any], step: Tensor, device: str) -> float:
    """Seconds of the fastest of four calls, each waited for and each from the table's first row."""
    best = float("inf")
    for _ in range(4):
        step.zero_()
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def wait(device: str) -> None:
    """Wait until all work queued on the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
