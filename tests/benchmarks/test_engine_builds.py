"""What a TensorRT-for-RTX build takes, on a tiny network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cdiff.benchmarks import engine_builds
from cdiff.benchmarks.gpu_subjects import SHIPPED, subject
from tests.export.networks import FLAT

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: pip install '.[rtx]' in cdiff's clone"
)


@pytest.mark.slow
def test_both_precisions_are_built_and_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = subject(SHIPPED, small=True)
    flat = replace(tiny, config=replace(tiny.config, network=FLAT))  # exporting takes as long as a graph has nodes
    monkeypatch.setattr(engine_builds, "subjects", lambda: [flat])
    monkeypatch.setitem(engine_builds.RTX_CAPABILITIES, "float32", ("8.9",))
    assert engine_builds.main(["--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    found = report["builds"][SHIPPED]
    assert found["rows"] == flat.rows
    for precision in engine_builds.PRECISIONS:
        assert found[precision]["cpu_seconds"] > 0
        assert min(found[precision]["bytes"].values()) > 10_000
    assert "7.5" in report["capabilities"]["float16"]
