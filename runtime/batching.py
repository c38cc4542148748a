"""All rows (slice, level, run) of a scan through the engine in padded batches of one size, and their running sums (section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.engines.base import Engine
from cdiff.runtime.framing import Windows
from cdiff.runtime.sampler import SamplerTable

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called as progress(done, total) after every denoiser call; both count rows times steps of the whole scan."""


@dataclass
class Timings:
    """Seconds spent by part, added up over all batches: pass one in to have it filled. `rows` counts padding too."""

    encode: float = 0.0
    denoise: float = 0.0
    noise: float = 0.0
    update: float = 0.0
    collect: float = 0.0
    rows: int = 0
    calls: int = 0


@dataclass(frozen=True)
class SliceResult:
    """One finished slice, on its own grid [h, w] (windows already put together).

    `level_means` [C,h,w] float32: at index c-1 the mean over runs of clip((x+1)/2, 0, 1), the fraction of runs that put the
    pixel in the consensus at level c. `run_std` [h,w] float32: standard deviation over runs (divided by R) of a run's soft
    map, which is its mean over levels. `runs` [C,R,h,w] uint8, when kept: each run's map, 255 = 1. `index` is the slice's
    place among those framed, `slice_id` its number in the scan.
    """

    index: int
    slice_id: int
    level_means: Float32
    run_std: Float32
    runs: NDArray[np.uint8] | None


def rows_per_batch(total: int, device: str = "cpu") -> int:
    """The padded batch used when none is asked for, given the scan's number of rows."""
    raise NotImplementedError


def segment_windows(
    engine: Engine,
    windows: Windows,
    table: SamplerTable,
    *,
    levels: int,
    runs: int,
    seed: int = 0,
    batch: int | None = None,
    slice_ids: Sequence[int] | None = None,
    keep_runs: bool = False,
    progress: Progress | None = None,
    timings: Timings | None = None,
) -> Iterator[SliceResult]:
    """Yield the result of every slice in order, each as soon as it is finished.

    `slice_ids` [S] are the slices' numbers in the scan (0..S-1 by default): they, not the position, enter the noise, so a part
    of a scan gets the maps that it has in the whole. Raises CdiffError for arguments out of range and when the network returns
    a value that is not finite.
    """
    raise NotImplementedError
