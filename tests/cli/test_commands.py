"""The commands on a tiny trained model: what they write, where, and what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

import cdiff
from cdiff.cli.app import app
from tests.runtime.test_segmenter import make_bundle

ENDINGS = {"_soft.nii.gz", "_levels.nii.gz", "_uncertainty.nii.gz", "_mask.nii.gz", "_preview.png", ".json"}
SHORT = ("--runs", 2, "--steps", 3)


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def soft(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


@pytest.fixture
def scan(tiny_data: Path) -> Path:
    return tiny_data / "Validation/case01/image.nii.gz"


def test_default_output_folder(scan: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("segment", scan, "--model", tiny_bundle, *SHORT)
    assert {path.name for path in (tmp_path / "cdiff_output").iterdir()} == {f"image{end}" for end in ENDINGS}
    assert result.stdout.strip() == "cdiff_output/image_preview.png"
    assert "onnxruntime on cpu" in result.stderr
    expected = json.loads((tmp_path / "cdiff_output" / "image.json").read_text())["expected_dice"]["mask"]
    told = "the mask is empty" if expected is None else f"expected Dice {expected:.2f}"
    assert any(line.startswith("image: ") and line.endswith(f" s, {told}") for line in result.stderr.splitlines())


def test_a_page_is_what_to_open(scan: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    result = run("segment", scan, "-o", tmp_path, "--model", tiny_bundle, *SHORT, "--page", "-q")
    assert result.stdout.strip() == str(tmp_path / "image_page.html")
    assert {path.name for path in tmp_path.iterdir()} == {f"image{end}" for end in ENDINGS | {"_page.html"}}


def test_quiet_says_where_and_what_must_be_known(scan: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    result = run("segment", "-i", scan, "-o", tmp_path, "--model", tiny_bundle, *SHORT, "-q", "--no-preview")
    warnings = json.loads((tmp_path / "image.json").read_text())["warnings"]
    assert result.stderr.splitlines() == [f"note: image: {line}" for line in warnings]
    assert result.stdout.strip() == str(tmp_path / "image_soft.nii.gz")
    assert {path.name for path in tmp_path.iterdir()} == {f"image{end}" for end in ENDINGS if "preview" not in end}


def test_who_did_not_choose_is_told_of_the_fast_way(scan: Path, tmp_path: Path) -> None:
    """The chains of a model that is two small formulas are short: all of them are drawn."""
    bundle = make_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    fast = manifest["fast"]
    line = f"25 runs of {manifest['T']} steps for each slice and level; --fast takes {fast['runs']} of {fast['steps']}"
    common = ("segment", scan, "-o", tmp_path, "--model", bundle, "--slices", "0:1", "--no-preview")
    assert line in run(*common).stderr.splitlines()
    for chosen in (["--fast"], ["--runs", 1], ["--steps", 2], ["--sampler", "ddim", "--steps", 2]):
        assert "--fast takes" not in run(*common, *chosen).stderr


def test_options_reach_the_runtime(scan: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The report names what was asked for, and the maps are those of the same call from Python."""
    run("segment", scan, "-o", tmp_path, "--model", tiny_bundle, "--runs", 3, "--steps", 4, "--sampler", "dpm++2m",
        "--levels", "vote", "--seed", 5, "--slices", "1:3", "--no-preview", "-q")  # fmt: skip
    report = json.loads((tmp_path / "image.json").read_text())
    asked = {"runs": 3, "steps": 4, "sampler": "dpm++2m", "combine": "vote", "seed": 5}
    assert {key: report[key] for key in asked} == asked
    result = cdiff.load(tiny_bundle).segment(scan, **asked, slices="1:3")
    np.testing.assert_array_equal(soft(tmp_path / "image_soft.nii.gz"), result.soft)


