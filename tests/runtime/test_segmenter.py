"""From a bundle and a scan to maps: the arguments' meaning, promises 1 and 4, every way of giving a scan, the report."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import shutil
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import cdiff
from cdiff.runtime.bundle import open_bundle, write_bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.prepared import Clock
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.scans.intensity import Intensity
from cdiff.runtime.segmenter import Segmenter
from tests.runtime.graphs import write_pair
from tests.runtime.test_manifest import example

C, T, SIZE = 3, 20, 16
QUICK: dict[str, Any] = {"steps": 3, "runs": 2, "sampler": "ddim"}


def make_bundle(path: Path, **changes: Any) -> Path:
    def build(folder: Path) -> Manifest:
        write_pair(folder, size=SIZE, T=T, levels=C, channels=changes.get("image_channels", 1))
        values = {
            "name": "tiny", "levels": C, "T": T, "schedule": NoiseSchedule(T, beta_end=1e-2).to_json(),
            "image_size": (SIZE, SIZE), "framing": "tile", "features_channels": 4,
            "intensity": Intensity("slice").to_json(), "fast": {"sampler": "dpm++2m", "steps": 4, "runs": 3},
        }  # fmt: skip
        return example(files={}, **{**values, **changes})

    return write_bundle(path, build).path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def segmenter(bundle: Path) -> Segmenter:
    return cdiff.load(bundle)


def volume(*shape: int) -> Any:
    return np.random.default_rng(2).integers(0, 255, shape).astype(np.uint8)


def saved(path: Path, array: Any) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([0.7, 0.7, 2.5, 1])), path)
    return path


def test_the_maps_are_those_of_the_loop(segmenter: Segmenter) -> None:
    """Axis, order of levels, means: all against the loop called by hand."""
    array = volume(SIZE, SIZE, 3)
    result = segmenter.segment(array, runs=3, steps=5, sampler="ddpm", seed=7)
    slices = Intensity("slice").apply(np.moveaxis(array, 2, 0)[:, None])
    expected = list(
        segment_windows(
            segmenter.engine,
            Framing("tile", (SIZE, SIZE), 0.25).frame(slices),
            sampler_table("ddpm", segmenter.manifest.noise_schedule, 5),
            levels=C, runs=3, seed=7, batch=result.report["batch"],
        )
    )  # fmt: skip
    for index, one in enumerate(expected):
        np.testing.assert_array_equal(result.levels[:, :, index], np.moveaxis(one.level_means, 0, -1))
        np.testing.assert_array_equal(result.uncertainty[:, :, index, 1], one.run_std)
    np.testing.assert_allclose(result.soft, result.levels.mean(axis=-1), rtol=1e-6)
    assert result.soft.std() > 0.05, "the tiny network's maps must differ for this test to mean anything"


def test_a_long_scans_maps_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image, C levels and the spread; saving adds no whole one."""
    model = cdiff.load(make_bundle(tmp_path / "bundle", framing="resize"))
    array = volume(128, 128, 200)
    model.segment(array[..., :1], runs=1, steps=1)
    monkeypatch.setattr("cdiff.runtime.map_file.physical_cores", lambda: 1)  # each holds some blocks
    tracemalloc.start()
    result = model.segment(array, runs=1, steps=1)
    segmented = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    result.save(tmp_path / "maps", preview=False)
    saved = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    one = 4 * array.size
    assert segmented < (1 + C + 1 + 0.25) * one
    assert saved < one, "a few blocks' worth"


def test_numbers_of_numpy_are_numbers(segmenter: Segmenter, tmp_path: Path) -> None:
    """As of a loop over np.arange: the maps were computed, and their report could not be written."""
    array = volume(SIZE, SIZE, 2)
    numbers = {"runs": np.int32(2), "steps": np.int64(3), "seed": np.uint64(2**64 - 1), "batch": np.int8(2)}
    more = {"slice_axis": np.int64(2), "slices": (np.int64(0), np.int64(1)), "mirror": np.True_, "fast": np.True_}
    found = segmenter.segment(array, **numbers, **more)
    same = segmenter.segment(
        array, runs=2, steps=3, seed=2**64 - 1, batch=2, slice_axis=2, slices=(0, 1), mirror=True, fast=True
    )
    np.testing.assert_array_equal(found.soft, same.soft)
    report = found.save(tmp_path, preview=False)
    assert [report[key] for key in ("runs", "steps", "seed", "batch")] == [2, 3, 2**64 - 1, 2]


