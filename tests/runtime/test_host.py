"""What a report says of the processor, also on a system that tells nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest

from cdiff.runtime import host
from cdiff.runtime.host import NO_QUOTA, logical_cores, processor
from cdiff.runtime.report import build_report


def test_the_cores_are_those_of_the_affinity_mask() -> None:
    assert logical_cores() == len(os.sched_getaffinity(0))


def test_a_report_reads_no_files_of_packages_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server writes one for each scan; and what is installed under it later is not what it runs."""
    first = build_report({})["versions"]
    monkeypatch.setattr(host, "version", lambda name: f"a later {name}")
    assert build_report({})["versions"] == first
    assert first["numpy"] == np.__version__


def test_a_system_without_proc_and_affinity_is_described_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, where training used to stop at its first checkpoint."""

    def refuse(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processor() == "arm"
    assert logical_cores() == os.cpu_count()


ARM = """processor\t: {}
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: {}
CPU revision\t: 1
"""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC: a part\nstepping\t: 1\n",
            "AMD EPYC: a part",
        ),
        ("\n".join(ARM.format(core, "0xd0c") for core in range(4)), "aarch64 (CPU implementer 0x41, part 0xd0c)"),
        (  # small cores and large ones
            "\n".join(ARM.format(core, "0xd05" if core < 4 else "0xd0b") for core in range(8)),
            "aarch64 (CPU implementer 0x41, part 0xd05; CPU implementer 0x41, part 0xd0b)",
        ),
        ("processor\t: 0\nhart\t: 0\n", "aarch64"),
    ],
)
def test_a_processor_has_a_name_where_linux_states_none(text: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ARM there are only numbers. Without them the machines of two reports could not be told apart."""
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert processor() == name


def test_hyper_threads_and_quotas_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = {0, 1, 5}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: mask)
    for cpu in mask:
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text("all of them on one core\n")
    for place in ("CGROUPS", "OWN_CGROUPS"):
        monkeypatch.setattr(host, place, tmp_path / "none")
    monkeypatch.setattr(host, "CPUS", tmp_path)
    assert host.physical_cores() == 1
    monkeypatch.setattr(host, "CPUS", tmp_path / "unknown")
    assert host.physical_cores() == len(mask)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    assert host.physical_cores() == 1


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 2),  # a container with a view of its own
        ("0::/", {"cpu.max": "max 100000"}, NO_QUOTA),
        # systemd's CPUQuota of what lies above
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/not/here", {"cpu.max": "400000 100000"}, 4),  # the host's path, seen from inside
        ("3:cpu,cpuacct:/job\n0::/", {"cpu,cpuacct/job/cpu.cfs_quota_us": "250000"}, 3),
        ("3:cpu,cpuacct:/job\n0::/", {"cpu,cpuacct/job/cpu.cfs_quota_us": "-1"}, NO_QUOTA),
        ("5:cpuset:/job\n3:cpu:/docker/1f", {"cpu/cpu.cfs_quota_us": "50000"}, 1),
    ],
)
def test_quotas_are_found_wherever_a_process_is_put(
    tmp_path: Path, own: str, files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
        file.with_name("cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "OWN_CGROUPS", tmp_path / "own")
    assert host.quota() == cores
