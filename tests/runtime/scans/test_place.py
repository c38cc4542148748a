"""A place that the user names: the maps of a crop around it, bit for bit, wherever it lies; what is said; every mistake in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import cdiff
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.prepared import notes
from cdiff.runtime.results import Result
from cdiff.runtime.sampling.framing import Framing, box_around, resize
from cdiff.runtime.scans.intensity import Intensity
from cdiff.runtime.scoring.metrics import dice
from cdiff.runtime.segmenter import Segmenter
from tests.conftest import REPOSITORY
from tests.runtime.dicom_files import orthogonal
from tests.runtime.scan_files import nifti
from tests.runtime.test_segmenter import QUICK, SIZE, make_bundle, volume

FIELD = 32
DEMO = REPOSITORY / "cdiff" / "demo" / "image.nii.gz"


def centre_model(path: Path, size: Any = (FIELD, FIELD), **changes: Any) -> Segmenter:
    """A tiny model that looks at SIZE x SIZE pixels, trained on slices of `size`; none: its bundle does not say."""
    data = {} if size is None else {"slice_size": list(size)}
    return cdiff.load(make_bundle(path, **{"framing": "centre", "training": {"data": data}, **changes}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return centre_model(tmp_path_factory.mktemp("place") / "tiny")


def around(crop: Any, corner: tuple[int, int], shape: tuple[int, int]) -> Any:
    """`crop` [h, w, S] in slices of `shape`, among voxels that no percentile of the crop has."""
    whole = np.random.default_rng(5).integers(-1000, 3000, (*shape, crop.shape[2])).astype(np.int16)
    y, x = corner
    whole[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return whole


def assert_same_maps(found: Any, crop: Any, corner: tuple[int, int]) -> None:
    """Bit for bit those of the crop where it lies, and 0 elsewhere; NaN in the same slices."""
    y, x = corner
    h, w = crop.soft.shape[:2]
    for name in ("soft", "levels", "uncertainty", "mask"):
        got, want = getattr(found, name), getattr(crop, name)
        np.testing.assert_array_equal(got[y : y + h, x : x + w], want)
        outside = np.nan_to_num(got).copy()
        outside[y : y + h, x : x + w] = 0
        assert not outside.any(), name
    assert np.nanmax(crop.soft) > 0.1, "maps of nothing would not tell"


CHAIN: dict[str, Any] = {"fast": True, "seed": 4, "slices": "2:4", "keep_runs": True}


@pytest.fixture(scope="module")
def demo_alone() -> tuple[Segmenter, np.ndarray, Result]:
    """The shipped model, its demo crop, and the crop's own maps."""
    crop, model = np.asanyarray(nib.load(DEMO).dataobj), cdiff.load()
    return model, crop, model.segment(crop, **CHAIN)


@pytest.mark.parametrize("corner", [(0, 0), (384, 384), (0, 211), (97, 150)])
def test_the_shipped_model_gives_a_crops_maps_wherever_it_lies(
    corner: tuple[int, int], demo_alone: tuple[Segmenter, np.ndarray, Result]
) -> None:
    """At a corner, at an edge and inside of a 512 x 512 slice; with mirrored runs and all of them kept."""
    model, crop, alone = demo_alone
    place = (corner[0] + 64, corner[1] + 64, 3)
    found = model.segment(around(crop, corner, (512, 512)), at=place, **CHAIN)
    assert found.report["mirror"] is True
    assert_same_maps(found, alone, corner)
    assert found.stack.runs is not None
    assert alone.stack.runs is not None
    y, x = corner
    np.testing.assert_array_equal(found.stack.runs[..., y : y + 128, x : x + 128], alone.stack.runs)
    assert found.window == (slice(y + 32, y + 96), slice(x + 32, x + 96)), "what the picture is drawn around"
    assert alone.window is None
    assert found.report["framing"] == alone.report["framing"] | {
        "at": list(place),
        "window": {"first": [y + 32, x + 32], "size": [64, 64]},
        "field": {"first": [y, x], "size": [128, 128]},
    }


def test_without_a_place_a_crop_in_a_large_slice_has_other_maps(model: Segmenter) -> None:
    """Even in the slice's very middle: its percentiles are those of the whole slice."""
    crop = volume(FIELD, FIELD, 2)
    whole = around(crop, (32, 32), (96, 96))
    inside = model.segment(whole, **QUICK).soft[32:64, 32:64]
    assert abs(inside - model.segment(crop, **QUICK).soft).max() > 0.01


