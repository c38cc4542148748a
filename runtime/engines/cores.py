"""How many cores this process may really use: what an engine's thread pool should be as large as."""

from __future__ import annotations

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
NO_QUOTA = 2**30


def physical_cores(cpus: Path = CPUS, cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Physical cores available: those of the affinity mask, hyper-threads counted once, no more than `quota`.

    Two threads of one core share its arithmetic units, so a matrix product gains nothing from the second. Where the system
    does not tell (not Linux), the number of logical processors.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {_core(cpus, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), quota(cgroups, own)))


def quota(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Whole cores in the tightest CPU quota of this process's control groups and those above them, rounded up; NO_QUOTA where none has one.

    A container sees its own group as the uppermost or by its path on the host; a service's or batch job's group lies deeper.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    found = [NO_QUOTA]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, files = cgroups, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, files = cgroups / controllers, ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = Path(path.lstrip("/"))
        found += [_limit([root / above / file for file in files]) for above in (group, *group.parents)]
    return min(found)


def _core(cpus: Path, cpu: int) -> str:
    """A name for the core that a logical processor belongs to: the list of its hyper-threads."""
    try:
        return (cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _limit(files: list[Path]) -> int:
    """Of one group: `200000 100000`, `max 100000` or, in version 1's two files, -1 and 100000."""
    try:
        limit, period = " ".join(file.read_text() for file in files).split()
        return NO_QUOTA if limit in ("max", "-1") else -(-int(limit) // int(period))
    except (OSError, ValueError):
        return NO_QUOTA
