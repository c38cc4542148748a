"""The machine of a run, described for the checkpoint and the model card; and the PyTorch settings that it computes with."""

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
from cdiff.runtime.words import first_line


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


@contextmanager
def usable(device: torch.device | str) -> Iterator[None]:
    """Within the block, which begins to use `device`, raise a CdiffError of one line where a GPU refuses: one that other programs have filled
    or keep to themselves, or that the driver lists but cannot start."""
    try:
        yield
    except RuntimeError as error:  # PyTorch's for memory, for CUDA's errors and for a CUDA that does not start
        if str(device) == "cpu":
            raise
        raise CdiffError(
            f"PyTorch cannot use {device} ({first_line(error)}); end what else uses that GPU, or name another device"
        ) from None


def no_room(error: Exception) -> bool:
    """Whether the GPU is full: PyTorch has an error of its own for that, but CUDA and cuBLAS take memory beside PyTorch's and say it otherwise."""
    said = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


@for_all_threads
@contextmanager
def float32_by_default() -> Iterator[None]:
    """Within the block new tensors are float32 unless they name a type. PyTorch has one default for the whole process, so that other threads
    see it change too: code that runs often names its types instead."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def thread_as_it_starts() -> Iterator[None]:
    """Within the block PyTorch's per-thread state is what a new program finds, restored afterwards: new tensors are on the CPU, no autocast
    computes in another type than ours, and gradients are recorded."""
    kinds = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(kind) for kind in kinds]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if torch.get_default_device() != torch.device("cpu"):  # otherwise it would only slow every call down
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        for kind, enabled in zip(kinds, before, strict=True):
            torch.set_autocast_enabled(kind, enabled)


_processes: set[int] = set()
"""Ids of the processes in which PyTorch was used for our work: this one, and those that it was forked from."""


@contextmanager
def as_it_starts() -> Iterator[None]:
    """Within the block PyTorch is as a new program finds it, restored afterwards: `thread_as_it_starts` and `float32_by_default`.

    Raises CdiffError in a process forked from one that has been in such a block: PyTorch would wait for threads that exist only there.
    """
    if _processes - {os.getpid()}:
        raise CdiffError(
            "PyTorch has computed in the process that this one was forked from, and here it would wait forever for threads that it had there; "
            "start processes by spawn: multiprocessing.get_context('spawn')"
        )
    _processes.add(os.getpid())
    with float32_by_default(), thread_as_it_starts():
        yield


@for_all_threads
@contextmanager
def own_attention() -> Iterator[None]:
    """Within the block attention on a GPU uses PyTorch's own kernels. On compute capability 9.0 and 10.0 PyTorch prefers cuDNN's, which end
    a step in an error ("No valid execution plans") for shapes that they do not support; attention is less than one in a hundred of the paper's
    network's FLOPs.
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
    """One training at a time in a program: dropout and initial weights are drawn from PyTorch's one generator on a device, which each run
    seeds, so that neither of two runs in threads could be repeated. Raises CdiffError in the second."""
    if not _TRAINING.acquire(blocking=False):
        raise CdiffError(
            "another training is running in this program, and the two would share one random generator; wait until it ends, or train "
            "in another process"
        )
    try:
        yield
    finally:
        _TRAINING.release()


@contextmanager
def arithmetic(deterministic: bool, threads: int = 0) -> Iterator[None]:
    """Within the block PyTorch takes the same algorithms each time, or whichever cuDNN finds fastest for the shapes, and computes in `threads`
    threads on a CPU (0: as many as before, but no more than a container's quota allows: PyTorch counts processors, not the container's share
    of them). All is restored afterwards, and so is the state of PyTorch's own generators, which a run seeds.

    With `deterministic`, an operation that has no deterministic form raises RuntimeError.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(threads or min(before[2], quota()))
    if deterministic:
        # cuBLAS reads it at its own first use; `find_device` has used the GPU before, but not cuBLAS.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(gpus), own_attention():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=only_warned)
        torch.backends.cudnn.benchmark = before[1]
        torch.set_num_threads(before[2])
