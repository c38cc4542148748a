"""What every engine offers the loop: encode a slice once, denoise a padded batch at every step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError

if TYPE_CHECKING:
    from cdiff.runtime.bundle import Bundle
    from cdiff.runtime.sampling.sampler import SamplerTable

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Prediction = tuple[Float32, Float32 | None]
"""x0 [B,1,H,W] in [-1, 1], and for a learned variance the interpolation `mix` [B,1,H,W], about 0 to 1, else None."""


@dataclass(frozen=True)
class Rows:
    """The rows of one padded batch, B of them; only the first `valid` mean anything, the others are padding.

    Every array has B entries: `slot` where the features of the row's window lie, `slice_id` the slice's number in the
    scan (a word of the noise), `origin` [B,2] of the window in the canvas, `level` 1..K and `run` 0..R-1. K is how many maps the
    model draws of a slice: one a level, which gives them their name here, one an annotator, or one.
    `canvas` is the (height, width) that the windows are cut from; it is the window's own size unless tiles are used.
    """

    valid: int
    slot: Int64
    slice_id: Int64
    origin: Int64
    level: Int64
    run: Int64
    canvas: tuple[int, int]


class Binding(Protocol):
    """An engine's buffers for batches of one fixed shape: `rows` rows that share the features in `slots` places."""

    rows: int
    slots: int

    def encode(self, slot: int, image: Float32) -> None:
        """Encode one window [ch,H,W] and keep its features at place `slot`, where they stay until overwritten.

        Raises CdiffError when the features are not finite.
        """

    def run(self, x: Float32, slot: Int64, t: Int64, level: Int64) -> Prediction:
        """Denoise x [B,1,H,W] once; the arrays returned are the binding's own and hold until its next `run`."""


@runtime_checkable
class ChainBinding(Protocol):
    """A binding that runs the whole reverse chain itself, for instance as a captured CUDA graph.

    The loop calls `run_chain` in place of its own steps when a binding has it. The noise must be `noise.normal`'s.
    """

    def run_chain(self, rows: Rows, table: SamplerTable, seed: int) -> Float32:
        """From x_T, drawn with the noise's initial step, to the last x [B,1,H,W]; padding rows may hold anything."""


@dataclass(frozen=True)
class SumLayout:
    """What running sums are kept: for `places` windows at once, over `levels` K and `runs` R; each run's map too if `keep_runs`.

    A window has `views` slots for features, one after another: place p's are p * views .. p * views + views - 1.
    """

    places: int
    levels: int
    runs: int
    views: int
    keep_runs: bool


@dataclass(frozen=True)
class WindowSums:
    """The sums of one window whose rows are all through, of clip((x + 1)/2, 0, 1) mirrored back: `level` [K,H,W] over runs, `run`
    [R,H,W] over levels, float32; `kept` [K,R,H,W] uint8, each run's map, 255 = 1. They hold until the second next `queue`."""

    level: Float32
    run: Float32
    kept: NDArray[np.uint8] | None


class Pending(Protocol):
    """A batch that was queued."""

    @property
    def seconds(self) -> float:
        """What the batch's chain took on the device; known once `wait` is back."""

    def wait(self, report: Callable[[int], None] | None = None) -> list[WindowSums]:
        """Wait until the batch is through, and give the sums of the windows that it finished, in the order of `queue`'s places.

        report: called with the number of steps that are through, a few times. Raises CdiffError, naming the row, when the network
        returned a value that is not finite.
        """


@runtime_checkable
class SumBinding(Protocol):
    """A binding that runs whole chains by itself and keeps the running sums on its device, so that only they come back.

    The loop uses it in place of `run` and `run_chain` when a binding has it. Work is queued: the next batch may be encoded and
    queued before the last one is waited for, and no more than that. `encode` then reports what is not finite in `wait`.
    """

    def begin(self, layout: SumLayout, table: SamplerTable, seed: int) -> None:
        """Clear the sums; `table` and `seed` are for all batches up to the next `begin`, which also drops what was not waited for."""

    def queue(self, rows: Rows, finished: Sequence[int]) -> Pending:
        """Queue a batch's chain and the addition to its sums; `finished` are the places of the windows that it completes."""


class Engine(Protocol):
    """Something that can run a bundle's two graphs. `name` and `device` are what a report names."""

    @property
    def name(self) -> str:
        """The engine's name in the registry, such as `onnxruntime`."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda:N`: where it really runs, never merely where it was asked to."""

    @property
    def version(self) -> str:
        """The version of the library that runs the graphs."""

    def encode(self, images: Float32) -> Any:
        """Features [S,L,H,W] of images [S,ch,H,W] float32; a host array unless the engine says otherwise."""

    def denoise(self, x: Float32, features: Any, row_slice: Int64, t: Int64, level: Int64) -> Prediction:
        """One call for any shapes: x [B,1,H,W], features [S,L,H,W], row_slice, t (1..T) and level (1..K), each [B]."""

    def bind(self, rows: int, slots: int) -> Binding:
        """Buffers for batches of `rows` rows over at least `slots` sets of features, reused for a whole scan."""


@runtime_checkable
class LimitedRows(Protocol):
    """An engine whose graphs are made for a number of rows; the loop asks it for no more unless somebody asks for just so many."""

    @property
    def most_rows(self) -> int:
        """Most rows of a batch."""


@runtime_checkable
class OneScanAtATime(Protocol):
    """An engine that gives the same binding for scan after scan: a second one would begin its sums anew and write over its features, so
    whoever computes a scan holds `turn` until that is done."""

    turn: threading.Lock


def features_not_finite() -> CdiffError:
    """The error for an encoder's output that is not finite, the same from every engine."""
    return CdiffError(
        "the encoder returned a value that is not finite; "
        "check the scan's values, and a half-precision model against its float32 form"
    )


def variance_as_listed(bundle: Bundle, learned: bool) -> None:
    """Raise CdiffError unless the manifest says of the denoiser what it gives: a chain takes the noise's size from `mix` where there is one,
    and would draw other maps with it than those that the model was trained for, or without it."""
    listed = bundle.manifest.variance
    if (listed == "learned") != learned:
        gives = "gives a variance of its own (mix)" if learned else "gives no variance (mix)"
        raise CdiffError(
            f"{bundle.path}: the manifest says variance {listed}, and the denoiser {gives}: export the model again"
        )


class HostBinding:
    """The binding of any engine whose arrays live in host memory: `encode` and `denoise` over one features array."""

    def __init__(self, engine: Engine, rows: int, slots: int) -> None:
        self.engine, self.rows, self.slots = engine, rows, slots
        self._features: NDArray[Any] | None = None

    def encode(self, slot: int, image: Float32) -> None:
        """See `Binding.encode`."""
        features = np.asarray(self.engine.encode(image[None]))
        if not np.isfinite(features).all():
            raise features_not_finite()
        if self._features is None:
            # Places not used yet hold zeros, so that a padding row never meets a NaN left in memory.
            self._features = np.zeros((self.slots, *features.shape[1:]), features.dtype)
        self._features[slot] = features[0]

    def run(self, x: Float32, slot: Int64, t: Int64, level: Int64) -> Prediction:
        """See `Binding.run`."""
        return self.engine.denoise(x, self._features, slot, t, level)
