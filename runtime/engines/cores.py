"""How many cores this process may really use: what an engine's thread pool should be as large as."""

from __future__ import annotations

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores(cpus: Path = CPUS, quota: Path = QUOTA) -> int:
    """Physical cores available: those of the affinity mask, hyper-threads counted once, no more than a container's quota.

    Two threads of one core share its arithmetic units, so a matrix product gains nothing from the second. Where the system
    does not tell (not Linux), the number of logical processors.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
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
