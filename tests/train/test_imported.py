"""Checkpoints of the published codes: imported, they return what the published code returned; what does not fit is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from cdiff.export.reference import TorchEngine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.scans.intensity import Intensity
from cdiff.train.checkpoint import load_run, read_state, read_tensors
from cdiff.train.imported.importer import Imported, import_checkpoint
from cdiff.train.imported.mapping import links
from cdiff.train.imported.options import Options
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset
from tests.train.published import CHAIN_SEED, Recorded, inputs, recorded

TINY = ("consensus", "consensus_options", "consensus_short", "implicit", "implicit_options")
FULL = ("consensus_256", "consensus_224", "implicit_256")
WIDTHS = (*(f"consensus_{size}" for size in (64, 128, 320, 480)), *(f"implicit_{size}" for size in (64, 128, 512)))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Imported]:
    folder = tmp_path_factory.mktemp("imported")
    return {name: import_checkpoint(recorded(name).save(folder / name), folder / f"{name}-run") for name in TINY}


def read_inputs(case: Recorded, channels: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return inputs(case.name, len(case.arrays["t"]), channels, case.arrays["output"].shape[-1])


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_the_published_code_s(name: str, imported: dict[str, Imported]) -> None:
    case, run = recorded(name), load_run(imported[name].path)
    x, image = read_inputs(case, run.config.network.image_channels)
    with torch.no_grad():
        found = run.network(
            *(torch.from_numpy(each) for each in (x, image, case.arrays["t"], case.arrays["level"]))
        ).numpy()
    wanted = case.arrays["output"]
    assert wanted.std() > 0.3
    np.testing.assert_allclose(found[:, : wanted.shape[1]], wanted, rtol=0, atol=1e-5)
    if found.shape != wanted.shape:  # a variance of beta_t: the second channel says so everywhere
        assert (found[:, 1] == 1).all()
    # Each row has a timestep of its own, and where there are levels one of those: neither may be lost on the way.
    assert np.abs(found[1:] - found[:1]).max() > 0.1


@pytest.mark.parametrize("name", ["consensus_short", "implicit"])
def test_reverse_chains_end_where_the_published_ones_do(name: str, imported: dict[str, Imported]) -> None:
    case, run = recorded(name), load_run(imported[name].path)
    config = run.config.network
    _, image = read_inputs(case, config.image_channels)
    engine = TorchEngine(run.network, run.schedule)
    windows = Framing("resize", image.shape[2:]).frame(image[:1])
    (result,) = segment_windows(
        engine,
        windows,
        sampler_table("ddpm", run.schedule),
        levels=config.levels,
        runs=int(case.arrays["chain_runs"]),
        seed=CHAIN_SEED,
    )
    np.testing.assert_allclose(result.level_means, case.arrays["chain"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*TINY, *FULL, *WIDTHS])
def test_every_tensor_has_one_place(name: str) -> None:
    case = recorded(name)
    options = Options.read(case.source, case.args, [])
    config = options.config(image_channels=case.args.get("condition_input_channel", 4), step=0, intensity=Intensity())
    with torch.device("meta"):
        network = ConsensusNet(config.network)
        found = links(network, options)
        assert {link.theirs: link.shape for link in found} == case.shapes
        assert len(found) == len(case.shapes)
        written = [(ours, t.shape) for link in found for ours, t in link.into(torch.empty(link.shape)).items()]
    ours = {key: value.shape for key, value in network.state_dict().items()}
    tables = {"denoiser.time_table.weight", "denoiser.level_table.weight"}
    assert len({key for key, _ in written}) == len(written)  # no tensor of ours is written twice
    assert tables | dict(written).keys() == ours.keys()
    assert all(shape == ours[key] for key, shape in written)


def test_the_published_configuration() -> None:
    case = recorded("consensus_256")
    options = Options.read("consensus", case.args, [])
    config = options.config(image_channels=1, step=35_000, intensity=Intensity())
    paper = preset("paper").network
    assert config.network == dataclasses.replace(paper, levels=7, rrdbs=10, variance="learned")
    assert config.schedule == preset("paper").schedule
    assert (config.data.framing, config.training.augment) == ("resize", True)
    # 224 pixels and attention at 16 and 8: 224 // 16 is no power of two, so the published network attends in its bottleneck alone.
    tumour = recorded("consensus_224")
    assert Options.read("consensus", tumour.args, []).attention_depths == ()


def test_the_implicit_ensemble_s_configuration() -> None:
    config = Options.read("implicit-ensemble", {}, []).config(image_channels=4, step=0, intensity=Intensity())
    network = config.network
    assert (network.image_size, network.conditions, network.T, network.rrdbs, network.variance) == (
        224,
        1,
        1000,
        0,
        "learned",
    )
    assert (network.attention_depths, network.heads) == ((4,), 1)
    assert (config.data.framing, config.training.augment) == ("centre", False)
    named = preset("implicit-ensemble")
    assert (named.network, named.data.framing, named.data.jitter) == (network, "centre", 0)
    for key in ("batch", "lr", "ema", "warmup", "augment"):
        assert getattr(named.training, key) == getattr(config.training, key)
    # Its loader does not read image_size: who set that to the 224 pixels it cuts has them cut all the same.
    # So has who set it to BraTS's own 240, which no U-Net of six depths takes; one of two depths could be of a changed loader.
    six = "1,1,2,2,4,4"
    for size, widths, seen in ((224, six, (224, "centre")), (240, six, (224, "centre")), (240, "1,2", (240, "resize"))):
        stated = Options.read("implicit-ensemble", {"image_size": size, "channel_mult": widths}, [])
        config = stated.config(image_channels=4, step=0, intensity=Intensity())
        assert (config.network.image_size, config.data.framing) == seen


def test_masks_are_coded_as_in_the_published_code(imported: dict[str, Imported]) -> None:
    """-1 and 1 in the consensus code (its datasets), 0 and 1 in what the implicit ensemble diffuses (its training_losses_segmentation)."""
    assert [imported[name].config.network.outside for name in TINY] == [-1, -1, -1, 0, 0]


def test_variances_are_those_of_the_published_code(imported: dict[str, Imported]) -> None:
    """learn_sigma; sigma_small, which is beta tilde; neither, which is beta and a learned one that is always that."""
    kinds = [imported[name].config.network.variance for name in TINY]
    assert kinds == ["learned", "fixed", "learned", "learned", "learned"]


def test_what_a_run_says_of_its_origin(imported: dict[str, Imported]) -> None:
    done = imported["consensus"]
    run = load_run(done.path)
    assert run.info["step"] == done.step == 2500
    origin = run.info["imported"]
    assert origin["repository"] == "tomeramit/Annotator-Consensus-Prediction"
    other = load_run(imported["consensus_short"].path).info["imported"]
    assert [(each["from"], each["variant"]) for each in (origin, other)] == [
        ("consensus", "consensus"),
        ("consensus", "annotator"),
    ]
    assert origin["file"] == "ema_val_0.7512345_0.9999_002500.pt"
    assert origin["sha256"] == sha256(done.path.parent / "consensus" / origin["file"])
    assert origin["options"]["rrdb_blocks"] == 1
    assert {key: run.info[key] for key in ("seconds", "best", "best_window", "is_best")} == {
        **{"seconds": 0.0, "best": None, "best_window": 32, "is_best": True}
    }
    assert run.info["parameters"] == done.parameters == sum(p.numel() for p in run.network.parameters())
    (group,) = read_state(done.path / "checkpoints" / "step-0002500" / "optimiser.pt")["optimiser"]["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.999), 0.0)
    assert run.config.network.conditions == 3
    assert [imported[name].options.variant for name in TINY[1:4]] == ["no-annotator", "annotator", "implicit-ensemble"]
    assert [imported[name].config.network.conditions for name in TINY[1:4]] == [1, 3, 1]


def test_schedules(imported: dict[str, Imported]) -> None:
    # gaussian_diffusion.get_named_beta_schedule: linear from 1e-4 to 0.02 times 1000/T, in the consensus code at most 0.8.
    schedule = imported["consensus"].config.schedule
    np.testing.assert_allclose(schedule.betas[[1, 100]], [1e-3, 0.2], rtol=1e-12)
    np.testing.assert_allclose(imported["consensus_short"].config.schedule.betas[[1, 10]], [1e-2, 0.8], rtol=1e-12)
    for T in (12, 20, 24, 25, 26):
        options = Options.read("consensus", recorded("consensus").args, [f"diffusion_steps={T}"])
        betas = options.config(image_channels=1, step=0, intensity=Intensity()).schedule.betas[1:]
        np.testing.assert_allclose(betas, np.linspace(0.1 / T, min(20 / T, 0.8), T), rtol=1e-12)
    cosine = imported["consensus_options"].config.schedule

    def abar(u: float) -> float:
        return float(np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2)

    assert cosine.T == 50
    np.testing.assert_allclose(cosine.abar[20], abar(0.4) / abar(0), rtol=1e-12)
    assert cosine.betas[50] == 0.999


def test_soft_label_networks_leave_their_table_of_annotators(tmp_path: Path) -> None:
    case = recorded("consensus")
    args = case.args | {"soft_label_training": True, "consensus_training": False}
    soft = dataclasses.replace(case, args=args)
    done = import_checkpoint(soft.save(tmp_path / "soft", "ema.pt"), tmp_path / "run")
    assert done.step == 0
    assert done.config.network.conditions == 1
    assert not load_run(done.path).network.denoiser.level_table.weight.any()
    # With no_annotator_training besides, the published constructor makes no such table.
    assert Options.read("consensus", args | {"no_annotator_training": True}, []).annotators == 0


def test_prefixes_of_distributed_training_and_half_precision_tensors_are_read(
    tmp_path: Path, imported: dict[str, Imported]
) -> None:
    case = recorded("consensus")
    path = case.save(tmp_path / "parallel", "model_35000.pt")
    torch.save({f"module.{name}": value.half() for name, value in case.tensors().items()}, path)
    done = import_checkpoint(path, tmp_path / "run")
    assert done.step == 35_000
    assert any("model_35000.pt is not called ema*" in note for note in done.notes)
    written = read_tensors(done.path / "checkpoints" / "step-0035000" / "ema.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float32}
    run = load_run(done.path)
    wanted = load_run(imported["consensus"].path).network.state_dict()
    for name, value in run.network.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted[name], rtol=2e-3, atol=5e-3)


def test_wrong_tensors_are_named_kind_by_kind(tmp_path: Path) -> None:
    case = recorded("consensus")
    path = case.save(tmp_path / "given")
    tensors = case.tensors()
    del tensors["middle_block.1.qkv.weight"], tensors["input_blocks.1.0.in_layers.0.bias"]
    tensors["an.extra"] = torch.zeros(2, 3)
    tensors["rrdb.HRconv.weight"] = torch.zeros(64, 64, 1, 1)
    tensors["label_emb.weight"] = torch.tensor(1.0)
    tensors["out.0.bias"] = torch.full((32,), torch.nan)
    tensors["time_embed.0.bias"] = torch.zeros(128, dtype=torch.int64)
    torch.save(tensors, path)
    with pytest.raises(CdiffError) as caught:
        import_checkpoint(path, tmp_path / "run")
    first, *rest = str(caught.value).splitlines()
    assert f"7 of {len(case.shapes) + 1} tensors are wrong" in first
    assert [line.strip() for line in rest] == [
        "missing    input_blocks.1.0.in_layers.0.bias [32]",
        "missing    middle_block.1.qkv.weight [192, 64, 1]",
        "extra      an.extra [2, 3]",
        "misshapen  label_emb.weight [], not [3, 128]",
        "misshapen  rrdb.HRconv.weight [64, 64, 1, 1], not [64, 64, 3, 3]",
        "wrong type time_embed.0.bias int64, not plain floating-point numbers",
        "not finite out.0.bias",
    ]
    assert not (tmp_path / "run").exists()


def test_of_many_wrong_tensors_a_dozen_of_each_kind_is_named_and_the_rest_counted(tmp_path: Path) -> None:
    case = recorded("consensus")
    path = case.save(tmp_path / "given")
    tensors = {f"rrdb.other.{i:03d}": torch.zeros(1) for i in range(200)}
    shapeless = [name for name in case.shapes if name.startswith("input_blocks.")][:13]
    torch.save(tensors | {name: torch.zeros(7, 7) for name in shapeless}, path)
    with pytest.raises(CdiffError) as caught:
        import_checkpoint(path, tmp_path / "run")
    first, *rest = (line.strip() for line in str(caught.value).splitlines())
    missing = len(case.shapes) - 13
    assert "{0} of {0} tensors are wrong".format(missing + 200 + 13) in first
    assert [line.split()[0] for line in rest] == ["missing"] * 13 + ["extra"] * 13 + ["misshapen"] * 13
    assert rest[12] == f"missing    {missing - 12} more"
    assert rest[13:15] == ["extra      rrdb.other.000 [1]", "extra      rrdb.other.001 [1]"]
    assert rest[25] == "extra      188 more"
    assert "more" not in rest[-1]  # where one is left over, its name takes no more room than its number


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rrdb_blocks": 2}, "the options say rrdb_blocks=2, the tensors 1"),
        ({"num_channels": 64}, "the options say num_channels=64, the tensors 32"),
        ({"number_of_annotators": 7}, "the options say number_of_annotators=7, the tensors 3"),
        ({"learn_sigma": False}, "the options say learn_sigma=False, the tensors True"),
        ({"condition_input_channel": 4}, "the options say condition_input_channel=4, the tensors 1"),
        ({"num_res_blocks": 3}, "the options say num_res_blocks=3, the tensors 1"),
        (
            {"no_annotator_training": True, "consensus_training": False},
            "the options say no_annotator_training=True, the tensors False):\n  extra      label_emb.weight [3, 128]",
        ),
        ({"use_scale_shift_norm": True}, "misshapen  middle_block.0.emb_layers.1.weight [64, 128], not [128, 128]"),
        ({"attention_resolutions": "16"}, "extra      input_blocks.5.1.qkv.weight"),
        ({"attention_resolutions": "16"}, "attention_resolutions=16 with image_size=32, the tensors 16,8)"),
        ({"image_size": 100}, "no network for image_size=100"),
        ({"noise_schedule": "quadratic"}, "must be linear or cosine"),
        ({"num_heads": "four"}, "num_heads=four must be a whole number"),
        ({"ema_rate": "slow"}, "ema_rate=slow must be a number"),
        ({"rrdb_blocks": 0}, "rrdb_blocks=0 cannot be imported"),
    ],
)
def test_options_that_do_not_fit_are_said(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    case = recorded("consensus")
    path = dataclasses.replace(case, args=case.args | change).save(tmp_path / "given")
    with pytest.raises(CdiffError) as caught:
        import_checkpoint(path, tmp_path / "run")
    assert says in str(caught.value)
    assert str(caught.value).count("the options say") <= 1  # those that agree are not named
    assert not (tmp_path / "run").exists()


def test_options_are_read_from_args_then_from_the_command(tmp_path: Path) -> None:
    case = recorded("consensus")
    path = case.save(tmp_path / "given")
    elsewhere = tmp_path / "args.json"
    (path.parent / "args.json").rename(elsewhere)
    with pytest.raises(CdiffError, match=r"no args\.json beside"):
        import_checkpoint(path, tmp_path / "run")
    with pytest.raises(CdiffError, match=r"options here are .*rrdb_blocks"):
        import_checkpoint(path, tmp_path / "run", args=elsewhere, settings=["nonsense=1"])
    elsewhere.write_text(json.dumps(case.args | {"rrdb_blocks": 4}))
    (tmp_path / "run").mkdir()  # empty, and so as good as none
    done = import_checkpoint(path, tmp_path / "run", args=elsewhere, settings=["rrdb_blocks=1"], image_size=64)
    assert (done.config.network.rrdbs, done.config.network.image_size) == (1, 64)
    for there in (tmp_path / "run", elsewhere):
        with pytest.raises(CdiffError, match="already exists"):
            import_checkpoint(path, there, args=elsewhere)


README_FLAGS = (
    "image_size=256 num_channels=128 class_cond=False num_res_blocks=2 num_heads=1 learn_sigma=True use_scale_shift_norm=False "
    "attention_resolutions=16 diffusion_steps=1000 noise_schedule=linear rescale_learned_sigmas=False rescale_timesteps=False "
    "lr=1e-4 batch_size=10"
)


def test_every_flag_of_a_training_may_be_named() -> None:
    plain = Options.read("implicit-ensemble", {}, [])
    assert Options.read("implicit-ensemble", {}, README_FLAGS.split()) == plain
    assert Options.read("implicit-ensemble", {}, ["use_fp16=True", "save_interval=5000"]) == plain
    case = recorded("consensus")
    named = [f"{name}={value}" for name, value in case.args.items() if value is not None]
    assert Options.read("consensus", {}, [*named, "n_gen=25"]) == Options.read("consensus", case.args, [])
    with pytest.raises(CdiffError, match="nonsense"):
        Options.read("implicit-ensemble", {}, ["nonsense=1"])


def test_normalisation_of_the_training_images(tmp_path: Path) -> None:
    case = recorded("consensus_options")  # four channels
    path = case.save(tmp_path / "given")
    rng = np.random.default_rng(0)
    arrays = [rng.normal(50 + 10 * i, 5 + i, (9, 7, 4)).astype(np.float32) for i in range(3)]
    for i, array in enumerate(arrays):
        folder = tmp_path / "train" / f"case{i:02d}"
        folder.mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "image.nii.gz")
    done = import_checkpoint(path, tmp_path / "run", images=tmp_path / "train")
    intensity = load_run(done.path).intensity
    mean = np.mean([array.mean(axis=(0, 1)) for array in arrays], axis=0)
    std = np.mean([array.std(axis=(0, 1)) for array in arrays], axis=0)
    image = np.moveaxis(arrays[1], 2, 0)[None]
    np.testing.assert_allclose(
        intensity.apply(image), (image - mean[:, None, None]) / std[:, None, None], rtol=0, atol=1e-4
    )
    assert not any("each slice's own are used instead" in note for note in done.notes)
    assert any(
        "each slice's own are used instead" in note for note in import_checkpoint(path, tmp_path / "other").notes
    )
    plain = path.rename(path.with_name("model_000100.pt"))  # not averaged; and a mean for all channels
    one = import_checkpoint(plain, tmp_path / "one", mean=(50.0,), std=(2.0,))
    np.testing.assert_allclose(load_run(one.path).intensity.apply(image), (image - 50) / 2, rtol=0, atol=1e-4)
    assert one.step == 100
    assert any("model_000100.pt is not called ema*" in note for note in one.notes)
    assert not any("is not called ema*" in note for note in done.notes)
    plain.rename(path)
    with pytest.raises(CdiffError, match="2 means are given, but the network takes 4"):
        import_checkpoint(path, tmp_path / "third", mean=(1.0, 2.0), std=(1.0, 1.0))
    with pytest.raises(CdiffError, match="no \\*/image"):
        import_checkpoint(path, tmp_path / "third", images=tmp_path)
    for name, depth in (("a", 7), ("b", 5)):  # volumes, whose last axis is no channel
        (tmp_path / "volumes" / name).mkdir(parents=True)
        nib.save(nib.Nifti1Image(arrays[0][:, :, [0] * depth], np.eye(4)), tmp_path / "volumes" / name / "image.nii.gz")
        message = (
            "have 7 channels, as their last axis is read"
            if name == "a"
            else "last axis, .* has 5 or 7; .*--mean and --std"
        )
        with pytest.raises(CdiffError, match=message):
            import_checkpoint(path, tmp_path / "third", images=tmp_path / "volumes")
