"""What a report says of the processor, also on a system that tells nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from cdiff.runtime.host import logical_cores, processor


def test_the_cores_are_those_of_the_affinity_mask() -> None:
    assert logical_cores() == len(os.sched_getaffinity(0))


def test_a_system_without_proc_and_affinity_is_described_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, where training used to stop at its first checkpoint."""

    def refuse(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processor() == "arm"
    assert logical_cores() == os.cpu_count()
