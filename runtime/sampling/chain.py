"""The reverse chain of one padded batch: x' = a x + b x0 + c x0_prev + d z for each row of a sampler's table, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.engines.base import Binding, Rows
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.noise import INITIAL, Noise
from cdiff.runtime.sampling.sampler import SamplerTable
from cdiff.runtime.sampling.zoom import APART

Float32 = NDArray[np.float32]


@dataclass
class Timings:
    """Seconds spent in each part, summed over all batches; pass an instance in to have it filled. `rows` counts padding too.

    Where a device runs whole chains, `denoise` is the device's time for them, noise and update included; `encode` and `queue`
    are the host's time for handing the work over; and the parts overlap.
    """

    encode: float = 0.0
    queue: float = 0.0
    denoise: float = 0.0
    noise: float = 0.0
    update: float = 0.0
    collect: float = 0.0
    rows: int = 0
    calls: int = 0

    def __add__(self, other: Timings) -> Timings:
        """Both together."""
        return Timings(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to one of the parts."""
        start = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - start)


class Chain:
    """The chain on host arrays, in place, float32. `size` (H, W) is the model's image size; the batch size is the binding's."""

    def __init__(
        self, binding: Binding, size: tuple[int, int], table: SamplerTable, noise: Noise, timings: Timings
    ) -> None:
        self.binding, self.table, self.noise, self.timings = binding, table, noise, timings
        shape = (binding.rows, 1, *size)
        self.x = np.empty(shape, np.float32)
        self.z = np.zeros(shape, np.float32)
        self.scratch = np.empty(shape, np.float32)
        self.previous = np.zeros(shape, np.float32)
        self.t = np.empty(binding.rows, np.int64)

    def run(self, rows: Rows, report: Callable[[int], None] | None) -> Float32:
        """Run the rows' chain from a new x_T and return the last x [B,1,H,W], an array that the next batch overwrites.

        report: called with the number of steps done after each. Raises CdiffError when the network returns a non-finite value.
        """
        table, timings = self.table, self.timings
        with timings.part("noise"):
            self._draw(rows, INITIAL)
        np.copyto(self.x, self.z)
        for step in range(len(table)):
            self.t.fill(table.t[step])
            with timings.part("denoise"):
                x0, mix = self.binding.run(self.x, rows.slot, self.t, rows.level)
            timings.calls += 1
            if table.d[step] > 0:
                with timings.part("noise"):
                    self._draw(rows, step)
            with timings.part("update"):
                check_finite(rows, x0, f"x0 at timestep {table.t[step]}")
                if mix is not None:
                    check_finite(rows, mix, f"the variance at timestep {table.t[step]}")
                self._update(step, x0, mix)
            if report is not None:
                report(step + 1)
        return self.x

    def _draw(self, rows: Rows, step: int) -> None:
        """Draw standard normals for the valid rows; padding rows keep their old values, which are finite."""
        for i in range(rows.valid):
            self.noise.fill(
                self.z[i, 0],
                slice_=int(rows.slice_id[i]),
                level=int(rows.level[i]),
                run=int(rows.run[i]),
                step=step,
                origin=(int(rows.origin[i, 0]), int(rows.origin[i, 1])),
                canvas=rows.canvas,
            )

    def _update(self, step: int, x0: Float32, mix: Float32 | None) -> None:
        """Apply one row of the table, in place. Its coefficients become Python floats so that NumPy stays in float32."""
        table, x, scratch = self.table, self.x, self.scratch
        a, b, c, d = (float(column[step]) for column in (table.a, table.b, table.c, table.d))
        x *= a
        x += np.multiply(x0, b, out=scratch)
        if c:
            x += np.multiply(self.previous, c, out=scratch)
        if table.c.any():
            np.copyto(self.previous, x0)  # the binding overwrites its array in its next run
        if not d:
            return
        if mix is None or table.log_variance_min is None or table.log_variance_max is None:
            x += np.multiply(self.z, d, out=scratch)
            return
        # Nichol & Dhariwal 2021, equation 15: the standard deviation is exp(((1 - mix) min + mix max) / 2).
        low, high = float(table.log_variance_min[step]) / 2, float(table.log_variance_max[step]) / 2
        np.multiply(mix, high - low, out=scratch)
        scratch += low
        np.exp(scratch, out=scratch)
        scratch *= self.z
        x += scratch


def check_finite(rows: Rows, value: Float32, what: str) -> None:
    """Raise CdiffError, naming the row, if a valid row of value [B,1,H,W] holds a NaN or an infinity."""
    # A sum is not finite if one of its terms is not, and is cheaper than testing every term.
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(value[: rows.valid].sum()):
            return
    finite = np.isfinite(value[: rows.valid]).all(axis=(1, 2, 3))
    if not finite.all():  # otherwise only the sum overflowed
        raise not_finite(rows, what, int(np.argmin(finite)))


def not_finite(rows: Rows, what: str, row: int) -> CdiffError:
    """The error for a value that is not finite in one row of a batch."""
    return CdiffError(
        f"the network returned a value that is not finite: {what}, slice {rows.slice_id[row] % APART}, level {rows.level[row]}, "
        f"run {rows.run[row]}; check the scan's values, or, if the model is in half precision, try its float32 form"
    )
