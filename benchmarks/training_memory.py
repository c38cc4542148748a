"""What a training step keeps in memory, without a GPU: the step on tensors without content, counting the bytes that are alive.

    python -m cdiff.benchmarks.training_memory paper checkpointing=true

In float32. Counted: weights, gradients, AdamW's state, EMA, activations and what operations return. Not counted: cuDNN's workspaces,
the allocator's gaps, CUDA's own share, and AdamW's temporary copies on a GPU (up to the size of the weights).
"""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdiff.benchmarks.script import parser_of, script
from cdiff.train.config import Config
from cdiff.train.fabric import fabric_on
from cdiff.train.learner import Learner
from cdiff.train.presets import PRESETS, preset
from cdiff.train.rows import Rows, parts_of


@dataclass(frozen=True)
class StepMemory:
    """Bytes: `kept` from step to step (weights, AdamW, EMA), and the `peak` within one step, which includes them."""

    kept: int
    peak: int


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that were made inside it and still exist: `now`, and at most `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # AdamW before PyTorch 2.12 reads the number of its step, which a tensor without content does not have
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def step_memory(config: Config) -> StepMemory:
    """One process's memory for a step of `config` at windows of image_size pixels, in its second step, when AdamW has its state."""
    nowhere = torch.device("meta")
    with Alive() as alive, nowhere:
        learner = Learner(config, fabric_on(nowhere))
        for _ in range(2):
            alive.peak = alive.now
            _step(learner)
        return StepMemory(alive.now, alive.peak)


def _step(learner: Learner) -> None:
    settings, network = learner.config.training, learner.config.network
    size, r = network.image_size, settings.rows_per_image
    for part in parts_of(settings.late_batch or settings.batch, settings.accumulate):
        n, rows = len(part), len(part) * r
        index = torch.ones(rows, dtype=torch.int64)
        image = torch.zeros(n, network.image_channels, size, size)
        masks = torch.zeros(n, network.levels, size, size, dtype=torch.bool)
        raters = torch.full((n,), network.levels)
        noise, u = torch.zeros(rows, 1, size, size), torch.zeros(rows)
        drawn = Rows(image, masks, raters, index, index, noise, u, 1.0, 0)
        learner.loss(drawn).backward()  # type: ignore[no-untyped-call]
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)


@script
def main(argv: list[str] | None = None) -> None:
    """The command line: print the memory of a step as JSON, in bytes."""
    parser = parser_of("training_memory", __doc__)
    parser.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="change one value of it, as cdiff train --set")
    options = parser.parse_args(argv)
    config = preset(options.preset).with_settings(options.settings)
    print(json.dumps({"preset": options.preset, "settings": options.settings} | asdict(step_memory(config))))


if __name__ == "__main__":
    sys.exit(main())