@pytest.mark.parametrize("name", ["runs", "steps", "seed", "batch", "slice_axis", "series"])
def test_a_number_that_is_not_whole_is_told(segmenter: Segmenter, name: str) -> None:
    for value in (2.0, "2"):
        with pytest.raises(CdiffError, match=f"^{name} {value!r} is not a whole number$"):
            segmenter.segment(volume(SIZE, SIZE, 2), **{name: value})


def test_how_the_callers_numpy_treats_errors_changes_nothing(segmenter: Segmenter, tmp_path: Path) -> None:
    """Neither as exceptions nor as warnings: values too small for float32 are zeros, those too large are refused as what they are."""
    array = np.where(volume(SIZE, SIZE, 2) > 128, 1.0, 1e-60)
    path = saved(tmp_path / "scan.nii", array)
    plain = segmenter.segment(array, **QUICK), segmenter.segment(path, **QUICK)
    with np.errstate(all="raise"):
        for result, scan in zip(plain, (array, path), strict=True):
            np.testing.assert_array_equal(segmenter.segment(scan, **QUICK).soft, result.soft)
        plain[1].save(tmp_path / "maps", page=True)
    for behaviour in ("raise", "warn"):
        with (
            warnings.catch_warnings(action="error"),
            np.errstate(all=behaviour),  # type: ignore[call-overload]
            pytest.raises(CdiffError, match=r"512 values not finite in float32 \(too large;"),
        ):
            segmenter.segment(np.full((SIZE, SIZE, 2), 1e60), **QUICK)


def test_runs_are_mirrored_where_the_bundle_says_so_or_the_caller_does(segmenter: Segmenter, tmp_path: Path) -> None:
    array, chain = volume(SIZE, SIZE, 1), {"steps": 3, "runs": 4, "sampler": "ddim", "batch": 4}
    plain, asked = segmenter.segment(array, **chain), segmenter.segment(array, **chain, mirror=True)
    other = cdiff.load(make_bundle(tmp_path / "mirrored", mirror=True))
    stated, refused = other.segment(array, **chain), other.segment(array, **chain, mirror=False)
    assert [r.report["mirror"] for r in (plain, asked, stated, refused)] == [False, True, True, False]
    np.testing.assert_array_equal(stated.levels, asked.levels)
    np.testing.assert_array_equal(refused.levels, plain.levels)
    assert abs(asked.levels - plain.levels).max() > 0.01


def test_what_a_notebook_shows_is_a_line(segmenter: Segmenter) -> None:
    result = segmenter.segment(volume(SIZE, SIZE, 3), **QUICK, slices="1:3")
    assert repr(result) == f"<Result scan: {SIZE} x {SIZE} x 3, slices 1 to 2, {C} levels>"
    assert repr(segmenter) == f"<Segmenter tiny: onnxruntime {segmenter.engine.version} on cpu>"
    assert dir(cdiff) == ["__version__", "load"]
    assert len(repr(next(segmenter.segment_many([volume(SIZE, SIZE)], **QUICK)).value)) < 100


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_loaded_model_says_why_it_cannot_be_copied_or_sent(segmenter: Segmenter, copied: Any) -> None:
    """As multiprocessing, joblib and the like would; what it made can be."""
    with pytest.raises(CdiffError, match=r"open it there, with cdiff\.load"):
        copied(segmenter)
    result = segmenter.segment(volume(10, 12, 2), runs=1, steps=1)
    sent = pickle.loads(pickle.dumps(copy.deepcopy(result)))
    np.testing.assert_array_equal(sent.soft, result.soft)
    assert sent.report == result.report


