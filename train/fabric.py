"""Lightning Fabric, the engine that training runs on: one device and precision, or the processes that torchrun started, training one model.

Each process holds the whole network and works through its share of every step's images; Fabric averages the gradients through PyTorch's
DistributedDataParallel (Li et al. 2020, VLDB 13(12)), over gloo between CPUs and NCCL between GPUs. What it leaves to us is here: that all
agree before they start, and that all end, one of them saying why, when one fails.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

from cdiff.runtime.device.gpu import parse_device
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.words import first_line
from cdiff.train.machine import usable

logging.getLogger("lightning_fabric").setLevel(
    logging.WARNING
)  # its greetings would stand between our users and our lines

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OVERRIDES = ("LT_ACCELERATOR", "LT_STRATEGY", "LT_DEVICES", "LT_NUM_NODES", "LT_PRECISION")
"""Variables of Lightning's own launcher, which Fabric would follow instead of its arguments."""
PATIENCE = timedelta(minutes=30)
"""How long a process waits for another: one may read its data from a slower disk, or be writing a checkpoint."""
PRECISIONS = {"32-true": "float32", "bf16-mixed": "mixed bf16", "16-mixed": "mixed fp16"}


class FailedElsewhere(Exception):
    """Another process of this run has failed and said why; this one ends without a word."""


