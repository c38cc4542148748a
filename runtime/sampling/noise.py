"""Noise as a function of (seed, slice, level, run, step): counter-based Philox and Box-Muller.

It does not depend on the batch, the engine or the number of devices, because nothing is drawn in sequence. The layout
below is all that another implementation (a CUDA kernel) needs.

Words. Philox4x64-10 (Salmon et al. 2011; the variant of numpy.random.Philox) with the key (seed, 0) and the counter

    (block + 1, step + 1, level * 2^32 + run, slice)        block >= 0; 64 bits each, the least significant first

gives four 64-bit words, numbered 4 block .. 4 block + 3. `step` is the row of the sampler's table; x_T, from which the chain
starts, has the step INITIAL = -1, so its second counter word is 0. (The + 1 of block + 1 is there because NumPy adds 1 to the
first word before each block.)

Pixels. In a canvas `width` pixels wide, the pixels (y, 2k) and (y, 2k + 1) share the word y * ceil(width / 2) + k; where the
width is odd, the last column leaves half of its word unused. A window reads the words that its pixels have in the canvas, so
overlapping tiles see the same noise where they overlap.

Normals. `low` is the lower half of a word as uint32, `high` its upper half as int32. In float32, rounded after each
operation,

    r     = sqrt(-2 log(low * 2^-32 + 2^-33))               the argument lies in (0, 1]
    theta = high * (2 pi * 2^-32)                           in [-pi, pi]

and the pixel (y, 2k) gets r cos(theta), the pixel (y, 2k + 1) r sin(theta) (Box & Muller 1958). There is no rejection and no
table, so every device does the same; log, sin and cos may differ in their last bits between machines.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError

Float32 = NDArray[np.float32]

INITIAL = -1
"""The step number of x_T; the table's first row is step 0."""


class Noise:
    """The noise of one seed, 0 .. 2^64 - 1 (else CdiffError). Not thread-safe: each thread needs its own."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise CdiffError(f"the seed is {seed}, but must lie between 0 and 2^64 - 1")
        self._philox = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.zeros(4, np.uint64))
        self._state = self._philox.state

    def fill(
        self,
        out: Float32,
        *,
        slice_: int,
        level: int,
        run: int,
        step: int,
        origin: tuple[int, int] = (0, 0),
        canvas: tuple[int, int] | None = None,
    ) -> None:
        """Write standard normals into out [H,W], a window at `origin` (y, x) of a `canvas` (height, width).

        `step` >= 0, or INITIAL; the other numbers >= 0, level and run below 2^32. Without `canvas`, `out` is the whole canvas.
        """
        (top, left), (height, width) = origin, out.shape
        stride = ((width if canvas is None else canvas[1]) + 1) // 2
        first = top * stride
        words = self._words(first // 4, first % 4 + height * stride, step, (level << 32) | run, slice_)[first % 4 :]
        pairs = words.reshape(height, stride)[:, left // 2 : (left + width + 1) // 2]
        halves = np.ascontiguousarray(pairs).view("<u4")
        r = halves[:, 0::2].astype(np.float32)
        r *= np.float32(2.0**-32)
        r += np.float32(2.0**-33)
        np.log(r, out=r)
        r *= np.float32(-2)
        np.sqrt(r, out=r)
        theta = halves.view("<i4")[:, 1::2].astype(np.float32)
        theta *= np.float32(2 * np.pi * 2.0**-32)
        odd = left % 2  # a window that starts at an odd column begins with the second half of a word
        even, second = out[:, odd::2], out[:, 1 - odd :: 2]
        cosine, sine = np.cos(theta)[:, odd:], np.sin(theta, out=theta)
        np.multiply(r[:, odd : odd + even.shape[1]], cosine[:, : even.shape[1]], out=even)
        np.multiply(r[:, : second.shape[1]], sine[:, : second.shape[1]], out=second)

    def _words(self, block: int, count: int, step: int, level_run: int, slice_: int) -> NDArray[np.uint64]:
        """`count` words of the stream, from word 4 block on."""
        self._state["state"]["counter"][:] = (block, step + 1, level_run, slice_)
        self._state["buffer_pos"] = 4  # an empty buffer: nothing left over from earlier words
        self._philox.state = self._state
        return self._philox.random_raw(count).astype("<u8", copy=False)


def normal(
    seed: int,
    slice_: int,
    level: int,
    run: int,
    step: int,
    shape: tuple[int, int],
) -> Float32:
    """`Noise(seed).fill` into a new array of `shape` [H,W] float32; for a loop keep one `Noise`."""
    out = np.empty(shape, np.float32)
    Noise(seed).fill(out, slice_=slice_, level=level, run=run, step=step)
    return out
