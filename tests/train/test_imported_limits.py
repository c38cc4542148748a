"""Checkpoints of the published codes that say too little, or hold what they should not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.intensity import Intensity
from cdiff.train.checkpoint import load_run
from cdiff.train.imported.importer import import_checkpoint
from cdiff.train.imported.normalisation import intensity_of, training_statistics
from cdiff.train.imported.options import Options
from cdiff.train.imported.weights import check_fit, shown
from tests.strict import every_warning_is_an_error
from tests.train.published import recorded


def test_a_soft_label_checkpoint_without_a_table_takes_its_number_of_annotators(tmp_path: Path) -> None:
    """As the published script writes it: args.json holds no number, and the network no table."""
    case = recorded("consensus")
    args = case.args | {"soft_label_training": True, "consensus_training": False, "number_of_annotators": None}
    path = dataclasses.replace(case, args=args).save(tmp_path / "soft")
    tensors = case.tensors()
    del tensors["label_emb.weight"]
    torch.save(tensors, path)
    unknown = import_checkpoint(path, tmp_path / "unknown")
    assert any("number_of_annotators=C" in note for note in unknown.notes)
    assert unknown.config.network.levels == 1
    told = import_checkpoint(path, tmp_path / "told", settings=["number_of_annotators=6"])
    assert told.config.network.levels == 6
    assert not any("number_of_annotators" in note for note in told.notes)
    network = load_run(told.path).network.state_dict()
    assert all(torch.equal(value, network[name]) for name, value in load_run(unknown.path).network.state_dict().items())


def test_a_consensus_checkpoint_that_has_lost_its_table_is_refused(tmp_path: Path) -> None:
    """A network of levels that is told none would draw the same thing for each."""
    case = recorded("consensus")
    path = case.save(tmp_path / "given")
    torch.save({name: tensor for name, tensor in case.tensors().items() if name != "label_emb.weight"}, path)
    says = r"the options say number_of_annotators=3, the tensors 0\):\n  missing    label_emb\.weight \[3, 128\]"
    with pytest.raises(CdiffError, match=says):
        import_checkpoint(path, tmp_path / "run")


def test_a_checkpoint_without_a_table_is_no_network_of_levels(tmp_path: Path) -> None:
    """Its one map would be taken for the first level's; it is what somebody's, or the mean, would be."""
    case = recorded("consensus")
    path = case.save(tmp_path / "given")
    path.with_name("args.json").unlink()
    torch.save({name: tensor for name, tensor in case.tensors().items() if name != "label_emb.weight"}, path)
    for training in ("consensus", "annotators"):
        with pytest.raises(CdiffError, match=r"has no table of levels .*was it --option no_annotator_training=True or"):
            import_checkpoint(path, tmp_path / "run", settings=[f"{training}_training=True"])
    done = import_checkpoint(path, tmp_path / "run", settings=["no_annotator_training=True"])
    assert any("number_of_annotators=C" in note for note in done.notes)
    settings = ["no_annotator_training=True", "number_of_annotators=1"]
    told = import_checkpoint(path, tmp_path / "told", settings=settings)
    assert not any("number_of_annotators" in note for note in told.notes)


@pytest.mark.parametrize("name", ["consensus", "consensus_256", "consensus_224"])
def test_weights_alone_show_their_network(name: str) -> None:
    """Without args.json: what a shape shows need not be said, only which training it was and what no tensor shows."""
    case = recorded(name)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in case.shapes.items()}
    alone = Options.read("consensus", shown(tensors, "consensus"), ["consensus_training=True", "dropout=0.1"])
    told = Options.read("consensus", case.args, ["dropout=0.1"])
    channels = case.args["condition_input_channel"]
    networks = [each.config(image_channels=channels, step=0, intensity=Intensity()).network for each in (alone, told)]
    assert networks[0] == networks[1]
    assert ("image_size" in alone.unseen) == (name == "consensus_224")  # 256 and 128 pixels have the same widths


@pytest.mark.parametrize("name", ["implicit", "implicit_options"])
def test_blocks_that_halve_the_size_are_told_from_those_that_do_not(name: str) -> None:
    """They look alike; those that double it have a place of their own."""
    case = recorded(name)
    found = shown({key: torch.empty(shape, device="meta") for key, shape in case.shapes.items()}, case.source)
    for option in ("resblock_updown", "num_res_blocks", "use_scale_shift_norm"):
        assert found[option] == case.args[option], option
    assert name == "implicit" or found["resblock_updown"]


def test_what_the_tensors_leave_open_is_not_guessed() -> None:
    """A damaged file has lost blocks that look like any other."""
    lost_of = {
        "implicit_options": "input_blocks.3.",
        "consensus": "input_blocks.3.",
        "consensus_options": "input_blocks.4.",
    }
    for name, lost in lost_of.items():
        case = recorded(name)
        left = {key: shape for key, shape in case.shapes.items() if not key.startswith(lost)}
        found = shown({key: torch.empty(shape, device="meta") for key, shape in left.items()}, case.source)
        assert found["num_channels"] == 32
        assert not found.keys() & {"num_res_blocks", "image_size", "deeper_net", "channel_mult"}
    case, lost = recorded("implicit"), "input_blocks.1.0.out_layers.3.weight"
    left = {key: torch.empty(shape, device="meta") for key, shape in case.shapes.items() if key != lost}
    assert "num_res_blocks" in shown(left, case.source)
    assert "channel_mult" not in shown(left, case.source)


def test_weights_alone_are_imported_once_the_training_is_named(tmp_path: Path) -> None:
    case = recorded("consensus")
    path = case.save(tmp_path / "given")
    told = import_checkpoint(path, tmp_path / "told")
    (path.parent / "args.json").unlink()
    with pytest.raises(CdiffError, match=r"--option consensus_training=True, or annotators_training, no_annot"):
        import_checkpoint(path, tmp_path / "run", settings=["number_of_annotators=3"])
    other = tmp_path / "args.json"
    other.write_text('{"learning_rate": 0.1}')  # of another program: an annotator's map would be drawn for each level
    with pytest.raises(CdiffError, match=r"args\.json does not say how it was trained: .*consensus_training=True"):
        import_checkpoint(path, tmp_path / "run", args=other)
    other.write_text(json.dumps(dict.fromkeys(case.args)))  # nulls say no more than what is left out
    alone = import_checkpoint(path, tmp_path / "alone", args=other, settings=["consensus_training=True"])
    assert any("assumed, since no tensor shows them" in note and "diffusion_steps=100" in note for note in alone.notes)
    wanted = load_run(told.path).network.state_dict()
    found = load_run(alone.path).network.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert not any("sigma_small" in note for note in alone.notes)  # its variance is learned
    fixed = recorded("consensus_short").save(tmp_path / "fixed")
    (fixed.parent / "args.json").unlink()
    notes = import_checkpoint(fixed, tmp_path / "fixed-run", settings=["annotators_training=True"]).notes
    assert any("assumed, since no tensor shows them" in note and "sigma_small=False" in note for note in notes)
    # What is said goes before what is shown, and is held against it.
    with pytest.raises(CdiffError, match="the options say num_res_blocks=2, the tensors 1"):
        import_checkpoint(path, tmp_path / "run", settings=["consensus_training=True", "num_res_blocks=2"])
    implicit = recorded("implicit")
    path = implicit.save(tmp_path / "implicit")
    path.with_name("args.json").unlink()
    done = import_checkpoint(path, tmp_path / "ensemble", settings=["image_size=32", "num_heads=4"])
    assert (done.config.network.base_channels, done.config.network.channel_mult) == (32, (1, 2))
    # Its size is not shown by its widths, and 256 would be cut to the loader's 224 without a word.
    assert not any("image_size=32, " in note for note in done.notes if "assumed, since no tensor shows them" in note)
    unsaid = import_checkpoint(path, tmp_path / "unsaid", settings=["num_heads=4", "attention_resolutions=128"]).notes
    assert any("assumed, since no tensor shows them" in note and "image_size=256, " in note for note in unsaid)
    with pytest.raises(CdiffError, match="the options say channel_mult=1,2,2, the tensors 1,2"):
        import_checkpoint(path, tmp_path / "run", settings=["channel_mult=1,2,2", "image_size=32"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 256}, "the options say image_size=256, the tensors 32"),
        ({"use_scale_shift_norm": True}, "the options say use_scale_shift_norm=True, the tensors False"),
    ],
)
def test_options_that_the_shapes_disprove_are_named(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    case = recorded("consensus")
    path = dataclasses.replace(case, args=case.args | change).save(tmp_path / "given")
    with pytest.raises(CdiffError) as caught:
        import_checkpoint(path, tmp_path / "run")
    assert says in str(caught.value)
    # 256, 224 and 128 pixels share their widths: which of them it is the shapes do not say, and so neither does the message.
    shared = recorded("consensus_256")
    tensors = {key: torch.empty(shape, device="meta") for key, shape in recorded("consensus_224").shapes.items()}
    options = Options.read("consensus", shared.args | {"deeper_net": False, "rrdb_blocks": 3}, [])
    with pytest.raises(CdiffError, match="rrdb_blocks=3, the tensors 10") as caught:
        check_fit(tensors, [], options, path)
    assert "say image_size" not in str(caught.value)
    assert (
        "attention_resolutions=16,8 with image_size=256, the tensors nowhere but in the bottleneck (as with attention_resolutions=1)"
        in str(caught.value)
    )


def test_what_no_tensor_shows_is_said_where_nothing_says_it(tmp_path: Path) -> None:
    case = recorded("implicit")
    path = case.save(tmp_path / "given")
    (path.parent / "args.json").unlink(missing_ok=True)
    named = [f"{name}={value}" for name, value in case.args.items() if value is not None]
    plain = [one for one in named if not one.startswith("num_heads=")]
    (note,) = [
        n
        for n in import_checkpoint(path, tmp_path / "a", settings=plain).notes
        if "assumed, since no tensor shows them" in n
    ]
    assert "num_heads=1" in note
    whole = import_checkpoint(
        path, tmp_path / "c", settings=[*plain, "diffusion_steps=1000", "timestep_respacing=ddim1000"]
    ).notes
    assert not any("1000 steps" in n or "respacing" in n.partition(":")[0] for n in whole)
    others = [*plain, "num_heads=1", "diffusion_steps=100", "timestep_respacing=10"]
    fewer = import_checkpoint(path, tmp_path / "b", settings=others).notes
    assert not any("num_heads=" in n for n in fewer)
    assert any("1000 steps" in n for n in fewer)
    assert any("timestep_respacing=10 is a matter of sampling: all 100 timesteps" in n for n in fewer)


def test_an_x0_that_was_not_clipped_is_said(tmp_path: Path) -> None:
    path = recorded("consensus").save(tmp_path / "given")
    for said, notes in (("True", 0), ("False", 1)):
        done = import_checkpoint(path, tmp_path / said, settings=[f"clip_denoised={said}"])
        assert sum("x0 is clipped to -1 and 1 here all the same" in note for note in done.notes) == notes


def test_the_published_loaders_crop_can_be_asked_for(tmp_path: Path) -> None:
    case = recorded("implicit")
    path = case.save(tmp_path / "given", "savedmodel050000.pt")
    done = import_checkpoint(path, tmp_path / "resized")
    assert (done.config.data.framing, done.step) == ("resize", 50_000)
    assert any("--image-size 224" in note for note in done.notes)
    cropped = import_checkpoint(path, tmp_path / "cropped", image_size=224)
    assert (cropped.config.data.framing, cropped.config.network.image_size) == ("centre", 224)
    assert not any("--image-size 224" in note for note in cropped.notes)


@pytest.mark.parametrize("how", ["meta", "float8", "too large", "flipped"])
def test_tensors_that_are_no_plain_finite_numbers_are_one_line(how: str, tmp_path: Path) -> None:
    case = recorded("consensus")
    path = case.save(tmp_path / "given")
    tensors, name = case.tensors(), "rrdb.HRconv.weight"
    weight = tensors[name]
    changed = {
        "meta": weight.to("meta"),
        "float8": weight.to(torch.float8_e4m3fn),
        "too large": torch.full(weight.shape, 1e300, dtype=torch.float64),
        "flipped": weight,
    }
    torch.save(tensors | {name: changed[how]}, path)
    if how == "flipped":
        data = bytearray(path.read_bytes())
        place = data.find(weight.numpy().tobytes())
        assert place > 0
        data[place] ^= 1
        path.write_bytes(data)
    with pytest.raises(CdiffError, match="is damaged" if how == "flipped" else rf"(wrong type|not finite) {name}"):
        import_checkpoint(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tensor_that_is_stored_as_its_negative_keeps_its_sign(tmp_path: Path) -> None:
    case = recorded("consensus")
    path, name = case.save(tmp_path / "given"), "out.2.bias"
    bias = case.tensors()[name]
    torch.save(case.tensors() | {name: torch._neg_view(-bias)}, path)
    network = load_run(import_checkpoint(path, tmp_path / "run").path).network
    torch.testing.assert_close(network.denoiser.last.bias.data, bias, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        *((f"{name}=0", "at least 1") for name in ("image_size", "num_channels", "num_res_blocks", "num_heads")),
        ("condition_input_channel=0", "at least 1"),
        *((f"diffusion_steps={steps}", "at least 2") for steps in (0, 1)),
        *((f"num_heads_upsample={heads}", "-1, .* or at least 1") for heads in (0, -2)),
        *((f"{name}=320000000", "at most") for name in ("image_size", "num_channels", "num_res_blocks", "rrdb_blocks")),
        ("diffusion_steps=100001", "at most 100000"),
        ("num_channels=48", "a multiple of 32"),
        *((f"lr={number}", "a number") for number in ("inf", "nan", "fast")),
        (f"num_heads={'9' * 400}", "a whole number"),
        ("sigma_small=perhaps", "True or False"),
        *((f"attention_resolutions={sizes}", "whole numbers with commas") for sizes in ("", "0", "16,,8", "16,-8")),
    ],
)
def test_options_beyond_reason_are_one_line(option: str, says: str) -> None:
    with pytest.raises(CdiffError, match=f"the published option {option.partition('=')[0]}=.* must be {says}"):
        Options.read("consensus", recorded("consensus").args, [option])


@pytest.mark.parametrize("option", ["class_cond=True", "learn_sigma=False"])
def test_what_the_implicit_ensemble_s_scripts_cannot_run_is_refused(option: str) -> None:
    with pytest.raises(CdiffError, match=f"{option} cannot be imported"):
        Options.read("implicit-ensemble", {}, [option])
    assert Options.read("consensus", recorded("consensus").args, [option])  # whose network it does not change, or has


def test_options_are_spelled_as_on_the_published_command_line() -> None:
    args = recorded("consensus").args
    for yes, no in (("yes", "no"), ("TRUE", "False"), ("t", "f"), ("y", "n"), ("1", " 0")):
        assert Options.read("consensus", args, [f"sigma_small={yes}"])["sigma_small"] is True
        assert Options.read("consensus", args, [f"sigma_small={no}"])["sigma_small"] is False
    assert Options.read("consensus", args, ["ema_rate=0.99,0.9999"]).ema_rate == 0.99
    assert Options.read("consensus", args, ["attention_resolutions=16, 4"]).attention_depths == (1, 3)
    assert Options.read("consensus", args, ["attention_resolutions=32"]).attention_depths == (0,)
    assert Options.read("consensus", args | {"ema_rate": None}, []).ema_rate == 0.9999  # as if it were not there
    for said, target in (("True", "x0"), ("False", "eps")):
        options = Options.read("consensus", args, [f"predict_xstart={said}"])
        assert options.config(image_channels=1, step=0, intensity=Intensity()).network.target == target


def test_how_it_was_trained_is_what_a_training_goes_on_with() -> None:
    options = Options.read(
        "consensus", recorded("consensus").args, ["weight_decay=0.5", "ema_rate=0.99", "dropout=0.3"]
    )
    config = options.config(image_channels=1, step=400_000, intensity=Intensity(), image_size=224)
    training = config.training
    assert (training.batch, training.lr, training.weight_decay, training.ema) == (4, 2e-5, 0.5, 0.99)
    assert (training.warmup, training.steps, config.network.dropout) == (0, 400_001, 0.3)  # it can take a step more
    assert (config.network.image_size, config.data.framing) == (224, "resize")  # only the other code crops
    config = Options.read("implicit-ensemble", {}, []).config(image_channels=4, step=50_000, intensity=Intensity())
    assert (config.training.batch, config.training.lr, config.training.steps) == (10, 1e-4, 300_000)


@pytest.mark.parametrize(("mean", "std"), [((1.0,), ()), ((), (2.0,)), ((1.0, 2.0), (2.0,))])
@pytest.mark.parametrize("source", ["consensus", "implicit-ensemble"])
def test_a_mean_without_its_deviation_is_refused(source: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Each alone would be left out without a word."""
    with pytest.raises(CdiffError, match="mean and std must be as many numbers"):
        intensity_of(source, mean, std, None)


