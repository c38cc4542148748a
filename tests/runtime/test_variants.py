"""The variants: what K maps of a slice say of C annotators, against slow loops; and the files, reports and pictures that say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import cdiff
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.pictures.preview import preview_figure
from cdiff.runtime.results import Result
from cdiff.runtime.sampling.noise import INITIAL, normal
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.scans.inputs import scans_at
from cdiff.runtime.scans.intensity import Intensity
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.scoring.metrics import ged, soft_dice
from cdiff.runtime.scoring.scores import CaseTally
from cdiff.runtime.stack import Stack, entropy
from cdiff.runtime.variants import VARIANTS, variant_called
from tests.runtime.graphs import write_pair
from tests.runtime.pictures.test_preview import drawn_texts
from tests.runtime.test_manifest import example
from tests.runtime.test_segmenter import SIZE, T, make_bundle

C, R = 3, 4
NAMES = list(VARIANTS)


def level_by_hand(name: str, maps: Any, c: int) -> Any:
    """One pixel's maps (K numbers) to whether level c holds it, as docs/variants.md has it."""
    if name == "consensus":
        return float(maps[c - 1])
    if name == "annotator":
        return float(sum(value >= 0.5 for value in maps) >= c)
    return float(maps[0] >= (c - 0.5) / C)


@pytest.mark.parametrize("name", NAMES)
def test_the_maps_are_those_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    """One chain after another, in float64 where it can be: soft map, levels, uncertainty, mask and the energy distance's samples."""
    bundle = _bundle(tmp_path / "bundle", name)
    segmenter = cdiff.load(bundle)
    K = 3 if name in ("consensus", "annotator") else 1
    array = np.random.default_rng(2).integers(0, 255, (SIZE, SIZE)).astype(np.uint8)
    result = segmenter.segment(array, runs=R, steps=5, sampler="ddim", seed=7, keep_runs=True)

    features = segmenter.engine.encode(Intensity("slice").apply(array[None, None]))
    table = sampler_table("ddim", segmenter.manifest.noise_schedule, 5)
    runs = np.zeros((K, R, SIZE, SIZE))
    for k in range(K):
        for r in range(R):
            x = normal(7, 0, k + 1, r, INITIAL, (SIZE, SIZE))[None, None].astype(np.float32)
            for t, a, b in zip(table.t, table.a, table.b, strict=True):
                one = np.array([1])
                x0, _ = segmenter.engine.denoise(x, features, 0 * one, int(t) * one, (k + 1) * one)
                x = (a * x + b * x0).astype(np.float32)
            runs[k, r] = np.clip((x[0, 0] + 1) / 2, 0, 1)
    maps = runs.mean(axis=1)
    soft = maps.mean(axis=0)
    spread = runs.mean(axis=0).var(axis=0) if name == "implicit-ensemble" else runs.mean(axis=0).std(axis=0)
    assert runs.std(axis=1).max() > 0.02, "the runs must differ for this test to mean anything"

    np.testing.assert_allclose(result.maps, np.moveaxis(maps, 0, -1), atol=1e-5)
    np.testing.assert_allclose(result.soft, soft, atol=1e-5)
    np.testing.assert_allclose(result.uncertainty[..., 0], entropy(soft.astype(np.float32)), atol=1e-3)
    np.testing.assert_allclose(result.uncertainty[..., 1], spread, atol=1e-5)
    expected = np.array(
        [[[level_by_hand(name, maps[:, y, x], c) for c in range(1, C + 1)] for x in range(SIZE)] for y in range(SIZE)]
    )
    # A pixel may lie on a threshold to rounding; all but a few agree, and the levels of consensus are numbers.
    assert np.isclose(result.levels, expected, atol=1e-5).mean() > 0.99
    assert result.levels.shape == (SIZE, SIZE, C)

    samples = VARIANTS[name].to_samples(result.stack.runs[0], C)  # type: ignore[index]
    if name == "soft-label":
        wanted = [runs[0, r] >= (c - 0.5) / C for r in range(R) for c in range(1, C + 1)]
    else:
        wanted = [runs[k, r] >= 0.5 for k in range(K) for r in range(R)]
    assert samples.shape == (len(wanted), SIZE, SIZE)
    assert (samples == np.stack(wanted)).mean() > 0.99


def _bundle(path: Path, name: str, **changes: Any) -> Path:
    """A bundle of the variant whose graphs know its conditions and no others."""
    K = VARIANTS[name].conditions(C)

    def build(folder: Path) -> Manifest:
        write_pair(folder, size=SIZE, T=T, levels=K)
        manifest = Manifest.read(make_bundle(path.with_name(f"{path.name}_pattern"), variant=name) / "manifest.json")
        return Manifest(**{**vars(manifest), "files": {}, **changes})

    from cdiff.runtime.bundle import write_bundle

    return write_bundle(path, build).path


