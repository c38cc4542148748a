"""What this process runs on: the processor's name and cores, for reports and an engine's thread pool, and the versions of packages. Works
without /proc too."""

from __future__ import annotations

import functools
import os
import platform
from importlib.metadata import version
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
NO_QUOTA = 2**30
MOST_THREADS = 4096
"""The most threads that may be asked for: each takes memory, and OpenMP ends the process where the system runs out of it."""


@functools.cache  # a few packages
def package_version(name: str) -> str:
    """The version of an installed package, cached: one installed later is not the one that runs here.

    Reading it takes milliseconds, and every scan's report states several. Raises PackageNotFoundError where it is not installed.
    """
    return version(name)


def processor() -> str:
    """The processor's name as the system states it. On ARM, where Linux states none, the implementer and part number of each kind of
    core, as in `aarch64 (CPU implementer 0x41, part 0xd0c)`; failing that, the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    stated = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
    found: dict[str, list[str]] = {key: [] for key in ("model name", "CPU implementer", "CPU part")}
    for key, value in stated:
        if key in found:
            found[key].append(value)
    if found["model name"]:
        return found["model name"][0]
    pairs = dict.fromkeys(zip(found["CPU implementer"], found["CPU part"], strict=False))
    kinds = "; ".join(f"CPU implementer {maker}, part {part}" for maker, part in pairs)
    return f"{platform.machine()} ({kinds})" if kinds else platform.machine()


def logical_cores() -> int:
    """The number of logical processors that this process may use; all of the machine's where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """The number of physical cores in the affinity mask, hyper-threads counted once, but at least 1 and at most `quota`.

    Two threads of one core share its arithmetic units, so a matrix product gains nothing from the second. Where the system
    does not say (not Linux), the number of logical processors.
    """
    if not hasattr(os, "sched_getaffinity"):
        return logical_cores()
    cores = {_core(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), quota()))


def quota() -> int:
    """The tightest CPU quota of this process's control groups and their parents, in cores, rounded up; NO_QUOTA where none has one.

    A container sees its own group as the root or by its path on the host; the group of a service or batch job lies deeper.
    """
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    found = [NO_QUOTA]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, files = CGROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, files = CGROUPS / controllers, ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = Path(path.lstrip("/"))
        found += [_limit([root / above / file for file in files]) for above in (group, *group.parents)]
    return min(found)


def _core(cpu: int) -> str:
    """The core that a logical processor belongs to, named by the list of its hyper-threads."""
    try:
        return (CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _limit(files: list[Path]) -> int:
    """The quota of one group in cores. Its files hold `200000 100000`, `max 100000` or, in version 1's two files, -1 and 100000."""
    try:
        limit, period = " ".join(file.read_text() for file in files).split()
        return NO_QUOTA if limit in ("max", "-1") else -(-int(limit) // int(period))
    except (OSError, ValueError):
        return NO_QUOTA