def fabric_on(device: torch.device, amp: str = "off", backend: str = "gloo") -> Fabric:
    """Fabric on exactly `device`, in exactly the precision that `amp` names (see TrainingConfig); its launch() takes the device.

    backend: how the processes communicate; the first launch decides it for all later ones. Of several processes on a machine each
    takes the GPU of its own number. Raises CdiffError where the environment would override this, or spreads the processes unevenly.
    """
    if alien := [name for name in OVERRIDES if name in os.environ]:
        raise CdiffError(
            f"{', '.join(alien)} would override --device and amp; unset it, and start several processes with torchrun"
        )
    world, here = int(os.environ.get("WORLD_SIZE", "1")), 1
    strategy: Strategy = SingleDeviceStrategy(device)
    if world > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if world % here:
            raise CdiffError(
                f"{here} of {world} processes run on {socket.gethostname()}; start the same number on every machine"
            )
        strategy = DDPStrategy(process_group_backend=backend, timeout=PATIENCE, gradient_as_bucket_view=True)
    # Given the environment and precision, Fabric neither looks for a cluster nor computes in bf16 where fp16 was asked for (on a CPU).
    plugins: list[Any] = [TorchElasticEnvironment() if world > 1 else LightningEnvironment(), _precision(amp, device)]
    kind = "cuda" if device.type == "cuda" else "cpu"
    return Fabric(accelerator=kind, strategy=strategy, devices=here, num_nodes=world // here, plugins=plugins)


def _precision(amp: str, device: torch.device) -> Precision:
    if amp == "auto" and device.type == "cuda":
        with torch.cuda.device(device):
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    if amp in ("auto", "off"):
        return Precision()
    # Half precision's gradients underflow, so 16-mixed scales the loss; bf16 has float32's range and needs no scaling.
    return MixedPrecision("bf16-mixed" if amp == "bf16" else "16-mixed", device.type)


def precision_of(fabric: Fabric) -> str:
    """float32, mixed bf16 or mixed fp16."""
    return PRECISIONS[fabric.strategy.precision.precision]


def find_device(name: str, fabric: Fabric) -> torch.device:
    """The device that `--device` asks for: cpu, cuda, cuda:N, or auto (a GPU if PyTorch sees one); among several processes, this one's GPU.

    Raises CdiffError for another name and for a GPU that is not there or takes nothing.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if (number := parse_device(name)) is None:
        return torch.device("cpu")
    if fabric.world_size > 1:
        if name != "cuda":
            raise CdiffError(f"--device {name}: each process takes the GPU of its own number; use --device cuda")
        number = fabric.local_rank
    if fabric.world_size > 1 and 0 < (count := torch.cuda.device_count()) <= number:
        raise CdiffError(
            f"{name_of(fabric)} needs cuda:{number}, but PyTorch sees {_seen(count)}; start one process per GPU (torchrun --nproc-per-node)"
        )
    must_have(name, number)
    device = torch.device("cuda", number)
    with usable(device):
        torch.zeros(1, device=device)
    return device


def must_have(name: str, number: int) -> None:
    """Raise CdiffError where PyTorch does not see GPU `number`, which `--device name` asks for."""
    count = torch.cuda.device_count()
    if count == 0:
        raise CdiffError(
            f"--device {name}: PyTorch sees no CUDA device here; use --device cpu or install a CUDA build of torch"
        )
    if number >= count:
        raise CdiffError(f"--device {name}: PyTorch sees {_seen(count)}")


def _seen(count: int) -> str:
    return "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"


@contextmanager
def joined(cuda: bool) -> Iterator[Fabric]:
    """Connect to the processes that torchrun started with this one, over their CPUs, before anything else can fail; yields their Fabric,
    or without torchrun that of this process alone.

    cuda: whether gradients will be averaged between GPUs. Raises CdiffError when the environment is incomplete or the others cannot be
    reached. When any process fails in the block or is interrupted, one of them raises the error and the others FailedElsewhere.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if text == "1":
        yield fabric_on(torch.device("cpu"))
        return
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if not text.isdigit() or missing:
        what = f"is set but {', '.join(missing)} is not" if missing else "is not a number"
        raise CdiffError(f"WORLD_SIZE={text} {what}; start several processes with torchrun, or unset WORLD_SIZE")
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        # Small values are exchanged between CPUs in either case, so that no GPU has to wait for them.
        fabric = fabric_on(torch.device("cpu"), backend="cpu:gloo,cuda:nccl" if cuda else "gloo")
        fabric.launch()
        store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    except (RuntimeError, ValueError) as error:
        raise CdiffError(
            f"the processes could not meet at {host}:{port} ({first_line(error)}); check torchrun's addresses"
        ) from None
    try:
        yield fabric
        fabric.barrier()  # no process leaves while another needs it; the others also wait here for the first one's last checkpoint
    except (Exception, KeyboardInterrupt) as error:
        blamed = _blame(error, fabric, store)
        # No collective call from here on: it would wait for processes that cannot answer.
        if blamed is error:
            raise
        raise blamed from None
    atexit.register(_leave)  # not sooner, or a second run in this process could not connect again


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # a model in a cycle of references keeps the group's threads, which abort the process if Python ends before them


def name_of(fabric: Fabric) -> str:
    """This process among the others, as a message names it."""
    return f"process {fabric.global_rank} of {fabric.world_size} on {socket.gethostname()}"


def summed(fabric: Fabric, tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, the same everywhere; any shape, on Fabric's device."""
    out = fabric.all_reduce(tensor, reduce_op="sum")
    assert isinstance(out, Tensor)
    return out


def settle(fabric: Fabric, seconds: float, asked: bool) -> tuple[float, bool]:
    """The first process's `seconds`, and whether any process was asked to stop: all must act on the same, or they would diverge."""
    told = summed(fabric, torch.tensor([seconds if fabric.is_global_zero else 0.0, float(asked)], dtype=torch.float64))
    return float(told[0]), bool(told[1] > 0)


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """For a block that every process must get through: after it, the first process in which it raised a CdiffError raises that, and all
    others FailedElsewhere, so that none is left waiting."""
    failure: CdiffError | None = None
    try:
        yield
    except CdiffError as error:
        failure = error
    said = [fabric.broadcast(failure and str(failure), src=rank) for rank in range(fabric.world_size)]
    failed = [rank for rank, text in enumerate(said) if text is not None]
    if failed and failed[0] != fabric.global_rank:
        raise FailedElsewhere
    if failure is not None:
        raise failure if set(said) == {str(failure)} else CdiffError(f"{name_of(fabric)}: {failure}")


def check_same(fabric: Fabric, facts: dict[str, Any]) -> None:
    """Raise CdiffError, or FailedElsewhere, in all processes when any one's `facts` differ from the first one's."""
    theirs = fabric.broadcast(facts)
    with together(fabric):
        for key, value in facts.items():
            if value != theirs[key]:
                raise CdiffError(
                    f"the processes do not agree: {key} is {value} here and {theirs[key]} in process 0; "
                    "start all of them with the same command, data and run folder"
                )


def _blame(error: BaseException, fabric: Fabric, store: Any) -> BaseException:
    """What this process should raise after `error`: one process speaks, the others raise FailedElsewhere."""
    if isinstance(error, FailedElsewhere) or not _claim(store):
        return FailedElsewhere()
    if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
        return CdiffError(
            f"{name_of(fabric)} lost its connection to another process, which ended without saying why (killed, or out of memory?); "
            "start the same command again, with --resume if a run has begun"
        )
    return error


def _claim(store: Any) -> bool:
    """True for the first process to ask. torchrun keeps the store; if it has ended with another process, each speaks rather than none."""
    try:
        return bool(store.add(f"cdiff-failed-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1)
    except RuntimeError:
        return True