def test_conditions() -> None:
    assert {name: variant.conditions(4) for name, variant in VARIANTS.items()} == {
        "consensus": 4, "annotator": 4, "no-annotator": 1, "soft-label": 1, "implicit-ensemble": 1
    }  # fmt: skip
    assert example(variant="no-annotator").conditions == 1
    with pytest.raises(CdiffError, match=r"some\.json: key 'variant' must be one of consensus, annotator"):
        Manifest.from_json(example().to_json() | {"variant": "majority"}, "some.json")
    with pytest.raises(CdiffError, match="'majority' is not known; use consensus"):
        variant_called("majority")


def stack_of(name: str, maps: Any, runs: Any = None) -> Stack:
    """One slice of one row of pixels: maps [K][pixels]."""
    array = np.asarray(maps, np.float32)[None, :, None, :]
    kept = None if runs is None else np.asarray(runs, np.uint8)[None, :, :, None, :]
    return Stack(array, np.full((1, 1, array.shape[-1]), 0.5, np.float32), kept, VARIANTS[name], C)


def rows(maps: Any) -> list[list[float]]:
    return [[float(value) for value in row] for row in maps[0, :, 0, :]]


def test_definitions_by_hand() -> None:
    # A pixel that all, two and one of the annotators' maps hold; then one on which each is in doubt.
    annotator = stack_of("annotator", [[1.0, 0.9, 0.6, 0.4], [1.0, 0.5, 0.4, 0.4], [1.0, 0.2, 0.1, 0.4]])
    np.testing.assert_allclose(annotator.soft[0, 0], [1, 1.6 / 3, 1.1 / 3, 0.4], rtol=1e-6)
    assert rows(annotator.levels) == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    for name in ("no-annotator", "soft-label", "implicit-ensemble"):
        one = stack_of(name, [[1.0, 2 / 3, 1 / 6, 0.16]])
        np.testing.assert_allclose(one.soft[0, 0], [1, 2 / 3, 1 / 6, 0.16], rtol=1e-6)
        assert rows(one.levels) == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert stack_of("soft-label", [[0.5]]).spread == 0.5
    assert stack_of("implicit-ensemble", [[0.5]]).spread == 0.25
    consensus = stack_of("consensus", [[1.0, 0.7], [0.8, 0.2], [0.3, 0.0]])
    assert rows(consensus.levels) == rows(consensus.maps)


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_model_scores_as_it_should(name: str) -> None:
    """Its soft map is the annotators' fraction, its levels theirs; its samples are at distance 0 where they are the annotators' masks."""
    drawn = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 1, 0]], bool)
    share = drawn.mean(axis=0)
    levels = np.array([drawn.sum(axis=0) >= c for c in (1, 2, 3)])
    maps, runs = {
        "consensus": (levels, np.repeat(levels[:, None], C, axis=1)),
        "annotator": (drawn, np.repeat(drawn[:, None], C, axis=1)),
        "no-annotator": (share[None], drawn[None]),  # run r is annotator r
        "soft-label": (share[None], np.repeat(share[None, None], C, axis=1)),
        "implicit-ensemble": (levels[1:2], np.repeat(levels[1:2, None], C, axis=1)),
    }[name]
    stack = stack_of(name, maps, np.rint(255 * runs))
    tally = CaseTally(drawn[None, :, None], np.array([0]), "mean")
    tally.add(stack, 0, read_scan(np.zeros((1, drawn.shape[-1], 1)), slice_axis=2).grid)
    (scores,) = tally.row()["slices"]
    if name == "implicit-ensemble":  # it draws the majority, and says nothing of who else drew
        assert scores["soft_dice_5"] == pytest.approx(soft_dice(levels[1].astype(float), share))
        assert scores["dice_per_level"][1] == 1
        assert scores["ged"] == pytest.approx(ged(levels[1:2], drawn))
        return
    assert scores["soft_dice_5"] == scores["soft_dice_9"] == 1
    assert scores["dice_per_level"] == [1, 1, 1]
    nested = name in ("consensus", "soft-label")
    assert scores["ged"] == pytest.approx(scores["ged_floor"] if nested else 0, abs=1e-9)


