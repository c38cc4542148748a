"""The processor that this process runs on: its name and cores, for reports and for an engine's thread pool. Works without /proc, too."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def processor() -> str:
    """The processor's name as the system states it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def logical_cores() -> int:
    """Logical processors that this process may use; all of the machine's where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores(cpus: Path = CPUS, quota: Path = QUOTA) -> int:
    """Physical cores available: those of the affinity mask, hyper-threads counted once, no more than a container's quota.

    Two threads of one core share its arithmetic units, so a matrix product gains nothing from the second. Where the system
    does not tell (not Linux), the number of logical processors.
    """
    if not hasattr(os, "sched_getaffinity"):
        return logical_cores()
    cores = {_core(cpus, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota(quota)))


def _core(cpus: Path, cpu: int) -> str:
    """A name for the core that a logical processor belongs to: the list of its hyper-threads."""
    try:
        return (cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota(path: Path) -> int:
    """Whole cores in a container's CPU quota (cgroup v2: `max 100000` or `200000 100000`), rounded up."""
    try:
        limit, period = path.read_text().split()
    except (OSError, ValueError):
        limit, period = "max", "1"
    return 2**30 if limit == "max" else -(-int(limit) // int(period))
