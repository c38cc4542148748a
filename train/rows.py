"""What one optimiser step learns from: windows, and for each of their rows a timestep, a level and noise; functions of (seed, step) alone.

A step's images are cut into parts: `accumulate` for each process. Every process draws for all of them and keeps its own, so the
rows of a step are the same however many processes and parts there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import several
from cdiff.train.config import Config
from cdiff.train.data import Slices, training_batch
from cdiff.train.pace import batch_size

PART_SEED = 1_000_000_007  # dropout must differ between a step's parts, and from what is drawn for the step


@dataclass(frozen=True)
class Rows:
    """A part of a step: image [B, channels, n, n] float32, masks [B, C, n, n] bool and raters int64 [B] (how many of the masks somebody
    drew), each for r rows that lie next to each other.

    t int64 [B r] in 1..T, level int64 [B r] in 1..K, noise [B r, 1, n, n], u float32 [B r] in [0, 1) for a target that draws a mask
    at random without telling the network which. `share` is the part's share of the step's rows, `seed` is for what the network draws
    itself (dropout).
    """

    image: Tensor
    masks: Tensor
    raters: Tensor
    t: Tensor
    level: Tensor
    noise: Tensor
    u: Tensor
    share: float
    seed: int

    def to(self, device: torch.device) -> Rows:
        """The same on `device`, channels last. From pinned memory the copies run beside the GPU's work."""
        moved = self._each(lambda x: x.to(device, non_blocking=True))
        return replace(moved, image=moved.image.contiguous(memory_format=torch.channels_last))

    def pinned(self) -> Rows:
        """The same in page-locked memory, from which a GPU copies without the processor's help."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        changed: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def parts_of(images: int, parts: int) -> list[range]:
    """`images` images in `parts` runs of neighbours whose lengths differ by one at most."""
    edges = [i * images // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def check_parts(config: Config, world: int) -> None:
    """Raise CdiffError unless every part of a step has an image, among `world` processes."""
    settings = config.training
    parts = world * settings.accumulate
    for name, images in (("batch", settings.batch), ("late_batch", settings.late_batch or settings.batch)):
        if images < parts:
            remedies = [f"raise {name} to {parts} or more"]
            # The only remedies of a resumed run, whose batch is settled.
            remedies += ["lower accumulate"] if settings.accumulate > 1 else []
            remedies += ["start fewer processes"] if world > 1 else []
            raise CdiffError(
                f"a step of {several(images, 'image')} cannot be shared by {world} process{'es' if world > 1 else ''} with "
                f"accumulate={settings.accumulate}; {', or '.join(remedies)}"
            )


def draw_rows(slices: Slices, config: Config, k: int, window: int, rank: int = 0, world: int = 1) -> list[Rows]:
    """Process `rank`'s parts, among `world` processes, of step k (from 0), whose windows have `window` pixels."""
    settings, T = config.training, config.network.T
    images, r = batch_size(config, window), settings.rows_per_image
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + k)
    late = torch.rand(images * r, generator=generator) ** (1 / settings.t_power)
    t = 1 + (T * late).long().clamp(max=T - 1)
    level = torch.randint(1, config.network.conditions + 1, (images * r,), generator=generator)
    noise = torch.randn(images * r, 1, window, window, generator=generator)
    u = torch.rand(images * r, generator=generator)

    own = list(enumerate(parts_of(images, world * settings.accumulate)))
    own = own[rank * settings.accumulate : (rank + 1) * settings.accumulate]
    start, stop = own[0][1].start, own[-1][1].stop
    batch = training_batch(slices, config, k, images, window, range(start, stop))
    parts = []
    for number, part in own:
        here = slice(part.start - start, part.stop - start)
        rows = slice(part.start * r, part.stop * r)
        seed = settings.seed * 1_000_003 + k + (number + 1) * PART_SEED
        share = len(part) / images
        drawn = batch.image[here], batch.masks[here], batch.raters[here]
        parts.append(Rows(*drawn, t[rows], level[rows], noise[rows], u[rows], share, seed))
    return parts
