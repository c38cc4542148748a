"""The processes that train one model together, as torchrun starts them: who one is, what all must agree on, and how all end when one fails.

Each holds the whole network and works through its share of every step's images; PyTorch's DistributedDataParallel averages the
gradients (Li et al. 2020, VLDB 13(12)), over gloo between CPUs and NCCL between GPUs. Alone, all of this is nothing.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cdiff.runtime.errors import CdiffError

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(minutes=30)
"""How long a process waits for another: one may read its data from a slower disk, or be writing a checkpoint."""
_joins = itertools.count()  # a second group of the same processes must not read the first one's keys


class FailedElsewhere(Exception):
    """Another process of this run has failed and said why; this one ends without a word."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world` ones: `rank` from 0 over all machines, `local` from 0 on this one. `store` is what all of them see."""

    rank: int = 0
    world: int = 1
    local: int = 0
    store: Any = None  # a torch.distributed Store

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"process {self.rank} of {self.world} on {socket.gethostname()}"

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; any shape, the same everywhere."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def settle(self, seconds: float, asked: bool) -> tuple[float, bool]:
        """The first process's clock, and whether any process was asked to stop: what all go by, or they would part ways."""
        if self.world == 1:
            return seconds, asked
        told = self.sum(torch.tensor([seconds if self.first else 0.0, float(asked)], dtype=torch.float64))
        return float(told[0]), bool(told[1] > 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what every process must get through: a CdiffError of one is raised on all of them, so that none is left waiting."""
        said: str | None = None
        try:
            yield
        except CdiffError as error:
            if self.world == 1:
                raise
            said = str(error)
        told = self._gather((said, self.name))
        failed = [(text, name) for text, name in told if text is not None]
        if failed:
            text, name = failed[0]
            raise CdiffError(text if len({text for text, _ in told}) == 1 else f"{name}: {text}")

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise CdiffError, on all processes, where one's `facts` are not the first one's."""
        for theirs, name in self._gather((facts, self.name)):
            for key, value in theirs.items():
                if value != facts[key]:
                    raise CdiffError(
                        f"the processes do not agree: {key} is {value} in {name} and {facts[key]} in {self.name}; "
                        "start all of them with the same command, data and run folder"
                    )

    def _gather(self, value: Any) -> list[Any]:
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def blame(self, error: Exception) -> Exception:
        """What this process should raise after `error`: one process speaks, the others raise FailedElsewhere."""
        if isinstance(error, FailedElsewhere) or not self._claim():
            return FailedElsewhere()
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            return CdiffError(
                f"{self.name} lost its connection to another process, which ended without saying why (killed, or out of memory?); "
                "start the same command again with --resume"
            )
        return error

    def _claim(self) -> bool:
        """True for the first process to ask. torchrun keeps the store; where it has gone with another process, somebody must speak."""
        try:
            return bool(self.store.add("failed", 1) == 1)
        except RuntimeError:
            return True


ALONE = Ranks()


@contextmanager
def joined(cuda: bool) -> Iterator[Ranks]:
    """Join the processes that torchrun started with this one; without torchrun, be alone.

    cuda: whether gradients are averaged between GPUs. Raises CdiffError when the environment is incomplete or the others do not
    come; and, when any process fails inside, the error in one of them and FailedElsewhere in the others.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if text == "1":
        yield ALONE
        return
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if not text.isdigit() or missing:
        what = f"is set but {', '.join(missing)} is not" if missing else "is not a number"
        raise CdiffError(f"WORLD_SIZE={text} {what}; start several processes with torchrun, or unset WORLD_SIZE")
    ranks = _join(cuda)
    try:
        yield ranks
    except Exception as error:
        blamed = ranks.blame(
            error
        )  # and no farewell to the others: a collective call would wait for those that cannot answer
        if blamed is error:
            raise
        raise blamed from None
    ranks.settle(0.0, False)  # nobody leaves while another still needs it
    dist.destroy_process_group()


def _join(cuda: bool) -> Ranks:
    try:
        shared, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"cdiff-{next(_joins)}", shared)  # type: ignore[attr-defined]
        # Small facts travel between CPUs in either case: they need no GPU to wait.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise CdiffError(f"the processes could not meet at {where} ({reason}); check torchrun's addresses") from None
    return Ranks(rank, world, int(os.environ["LOCAL_RANK"]), store)
