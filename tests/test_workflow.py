"""The whole road through the real commands: train, export, segment, evaluate; and a training run that is killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.train.checkpoint import load_run
from tests.export.networks import flat_settings
from tests.synthetic import AFFINE, write_synthetic_dataset

CDIFF = Path(sys.executable).with_name("cdiff")
METRICS = ("soft_dice_5", "soft_dice_9", "dice_per_level", "ged", "pairwise_dice_annotators")
OUTPUTS = ("soft.nii.gz", "levels.nii.gz", "uncertainty.nii.gz", "mask.nii.gz", "preview.png")


def command(*arguments: object) -> list[str]:
    return [str(CDIFF), *map(str, arguments)]


def run(*arguments: object) -> str:
    """Run one command as a user would; its stdout, or a failure that shows what it said."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=540)
    assert done.returncode == 0, f"{' '.join(command(*arguments))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def within(*arguments: object) -> str:
    """The same in this process, which starts sooner."""
    done = CliRunner().invoke(app, [str(part) for part in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def load(path: Path) -> tuple[np.ndarray[Any, Any], nib.Nifti1Image]:
    image = nib.load(path)
    return np.asanyarray(image.dataobj), image


@pytest.mark.slow
def test_volumes_of_five_annotators(tmp_path: Path) -> None:
    """Another size than the model's, more annotators than the shipped model's four."""
    shape = (44, 36, 3)
    data = write_synthetic_dataset(
        tmp_path / "data", {"Training": 3, "Validation": 1, "Testing": 2}, raters=5, shape=shape
    )
    trained, bundle, maps = tmp_path / "run", tmp_path / "bundle", tmp_path / "maps"

    within("train", "--data", data, "--preset", "tiny", *flat_settings(), "--out", trained, "--max-steps", 4)
    within("export", trained, "--out", bundle)
    assert "5" in within("info", bundle)
    within("segment", data / "Testing", "--model", bundle, "-o", maps, "--runs", 3, "--steps", 4, "--seed", 7)

    for name in ("case01", "case02"):
        assert {f"{name}_{ending}" for ending in OUTPUTS} <= {path.name for path in maps.iterdir()}
        soft, image = load(maps / f"{name}_soft.nii.gz")
        assert soft.shape == shape
        assert soft.dtype == np.float32
        np.testing.assert_allclose(image.affine, AFFINE)
        assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
        levels, _ = load(maps / f"{name}_levels.nii.gz")
        assert levels.shape == (*shape, 5)
        np.testing.assert_allclose(levels.mean(axis=-1), soft, atol=1e-5)
        mask, _ = load(maps / f"{name}_mask.nii.gz")
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, soft >= 0.5)
        report = json.loads((maps / f"{name}.json").read_text())
        assert report["seed"] == 7

    scores_file = tmp_path / "scores.json"
    within("evaluate", "--data", data, "--model", bundle, "--runs", 2, "--steps", 3, "--json", scores_file)
    scores = json.loads(scores_file.read_text())
    assert scores["n_slices"] == 2 * shape[2]
    assert set(METRICS) <= set(scores)


@pytest.mark.slow
def test_microscopy_in_colour(tmp_path: Path) -> None:
    """2-D images of three channels, cut in tiles, without split folders; a PNG segmented like its NIfTI; scores of what was held out."""
    data = write_synthetic_dataset(tmp_path / "data", 5, raters=3, shape=(40, 52), channels=3)
    trained, bundle, maps = tmp_path / "run", tmp_path / "bundle", tmp_path / "maps"
    settings = [part for text in ("image_channels=3", "framing=tile") for part in ("--set", text)]

    within("train", "--data", data, "--preset", "tiny", *flat_settings(), *settings, "--out", trained, "--max-steps", 4)
    within("export", trained, "--out", bundle)
    scan = data / "case01" / "image.nii.gz"
    pixels, _ = load(scan)
    picture = tmp_path / "picture.png"
    Image.fromarray(pixels).save(picture)
    chain = ("--model", bundle, "-o", maps, "--runs", 2, "--steps", 3)
    within("segment", scan, *chain)
    within("segment", picture, *chain)

    from_nifti, _ = load(maps / "image_soft.nii.gz")
    from_png, _ = load(maps / "picture_soft.nii.gz")
    assert from_nifti.shape == (40, 52)
    np.testing.assert_array_equal(from_png.reshape(40, 52), from_nifti)

    # Of the data that it learned from, the case that training held out is scored, and no other.
    within("evaluate", "--data", data, "--model", bundle, "--runs", 1, "--steps", 2, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["data"]["split"], scores["n_cases"]) == ("val", 1)


@pytest.mark.slow
def test_the_road_leads_to_useful_maps(tmp_path: Path) -> None:
    """A short training on an easy shape gives maps of unseen cases that are nearer to all annotators than one of them is."""
    data = write_synthetic_dataset(
        tmp_path / "data", {"Training": 12, "Validation": 2, "Testing": 4}, raters=3, shape=(40, 36, 3)
    )
    trained, bundle, scores_file = tmp_path / "run", tmp_path / "bundle", tmp_path / "scores.json"
    settings = [part for text in ("steps=150", "val_every=75", "ema=0.96") for part in ("--set", text)]
    within("train", "--data", data, "--preset", "tiny", *flat_settings(24), *settings, "--out", trained)
    with (trained / "log.csv").open(newline="") as log:
        validated = [float(row["val_soft_dice_5"]) for row in csv.DictReader(log) if row["val_soft_dice_5"]]
    assert len(validated) == 2
    assert load_run(trained).info["val_soft_dice_5"] == max(validated) > 0.6
    within("export", trained, "--out", bundle)
    within("evaluate", "--data", data, "--model", bundle, "--fast", "--json", scores_file)
    scores = json.loads(scores_file.read_text())
    assert scores["soft_dice_5"]["mean"] > scores["soft_dice_5_annotators"]["mean"]


@pytest.mark.slow
def test_real_nodules(lidc: Path, tmp_path: Path) -> None:
    """A few patients of each split: what real headers, empty masks and small objects do to the road."""
    data = tmp_path / "lidc"
    for split, number in (("Training", 3), ("Validation", 1), ("Testing", 1)):
        (data / split).mkdir(parents=True)
        for case in sorted((lidc / split).iterdir())[:number]:
            (data / split / case.name).symlink_to(case)
    trained, bundle, maps = tmp_path / "run", tmp_path / "bundle", tmp_path / "maps"

    train = ("train", "--data", data, "--preset", "tiny", *flat_settings(24), "--set", "levels=4", "--max-steps", 6)
    within(*train, "--out", trained)
    within("export", trained, "--out", bundle)
    run("segment", data / "Testing", "--model", bundle, "-o", maps, "--runs", 1, "--steps", 2)
    for case in sorted((data / "Testing").iterdir()):
        _, before = load(case / "image.nii.gz")
        soft, after = load(maps / f"{case.name}_soft.nii.gz")
        assert soft.shape == before.shape
        np.testing.assert_array_equal(after.affine, before.affine)
        assert after.header.get_zooms() == before.header.get_zooms()

    scores_file = tmp_path / "scores.json"
    chain = ("--runs", 1, "--steps", 2)
    within("evaluate", "--data", data, "--model", bundle, *chain, "--all-raters", "--json", scores_file)
    scores = json.loads(scores_file.read_text())
    assert len(scores["dice_per_level"]) == 4


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of every safetensors file below a folder."""
    from safetensors.numpy import load_file

    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.minutes
def test_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL twice in the middle of a run, resume, and compare with a run that nobody disturbed."""
    data = write_synthetic_dataset(tmp_path / "data", {"Training": 4, "Validation": 1}, raters=3, shape=(32, 32, 3))
    settings = [part for text in ("steps=60", "val_every=20", "save_every_s=0.2") for part in ("--set", text)]
    train = ("train", "--data", data, "--preset", "tiny", *settings)
    run(*train, "--out", tmp_path / "whole")

    killed = tmp_path / "killed"
    for attempt in range(2):
        before = newest(killed)
        process = subprocess.Popen(
            command(*train, "--out", killed, *(["--resume"] if attempt else [])),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while newest(killed) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(*train, "--out", killed, "--resume")

    expected, found = weights(tmp_path / "whole"), weights(killed)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def newest(folder: Path) -> int:
    """When the newest checkpoint below a folder was written, ns; 0 when there is none."""
    times = []
    for path in folder.rglob("*.safetensors"):
        try:
            times.append(path.stat().st_mtime_ns)
        except FileNotFoundError:  # replaced while we looked
            continue
    return max(times, default=0)
