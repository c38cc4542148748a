"""What a run is computed on, for the checkpoint and the model card; and with which of PyTorch's algorithms and how many threads."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.host import logical_cores, processor, quota
from cdiff.runtime.switches import for_all_threads


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, processor, cores that this process may use, threads that it uses, and versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": processor(),
        "cores": logical_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@for_all_threads
@contextmanager
def float32_by_default() -> Iterator[None]:
    """New tensors are float32 unless they say otherwise. PyTorch has one default for the whole process: who computes in a thread of its own
    sees it change too, so what runs often says its types instead."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def thread_as_it_starts() -> Iterator[None]:
    """What PyTorch keeps for each thread apart is as a program finds it that has changed nothing, and is given back: new tensors are on the
    CPU, no autocast computes in another type than ours, and gradients are kept."""
    kinds = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(kind) for kind in kinds]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if torch.get_default_device() != torch.device("cpu"):  # elsewhere it would only slow every call down
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        for kind, enabled in zip(kinds, before, strict=True):
            torch.set_autocast_enabled(kind, enabled)


_processes: set[int] = set()
"""Where PyTorch was used for any of our work: this process, and those that it was forked off from."""


@contextmanager
def as_it_starts() -> Iterator[None]:
    """PyTorch as a program finds it that has changed nothing, given back as it was: `thread_as_it_starts` and `float32_by_default`.

    Raises CdiffError in a process that was forked off from one that has been in here: PyTorch would wait for threads that it had there, and that
    are not here.
    """
    if _processes - {os.getpid()}:
        raise CdiffError(
            "PyTorch has computed in the process that this one was forked off from, and waits forever without the threads that it had there; "
            "start processes by spawn: multiprocessing.get_context('spawn')"
        )
    _processes.add(os.getpid())
    with float32_by_default(), thread_as_it_starts():
        yield


@for_all_threads
@contextmanager
def own_attention() -> Iterator[None]:
    """Attention on a GPU by PyTorch's own kernels. On cards of compute capability 9.0 and 10.0 it prefers cuDNN's, which ends a step in an
    error ("No valid execution plans") where it has none for these shapes; of the FLOPs of the paper's network attention is less than one in a
    hundred.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


_TRAINING = threading.Lock()


@contextmanager
def alone() -> Iterator[None]:
    """One training at a time in a program: dropout and first weights are drawn from PyTorch's one generator on a device, which each run
    seeds, so that of two in threads neither could be repeated. Raises CdiffError in the second."""
    if not _TRAINING.acquire(blocking=False):
        raise CdiffError(
            "another training is under way in this program, and the two would draw from one random generator; wait until it ends, or train "
            "in another process"
        )
    try:
        yield
    finally:
        _TRAINING.release()


@contextmanager
def arithmetic(deterministic: bool, threads: int = 0) -> Iterator[None]:
    """PyTorch's choice of algorithms during a run: the same ones each time, or whichever cuDNN finds fastest for these shapes; and how many
    threads compute on a CPU (0: as many as before, but no more than a container's quota, for PyTorch counts processors, whatever share of them
    that is). All is given back after it, and so is the state of PyTorch's own generators, which a run seeds.

    With `deterministic`, an operation that has no deterministic form raises RuntimeError.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(threads or min(before[2], quota()))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when the GPU is first used
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(gpus), own_attention():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.set_num_threads(before[2])
