"""Reading cases for training: what is found, what is left out and said, and batches that depend on nothing but seed and step."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.data.partition import held_out_of
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.framing import Framing
from cdiff.train.config import Config
from cdiff.train.data import Slices, fit_to_data, read_data, training_batch, validation_windows
from cdiff.train.presets import preset
from tests.synthetic import write_synthetic_dataset


def tile_config(**values: object) -> Config:
    return preset("tiny").with_values({"framing": "tile", "crop": 16, "jitter": 3, **values})


def test_split_folders_are_used_as_they_are(tiny_data: Path) -> None:
    data = read_data(tiny_data, preset("tiny"))
    assert data.summary["train"] == {"cases": 4, "cases_found": 4, "slices": 16}
    assert data.summary["val"] == {"cases": 2, "cases_found": 2, "slices": 8}
    assert data.notes == []


def test_the_size_of_the_slices_is_kept_where_all_have_one(tiny_data: Path, tmp_path: Path) -> None:
    """Those of Training count. Resampled slices have lost theirs."""
    assert read_data(tiny_data, tile_config()).summary["slice_size"] == [32, 32]
    assert read_data(tiny_data, preset("tiny").with_values({"framing": "centre"})).summary["slice_size"] == [32, 32]
    assert "slice_size" not in read_data(tiny_data, preset("tiny")).summary
    root = tmp_path / "data"
    write_synthetic_dataset(root, {"Training": 1, "Validation": 1}, raters=3, shape=(32, 32, 4))
    write_synthetic_dataset(tmp_path / "other", 1, raters=3, shape=(48, 32, 4))
    shutil.copytree(tmp_path / "other/case01", root / "Validation/case09")
    assert read_data(root, tile_config()).summary["slice_size"] == [32, 32]
    shutil.copytree(tmp_path / "other/case01", root / "Training/case09")
    assert "slice_size" not in read_data(root, tile_config()).summary


def test_without_split_folders_whole_cases_are_held_out_and_it_is_said(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "flat", 6, raters=3, shape=(32, 32, 4))
    data = read_data(root, preset("tiny").with_values({"val_fraction": 0.34}))
    assert len(set(data.val.names)) == 2
    assert set(data.train.names) | set(data.val.names) == {f"case{i:02d}" for i in range(1, 7)}
    assert not set(data.train.names) & set(data.val.names)
    assert "held out 2 of 6 cases" in data.notes[0]
    again = held_out_of(find_cases(root), root, json.loads(json.dumps(data.summary["held_out"])))
    assert {case.name for case in again} == set(data.val.names)


@pytest.mark.parametrize(("policy", "cases"), [("skip", 3), ("as-is", 4)])
def test_a_case_with_fewer_raters_is_reported_and_handled_as_chosen(
    tiny_data: Path, tmp_path: Path, policy: str, cases: int
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    (root / "Training" / "case02" / "task01_seg03.nii.gz").unlink()
    data = read_data(root, preset("tiny").with_values({"missing_raters": policy}))
    assert data.summary["train"]["cases"] == cases
    assert any("case02 has 2 masks, not 3" in note for note in data.notes)
    for variant, remedy in (("consensus", "skip or as-is"), ("annotator", "skip")):
        with pytest.raises(CdiffError, match=rf"case02 has 2 masks, not 3; set missing_raters={remedy}$"):
            read_data(root, preset("tiny").with_values({"missing_raters": "error", "variant": variant}))


def test_a_case_with_more_raters_is_never_used_in_part(tiny_data: Path) -> None:
    with pytest.raises(CdiffError, match="has 3 masks, not 2"):
        read_data(tiny_data, preset("tiny").with_values({"levels": 2, "missing_raters": "as-is"}))


def test_annotators_are_counted_over_the_cases(tiny_data: Path, tmp_path: Path) -> None:
    assert fit_to_data(preset("tiny"), tiny_data, []).network.levels == 3
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    (root / "Training" / "case02" / "task01_seg03.nii.gz").unlink()
    assert fit_to_data(preset("tiny"), root, []).network.levels == 3


@pytest.mark.parametrize("shape", [(40, 24), (24, 40, 3)])
def test_other_sizes_and_2d_images_are_resized_image_and_masks_alike(tmp_path: Path, shape: tuple[int, ...]) -> None:
    root = write_synthetic_dataset(tmp_path / "d", {"train": 2, "val": 1}, raters=3, shape=shape)
    data = read_data(root, preset("tiny"))
    assert len(data.train) == 2 * (shape[2] if len(shape) == 3 else 1)
    for image, masks in zip(data.train.images, data.train.masks, strict=True):
        assert image.shape == (1, 32, 32)
        assert masks.shape == (3, 32, 32)
        # The synthetic structure is bright: after resizing it still is, where the masks say.
        if masks[0].any():
            assert image[0][masks[0] > 0].mean() > image[0][masks[0] == 0].mean() + 0.5


def test_a_pixel_that_is_half_covered_when_a_mask_is_made_smaller_is_drawn(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "d", {"train": 1, "val": 1}, raters=3, shape=(64, 64))
    masks = np.zeros((64, 64), np.uint8)
    masks[:, 31:] = 1  # of pixel 15, whose middle lies at 31, the one half
    for path in (root / "train" / "case01").glob("*seg*.nii.gz"):
        nib.save(nib.Nifti1Image(masks, np.eye(4)), path)
    (drawn,) = read_data(root, preset("tiny")).train.masks
    assert drawn.shape == (3, 32, 32)
    assert drawn[:, :, 15:].all()
    assert not drawn[:, :, :15].any()


def test_batches_depend_on_seed_and_step_alone_and_an_epoch_sees_every_slice(tiny_data: Path) -> None:
    config = tile_config(augment=False)
    data = read_data(tiny_data, config)
    again = training_batch(data.train, config, 5, 4, 16)
    for step in (3, 9):
        training_batch(data.train, config, step, 4, 16)
    assert torch.equal(training_batch(data.train, config, 5, 4, 16).image, again.image)
    assert not torch.equal(training_batch(data.train, config, 6, 4, 16).image, again.image)
    plain = preset("tiny").with_values({"augment": False})
    seen = torch.cat([training_batch(data.train, plain, step, 4, 32).image for step in range(4)])
    whole = torch.stack(data.train.images)
    matches = (seen[:, None] == whole[None]).flatten(2).all(-1)
    assert torch.equal(matches.sum(0), torch.ones(16, dtype=torch.long))


def test_changed_intensities_are_the_same_whichever_part_of_the_batch_is_cut(tiny_data: Path) -> None:
    config = preset("tiny").with_values({"contrast": 0.3, "brightness": 0.2, "pixel_noise": 0.1})
    plain = preset("tiny")
    data = read_data(tiny_data, config)
    whole = training_batch(data.train, config, 5, 6, 32)
    part = training_batch(data.train, config, 5, 6, 32, range(2, 5))
    assert torch.equal(whole.image[2:5], part.image)
    assert torch.equal(whole.masks, training_batch(data.train, plain, 5, 6, 32).masks)
    assert not torch.equal(whole.image, training_batch(data.train, plain, 5, 6, 32).image)
    noisy = training_batch(data.train, plain.with_values({"pixel_noise": 0.1}), 5, 2, 32).image
    added = noisy - training_batch(data.train, plain, 5, 2, 32).image
    assert abs(np.corrcoef(added.flatten(1))[0, 1]) < 0.2, "each image has noise of its own"
    # Validation sees images as they are.
    assert torch.equal(validation_windows(data.train, [0], 32, "resize").image[0], data.train.images[0])


@pytest.mark.parametrize("framing", ["tile", "centre"])
@pytest.mark.parametrize("shape", [(20, 40), (7, 11), (32, 31)])
def test_a_slice_smaller_than_the_window_looks_in_training_as_when_segmenting(
    framing: str, shape: tuple[int, int]
) -> None:
    image = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    masks = (image[:1] > 0.5).to(torch.uint8)
    shown = validation_windows(Slices([image], [masks], [1], ["a"]), [0], 32, framing).image[0]
    windows = list(Framing(framing, (32, 32)).frame(image[None].numpy()))  # type: ignore[arg-type]
    assert any(np.abs(shown.numpy() - one).max() < 1e-5 for one in windows)


@pytest.mark.parametrize("shape", [(7, 11), (32, 31), (29, 32)])
def test_without_augmentation_a_smaller_slice_is_trained_on_as_it_is_segmented(shape: tuple[int, int]) -> None:
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    masks = (image > 0.5).to(torch.uint8)
    batch = training_batch(
        Slices([image], [masks], [1], ["a"]), tile_config(augment=False, image_size=32, crop=0), 0, 1, 32
    )
    (window,) = Framing("centre", (32, 32)).frame(image[None].numpy())
    assert np.array_equal(batch.image[0].numpy(), window)
    assert int(batch.masks.sum()) == int(masks.sum()), (
        "outside the slice nothing is marked, and within it nothing is lost"
    )


def test_votes_count_the_annotators(tiny_data: Path) -> None:
    config = preset("tiny").with_values({"augment": False})
    data = read_data(tiny_data, config)
    batch = validation_windows(data.train, [0, 1], 32, "resize")
    expected = torch.stack([m.sum(0, keepdim=True) for m in data.train.masks[:2]])
    assert torch.equal(batch.votes, expected.to(torch.uint8))
    assert int(batch.votes.max()) == 3


def test_windows_mostly_hold_the_structure_and_sometimes_plain_background(tiny_data: Path) -> None:
    config = tile_config(augment=False, jitter=2)
    data = read_data(tiny_data, config)
    votes = torch.cat([training_batch(data.train, config, step, 16, 16).votes for step in range(12)])
    share = np.mean([bool(v.any()) for v in votes])
    assert share > 0.8


def test_windows_lie_around_what_anyone_drew_and_within_the_slice() -> None:
    inner, edge = torch.zeros(2, 2, 60, 80, dtype=torch.uint8)
    inner[1, 40:44, 10:20] = edge[0, 57:, :4] = 1
    slices = Slices([torch.zeros(1, 60, 80)] * 3, [inner, edge, torch.zeros_like(edge)], [2] * 3, ["a", "b", "c"])
    assert [slices.rectangle(i) for i in range(3)] == [((40, 44), (10, 20)), ((57, 60), (0, 4)), None]
    batch = training_batch(slices, tile_config(augment=False, jitter=0), 0, 600, 16)
    around = 0
    for window in (inner[:, 34:50, 7:23], edge[:, 44:60, :16]):
        around += sum(torch.equal(masks, window > 0) for masks in batch.masks)
    assert 340 < around < 380, "all of 400 but the tenth that lies anywhere"


def test_windows_of_a_slice_without_a_structure_lie_anywhere_in_it() -> None:
    places = torch.stack(torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij"))
    slices = Slices([places], [torch.zeros(1, 60, 80, dtype=torch.uint8)], [1], ["a"])
    corners = training_batch(slices, tile_config(augment=False), 0, 400, 16).image[:, :, 0, 0]
    assert corners.min(dim=0).values.tolist() == [0, 0]
    assert corners.max(dim=0).values.tolist() == [60 - 16, 80 - 16]


def test_windows_of_tiles_lie_around_what_was_drawn_also_where_that_is_far_apart() -> None:
    """Each of two annotators drew something else; in the middle between them there is nothing."""
    masks = torch.zeros(2, 60, 80, dtype=torch.uint8)
    masks[0, 4:8, 4:8] = masks[1, 10:14, 70:74] = 1
    slices = Slices([torch.zeros(1, 60, 80)], [masks], [2], ["a"])
    batch = training_batch(slices, tile_config(augment=False, jitter=0), 0, 200, 16)
    met = batch.masks.any(dim=(2, 3)).sum(dim=0)
    assert (met > 80).all(), "of all but the tenth that lies anywhere, each in half"
    centred = preset("tiny").with_values({"framing": "centre", "jitter": 0, "augment": False})
    assert training_batch(slices, centred, 0, 200, 16).votes.any(dim=(1, 2, 3)).sum() < 20


def test_a_window_lies_up_to_jitter_pixels_off_on_either_side() -> None:
    masks = torch.zeros(1, 60, 80, dtype=torch.uint8)
    masks[0, 28:32, 38:42] = 1
    slices = Slices([torch.zeros(1, 60, 80)], [masks], [1], ["a"])
    batch = training_batch(slices, tile_config(augment=False, jitter=3), 0, 400, 16)
    whole = [window[0].nonzero() for window in batch.masks if window.sum() == 16]
    offsets = np.array([(corner - 6).tolist() for corner in (places.min(dim=0).values for places in whole)])
    assert len(whole) > 300
    assert np.percentile(offsets, [4, 96], axis=0).tolist() == [[-3, -3], [3, 3]]
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.2


@pytest.mark.parametrize(("framing", "told"), [("centre", True), ("tile", False)])
def test_structures_off_the_centre_that_the_model_sees_are_told(tmp_path: Path, framing: str, told: bool) -> None:
    root = write_synthetic_dataset(tmp_path / "d", {"Training": 2, "Validation": 1}, raters=3, shape=(32, 32, 4))
    settings = {"framing": framing, "image_size": 8, "attention_depths": (), "jitter": 0}
    assert not any(
        "outside the central" in note for note in read_data(root, preset("tiny").with_values(settings)).notes
    )
    for case in sorted((root / "Training").iterdir())[:1]:
        for path in case.glob("*seg*.nii.gz"):
            image = nib.load(path)
            masks = np.zeros(image.shape, np.uint8)
            masks[1:4, 1:4, :3] = 1  # the last slice is not marked
            nib.save(nib.Nifti1Image(masks, image.affine), path)
    notes = [n for n in read_data(root, preset("tiny").with_values(settings)).notes if "outside the central" in n]
    assert bool(notes) == told
    if told:
        assert "on 3 of 11 marked slices all that was drawn lies outside the central 8 x 8 pixels" in notes[0]


def test_tiles_are_validated_where_something_was_drawn() -> None:
    """In the middle of the slice nothing is, and a model that draws nothing would be right."""
    masks = torch.zeros(2, 61, 80, dtype=torch.uint8)
    masks[0, 58:, 74:78] = masks[:, 2:6, 1:3] = 1
    ramp = torch.arange(61.0 * 80).reshape(1, 61, 80)
    batch = validation_windows(Slices([ramp], [masks], [2], ["a"]), [0], 16, "tile")
    assert torch.equal(batch.image[0], ramp[:, :16, :16])
    assert int(batch.votes.sum()) == 16
    turned = validation_windows(Slices([ramp], [masks.flip(1, 2)], [2], ["a"]), [0], 16, "tile")
    assert torch.equal(turned.image[0], ramp[:, 45:, 64:])
    thin = torch.zeros(1, 13, 80, dtype=torch.uint8)  # as a window has more rows than that, it begins above the slice
    thin[0, 4:6, 70:] = 1
    for narrow in (thin, thin.mT):
        slices = Slices([torch.zeros(narrow.shape)], [narrow], [1], ["a"])
        assert int(validation_windows(slices, [0], 16, "tile").votes.sum()) == 20
    centred = validation_windows(Slices([ramp], [masks], [2], ["a"]), [0], 16, "centre")
    assert torch.equal(centred.image[0], ramp[:, 22:38, 32:48])
    assert int(centred.votes.sum()) == 0


@pytest.mark.parametrize("mode", ["tile", "centre"])
@pytest.mark.parametrize("shape", [(13, 16), (16, 11), (13, 21), (7, 9)])
def test_a_small_slice_lies_in_its_validation_window_as_when_it_is_segmented(mode: str, shape: tuple[int, int]) -> None:
    masks = torch.ones(1, *shape, dtype=torch.uint8)
    image = torch.arange(1.0, 1 + math.prod(shape)).reshape(1, *shape)
    batch = validation_windows(Slices([image], [masks], [1], ["a"]), [0], 16, mode)
    there = Framing("tile" if mode == "tile" else "centre", (16, 16)).frame(image[None].numpy()).image(0)
    inside = batch.masks[0, 0]
    assert int(inside.sum()) == math.prod(min(n, 16) for n in shape)
    np.testing.assert_allclose(batch.image[0][:, inside].numpy(), there[:, inside.numpy()], rtol=1e-5)


def test_unusable_data_is_refused_with_its_place(tmp_path: Path, tiny_data: Path) -> None:
    with pytest.raises(CdiffError, match="nowhere does not exist; give a folder"):
        read_data(tmp_path / "nowhere", preset("tiny"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CdiffError, match="no case in"):
        read_data(tmp_path / "empty", preset("tiny"))
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    victim = root / "Training" / "case01" / "task01_seg02.nii.gz"
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(CdiffError, match=r"task01_seg02\.nii\.gz"):
        read_data(root, preset("tiny"))
    with pytest.raises(CdiffError, match="no usable train slice"):
        read_data(tiny_data, dataclasses.replace(preset("tiny").with_values({"levels": 5})))


def test_the_variant_that_tells_annotators_apart_takes_the_cases_of_the_same_ones(
    tiny_data: Path, tmp_path: Path
) -> None:
    """A table in which not everybody read every case; seg1 and seg01 are one name."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    odd = root / "Training/case02"
    (odd / "task01_seg03.nii.gz").rename(odd / "task01_seg04.nii.gz")
    (root / "Training/case01/task01_seg01.nii.gz").rename(root / "Training/case01/task01_seg1.nii.gz")
    config = preset("tiny").with_values({"variant": "annotator"})
    data = read_data(root, config)
    assert data.notes == ["case02 has masks of seg01, seg02, seg04, but other cases of seg01, seg02, seg03: skipped"]
    assert "case02" not in data.train.names
    assert {"case01", "case03"} <= set(data.train.names)
    with pytest.raises(CdiffError, match="case02 has masks of"):
        read_data(root, config.with_values({"missing_raters": "error"}))
    assert "case02" in read_data(root, preset("tiny")).train.names
    for case in ("case03", "case04"):  # most lack the third; who they are is said by the one that has all
        (root / "Training" / case / "task01_seg03.nii.gz").unlink()
    (odd / "task01_seg04.nii.gz").unlink()
    assert set(read_data(root, config).train.names) == {"case01"}


