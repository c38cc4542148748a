"""A run that starts from other weights: they are taken as what they were trained to be, and with the cases that they had seen."""

from __future__ import annotations

import dataclasses
import io
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.data.partition import partition
from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import load_run, load_weights
from cdiff.train.config import Config
from cdiff.train.initial import read_initial
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset
from cdiff.train.sections import NetworkConfig
from cdiff.train.trainer import train
from tests.synthetic import write_synthetic_dataset

TINY = preset("tiny").with_values({"steps": 2, "val_every": 2})


def told(config: Config, data: Path, out: Path, **how: Any) -> str:
    """What a run of one step says before it begins."""
    text = io.StringIO()
    train(config, data, out, max_steps=1, console=Console(file=text), **how)
    return "".join(line for line in text.getvalue().splitlines(keepends=True) if line.startswith("note: "))


@pytest.mark.parametrize("change", [{"target": "eps"}, {"outside": 0}, {"groups": 2, "heads": 4}])
def test_weights_that_would_be_another_function_are_refused(
    change: dict[str, Any], tiny_run: Path, tiny_bundle: Path, tiny_data: Path, tmp_path: Path
) -> None:
    for init in (tiny_run, tiny_bundle):
        with pytest.raises(CdiffError) as caught:
            train(TINY.with_values(change), tiny_data, tmp_path / "run", init=init, quiet=True)
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(f"{init} was trained with ")
        there = TINY.values()
        for key, value in change.items():
            assert f"{key}={there[key]} ({value} here)" in line
            assert f"--set {key}={there[key]}" in line
    assert not (tmp_path / "run").exists()


def test_the_settings_that_make_another_network_are_named_all_at_once(
    tiny_run: Path, tiny_bundle: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Also those that no shape shows: what is asked for is then enough."""
    config = preset("small").with_values({"steps": 1, "batch": 2, "val_slices": 1, "image_size": 32, "levels": 3})
    for init in (tiny_run, tiny_bundle):
        with pytest.raises(CdiffError) as caught:
            train(config, tiny_data, tmp_path / "run", init=init, quiet=True)
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(f"{init} was trained with ")
        assert "channel_mult=[1,2] ([1,2,4,4,8] here)" in line
        added = shlex.split(line.rpartition("add ")[2].removesuffix(", or leave out --init"))
        settings = [word for word in added if word != "--set"]
        assert {setting.partition("=")[0] for setting in settings} >= {"base_channels", "channel_mult", "groups", "T"}
        train(config.with_settings(settings), tiny_data, tmp_path / init.parent.name, init=init, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"schedule": "cosine"}, {"beta_end": 0.01}, {"variant": "annotator"}])
def test_weights_that_learned_something_else_are_a_start_and_it_is_said(
    change: dict[str, Any], tiny_run: Path, tiny_bundle: Path, tiny_data: Path, tmp_path: Path
) -> None:
    ((key, value),) = change.items()
    for init in (tiny_run, tiny_bundle):
        said = told(TINY.with_values(change), tiny_data, tmp_path / init.parent.name, init=init)
        words = f"{key}={TINY.values()[key]} ({value} here)"
        assert said == f"note: {init} was trained with {words}: its weights are only a start for that\n"
    assert told(TINY, tiny_data, tmp_path / "same", init=tiny_run) == ""


def test_no_setting_of_the_network_slips_through(tiny_run: Path) -> None:
    """Each shows in the tensors, is refused or told of, or changes nothing that the weights compute."""
    initial = read_initial(tiny_run)
    others: dict[str, Any] = {
        "image_size": 64, "variant": "annotator", "channel_mult": (1, 4), "attention_depths": (0, 1), "heads": 4, "heads_up": 1,
        "head_channels": 4, "groups": 2, "dropout": 0.5, "embedding": "scale-shift", "resample": "block", "target": "v",
        "variance": "learned", "outside": 0,
    }  # fmt: skip
    silent = set()
    for part in dataclasses.fields(NetworkConfig):
        value = getattr(TINY.network, part.name)
        config = TINY.with_values({part.name: others[part.name] if part.name in others else 2 * value})
        try:
            load_weights(ConsensusNet(config.network), initial.tensors, initial.path)
            initial.check_function(config)
        except CdiffError:
            continue
        if not initial.notes(config):
            silent.add(part.name)
    assert silent == {"image_size", "dropout"}


def test_a_run_that_is_named_by_a_dot_is_called_by_its_folder(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_run)
    assert read_initial(Path()).origin["name"] == tiny_run.name


def test_cases_that_the_weights_had_learned_from_are_not_taken_for_unseen(tmp_path: Path) -> None:
    data = write_synthetic_dataset(tmp_path / "data", 6, raters=3, shape=(32, 32, 4))
    runs = [tmp_path / name for name in ("first", "second", "third")]
    seeds = (0, *(seed for seed in range(1, 20) if held(data, seed) != held(data, 0)))
    assert told(TINY.with_values({"seed": seeds[0]}), data, runs[0]).count("\n") == 1  # that cases are held out
    assert "held_out" in load_run(runs[0]).info["data"]

    said = told(TINY.with_values({"seed": seeds[1]}), data, runs[1], init=runs[0])
    (name,) = held(data, seeds[1])
    line = (
        f"note: the weights that this run starts from were trained on 1 of the 1 cases to validate on ({name}): its scores there are too "
        "good; validate on others, in a folder Validation\n"
    )
    assert line in said
    assert "held_out" not in load_run(runs[1]).info["data"]
    assert line in told(TINY.with_values({"seed": seeds[1]}), data, runs[1], resume=True)
    assert "held_out" not in load_run(runs[1]).info["data"]
    assert line[len("note: ") : -1] in load_run(runs[1]).info["data"]["notes"]

    # The second did not learn from the case that it validated on; the first did.
    said = told(TINY.with_values({"seed": seeds[1]}), data, runs[2], init=runs[1])
    assert line in said
    # Held out by both, a case is unseen.
    assert "too good" not in told(TINY.with_values({"seed": seeds[0]}), data, tmp_path / "same", init=runs[0])
    assert "held_out" in load_run(tmp_path / "same").info["data"]


def held(data: Path, seed: int) -> list[str]:
    return [case.name for case in partition(find_cases(data), data, 0.1, seed).val]