def test_a_scan_that_is_stored_another_way_is_cut_along_its_own_axis(
    tiny_data: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The same volume with its axes turned gives the same maps, turned."""
    stored = nib.load(tiny_data / "Validation/case01/image.nii.gz")
    turned = tmp_path / "turned.nii.gz"
    nib.save(nib.Nifti1Image(np.moveaxis(np.asanyarray(stored.dataobj), 2, 0), stored.affine[:, [2, 0, 1, 3]]), turned)
    common = ("--model", tiny_bundle, *SHORT, "--no-mirror", "--no-preview", "-q", "-o", tmp_path)
    run("segment", tiny_data / "Validation/case01/image.nii.gz", *common)
    run("segment", turned, "--slice-axis", 0, *common)
    np.testing.assert_array_equal(
        soft(tmp_path / "turned_soft.nii.gz"), np.moveaxis(soft(tmp_path / "image_soft.nii.gz"), 2, 0)
    )
    refused = CliRunner().invoke(app, ["segment", str(turned), "--slice-axis", "3", "-o", str(tmp_path)])
    assert refused.exit_code == 2


def test_fast_takes_the_bundles_values_unless_told(scan: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    run("segment", scan, "-o", tmp_path, "--model", tiny_bundle, "--fast", "--runs", 2, "--no-preview", "-q")
    report = json.loads((tmp_path / "image.json").read_text())
    preset = json.loads((tiny_bundle / "manifest.json").read_text())["fast"]
    assert (report["runs"], report["steps"], report["sampler"]) == (2, preset["steps"], preset["sampler"])


def test_a_folder_of_cases(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    result = run("segment", tiny_data / "Validation", "-o", tmp_path, "--model", tiny_bundle, *SHORT, "--no-preview")
    assert {path.name for path in tmp_path.glob("*.json")} == {"case01.json", "case02.json"}
    assert "2 of 2 scans" in result.stderr


def test_several_scans_and_folders_at_once(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """As a shell's * names them: masks among them are no scans, the same file twice is one, two of one name are refused before any work."""
    one, two = (tmp_path / f"{name}.nii.gz" for name in "ab")
    for copy in (one, two):
        copy.write_bytes((tiny_data / "Validation/case01/image.nii.gz").read_bytes())
    mask = tiny_data / "Validation/case01/task01_seg01.nii.gz"
    short = ("--model", tiny_bundle, "--runs", 1, "--steps", 1, "--no-preview")
    result = run("segment", one, two, one, mask, tiny_data / "Validation", "-o", tmp_path / "maps", *short)
    assert {path.name for path in (tmp_path / "maps").glob("*.json")} == {
        f"{name}.json" for name in ("a", "b", "case01", "case02")
    }
    assert "task01_seg01.nii.gz: left out, since their names say that they are masks or results" in result.stderr
    assert "look first at" not in result.stderr  # one step of the tiny model marks nothing
    for names, said in (
        ((one, tiny_data / "Training/case01", tiny_data / "Validation/case01"), "would both write case01_soft.nii.gz"),
        ((mask, mask.with_name("task01_seg02.nii.gz")), "only masks or results are named"),
        ((one, two, "--at", "1,1,1"), "2 scans are named; name one scan alone"),
    ):
        refused = run("segment", *names, "-o", tmp_path / "none", *short, code=2)
        assert said in " ".join(refused.stderr.split())
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").iterdir())


def test_the_scans_to_look_at_first_are_those_of_the_least_expected_dice(tmp_path: Path) -> None:
    """Of the demo's nodule, and crops of it from farther and farther beside: what lies in the middle is drawn best."""
    demo = nib.load(Path(cdiff.__file__).parent / "demo" / "image.nii.gz")
    voxels = np.asarray(demo.dataobj)
    for name, shift in (("a", 20), ("b", 0), ("c", 30), ("d", 10), ("e", 25)):
        nib.save(nib.Nifti1Image(np.roll(voxels[..., 3:4], shift, axis=1), demo.affine), tmp_path / f"{name}.nii.gz")
    out = tmp_path / "maps"
    result = run("segment", tmp_path, "-o", out, "--fast", "--runs", 1, "--zooms", "1", "--no-mirror", "--no-preview")
    expected = {name: json.loads((out / f"{name}.json").read_text())["expected_dice"]["mask"] for name in "abcde"}
    known = sorted((value, name) for name, value in expected.items() if value is not None)
    assert len(known) > 3
    lowest = ", ".join(f"{name} ({value:.2f})" for value, name in known[:3])
    assert f"look first at {lowest}: the lowest expected Dice" in result.stderr
    assert known[-1][1] in "bd"


def test_what_a_reader_of_the_maps_should_know_is_said_once(tiny_bundle: Path, tmp_path: Path) -> None:
    """With -q too: a report is what somebody who looks at a picture does not open."""
    for name in ("a", "b"):
        scan = nib.Nifti1Image(np.random.default_rng(0).normal(size=(32, 32, 6)).astype(np.float32), np.eye(4))
        (tmp_path / "scans").mkdir(exist_ok=True)
        nib.save(scan, tmp_path / "scans" / f"{name}.nii.gz")
    out = ("-o", tmp_path / "maps", "--no-preview", "-q")
    result = run("segment", tmp_path / "scans", "--model", tiny_bundle, *SHORT, *out)
    reports = [json.loads((tmp_path / "maps" / f"{name}.json").read_text()) for name in ("a", "b")]
    (note,) = {note for report in reports for note in report["warnings"] if "placeholder" in note}
    assert all(note in report["warnings"] for report in reports)
    assert result.stderr.splitlines() == [f"note: a: {note}"]


def test_evaluate_prints_and_writes_the_scores(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    result = run("evaluate", "--data", tiny_data, "--model", tiny_bundle, *SHORT, "--limit", 1, "--json", out)
    report = json.loads(out.read_text())
    assert (report["n_cases"], report["n_slices"]) == (1, 4)
    assert report["data"] == {"folder": "tiny", "split": "val", "task": None}
    assert report["protocol"]["sampler"] == "ddpm"
    assert f"{report['soft_dice_5']['mean']:.3f}" in result.stdout
    assert "Amit et al." not in result.stdout, "nobody asked for the paper's tables"
    assert result.stdout.splitlines()[-1] == str(out)
    assert "split val (train left out): " in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_evaluate_agrees_with_the_files_that_segment_writes(tiny_data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The same seed and options: the score is that of the map on disk."""
    from cdiff.runtime.scoring.metrics import soft_dice

    case = tiny_data / "Validation/case01"
    run("segment", case, "-o", tmp_path, "--model", tiny_bundle, *SHORT, "--no-preview", "-q")
    run("evaluate", "--data", tiny_data, "--split", "val", "--limit", 1, "--model", tiny_bundle, *SHORT, "-q",
        "--json", tmp_path / "scores.json")  # fmt: skip
    truth = np.mean([soft(path) for path in sorted(case.glob("task01*"))], axis=0)
    maps = soft(tmp_path / "case01_soft.nii.gz")
    expected = np.mean([soft_dice(maps[..., k], truth[..., k]) for k in range(4)])
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["soft_dice_5"]["mean"] == pytest.approx(expected)
    assert report["case_soft_dice_5"]["mean"] == pytest.approx(soft_dice(maps, truth))


def test_info_of_a_bundle(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    assert json.loads(run("info", tiny_bundle, "--json").stdout) == manifest
    assert f"T = {manifest['T']}" in run("info", tiny_bundle).stdout


def test_info_of_a_model_of_several_modalities_names_them_in_order(tmp_path: Path) -> None:
    training = {"data": {"modalities": ["t1", "flair"]}}
    bundle = make_bundle(tmp_path / "two", image_channels=2, training=training)
    words = " ".join(run("info", bundle).stdout.split())
    assert "image 16 x 16, 2 channels (t1, flair), tile, sliced along axis" in words
    assert "; " not in words[words.index("chain T") : words.index("--fast")], "neither mirrored nor of two sizes"
    two_sizes = make_bundle(tmp_path / "sizes", framing="centre", zooms=[1, 1.25])
    assert "; runs see the slice at 1 and 1.25 times its size --fast" in " ".join(run("info", two_sizes).stdout.split())
    assert "--fast sampler dpm++2m, steps 4, runs 3 precision" in words


def test_info_shows_scores_with_their_intervals() -> None:
    score = json.loads(run("info", "--json").stdout)["scores"]["testing, mean"]["soft_dice_5"]
    words = " ".join(run("info").stdout.split())
    assert f"soft_dice_5 {score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})" in words
    assert "runs see the slice mirrored in turn; at 1 and 1.25 times its size" in words


def test_doctor_names_the_engine() -> None:
    assert "onnxruntime" in run("doctor").stdout


def test_dry_run_writes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    result = run("train", "--data", tiny_data, "--preset", "tiny", "--out", tmp_path / "run", "--dry-run")
    assert "nothing is written" in result.stderr
    assert re.search("a step takes about [0-9.]+ s here, so 40 steps take about", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_resume_needs_no_settings_again(tiny_data: Path, tmp_path: Path) -> None:
    train = ("train", "--data", tiny_data, "--out", tmp_path / "run")
    (tmp_path / "run").mkdir()  # as one that was killed before it had written anything
    result = run(*train, "--resume", code=2)
    assert "run holds no run to resume; start it without --resume" in result.stderr
    run(*train, "--preset", "tiny", "--set", "batch=2", "--max-steps", 2, "-q")
    result = run(*train, "--resume", "--masks-by", "array", "--max-steps", 3)
    assert "step 3" in result.stderr
    assert "stopped before the run's end" in result.stderr
    result = run(*train, "--resume", "--masks-by", "header", code=2)
    assert "other settings (masks_by: array there, header now)" in result.stderr
    assert f"--init {tmp_path / 'run'} with another --out" in result.stderr


def test_a_place_in_a_large_scan(tmp_path: Path) -> None:
    """The shipped model on its demo crop, alone and in slices of 512 x 512: the files hold the same maps."""
    crop = nib.load(Path(cdiff.__file__).parent / "demo" / "image.nii.gz")
    voxels = np.asanyarray(crop.dataobj)
    whole = np.random.default_rng(0).integers(-1000, 3000, (512, 512, voxels.shape[2])).astype(np.int16)
    whole[384:, 100:228] = voxels
    nib.save(nib.Nifti1Image(voxels, crop.affine), tmp_path / "crop.nii.gz")
    nib.save(nib.Nifti1Image(whole, crop.affine), tmp_path / "chest.nii.gz")
    chain = ("-o", tmp_path / "maps", "--fast", "--slices", "2:4", "--seed", 3)
    run("segment", tmp_path / "crop.nii.gz", *chain)
    result = run("segment", tmp_path / "chest.nii.gz", *chain, "--at", "448,164,2")
    assert "chest: the model sees 64 x 64 of each slice's 512 x 512 pixels, around 448,164,2" in result.stderr
    for kind in ("soft", "levels", "uncertainty", "mask"):
        there, here = (soft(tmp_path / "maps" / f"{name}_{kind}.nii.gz") for name in ("chest", "crop"))
        np.testing.assert_array_equal(there[384:, 100:228], here)
        assert np.nanmax(here) > 0.1
    framing = json.loads((tmp_path / "maps/chest.json").read_text())["framing"]
    assert framing["at"] == [448, 164, 2]
    assert framing["field"] == {"first": [384, 100], "size": [128, 128]}