def test_cases_with_another_number_of_masks_than_c_say_which_setting_takes_them(tiny_data: Path) -> None:
    """What it names is a setting that does."""
    for C, said, taken in (
        (5, "missing_raters=as-is uses the masks that there are", {"missing_raters": "as-is"}),
        (2, "levels=3 matches them", {"levels": 3}),
    ):
        config = preset("tiny").with_values({"levels": C})
        with pytest.raises(CdiffError, match=rf"no train case has {C} masks \(they have 3\); --set {said}"):
            read_data(tiny_data, config)
        assert len(read_data(tiny_data, config.with_values(taken)).train)
    with pytest.raises(CdiffError, match=r"no train case has 1 mask \(they have 3\)"):
        read_data(tiny_data, preset("tiny").with_values({"levels": 1}))
    annotator = preset("tiny").with_values({"levels": 5, "variant": "annotator"})
    with pytest.raises(CdiffError, match=r"needs them all; another variant with --set missing_raters=as-is"):
        read_data(tiny_data, annotator)
    assert len(
        read_data(tiny_data, annotator.with_values({"variant": "no-annotator", "missing_raters": "as-is"})).train
    )
    with pytest.raises(CdiffError, match=r"val_fraction=0\.95 of 4 cases leaves none to train on"):
        read_data(tiny_data / "Training", preset("tiny").with_values({"val_fraction": 0.95}))