def test_rounding_a_single_map_is_refused(tmp_path: Path) -> None:
    array = np.zeros((SIZE, SIZE), np.uint8)
    alone = {"levels": 1}  # of a single annotator these draw one map too
    for name, changes in (
        ("no-annotator", {}),
        ("soft-label", {}),
        ("implicit-ensemble", {}),
        ("consensus", alone),
        ("annotator", alone),
    ):
        model = cdiff.load(_bundle(tmp_path / name, name, **changes))
        with pytest.raises(CdiffError, match=rf"this model \({name}\) draws a single map.*use 'mean'"):
            model.segment(array, runs=1, steps=1, combine="vote")
    single = cdiff.load(_bundle(tmp_path / "one", "soft-label")).segment(array, runs=1, steps=1)
    assert single.report["combine_note"] == "mean over runs"
    voted = cdiff.load(_bundle(tmp_path / "a", "annotator")).segment(array, runs=1, steps=1, combine="vote")
    assert set(np.unique(voted.maps)) <= {0, 1}
    assert (
        voted.report["combine_note"]
        == "mean over runs, rounded at one half for each annotator, then mean over annotators"
    )


def saved(name: str, folder: Path, called: str = "a") -> dict[str, Any]:
    read = read_scan(np.random.default_rng(0).random((5, 6, 2)), slice_axis=2)
    K = VARIANTS[name].conditions(C)
    maps = np.random.default_rng(1).random((2, K, 5, 6), dtype=np.float32)
    return Result(read.grid, read.slices, range(2), Stack(maps, maps[:, 0], None, VARIANTS[name], C)).save(
        folder, called
    )


@pytest.mark.parametrize("name", NAMES)
def test_files_say_what_they_hold(name: str, tmp_path: Path) -> None:
    report = saved(name, tmp_path)
    found = {file.removeprefix("a_").partition(".")[0] for file in report["outputs"]}
    assert found == {"soft", "levels", "uncertainty", "mask", "preview"} | (
        {"annotators"} if name == "annotator" else set()
    )
    said = {kind: bytes(nib.load(tmp_path / f"a_{kind}.nii.gz").header["descrip"]).decode().rstrip("\0") for kind in found - {"preview"}}  # type: ignore[attr-defined]  # fmt: skip
    assert said["levels"] == {
        "consensus": "cdiff at least c annotators, c last",
        "annotator": "cdiff at least c of the annotators' maps, c last",
    }.get(name, "cdiff soft map at least (c-1/2)/C, c last")
    assert said["uncertainty"].endswith("variance over runs" if name == "implicit-ensemble" else "std over runs")
    assert ("annotators" in said["soft"]) == (name != "implicit-ensemble")
    assert nib.load(tmp_path / "a_levels.nii.gz").shape == (5, 6, 2, C)
    if name == "annotator":
        assert nib.load(tmp_path / "a_annotators.nii.gz").shape == (5, 6, 2, C)


def test_an_older_results_annotators_do_not_stay_nor_are_they_scans(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 2), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    saved("annotator", tmp_path)
    assert [scan.name for scan in scans_at(tmp_path)] == ["a"]
    foreign = tmp_path / "b_annotators.nii.gz"  # somebody's scan of that name, which no report of ours lists
    foreign.touch()
    saved("consensus", tmp_path, "b")
    assert foreign.exists()
    saved("consensus", tmp_path)
    assert not (tmp_path / "a_annotators.nii.gz").exists()
    assert "a_annotators.nii.gz" not in json.loads((tmp_path / "a.json").read_text())["outputs"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_say_what_they_show(name: str) -> None:
    from cdiff.runtime.report import volumes

    read = read_scan(np.random.default_rng(0).random((40, 40, 3)), slice_axis=2)
    rows_, columns = np.indices((40, 40))
    far = np.hypot(rows_ - 18, columns - 20)
    maps = (
        np.stack([far < 12 - 2 * k for k in range(VARIANTS[name].conditions(C))])[None].repeat(3, 0).astype(np.float32)
    )
    stack = Stack(maps, 0 * maps[:, 0], None, VARIANTS[name], C)
    result = Result(read.grid, read.slices, range(3), stack, "a", {"volumes": volumes(stack, read.grid)})
    figure = preview_figure(result, "a")
    figure.canvas.draw()
    texts = {text.get_text() for text in drawn_texts(figure)}
    assert VARIANTS[name].outline_title in texts
    assert VARIANTS[name].outline_key in texts
    lines = next(a for a in figure.axes if a.get_title(loc="left") == VARIANTS[name].outline_title).collections
    assert len(lines) == (1 if name == "implicit-ensemble" else C)
    if name == "implicit-ensemble":
        assert not any("expert" in text or "agree" in text for text in texts)
    else:
        assert "fraction of experts who would include the pixel" in texts
    assert ("at least so many experts" in texts) == (name == "consensus")
    assert ("annotators" in result.report["volumes"]) == (name == "annotator")