def test_a_bundle_that_is_replaced_while_it_is_opened_is_no_mixture(tmp_path: Path, segmenter: Segmenter) -> None:
    opened = open_bundle(make_bundle(tmp_path / "one"))
    Segmenter(opened, segmenter.engine)
    shutil.rmtree(opened.path)
    make_bundle(opened.path, mirror=True)
    with pytest.raises(CdiffError, match="has changed since the bundle was opened"):
        Segmenter(opened, segmenter.engine)


def test_the_same_seed_gives_the_same_maps_bit_for_bit(segmenter: Segmenter, bundle: Path) -> None:
    array = volume(SIZE, SIZE, 2)
    one = segmenter.segment(array, **QUICK, seed=3, batch=4)
    again = cdiff.load(bundle).segment(array, **QUICK, seed=3, batch=4)
    np.testing.assert_array_equal(one.levels, again.levels)
    np.testing.assert_allclose(segmenter.segment(array, **QUICK, seed=3, batch=5).levels, one.levels, atol=1e-5)
    assert abs(segmenter.segment(array, **QUICK, seed=4, batch=4).levels - one.levels).max() > 0.01


def test_a_part_of_a_scan_has_the_maps_that_it_has_in_the_whole(segmenter: Segmenter) -> None:
    array = volume(SIZE, SIZE, 6)
    whole = segmenter.segment(array, **QUICK)
    part = segmenter.segment(array, **QUICK, slices="2:4")
    np.testing.assert_allclose(part.soft[..., 2:4], whole.soft[..., 2:4], atol=1e-5)
    assert np.isnan(part.soft[..., [0, 1, 4, 5]]).all()
    assert part.report["slices"] == {"first": 2, "end": 4, "of": 6}
    assert any("only slices 2 to 3 (of 0 to 5) were segmented" in line for line in part.report["warnings"])
    one = segmenter.segment(array, **QUICK, slices="2:3")
    assert any("only slice 2 (of 0 to 5) was segmented" in line for line in one.report["warnings"])


def test_slices_that_may_be_the_modalities_of_one_are_told(segmenter: Segmenter, tmp_path: Path) -> None:
    """Along the last axis of a scan of one channel; a model of several knows them when it sees them."""

    def told(note: str) -> bool:
        return "planes along the last axis was taken as a slice" in note

    for shape, said in (
        ((SIZE, SIZE, 4), True),
        ((SIZE, SIZE), False),
        ((SIZE, SIZE, 1), False),
        ((SIZE, SIZE, 5), False),
    ):
        warnings = segmenter.segment(volume(*shape), **QUICK).report["warnings"]
        assert any("each of the 4 planes along the last axis was taken as a slice" in note for note in warnings) == said
    first = segmenter.segment(volume(4, SIZE, SIZE), **QUICK, slice_axis=0)
    several = cdiff.load(make_bundle(tmp_path / "two", image_channels=2)).segment(volume(SIZE, SIZE, 4, 2), **QUICK)
    assert not any(map(told, [*first.report["warnings"], *several.report["warnings"]]))


def test_intensity_over_the_volume_uses_the_whole_scan_for_a_part(tmp_path: Path) -> None:
    segmenter = cdiff.load(make_bundle(tmp_path / "b", intensity=Intensity("volume").to_json()))
    array = volume(SIZE, SIZE, 4) // np.array([4, 1, 1, 1], np.uint8)
    whole, part = segmenter.segment(array, **QUICK), segmenter.segment(array, **QUICK, slices=(0, 1))
    np.testing.assert_allclose(part.soft[..., 0], whole.soft[..., 0], atol=1e-5)
    assert np.abs(segmenter.segment(array[..., :1], **QUICK).soft - whole.soft[..., :1]).max() > 0.01, "other limits"


def test_every_way_of_giving_a_scan_gives_the_same(segmenter: Segmenter, tmp_path: Path) -> None:
    array = volume(SIZE, SIZE, 2)
    path = saved(tmp_path / "a.nii.gz", array)
    expected = segmenter.segment(array, **QUICK).levels
    given: list[Any] = [path, str(path), nib.load(path)]
    for scan in given:
        np.testing.assert_array_equal(segmenter.segment(scan, **QUICK).levels, expected)


