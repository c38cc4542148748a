"""Configurations survive JSON, and settings from the command line are checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import cdiff
from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import config_of_weights
from cdiff.train.config import Config
from cdiff.train.imported.options import Options
from cdiff.train.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    config = preset(name)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_settings_reach_their_sections() -> None:
    config = preset("tiny").with_settings(
        ["batch=8", "lr=1", "target=v", "channel_mult=[1,4]", "scaled=false", "task=task02"]
    )
    assert (config.training.batch, config.training.lr, config.network.target) == (8, 1, "v")
    assert config.network.channel_mult == (1, 4)
    assert config.schedule.scaled is False
    assert config.data.task == "task02"
    config = config.with_settings(["schedule=cosine", "scaled=true", "intensity_method=standard"])
    config = config.with_values({"intensity_mean": (1.5, 2.0), "intensity_std": (1.0, 3.0)})
    assert config.schedule.kind == "cosine"
    assert config.data.intensity.mean == (1.5, 2.0)
    assert config.with_settings(["intensity_mean=[0.5,2]"]).data.intensity_mean == (0.5, 2)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("bacth=8", "no setting 'bacth'"),
        ("batch", "key=value"),
        ("batch=many", "expected a whole number below"),
        ("batch=1.5", "expected a whole number below"),
        ("scaled=1", "expected true or false"),
        ("batch=0", "at least 1"),
        ("image_size=33", "multiple of 2"),
        ("image_size=0", "multiple of 2"),
        ("image_size=4608", "at most 4096"),
        ("levels=1001", "at most 1000"),
        ("rrdbs=1000000000", "at most 1000"),
        ("rrdb_growth=1000000", "at most 8192"),
        ("base_channels=5000", "= 10000 must be at most 8192"),
        ("framing=crop", "use resize, tile or centre"),
        ("crop=16", "crop needs framing=tile"),
        ("missing_raters=guess", "skip, as-is or error"),
        ("decay=linear", "none or cosine"),
        ("clock=sun", "wall or cpu"),
        ("channel_mult=2", "channel_mult=2"),
        ("channel_mult=[1,0]", "at least 1 a depth"),
        ("rrdbs=-1", "rrdbs=-1 must not be negative"),
        ("dropout=1", r"dropout=1 must lie in \[0, 1\)"),
        ("schedule=sine", "use 'linear' or 'cosine'"),
        ("intensity_lower=100", "0 <= lower < upper"),
        ("late=2", "late=2 must lie in 0..1"),
        ("val_fraction=0", "between 0 and 1"),
        ("lr=-1", "lr=-1 must be positive"),
        ("lr=NaN", "expected a number below"),
        (f"lr={'9' * 400}", "expected a number below"),
        (f"batch={'9' * 5000}", "expected a whole number below"),
        (f"batch={2**62}", r"expected a whole number below 2\^40, for example batch=8"),
        (f"rows_per_image={'9' * 25}", "expected a whole number below"),
        (f"dice_weight={'9' * 25}", "expected a number below"),
        (f"channel_mult={'[' * 5000}", "expected a list of numbers"),
        (f"channel_mult=[{'1,' * 20000}1]", "channel_mult has 20001 depths"),
        ("channel_mult=[1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "channel_mult has 14 depths.* image_size of at most 4096"),
        ("lr=1e300", r"lr=1e\+300 must be at most 1"),
        ("weight_decay=1e300", r"weight_decay=1e\+300 must be at most 10000"),
        ("dice_weight=1e300", r"dice_weight=1e\+300 must be at most 1e\+06"),
        ("threads=3000000000", "threads=3000000000 must be at most 4096"),
        ("labels=[1,0]", r"labels=\[1, 0\] must be whole numbers from 1 on"),
        ("clip=0", "clip=0 must be positive"),
        ("seed=-1", "seed=-1 must not be negative"),
        ("seed=4294967296", r"seed=4294967296 must be below 2\^32"),
        ("threads=-1", "threads=-1 must not be negative"),
        ("late_batch=2", "set batch"),
        ("rotation=200", "rotation=200 must lie in 0..180"),
        ("pixel_noise=-0.1", "pixel_noise=-0.1 must lie in 0..2"),
    ],
)
def test_bad_settings_are_one_clear_line(setting: str, says: str) -> None:
    with pytest.raises(CdiffError, match=says) as caught:
        preset("tiny").with_settings([setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["batch=4", "batch=8"], "batch is set twice, to 4 and to 8"),
        (["labels=[3]", "labels=[2,4]"], r"labels is set twice, to \[3\] and to \[2, 4\]"),
        (["schedule=cosine", "beta_end=0.05"], "beta_end=0.05 is the linear schedule's"),
        (["scaled=false", "schedule=cosine"], "scaled=False is the linear schedule's"),
        (["augment=false", "rotation=90"], "augment=false leaves every window as it is"),
        (["framing=tile", "crop=64"], "crop=64 must not be above image_size=32"),
        (["framing=centre", "crop=16"], "with framing=centre every window has image_size=32"),
        (["framing=tile", "crop=32", "late_batch=2"], "without a crop below image_size none does"),
        (["framing=tile", "crop=16", "late=0", "late_batch=2"], "with late=0 there is none; set batch"),
    ],
)
def test_settings_that_contradict_each_other_are_one_clear_line(settings: list[str], says: str) -> None:
    with pytest.raises(CdiffError, match=says) as caught:
        preset("tiny").with_settings(settings)
    assert "\n" not in str(caught.value)


def test_a_run_that_was_begun_with_a_late_batch_of_no_late_phase_can_be_read_and_resumed() -> None:
    older = preset("tiny").with_settings(["framing=tile", "crop=16", "late_batch=2"]).to_json()
    older["data"]["late"] = 0.0
    config = Config.from_json(older).with_settings(["steps=7"])
    assert (config.training.late_batch, config.data.late, config.training.steps) == (2, 0.0, 7)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(CdiffError, match="paper, implicit-ensemble, small, lidc, tiny"):
        preset("big")


# What the kidney and brain-growth scripts set for themselves; the rest is the defaults of their command line.
KIDNEY_SCRIPT = {"image_size": 256, "num_res_blocks": 3, "learn_sigma": True, "deeper_net": True, "clip_denoised": True}
# The flags of the implicit ensemble's README are the defaults of `Options`.
PUBLISHED_SETTINGS: dict[str, tuple[str, dict[str, Any], int]] = {
    "paper": ("consensus", {**KIDNEY_SCRIPT, "consensus_training": True, "number_of_annotators": 4}, 1),
    "implicit-ensemble": ("implicit-ensemble", {}, 4),
}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        # The paper has 8 RRDBs, a fixed variance and a batch of 4 in place of its code's 10, learned one and 1.
        ("paper", {"rrdbs", "variance", "batch", "steps", "warmup"}),
        ("implicit-ensemble", {"steps", "jitter", "val_runs"}),
    ],
)
def test_a_preset_of_a_paper_has_the_settings_of_its_published_scripts(name: str, ours: set[str]) -> None:
    source, args, channels = PUBLISHED_SETTINGS[name]
    given = preset(name)
    script = Options.read(source, args, []).config(image_channels=channels, step=0, intensity=given.data.intensity)
    theirs = script.to_json()
    differ = {
        key
        for section, values in given.to_json().items()
        for key, value in values.items()
        if value != theirs[section][key]
    }
    assert differ == ours
    # What neither code can be told, and both do: t drawn evenly, the plain loss, one learning rate, no end by the clock.
    training = given.training
    assert (training.t_power, training.dice_weight, training.minutes, training.decay) == (1.0, 0.0, 0.0, "none")


@pytest.mark.parametrize(
    ("section", "value", "says"),
    [
        ("network", None, "section 'network' is not a JSON object"),
        ("network", [1], "section 'network' is not a JSON object"),
        ("network", {"T": "x"}, "has T='x'; expected a whole number below"),
        ("network", {"base_channels": 8.0}, "has base_channels=8.0; expected a whole number below"),
        ("network", {"channel_mult": 5}, "has channel_mult=5; expected a list of numbers"),
        ("network", {"channel_mult": [1, None]}, r"has channel_mult=\[1, None\]; expected a list of numbers"),
        ("data", {"intensity_lower": None}, "has intensity_lower=None; expected a number below"),
        ("training", {"augment": 1}, "has augment=1; expected true or false"),
        ("training", {"lr": 10**400}, "has lr=10+; expected a number below"),
    ],
)
def test_a_configuration_of_other_types_is_refused(section: str, value: object, says: str) -> None:
    tree = preset("tiny").to_json()
    tree[section] = tree[section] | value if isinstance(value, dict) else value
    with pytest.raises(CdiffError, match=says):
        Config.from_json(tree)


def test_the_preset_lidc_is_what_the_shipped_model_was_trained_with() -> None:
    """But for how long, with which learning rate and on which machine, and how it was validated meanwhile."""
    shipped, named = (
        config_of_weights(Path(cdiff.__file__).parent / "models" / "lidc" / "model.safetensors"),
        preset("lidc"),
    )
    assert (shipped.network, shipped.schedule) == (named.network, named.schedule)
    assert dataclasses.replace(shipped.data, late=named.data.late) == named.data
    theirs, ours = map(dataclasses.asdict, (shipped.training, named.training))
    differ = {key for key, value in theirs.items() if value != ours[key]}
    assert differ <= {"steps", "minutes", "lr", "warmup", "amp", "threads", "val_every", "val_slices", "val_steps"}
    # All else is the preset for one's own data, whose settings the page of settings states.
    small = dataclasses.replace(preset("small").training, dice_weight=1.0, val_steps=1)
    assert named.training == small
