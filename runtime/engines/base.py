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
"""x0 [B,1,H,W] in [-1, 1]; and for a learned variance the interpolation `mix` [B,1,H,W], roughly 0 to 1, else None."""


@dataclass(frozen=True)
class Rows:
    """The B rows of one padded batch; only the first `valid` mean anything, the others are padding.

    Every array has B entries: `slot`, where the features of the row's window lie; `slice_id`, the slice's number in the
    scan (a word of the noise's counter); `origin` [B,2], the window's corner (y, x) in the canvas; `level` 1..K; `run` 0..R-1.
    K is the number of maps that the model draws per slice: one per level (hence the name), one per annotator, or one.
    `canvas` is the (height, width) of what the windows are cut from: in the mode `resize` the window's own size.
    """

    valid: int
    slot: Int64
    slice_id: Int64
    origin: Int64
    level: Int64
    run: Int64
    canvas: tuple[int, int]


class Binding(Protocol):
    """An engine's buffers for batches of one fixed shape: `rows` rows that share the features held in `slots` slots."""

    rows: int
    slots: int

    def encode(self, slot: int, image: Float32) -> None:
        """Encode one window [ch,H,W] and keep its features in `slot`, where they stay until overwritten.

        Raises CdiffError when the features are not finite.
        """

    def run(self, x: Float32, slot: Int64, t: Int64, level: Int64) -> Prediction:
        """Denoise x [B,1,H,W] once, with slot, t and level each [B]; the next `run` overwrites the arrays returned."""


@runtime_checkable
class ChainBinding(Protocol):
    """A binding that runs the whole reverse chain itself, for instance as a captured CUDA graph.

    When a binding has `run_chain`, the loop calls it instead of taking the steps itself. The noise must be `noise.normal`'s.
    """

    def run_chain(self, rows: Rows, table: SamplerTable, seed: int) -> Float32:
        """Run from x_T, drawn with the noise's INITIAL step, to the last x [B,1,H,W]; padding rows may hold anything."""


@dataclass(frozen=True)
class SumLayout:
    """Which running sums are kept: those of `places` windows at once, over `levels` K and `runs` R; with `keep_runs` each run's map too.

    Each place has `views` consecutive feature slots: place p has p * views .. p * views + views - 1.
    """

    places: int
    levels: int
    runs: int
    views: int
    keep_runs: bool


@dataclass(frozen=True)
class WindowSums:
    """The sums of clip((x + 1)/2, 0, 1), mirrored back, of one window whose rows are all done: `level` [K,H,W] over runs and `run`
    [R,H,W] over levels, float32; `kept` [K,R,H,W] uint8, each run's map, 255 = 1. The second `queue` after this overwrites them."""

    level: Float32
    run: Float32
    kept: NDArray[np.uint8] | None


class Pending(Protocol):
    """A batch that was queued."""

    @property
    def seconds(self) -> float:
        """How long the batch's chain took on the device, in seconds; known once `wait` has returned."""

    def wait(self, report: Callable[[int], None] | None = None) -> list[WindowSums]:
        """Wait until the batch is done, and return the sums of the windows that it finished, in the order of `queue`'s `finished`.

        report: called a few times, with the number of steps done. Raises CdiffError, naming the row, when the network returned a
        value that is not finite.
        """


@runtime_checkable
class SumBinding(Protocol):
    """A binding that runs whole chains itself and keeps the running sums on its device, so that only they come back.

    The loop then calls neither `run` nor `run_chain`. Work is queued: one further batch, but no more, may be encoded and queued
    before the previous one is waited for. Features that are not finite are reported by `wait`, not by `encode`.
    """

    def begin(self, layout: SumLayout, table: SamplerTable, seed: int) -> None:
        """Clear the sums and drop batches not waited for; `table` and `seed` hold for all batches until the next `begin`."""

    def queue(self, rows: Rows, finished: Sequence[int]) -> Pending:
        """Queue a batch's chain and its addition to the sums; `finished` are the places of the windows that it completes."""


class Engine(Protocol):
    """Something that can run a bundle's two graphs. Reports give its `name`, `device` and `version`."""

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
        """Denoise once, for any B and S: x [B,1,H,W], features [S,L,H,W]; row_slice (0..S-1), t (1..T) and level (1..K), each [B]."""

    def bind(self, rows: int, slots: int) -> Binding:
        """Make buffers for batches of `rows` rows over at least `slots` sets of features, to be reused for a whole scan."""


@runtime_checkable
class LimitedRows(Protocol):
    """An engine whose graphs are made for a number of rows; a batch has no more than that unless the user asks for more."""

    @property
    def most_rows(self) -> int:
        """The most rows of a batch."""


@runtime_checkable
class OneScanAtATime(Protocol):
    """An engine that reuses one binding for every scan. A second scan would clear its sums and overwrite its features, so whoever
    computes a scan holds `turn` until it is done."""

    turn: threading.Lock


def features_not_finite() -> CdiffError:
    """The error for a non-finite encoder output, the same for every engine."""
    return CdiffError(
        "the encoder returned a value that is not finite; "
        "check the scan's values, or, if the model is in half precision, try its float32 form"
    )


def variance_as_listed(bundle: Bundle, learned: bool) -> None:
    """Raise CdiffError unless the manifest's variance agrees with the denoiser's outputs (`learned`: it returns `mix`).

    A chain scales its noise by `mix` wherever there is one, so a denoiser that has it against the manifest, or lacks it, would draw
    other maps than those that the model was trained for."""
    listed = bundle.manifest.variance
    if (listed == "learned") != learned:
        gives = "gives a variance of its own (mix)" if learned else "gives no variance (mix)"
        raise CdiffError(
            f"{bundle.path}: the manifest says variance {listed}, but the denoiser {gives}: export the model again"
        )


class HostBinding:
    """The binding of any engine whose arrays live in host memory: calls its `encode` and `denoise` with one array of features."""

    def __init__(self, engine: Engine, rows: int, slots: int) -> None:
        self.engine, self.rows, self.slots = engine, rows, slots
        self._features: NDArray[Any] | None = None

    def encode(self, slot: int, image: Float32) -> None:
        """See `Binding.encode`."""
        features = np.asarray(self.engine.encode(image[None]))
        if not np.isfinite(features).all():
            raise features_not_finite()
        if self._features is None:
            # Slots not used yet hold zeros, so that a padding row never reads a NaN left in memory.
            self._features = np.zeros((self.slots, *features.shape[1:]), features.dtype)
        self._features[slot] = features[0]

    def run(self, x: Float32, slot: Int64, t: Int64, level: Int64) -> Prediction:
        """See `Binding.run`."""
        return self.engine.denoise(x, self._features, slot, t, level)