def test_the_slice_axis_is_the_bundles_unless_given(segmenter: Segmenter, tmp_path: Path) -> None:
    array = volume(SIZE, SIZE, 2)
    expected = segmenter.segment(array, **QUICK).soft
    turned = np.moveaxis(array, 2, 0)
    along = segmenter.segment(turned, **QUICK, slice_axis=0)
    np.testing.assert_array_equal(along.soft, np.moveaxis(expected, 2, 0))
    strips = segmenter.segment(turned, **QUICK, slices="0:1").report["warnings"]
    assert any(f"strips of 2 x {SIZE} pixels" in line and "--slice-axis 0" in line for line in strips)
    assert not any("strips" in line for line in along.report["warnings"])
    other = cdiff.load(make_bundle(tmp_path / "b", slice_axis=0))
    result = other.segment(turned, **QUICK)
    np.testing.assert_array_equal(result.soft, np.moveaxis(expected, 2, 0))
    assert result.report["input"]["slice_axis"] == 0


def test_mean_and_vote(segmenter: Segmenter) -> None:
    array = volume(SIZE, SIZE)
    mean = segmenter.segment(array, **QUICK, combine="mean")
    vote = segmenter.segment(array, **QUICK, combine="vote")
    np.testing.assert_array_equal(vote.levels, mean.levels >= 0.5)
    np.testing.assert_allclose(vote.soft, (mean.levels >= 0.5).mean(axis=-1), rtol=1e-6)
    assert (mean.report["combine"], vote.report["combine"]) == ("mean", "vote")


def test_what_is_used_when_nothing_is_said(segmenter: Segmenter, tmp_path: Path) -> None:
    array = volume(SIZE, SIZE)

    def used(by: Segmenter = segmenter, **options: Any) -> tuple[str, int, int]:
        report = by.segment(array, **options).report
        return report["sampler"], report["steps"], report["runs"]

    for fast, wanted in (({"steps": 4}, ("ddpm", 4, 25)), ({"runs": 2}, ("ddpm", T, 2))):
        assert used(cdiff.load(make_bundle(tmp_path / next(iter(fast)), fast=fast)), fast=True) == wanted
    assert used() == ("ddpm", T, 25)
    assert used(fast=True) == ("dpm++2m", 4, 3)
    assert used(fast=True, runs=2) == ("dpm++2m", 4, 2)
    assert used(fast=True, steps=6, sampler="ddim") == ("ddim", 6, 3)
    with pytest.raises(CdiffError, match="this bundle states neither steps nor runs for fast"):
        used(cdiff.load(make_bundle(tmp_path / "none", fast={"sampler": "ddim"})), fast=True)


def test_kept_runs_have_the_maps_as_their_mean(segmenter: Segmenter) -> None:
    array = volume(SIZE, SIZE, 2)
    stack = segmenter.segment(array, **QUICK, keep_runs=True).stack
    assert stack.runs is not None
    assert stack.runs.shape == (2, C, 2, SIZE, SIZE)
    np.testing.assert_allclose(stack.runs.mean(axis=2) / 255, stack.levels, atol=0.5 / 255 + 1e-6)
    assert segmenter.segment(array, **QUICK).stack.runs is None


def test_other_sizes_come_back_on_their_own_grid(segmenter: Segmenter, tmp_path: Path) -> None:
    array = volume(30, 11, 2)
    tiled = segmenter.segment(array, **QUICK)
    assert tiled.soft.shape == (30, 11, 2)
    assert tiled.report["framing"]["windows_per_slice"] == 3
    closer = cdiff.load(make_bundle(tmp_path / "closer", tile_overlap=0.75)).segment(array, **QUICK)
    assert closer.report["framing"]["windows_per_slice"] == 5
    resized = cdiff.load(make_bundle(tmp_path / "b", framing="resize")).segment(array, **QUICK)
    assert resized.soft.shape == (30, 11, 2)
    assert any("30 x 11 were resampled" in line for line in resized.report["warnings"])


