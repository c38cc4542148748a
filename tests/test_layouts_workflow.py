"""From files in other layouts than case folders to scores, by the commands; and a check that foresees what training does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

import cdiff
from cdiff.cli.app import app
from cdiff.runtime.errors import CdiffError
from tests.export.networks import flat_settings
from tests.layouts import write_brats, write_qubiq, write_table

SHORT = ("--runs", 2, "--steps", 2, "-q")


def command(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def trained(data: Path, folder: Path, *more: object) -> tuple[Path, dict[str, Any]]:
    """A bundle of a barely trained network, and its manifest."""
    train = ("train", "--data", data, "--preset", "tiny", "--max-steps", 2, "--out", folder / "run", "-q")
    command(*train, *flat_settings(), *more)
    command("export", folder / "run", "--out", folder / "bundle", "-q")
    return folder / "bundle", json.loads((folder / "bundle/manifest.json").read_text())


@pytest.mark.slow
def test_four_modalities_in_files_of_their_own(tmp_path: Path) -> None:
    """BraTS slices: channels are found, segmenting takes a case's folder, the order of the modalities is kept."""
    data = tmp_path / "data"
    write_brats(data / "training", 4, patients=2)
    write_brats(data / "testing", 2)
    bundle, manifest = trained(data, tmp_path)
    assert (manifest["image_channels"], manifest["levels"]) == (4, 1)
    assert manifest["training"]["data"]["modalities"] == ["t1", "t1ce", "t2", "flair"]

    maps = tmp_path / "maps"
    command("segment", data / "testing", "--model", bundle, "-o", maps, *SHORT)
    assert {path.name for path in maps.glob("*.json")} == {"000001.json", "000002.json"}
    assert nib.load(maps / "000001_soft.nii.gz").shape == (32, 32)
    report = json.loads((maps / "000001.json").read_text())
    assert report["input"]["channels"] == 4
    assert report["volumes"]["unreliable"].startswith("mm2")

    # The file names are what counts: with two modalities' files exchanged by name, the maps are other ones.
    one = data / "testing/000001"
    t1, flair = sorted(one.glob("*_t1_*"))[0], sorted(one.glob("*_flair_*"))[0]
    before = np.asanyarray(nib.load(maps / "000001_soft.nii.gz").dataobj)
    first, second = t1.read_bytes(), flair.read_bytes()
    t1.write_bytes(second)
    flair.write_bytes(first)
    command("segment", one, "--model", bundle, "-o", tmp_path / "exchanged", *SHORT)
    after = np.asanyarray(nib.load(tmp_path / "exchanged/000001_soft.nii.gz").dataobj)
    assert np.abs(after - before).max() > 1e-6

    # From Python the order is the caller's: one that the names contradict is refused.
    files = [sorted(one.glob(f"*_{name}_*"))[0] for name in ("flair", "t1", "t1ce", "t2")]
    with pytest.raises(
        CdiffError, match="the files are flair, t1, t1ce, t2, but the model was trained on t1, t1ce, t2, flair"
    ):
        cdiff.load(bundle).segment(files, fast=True)

    command("evaluate", "--data", data, "--model", bundle, "--json", tmp_path / "scores.json", *SHORT)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["data"]["split"], scores["n_slices"]) == ("test", 2)
    t1.unlink()
    error = command("segment", one, "--model", bundle, "-o", maps, *SHORT, code=2).stderr
    assert "000001 has no t1" in error


@pytest.mark.slow
def test_a_table_of_sixteen_bit_png(tmp_path: Path) -> None:
    table = write_table(tmp_path / "data", 4, raters=2, modalities=("uv", "dapi"))
    bundle, manifest = trained(table, tmp_path)
    assert (manifest["image_channels"], manifest["levels"]) == (2, 2)
    maps = tmp_path / "maps"
    command("segment", table, "--model", bundle, "-o", maps, *SHORT)
    assert {path.name for path in maps.glob("*.json")} == {f"p{k}.json" for k in range(4)}
    soft = np.asanyarray(nib.load(maps / "p0_soft.nii.gz").dataobj)
    assert soft.shape[:2] == (32, 36)
    assert np.isfinite(soft).all()
    command("evaluate", "--data", table, "--model", bundle, "--json", tmp_path / "scores.json", *SHORT)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["data"]["split"], scores["n_cases"]) == ("val", 1)


@pytest.mark.parametrize("layout", ["qubiq", "brats", "table", "channels"])
def test_the_check_foresees_what_training_takes(tmp_path: Path, layout: str) -> None:
    from cdiff.train.data import fit_to_data, read_data
    from cdiff.train.presets import preset

    data = tmp_path / "data"
    if layout == "qubiq":
        write_qubiq(data, {"Training": 12, "Validation": 2}, raters=4, shapes=((32, 32, 1), (40, 32, 1)))
        (data / "Training/case05/task01_seg02.nii.gz").unlink()
    elif layout == "channels":
        write_qubiq(data, {"": 11}, raters=2, channels=4, shapes=((32, 32, 2),))
    elif layout == "brats":
        write_brats(data, 9, patients=4)
    else:
        data = write_table(data, 5, modalities=("a", "b"))
    out = tmp_path / "check.json"
    command("data", "check", data, "--json", out, "--no-sheet", "-q")
    plan = json.loads(out.read_text())["training"]
    config = fit_to_data(preset("tiny"), data, [])
    taken = read_data(data, config)
    assert (plan["levels"], plan["image_channels"]) == (config.network.levels, config.network.image_channels)
    assert (plan["train"], plan["val"]) == (taken.summary["train"], taken.summary["val"])
    assert set(plan["notes"]) <= set(taken.notes)


def test_a_check_of_unusable_data_ends_with_two_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_qubiq(tmp_path / "data", {"Training": 3, "Validation": 1})
    assert "data_sheet.png" in command("data", "check", data).stdout
    assert (tmp_path / "data_sheet.png").is_file()
    (data / "Training/case02/image.nii.gz").write_text("not a scan")
    result = command("data", "check", data, "--sheet", tmp_path / "s.png", "--json", tmp_path / "c.json", code=2)
    assert "case02" in result.stdout
    assert "training cannot start: 1 file of" in result.stderr
    assert json.loads((tmp_path / "c.json").read_text())["training"]["possible"] is False
    assert (tmp_path / "s.png").is_file()
    assert "--labels" in command("data", "check", data, "--labels", "one", code=2).stderr


def test_the_same_options_choose_the_data_in_every_command(tmp_path: Path) -> None:
    data = write_qubiq(tmp_path / "root" / "prostate", {"Training": 2, "Validation": 1}, tasks=2).parent
    train = ("train", "--data", data, "--preset", "tiny", "--out", tmp_path / "run")
    for one in (train, ("evaluate", "--data", data), ("data", "check", data)):
        assert "several tasks" in command(*one, code=2).stderr
    result = command(*train, "--task", "prostate/task02", "--layout", "cases", "--dry-run")
    assert "training on 2 slices of 2 cases" in result.stderr
