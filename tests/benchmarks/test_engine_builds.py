"""What a TensorRT-for-RTX build takes, on a tiny network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdiff.benchmarks import engine_builds
from cdiff.benchmarks.gpu_subjects import SHIPPED, subject

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: pip install '.[rtx]' in cdiff's clone"
)


def test_both_precisions_are_built_and_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_builds, "subjects", lambda: [subject(SHIPPED, small=True)])
    assert engine_builds.main(["--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    found = report["builds"][SHIPPED]
    assert found["rows"] == subject(SHIPPED, small=True).rows
    for precision in engine_builds.PRECISIONS:
        assert found[precision]["cpu_seconds"] > 0
        assert min(found[precision]["bytes"].values()) > 10_000
    assert "7.5" in report["capabilities"]["float16"]