def test_images_are_normalised_as_the_code_of_the_checkpoint_does_it() -> None:
    image = np.random.default_rng(0).uniform(0, 900, (2, 4, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(intensity_of("implicit-ensemble", (), (), None).apply(image), image)
    own = intensity_of("consensus", (), (), None).apply(image)
    np.testing.assert_allclose(own.mean(axis=(2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(own.std(axis=(2, 3)), 1, atol=1e-6)
    told = intensity_of("implicit-ensemble", (100.0,), (50.0,), None).apply(image)  # what is said goes before
    np.testing.assert_allclose(told, (image - 100) / 50, rtol=1e-6)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros(8, np.float32), r"b/image.nii.gz is 1-D \(8\)"),
        (np.zeros((8, 0, 1), np.float32), "b/image.nii.gz has shape .*, so it holds no voxel"),
        (np.diag([1, 2, 3, np.nan]).astype(np.float32), "b/image.nii.gz holds NaN or infinite values"),
        (np.ones((8, 8), np.complex64), "b/image.nii.gz holds values of type complex64"),
        (b"not a scan", "b/image.nii.gz is not a NIfTI file"),
    ],
)
@every_warning_is_an_error
def test_a_training_image_that_is_none_is_named(image: Any, says: str, tmp_path: Path) -> None:
    """Its number would be part of the mean, if it is not a traceback."""
    for case, values in (("a", np.arange(64, dtype=np.float32).reshape(8, 8)), ("b", image)):
        (tmp_path / case).mkdir()
        path = tmp_path / case / "image.nii.gz"
        if isinstance(values, bytes):
            path.write_bytes(values)
        else:
            nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    with pytest.raises(CdiffError, match=says) as caught:
        training_statistics(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_channel_that_is_the_same_everywhere_cannot_normalise(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
    image[..., 1] = 7
    (tmp_path / "a").mkdir()
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "a" / "image.nii.gz")
    with pytest.raises(
        CdiffError, match=r"channel 2 of the images in .* is the same everywhere.*give --mean and --std"
    ):
        training_statistics(tmp_path)


def test_images_and_numbers_are_not_both_taken(tmp_path: Path) -> None:
    with pytest.raises(CdiffError, match="say the same thing twice"):
        intensity_of("consensus", (1.0,), (1.0,), tmp_path)


def test_a_network_that_saw_some_timesteps_alone_is_refused_unless_its_user_says_otherwise() -> None:
    """The consensus code trains with timestep_respacing; the implicit ensemble's can only sample with it."""
    args = recorded("consensus").args | {"timestep_respacing": "50"}
    with pytest.raises(CdiffError, match="timestep_respacing=50 cannot be imported"):
        Options.read("consensus", args, [])
    for every in ("", "100", "ddim100", "34, 33,33"):  # of 100 these are all
        assert Options.read("consensus", args, [f"timestep_respacing={every}"])["diffusion_steps"] == 100
    for some in ("ddim50", "34,33,32", "33,33,34", "ddim50,50", "ddim", "all", "99", "0"):
        with pytest.raises(CdiffError, match=f"timestep_respacing={some} cannot be imported"):
            Options.read("consensus", args, [f"timestep_respacing={some}"])
    assert Options.read("implicit-ensemble", {}, ["timestep_respacing=50"])["diffusion_steps"] == 1000


def test_an_implicit_ensemble_of_other_channels_and_a_schedule_that_cannot_be(tmp_path: Path) -> None:
    """Four channels are written into its code, and who has others changed it there. With 20 steps the last beta is 1."""
    case = recorded("implicit")
    path = case.save(tmp_path / "given")
    for steps, last in ((20, "1"), (10, "2")):
        says = f"diffusion_steps={steps} cannot be imported with noise_schedule=linear: the last beta would be {last},"
        with pytest.raises(CdiffError, match=says):
            import_checkpoint(path, tmp_path / "run", settings=[f"diffusion_steps={steps}"])
    assert not (tmp_path / "run").exists()
    tensors, first = case.tensors(), "input_blocks.0.0.weight"
    torch.save(tensors | {first: tensors[first][:, 2:]}, path)
    network = load_run(import_checkpoint(path, tmp_path / "run").path).network
    assert torch.equal(network.encoder.first.weight, tensors[first][:, 2:4])
    assert torch.equal(network.denoiser.first.weight, tensors[first][:, 4:])