def test_the_report_says_what_was_done(segmenter: Segmenter, bundle: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "scan.nii.gz", volume(SIZE, SIZE, 2))
    calls: list[tuple[int, int]] = []
    result = segmenter.segment(path, **QUICK, seed=5, progress=lambda done, total: calls.append((done, total)))
    report = result.save(tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "scan.json").read_text())
    expected = {
        "cdiff": cdiff.__version__,
        "bundle": "tiny",
        "manifest_sha256": hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest(),
        "levels": C,
        "engine": "onnxruntime",
        "device": "cpu",
        "precision": "float32",
        "sampler": "ddim",
        "steps": 3,
        "runs": 2,
        "combine": "mean",
        "seed": 5,
    }
    assert {key: report[key] for key in expected} == expected
    assert report["input"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["input"]["path"] == str(path)
    timings = report["timings"]
    assert {"read", "frame", "segment", "encode", "denoise", "noise", "update", "write"} <= set(timings)
    assert timings["rows"] >= 2 * C * 2
    assert sum(timings[part] for part in ("encode", "denoise", "noise", "update")) <= timings["segment"] + 0.01
    assert calls[-1] == (2 * C * 2 * 3, 2 * C * 2 * 3)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out" / "scan_soft.nii.gz").dataobj), result.soft)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runs": 0}, "runs 0"),
        ({"steps": 0}, "steps"),
        ({"steps": T + 1}, "steps"),
        ({"sampler": "euler"}, "euler"),
        ({"combine": "max"}, "max"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"slices": "1:9"}, "1:9"),
        ({"slice_axis": 3}, "slice axis 3"),
        ({"batch": 0}, "batch"),
    ],
)
def test_wrong_arguments_get_one_line(segmenter: Segmenter, options: dict[str, Any], said: str) -> None:
    with pytest.raises(CdiffError, match=said) as caught:
        segmenter.segment(volume(SIZE, SIZE, 2), **{**QUICK, **options})
    assert "\n" not in str(caught.value)


def test_no_engine_stands_in_for_another(bundle: Path) -> None:
    for engine, device in (("tensorrt", "cpu"), ("onnxruntime", "tpu"), ("abacus", "cpu")):
        with pytest.raises(CdiffError):
            cdiff.load(bundle, engine=engine, device=device)


def test_a_changed_bundle_is_not_opened(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b")
    data = bytearray((path / "denoiser.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "denoiser.onnx").write_bytes(data)
    with pytest.raises(CdiffError, match=r"denoiser\.onnx"):
        Segmenter.open(path)


def test_an_open_bundle_can_be_given(bundle: Path) -> None:
    assert Segmenter.open(open_bundle(bundle)).manifest.name == "tiny"


def test_masks_of_zero_and_one(tmp_path: Path) -> None:
    """The same chains, of which x itself and not (x + 1)/2 is the fraction."""
    other = cdiff.load(make_bundle(tmp_path / "zero", outside=0, variant="implicit-ensemble"))
    usual = cdiff.load(make_bundle(tmp_path / "usual", variant="implicit-ensemble"))
    scan = volume(SIZE, SIZE)
    found, wanted = (each.segment(scan, **QUICK, keep_runs=True) for each in (other, usual))
    x = 2 * wanted.soft - 1
    assert (x < 0).any()
    assert (x > 0).any()
    np.testing.assert_allclose(found.soft, np.maximum(x, 0), atol=1e-6)
    np.testing.assert_array_equal(found.mask, x >= 0.5)
    np.testing.assert_allclose(found.stack.run_std, 2 * wanted.stack.run_std, atol=1e-6)
    assert found.stack.runs is not None
    assert wanted.stack.runs is not None
    of_x = 2.0 * wanted.stack.runs - 255
    np.testing.assert_array_equal(found.stack.runs, np.maximum(of_x, 0))


def test_each_part_of_a_scan_is_timed_from_the_end_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", iter([10.0, 11.0, 14.0, 14.5]).__next__)
    clock = Clock()
    for part in ("read", "frame", "segment"):
        clock.lap(part)
    assert clock.laps == {"read": 1, "frame": 3, "segment": 0.5}