@pytest.mark.parametrize(
    ("scope", "method", "size", "mirror"),
    [
        ("slice", "percentile", (32, 24), True),
        ("volume", "percentile", (24, 40), False),
        ("slice", "standard", (33, 31), False),
        ("volume", "standard", (32, 32), True),
    ],
)
def test_every_normalisation_and_shape(
    tmp_path: Path, scope: str, method: str, size: tuple[int, int], mirror: bool
) -> None:
    """The percentiles of a volume are those of the crop in all slices, also where a part of them is segmented."""
    model = centre_model(tmp_path / "b", size, intensity=Intensity(scope, method=method).to_json(), mirror=mirror)
    crop = volume(*size, 5)
    crop[..., 0] //= 4
    corner, chain = (70 - size[0], 13), {**QUICK, "runs": 4, "slices": "1:3"}
    at = (corner[0] + size[0] // 2, corner[1] + size[1] // 2, 2)
    found = model.segment(around(crop, corner, (70, 90)), at=at, **chain)
    assert_same_maps(found, model.segment(crop, **chain), corner)


def test_fixed_numbers_need_no_field_and_the_noise_is_the_crops(tmp_path: Path) -> None:
    fixed = Intensity("slice", method="standard", mean=(100.0,), std=(50.0,)).to_json()
    model = centre_model(tmp_path / "b", intensity=fixed)
    crop = volume(FIELD, FIELD, 1)
    whole, at = around(crop, (5, 40), (80, 80)), (21, 56, 0)
    assert_same_maps(model.segment(whole, at=at, **QUICK), model.segment(crop, **QUICK), (5, 40))
    unsaid = centre_model(tmp_path / "unsaid", None, intensity=fixed)
    assert not any("does not say how large" in note for note in notes(unsaid.prepare(whole, at=at), unsaid.manifest))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_indices_are_those_of_the_array_as_stored(model: Segmenter, axis: int) -> None:
    crop = volume(FIELD, FIELD, 4)
    whole = around(crop, (8, 50), (64, 100))
    at = [24, 66]
    at.insert(axis, 2)
    found = model.segment(np.moveaxis(whole, 2, axis), at=at, slice_axis=axis, **QUICK)
    expected = model.segment(whole, at=(24, 66, 2), **QUICK)
    np.testing.assert_array_equal(found.soft, np.moveaxis(expected.soft, 2, axis))
    assert_same_maps(expected, model.segment(crop, slices="2:3", **QUICK), (8, 50))


def test_row_and_column_of_a_picture_and_of_a_flat_array(model: Segmenter, tmp_path: Path) -> None:
    crop = volume(FIELD, FIELD, 1)
    pixels = np.clip(around(crop, (60, 9), (100, 48)), 0, 255).astype(np.uint8)[..., 0]
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (48, 100), "48 across and 100 down: row 76 is no column"
    alone = model.segment(crop[..., 0], **QUICK)
    for scan in (tmp_path / "x.png", pixels):
        for at in ((76, 25), "76,25", np.array([76, 25])):
            assert_same_maps(model.segment(scan, at=at, **QUICK), alone, (60, 9))


@pytest.mark.parametrize(
    ("point", "start"),
    [
        ((50, 50), (42, 42)),
        ((8, 92), (0, 84)),
        ((7, 93), (0, 84)),
        ((0, 99), (0, 84)),
        ((99, 0), (84, 0)),
    ],
)
def test_near_an_edge_the_window_is_moved_inside(
    model: Segmenter, point: tuple[int, int], start: tuple[int, int]
) -> None:
    rows, columns = box_around((100, 100), (SIZE, SIZE), point)
    assert (rows.start, columns.start) == start
    assert (rows.stop, columns.stop) == (start[0] + SIZE, start[1] + SIZE)
    found = model.segment(volume(100, 100, 1), at=(*point, 0), **QUICK)
    held = np.zeros((100, 100), bool)
    held[rows, columns] = True
    assert not found.soft[~held].any()
    assert (found.soft[held] > 0).mean() > 0.9
    moved = point not in ((50, 50), (8, 92))
    assert any("near the slice's edge" in note for note in found.report["warnings"]) == moved


def test_a_place_off_the_middle_of_the_crop_is_off_it_there_too(model: Segmenter) -> None:
    """The crop fills the slice's corner, and the place is too near to the edge for a crop around it."""
    crop = volume(FIELD, FIELD, 1)
    found = model.segment(around(crop, (0, 58), (70, 90)), at=(3, 86, 0), **QUICK)
    assert_same_maps(found, model.segment(crop, at=(3, 28, 0), **QUICK), (0, 58))
    assert found.report["framing"]["window"] == {"first": [0, 74], "size": [SIZE, SIZE]}


def test_a_slice_that_is_narrower_than_the_window_is_padded_as_without_a_place(model: Segmenter) -> None:
    strip = around(volume(10, FIELD, 1), (0, 20), (10, 80))
    found = model.segment(strip, at=(4, 36, 0), **QUICK)
    assert any("the model sees 16 x 16 of each slice's 10 x 80 pixels" in note for note in found.report["warnings"])
    assert_same_maps(found, model.segment(strip[:, 20:52], **QUICK), (0, 20))


def test_slices_of_training_that_were_smaller_than_the_window(tmp_path: Path) -> None:
    """The window is filled from the scan, not by reflection; percentiles are of as much as training saw."""
    model = centre_model(tmp_path / "b", (12, 12))
    array = volume(60, 60, 1).astype(np.float32)
    array[34:] *= 9  # in the window, and outside of the field
    ready = model.prepare(array, at=(30, 30, 0))
    low, high = np.percentile(array[24:36, 24:36], (0.5, 99.5)).astype(np.float32)
    expected = np.clip((array[22:38, 22:38, 0] - low) / (high - low) * 2 - 1, -1, 1)
    np.testing.assert_allclose(ready.windows.image(0)[0], expected, atol=1e-6)
    place = model.prepare(array, at=(30, 30, 0), shrink=2).place
    assert place is not None
    assert place.window == (slice(14, 46), slice(14, 46)), "nor is one of shrunk slices"


def test_a_bundle_that_does_not_say_takes_whole_slices_and_says_so(tmp_path: Path) -> None:
    model = centre_model(tmp_path / "old", None)
    array = volume(60, 70, 2)
    ready = model.prepare(array, at=(20, 50, 1))
    whole = Intensity("slice").apply(np.moveaxis(array, 2, 0)[1:, None])
    np.testing.assert_array_equal(ready.windows.image(0), whole[0, :, 12:28, 42:58])
    report = model.segment(ready, **QUICK).report
    assert any("does not say how large" in note for note in report["warnings"])
    assert report["framing"]["field"] == {"first": [0, 0], "size": [60, 70]}
    assert not any("--at" in note for note in model.segment(array, **QUICK).report["warnings"])


def test_the_slice_of_the_place_alone_unless_others_are_named(model: Segmenter) -> None:
    array = volume(60, 60, 30)
    alone = model.segment(array, at=(30, 30, 12), **QUICK)
    assert alone.slices == range(12, 13)
    assert np.isnan(alone.soft[..., 11]).all()
    (note,) = [note for note in alone.report["warnings"] if note.startswith("only")]
    assert note.startswith("only slice 12 (of 0 to 29), which holds 30,30,12,")
    assert note.endswith("such as --slices 7:18")
    for k, such in ((2, "0:8"), (28, "23:30")):  # none that is not there
        assert any(n.endswith(f"--slices {such}") for n in notes(model.prepare(array, at=(30, 30, k)), model.manifest))
    named = model.segment(array, at=(30, 30, 12), slices="12:14", **QUICK)
    np.testing.assert_array_equal(named.soft[..., 12], alone.soft[..., 12])
    assert not any("such as --slices" in note for note in named.report["warnings"])
    flat = model.segment(array[..., :1], at=(30, 30, 0), **QUICK)
    assert not any(note.startswith("only") for note in flat.report["warnings"])


@pytest.mark.parametrize(("shape", "told"), [((60, 32, 2), "--at I,J,K"), ((32, 60), "--at I,J "), ((36, 36, 2), "")])
def test_who_segments_a_large_scan_without_a_place_is_told_of_it(
    model: Segmenter, shape: tuple[int, ...], told: str
) -> None:
    (note,) = [n for n in model.segment(volume(*shape), **QUICK).report["warnings"] if "the model sees" in n]
    assert f"the central 16 x 16 of each slice's {shape[0]} x {shape[1]} pixels" in note
    assert ("--at" in note) == bool(told)
    assert told in note
    assert ("trained on 32 x 32 pixels" in note) == ("scaled by the whole slice" in note) == bool(told)
    just = model.prepare(volume(16, 16, 2))
    assert not any("the model sees" in n for n in notes(just, model.manifest)), "all of it"


@pytest.mark.parametrize(
    ("at", "more", "said"),
    [
        ((1, 2), {}, "at 1,2 does not fit a volume of 40 x 50 x 6; give I,J,K"),
        ("1,2,3,4", {}, "at 1,2,3,4 does not fit a volume"),
        ("here", {}, "at 'here' cannot be read; give a voxel in whole numbers"),
        ("1,2,", {}, "cannot be read"),
        ((1.5, 2, 3), {}, "cannot be read"),
        ("L30,P20", {}, "at 'L30,P20' cannot be read; a point is millimetres to the right (R) or left (L)"),
        ("L30,R20,S1", {}, "a point is millimetres"),
        *((wrong, {}, "a point is millimetres") for wrong in ("L30,20,S1", "L30,P20,S50,R5")),
        ("L30,P20,S50", {}, "the scan's header does not say how the patient lies; give a voxel"),
        (7, {}, "at 7 cannot be read"),
        ((40, 0, 0), {}, "at 40,0,0 is not in this scan of 40 x 50 x 6; the first index must be 0 to 39"),
        ((0, 50, 0), {}, "the second index must be 0 to 49"),
        ((0, 0, 6), {}, "the third index must be 0 to 5"),
        ((0, -1, 0), {}, "the second index must be 0 to 49"),
        ((0, 0, 4), {"slices": "0:4"}, "at 0,0,4 lies in slice 4, which slices 0:4 leave out"),
        ((5, 0, 4), {"slices": "0:4", "slice_axis": 0}, "lies in slice 5"),
        ((0, 0, 4), {"slices": "0:9"}, "slices 0:9 are not in this scan"),
    ],
)
def test_mistakes_get_one_line(model: Segmenter, at: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(CdiffError) as caught:
        model.segment(volume(40, 50, 6), at=at, **more, **QUICK)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", ["mm", "meter"])
def test_a_point_in_space_is_the_voxel_that_lies_there(model: Segmenter, unit: str, tmp_path: Path) -> None:
    """As a viewer shows the cursor, in any order and with either sign; on an oblique grid; the header's unit is minded."""
    affine = np.vstack([orthogonal((0.7, 0.8, 2.5)), [0, 0, 0, 1]])
    stored = affine if unit == "mm" else np.diag([0.001, 0.001, 0.001, 1]) @ affine
    scan = nifti(tmp_path / "a.nii.gz", volume(60, 70, 6), stored, unit)
    right, front, up = affine[:3, :3] @ (20.3, 40.4, 2.6) + affine[:3, 3]
    wanted = model.segment(scan, at=(20, 40, 3), **QUICK)
    for at in (f"R{right},A{front},S{up}", f"s{up:.1f}mm, l{-right:.1f}, P {-front:.1f}"):
        found = model.segment(scan, at=at, **QUICK)
        np.testing.assert_array_equal(found.soft, wanted.soft)
        assert found.report["framing"]["at"] == [20, 40, 3]
    with pytest.raises(CdiffError, match=r"at R-900,A0,S0 \(voxel -\d+,.*\) is not in this scan of 60 x 70 x 6"):
        model.segment(scan, at="R-900,A0,S0", **QUICK)


@pytest.mark.parametrize(
    ("point", "first", "inner"),
    [((100, 90), (36, 26), (32, 32)), ((3, 150), (0, 29), (1, 60)), ((130, 3), (43, 0), (43, 1))],
)
@pytest.mark.parametrize("scope", ["slice", "volume"])
def test_a_shrunk_part_gives_the_maps_of_such_a_crop(
    point: tuple[int, int], first: tuple[int, int], inner: tuple[int, int], scope: str, tmp_path: Path
) -> None:
    """In the middle and at edges, also of a side that is odd: what was shrunk by hand, segmented, and put back by hand."""
    model = centre_model(tmp_path / "b", (64, 64), intensity={"scope": scope, "lower": 0.5, "upper": 99.5})
    array = volume(171, 157, 4).astype(np.float32)
    found = model.segment(array, at=(*point, 2), shrink=2, slices="1:4", **QUICK)
    rows, columns = (slice(start, start + 128) for start in first)
    small = np.stack([resize(one, (64, 64)) for one in np.moveaxis(array[rows, columns], 2, 0)], axis=2)
    crop = model.segment(small, at=(*inner, 2), slices="1:4", **QUICK)
    y, x = (min(max(at - 8, 0), 48) for at in inner)
    expected = np.zeros((171, 157, 3), np.float32)
    for k in range(3):
        window = resize(crop.soft[y : y + 16, x : x + 16, k + 1], (32, 32))
        top, left = rows.start + 2 * y, columns.start + 2 * x
        expected[top : top + 32, left : left + 32, k] = window
    np.testing.assert_allclose(found.soft[..., 1:], expected, atol=1e-6)
    assert expected.max() > 0.1, "maps of nothing would not tell"
    framing = found.report["framing"]
    assert framing["window"] == {"first": [rows.start + 2 * y, columns.start + 2 * x], "size": [32, 32]}
    assert framing["field"] == {"first": [rows.start, columns.start], "size": [128, 128]}
    assert framing["shrink"] == 2
    (note,) = [note for note in found.report["warnings"] if "the model sees" in note]
    assert note.startswith("the model sees 32 x 32 of each slice's 171 x 157 pixels, shrunk to 16 x 16, around ")
    assert ("near the slice's edge" in note) == (inner != (32, 32))


def test_shrinking_by_one_changes_nothing(model: Segmenter) -> None:
    array = volume(60, 70, 1)
    one, none = (model.segment(array, at=(20, 50, 0), shrink=n, **QUICK) for n in (1, None))
    np.testing.assert_array_equal(one.levels, none.levels)
    assert one.report["framing"] == none.report["framing"]


def test_a_bundle_that_says_no_size_shrinks_the_whole_slice(tmp_path: Path) -> None:
    models = [centre_model(tmp_path / str(size), size) for size in (None, (30, 35))]
    array, asked = volume(60, 71, 1), {"at": (20, 50, 0), "shrink": 2, **QUICK}
    np.testing.assert_array_equal(*(model.segment(array, **asked).levels for model in models))


def test_the_shipped_model_follows_a_nodule_twice_as_large() -> None:
    """Magnified, the demo's nodule is more than the model looks for; shrunk again it has the map that it had."""
    crop, model = np.asanyarray(nib.load(DEMO).dataobj).astype(np.float32), cdiff.load()
    large = np.moveaxis(resize(np.moveaxis(crop, 2, 0), (256, 256)), 0, 2)
    k = crop.shape[2] // 2
    plain = model.segment(crop, slices=(k, k + 1), fast=True).mask[..., k]
    kept = model.segment(large, at=(128, 128, k), shrink=2, fast=True).mask[..., k]
    assert plain.sum() > 50
    assert dice(kept[::2, ::2] > 0, plain > 0) > 0.93


def test_shrinking_needs_a_place_and_room(model: Segmenter) -> None:
    array = volume(40, 50, 2)
    with pytest.raises(CdiffError, match=r"shrink needs the place of the structure; give --at too"):
        model.segment(array, shrink=2, **QUICK)
    for factor in (3, 0, -1):
        with pytest.raises(
            CdiffError, match=rf"shrink {factor} does not fit slices of 40 x 50 .* 16 x 16 pixels; 1 to 2"
        ):
            model.segment(array, at=(20, 20, 1), shrink=factor, **QUICK)
    with pytest.raises(CdiffError, match=r"shrink 2 does not fit slices of 12 x 50 .*smaller than the model's window"):
        model.segment(array[:12], at=(2, 20, 1), shrink=2, **QUICK)
    with pytest.raises(CdiffError, match="give slices, slice_axis, at, shrink and series to prepare"):
        model.segment(model.prepare(array, at=(20, 20, 1)), shrink=2, **QUICK)


def test_a_flat_image_takes_two_indices(model: Segmenter) -> None:
    with pytest.raises(CdiffError, match=r"at 1,2,0 does not fit an image of 40 x 50; give I,J, an index"):
        model.segment(volume(40, 50), at=(1, 2, 0), **QUICK)


@pytest.mark.parametrize("framing", ["tile", "resize"])
def test_a_model_that_looks_at_whole_slices_takes_no_place(tmp_path: Path, framing: str) -> None:
    model = centre_model(tmp_path / "b", framing=framing)
    with pytest.raises(CdiffError, match=rf"framing '{framing}' looks at the whole of each slice.*leave out --at"):
        model.segment(volume(40, 50, 6), at=(1, 1, 1), **QUICK)
    with pytest.raises(CdiffError, match="only 'centre' takes a point"):
        Framing(framing, (8, 8)).frame(np.zeros((1, 1, 9, 9), np.float32), (1, 1))  # type: ignore[arg-type]
