"""The forms that the exported graphs could have: each computes what PyTorch does, and is of the kind that its name says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cdiff.benchmarks import export_choices
from cdiff.export.exporter import export_run
from cdiff.train.presets import preset
from tests.export.networks import FLAT, random_run


@pytest.mark.minutes
def test_the_forms_agree_and_are_what_they_are_called(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(preset("tiny"), network=FLAT)
    bundle = export_run(random_run(tmp_path / "run", config), tmp_path / "bundle").path
    monkeypatch.setattr(export_choices, "ROUNDS", 1)  # times are not what is tested
    scan = next((tiny_data / "Validation").glob("*/image.nii.gz"))
    command = ["--model", str(bundle), "--scan", str(scan), "--json", str(tmp_path / "out.json")]
    assert export_choices.main(command) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    forms = report["speed"]
    assert all(found["ms_median"] > 0 for found in forms.values())
    exact = {name: found["max_error_x0"] for name, found in forms.items() if "bytes" in found}
    assert 1e-5 < exact.pop("half precision") < 5e-2
    assert max(exact.values()) < 1e-4, "folded tables and the whole update are the same arithmetic"
    nodes = {name: forms[name]["nodes"] for name in exact}
    assert "InstanceNormalization" in nodes["opset 20"]
    assert "GroupNormalization" not in nodes["opset 20"]
    assert "GroupNormalization" in nodes["opset 21"]
    assert nodes["embeddings folded"].get("Gemm", 0) < nodes["opset 21"]["Gemm"]
    assert forms["half precision"]["bytes"] < 0.8 * forms["opset 21"]["bytes"]
    assert sum(forms["opset 20"]["profile"].values()) == pytest.approx(1, abs=0.01)
    shares = {name: found["half_share"] for name, found in report["precision"].items()}
    assert shares.pop("float32") == 0
    assert shares.pop("half, first and last convolution float32") < 1
    assert set(shares.values()) == {1.0}
    maps = {name: found["map_max_error"] for name, found in report["precision"].items()}
    assert maps.pop("float32") < 1e-6 < min(maps.values())
    assert max(maps.values()) < 1e-2


def test_a_model_that_is_none_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_choices.main(["--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not a bundle")
