"""The structs that host and kernels share, field by field as in kernels.cu, and the block of them that a batch uploads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.engines.base import Rows
from cdiff.runtime.sampling.sampler import SamplerTable

JOB = np.dtype(
    [("seed", "<u8"), ("canvas_width", "<i4"), ("valid", "<i4"), ("steps", "<i4"), ("multistep", "<i4")], align=True
)
ROW = np.dtype(
    [
        *[("slice", "<u8"), ("level_run", "<u8"), ("top", "<i4"), ("left", "<i4")],
        *[("place", "<i4"), ("view", "<i4"), ("level", "<i4"), ("run", "<i4")],
    ],
    align=True,
)
STEP = np.dtype(
    [("t", "<i8"), *((name, "<f4") for name in ("a", "b", "c", "d", "low", "span"))],
    align=True,
)
STATE = np.dtype([("step", "<i4"), ("bad", "<u4"), ("bad_features", "<u4"), ("unused", "<u4")], align=True)

GOOD = 2**32 - 1
"""State's `bad` when every value was finite."""
ALIGNMENT = 256
"""The alignment in bytes that TensorRT requires of every address."""
Bytes = NDArray[np.uint8]


def aligned(size: int) -> int:
    """`size` in bytes, rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class BatchBlock:
    """What one batch uploads, in one piece: Job, Row[B], and the network's inputs row_slice and level, int64 [B] each.

    Its properties are byte offsets into it, and its size in bytes.
    """

    rows: int

    @property
    def row(self) -> int:
        return aligned(JOB.itemsize)

    @property
    def slot(self) -> int:
        return self.row + aligned(self.rows * ROW.itemsize)

    @property
    def level(self) -> int:
        return self.slot + aligned(self.rows * 8)

    @property
    def size(self) -> int:
        return self.level + aligned(self.rows * 8)

    def fill(self, out: Bytes, rows: Rows, table: SamplerTable, seed: int, views: int) -> None:
        """Write a batch into `out`, uint8 [size]. views: slots per window, which give a row's place and view from its slot."""
        job = out[: JOB.itemsize].view(JOB)
        job["seed"], job["canvas_width"], job["valid"] = seed, rows.canvas[1], rows.valid
        job["steps"], job["multistep"] = len(table), bool(table.c.any())
        row = out[self.row : self.row + self.rows * ROW.itemsize].view(ROW)
        row["slice"] = rows.slice_id
        row["level_run"] = (rows.level.astype(np.uint64) << np.uint64(32)) | rows.run.astype(np.uint64)
        row["top"], row["left"] = rows.origin[:, 0], rows.origin[:, 1]
        row["place"], row["view"] = np.divmod(rows.slot, views)
        row["level"], row["run"] = rows.level, rows.run
        out[self.slot : self.slot + self.rows * 8].view(np.int64)[:] = rows.slot
        out[self.level : self.level + self.rows * 8].view(np.int64)[:] = rows.level


def step_table(table: SamplerTable) -> NDArray[np.void]:
    """The sampler's table as Step [S]: its float64 columns rounded to float32 as in the host's update."""
    out = np.zeros(len(table), STEP)
    out["t"] = table.t
    for name in ("a", "b", "c", "d"):
        out[name] = getattr(table, name)
    if table.log_variance_min is not None and table.log_variance_max is not None:
        low, high = table.log_variance_min / 2, table.log_variance_max / 2
        out["low"], out["span"] = low, high - low
    return out


def spans_of(width: int) -> int:
    """The most Philox blocks that a window's line of `width` pixels can touch; a block is four words of two pixels each."""
    words = width // 2 + 1
    return (words + 6) // 4


def place_of_bad(code: int, batch: int, table: SamplerTable) -> tuple[str, int]:
    """Decode State's `bad`: what was not finite, in words, and the row of the batch. batch: its number of rows."""
    which, row = divmod(code, batch)
    step, mix = divmod(which, 2)
    if step == len(table):
        return "the result", row
    return f"{'the variance' if mix else 'x0'} at timestep {table.t[step]}", row