def test_labels_that_are_inside_are_read_and_kept(tmp_path: Path) -> None:
    """The run says which they were, and so does its bundle: evaluate takes the same."""
    root = write_synthetic_dataset(tmp_path / "d", {"train": 1, "val": 1}, raters=3, shape=(32, 32), channels=2)
    for path in root.glob("*/*/*seg*.nii.gz"):
        nib.save(nib.Nifti1Image(np.repeat(np.array([0, 1, 2, 4], np.uint8), 256).reshape(32, 32), np.eye(4)), path)
    config = fit_to_data(preset("tiny"), root, ["labels=[1,4]"])
    assert (config.network.levels, config.network.image_channels) == (3, 2)
    data = read_data(root, config)
    assert data.train.masks[0][:, ::8, 0].tolist() == [[0, 1, 0, 1]] * 3
    assert data.summary["labels"] == [1, 4]
    given = fit_to_data(preset("tiny"), root, ["image_channels=5"]).network
    assert (given.levels, given.image_channels) == (3, 5)


def test_c_comes_from_the_masks_unless_it_is_set(tmp_path: Path) -> None:
    root = write_synthetic_dataset(tmp_path / "five", 3, raters=5, shape=(32, 32))
    assert fit_to_data(preset("tiny"), root, ["batch=2"]).network.levels == 5
    chosen = fit_to_data(preset("tiny"), root, ["levels=4", "batch=2"])
    assert (chosen.network.levels, chosen.training.batch) == (4, 2)
