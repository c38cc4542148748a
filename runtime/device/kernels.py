"""The kernels of kernels.cu, compiled for one GPU, and a launch method for each that works out its grid."""

from __future__ import annotations

from typing import Any

from cdiff.runtime.device.compiler import cubin
from cdiff.runtime.device.gpu import Gpu
from cdiff.runtime.device.layout import spans_of

THREADS = 128
SIGNATURES = {
    "cdiff_noise": "PPPiiii",
    "cdiff_start": "PPPPPPPiii",
    "cdiff_update": "PPPPPPPPPiii",
    "cdiff_advance": "P",
    "cdiff_sum": "PPPPPPiiiii",
    "cdiff_finite": "PQiP",
}
"""The kernels and the types of their arguments in `struct`'s letters: P a device address, i int, Q unsigned 64 bits."""


class Kernels:
    """Launches kernels for batches of `rows` rows of `size` (H, W).

    Arguments named as arrays or structs of kernels.cu are device addresses, 0 meaning null; the others are numbers.
    """

    def __init__(self, gpu: Gpu, rows: int, size: tuple[int, int]) -> None:
        module = gpu.module(cubin(gpu.arch))
        self._functions = {name: module.get_function(name).prepare(types) for name, types in SIGNATURES.items()}
        self.rows, self.height, self.width = rows, *size
        self._spans = spans_of(self.width)
        self._window = (*size, self._spans)
        self._blocks = -(-self.height * self._spans // THREADS)

    def noise(self, stream: Any, out: int, job: int, rows: int, step: int) -> None:
        """Write the normals of `step` (-1 for x_T) to out [B,H,W] float32."""
        self._launch("cdiff_noise", (self._blocks, self.rows), stream, out, job, rows, step, *self._window)

    def start(self, stream: Any, x: int, previous: int, t: int, state: int, job: int, rows: int, table: int) -> None:
        """Set x to x_T, `previous` to 0, t to the table's first timestep, and the state to step 0 with no bad values."""
        pointers = x, previous, t, state, job, rows, table
        self._launch("cdiff_start", (self._blocks, self.rows), stream, *pointers, *self._window)

    def update(
        self, stream: Any, x: int, x0: int, mix: int, previous: int, t: int, state: int, job: int, rows: int, table: int
    ) -> None:
        """Apply the table's row for the state's step: x' = a x + b x0 + c previous + d z. `mix` is 0 without a learned variance."""
        pointers = x, x0, mix, previous, t, state, job, rows, table
        self._launch("cdiff_update", (self._blocks, self.rows), stream, *pointers, *self._window)

    def advance(self, stream: Any, state: int) -> None:
        """Add 1 to the state's step."""
        self._launch("cdiff_advance", (1, 1), stream, state, threads=1)

    def sum(
        self, stream: Any, x: int, sums: int, kept: int, state: int, job: int, rows: int, levels: int, runs: int
    ) -> None:
        """Add the final x to sums [places, K + R, H, W] float32, and write it to kept [places, K, R, H, W] uint8 unless that is 0."""
        blocks = -(-self.height * self.width // THREADS)
        numbers = self.rows, levels, runs, self.height, self.width
        self._launch("cdiff_sum", (blocks, 1), stream, x, sums, kept, state, job, rows, *numbers)

    def finite(self, stream: Any, values: int, count: int, width: int, state: int) -> None:
        """Set the state's bad_features if one of `count` values of `width` bytes (2 or 4) is not finite."""
        blocks = min(1024, -(-count // THREADS))
        self._launch("cdiff_finite", (blocks, 1), stream, values, count, width, state)

    def _launch(self, name: str, grid: tuple[int, int], stream: Any, *arguments: int, threads: int = THREADS) -> None:
        self._functions[name].prepared_async_call(grid, (threads, 1, 1), stream, *arguments)
