"""The model card: its front matter parses, its training command gives the configuration, the author's words are in it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnx
import pytest

from cdiff.export.card import Card, render, training_command
from cdiff.export.exporter import _manifest
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import DENOISER
from cdiff.train.checkpoint import LoadedRun
from cdiff.train.presets import PRESETS, preset
from tests.runtime.test_manifest import example

CHANGED = preset("lidc").with_values(
    {"base_channels": 32, "channel_mult": (1, 2), "attention_depths": (), "task": "task 2"}
)


@pytest.mark.parametrize(
    "config",
    [*PRESETS.values(), CHANGED, *(CHANGED.with_values({"task": task}) for task in ("Anna's; task", "a&b", ""))],
    ids=[*PRESETS, "changed", "quoted", "and", "empty"],
)
def test_the_training_command_gives_the_configuration(config: object) -> None:
    words = shlex.split(training_command(config))  # type: ignore[arg-type]
    name = words[words.index("--preset") + 1]
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert preset(name).with_settings(settings) == config


def test_the_card_holds_what_the_author_and_the_run_say() -> None:
    card = Card(
        license="cc-by-4.0",
        summary="Finds | circles.",
        credit=["Credit: the circle archive"],
        tags=["a: b"],
        limits="Only circles.",
    )
    manifest = example(
        training={"step": 12, "seconds": 7200.0, "machine": {"device": "cpu", "cpu": "Some CPU", "threads": 2}},
        scores={
            "testing": {"soft_dice_5": {"mean": 0.81234, "low": 0.7, "high": 0.9}},
            "dice_per_level": [{"level": 1, "mean": 0.9}, {"level": 2, "mean": 0.8}],
        },
        verification={"largest": {"maps": 1e-6}, "bounds": {"maps": 1e-3}},
    )
    text = render(card, manifest, CHANGED)
    front = text.split("---\n")[1]
    values = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in front.splitlines())}
    assert values["license"] == "cc-by-4.0"
    assert "a: b" in values["tags"]
    for words in (
        "Finds | circles.",
        "Credit: the circle archive",
        "Only circles.",
        "Not a medical device",
        "| testing, soft_dice_5 | 0.812 (0.700 to 0.900) |",
        "| dice_per_level 2 | 0.800 |",
        "2.0 h",
        "2 threads of Some CPU",
        "1.0e-06 (bound 1e-03)",
        "Somebody, 2023",
        training_command(CHANGED),
    ):
        assert words in text


def test_the_card_of_a_run_from_other_weights_says_which() -> None:
    published = {"repository": "somebody/code", "variant": "consensus", "file": "ema.pt", "sha256": "cd" * 32}
    training = {"step": 12, "seconds": 60.0, "init": {"name": "the first", "sha256": "ab" * 32, "imported": published}}
    text = render(Card(), example(training=training), CHANGED)
    assert f"{training_command(CHANGED)} --init 'the first'\n" in text
    assert 'license: "other"\n' in text
    assert "| time | 1.0 min |" in text
    assert "| time | 1.0 min of processor time |" in render(
        Card(), example(training=training | {"clock": "cpu"}), CHANGED
    )
    assert f"started from the averaged weights of the first, sha256 {'ab' * 32}, which were trained by" in text
    assert f"https://github.com/somebody/code (consensus) and imported from ema.pt, sha256 {'cd' * 32}." in text
    trained_on = {"step": 12, "seconds": 60.0, "imported": published}
    assert ", then trained further here." in render(Card(), example(training=trained_on), CHANGED)
    assert "--init" not in render(Card(), example(training=trained_on), CHANGED)


def test_numbers_of_one_are_singular() -> None:
    training = {
        "machine": {"device": "cpu", "cpu": "Some CPU", "threads": 1},
        "data": {"train": {"cases": 2, "slices": 7}, "val": {"cases": 1, "slices": 1}},
    }
    text = render(Card(), example(training=training), CHANGED)
    assert "| 1 thread of Some CPU |" in text
    assert "Trained on 7 slices of 2 cases; the checkpoint was chosen on 1 slice of 1 case." in text


def test_an_unscored_run_says_so() -> None:
    assert "Not scored yet" in render(Card(), example(), preset("tiny"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ('{"name": "\\ud800"}', "cannot read"),
        ('{"scores": {"dice": 1e999}}', "cannot read"),
        ("[]", "JSON object"),
        ('{"colour": "red"}', "'colour'"),
        ('{"name": 3}', "'name'"),
        ('{"tags": "x"}', "'tags'"),
        ('{"tags": [1]}', "'tags'"),
    ],
)
def test_a_wrong_card_is_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "card.json"
    path.write_text(text)
    with pytest.raises(CdiffError, match=word) as error:
        Card.read(path)
    assert str(path) in str(error.value)


def test_a_card_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    text = json.dumps({"name": "n", "tags": ["x", "y"], "scores": {"a": 1}})
    path.write_text(text, encoding="utf-8-sig")  # as some editors save it
    assert Card.read(path) == replace(Card(), name="n", tags=["x", "y"], scores={"a": 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"outside": 0, "augment": False, "slice_axis": 0, "framing": "centre", "target": "v", "variance": "learned"},
        {"variant": "annotator", "augment": True, "schedule": "cosine", "intensity_upper": 98.0, "levels": 3},
    ],
)
def test_the_manifest_says_how_the_run_was_trained(changes: dict[str, Any], tmp_path: Path) -> None:
    """Nothing else tells the runtime, and maps made in another way than the training's look like maps all the same."""
    config = preset("tiny").with_values({"image_channels": 2, "image_size": 48, "T": 30, **changes})
    graph = onnx.helper.make_graph([], "none", [], [])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]), tmp_path / DENOISER)
    run = LoadedRun(config, cast(Any, None), {})
    manifest = _manifest(run, Card(), "model", tmp_path, fp16=False, fast_steps=7)
    for name in ("variant", "levels", "T", "target", "variance", "image_channels", "outside"):
        assert getattr(manifest, name) == getattr(config.network, name), name
    assert (manifest.framing, manifest.slice_axis) == (config.data.framing, config.data.slice_axis)
    assert manifest.mirror is config.training.augment
    assert (manifest.image_size, manifest.precision, manifest.fast["steps"]) == ((48, 48), "float32", 7)
    assert (manifest.noise_schedule, manifest.normalisation) == (config.schedule, config.data.intensity)
