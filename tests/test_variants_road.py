"""Every variant down the whole road by the commands: train, resume, export, segment, evaluate, each on the same engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.runtime.variants import VARIANTS
from tests.synthetic import write_synthetic_dataset

C = 3
SETTINGS = {
    "image_size": 16,
    "channel_mult": "[1]",
    "attention_depths": "[]",
    "rrdbs": 0,
    "base_channels": 4,
    "heads": 1,
    "groups": 2,
    "T": 25,
    "val_slices": 1,
    "rows_per_image": 1,
}
CHAIN = ("--runs", 2, "--steps", 2, "--sampler", "ddim", "-q")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"Training": 2, "Validation": 1, "Testing": 1}
    return write_synthetic_dataset(tmp_path_factory.mktemp("data") / "d", splits, raters=C, shape=(16, 16, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_from_training_to_scores(name: str, data: Path, tmp_path: Path) -> None:
    trained, maps = tmp_path / "run", tmp_path / "maps"
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    train = ("train", "--data", data, "--out", trained, "-q")
    run(*train, "--preset", "tiny", *settings, "--variant", name, "--max-steps", 1)
    run(*train, "--resume", "--max-steps", 2)
    other = CliRunner().invoke(app, [str(part) for part in (*train, "--resume", "--variant", "no-annotator")])
    if name != "no-annotator":
        assert other.exit_code == 2
        assert f"variant: {name} there, no-annotator now" in " ".join(other.output.split())

    soft: dict[str, Any] = {}
    # Exporting is what takes the time here: in half precision once, with one map (tests/export/test_exporter.py has K = C).
    for precision in ("float16", "float32") if name == "implicit-ensemble" else ("float32",):
        bundle = tmp_path / precision
        run("export", trained, "--out", bundle, "-q", *(["--fp16"] if precision == "float16" else []))
        manifest = json.loads((bundle / "manifest.json").read_text())
        assert (manifest["variant"], manifest["levels"], manifest["precision"]) == (name, C, precision)
        run("segment", data / "Testing", "--model", bundle, "-o", maps, *CHAIN, "--no-preview")
        soft[precision] = nib.load(maps / "case01_soft.nii.gz").get_fdata()  # type: ignore[attr-defined]
    assert VARIANTS[name].drawn in " ".join((bundle / "README.md").read_text().split())
    np.testing.assert_allclose(soft.get("float16", soft["float32"]), soft["float32"], atol=0.02)
    report = json.loads((maps / "case01.json").read_text())
    assert report["variant"] == name
    assert nib.load(maps / "case01_levels.nii.gz").shape == (16, 16, 2, C)  # type: ignore[attr-defined]

    run("evaluate", "--data", data, "--model", tmp_path / "float32", *CHAIN, "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["model"]["variant"] == name
    assert len(scores["dice_per_level"]) == C
    assert all(0 <= scores[key]["mean"] <= 1 for key in ("soft_dice_5", "ged_floor"))


def test_a_variant_that_does_not_exist_is_one_line(data: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["train", "--data", str(data), "--out", str(tmp_path / "r"), "--variant", "majority"]
    )
    assert result.exit_code == 2
    assert "variant='majority' is not known; use consensus, annotator, no-annotator" in " ".join(result.output.split())
