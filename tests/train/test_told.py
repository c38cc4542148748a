"""What a changed checkpoint.json or config.json of a run does to an export of it: refused in a line, before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import checkpoint_folder, load_run
from cdiff.train.initial import read_initial

SPLIT = {"cases": 1, "slices": 2}


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def changed(run: Path, **values: Any) -> Path:
    """The run's last checkpoint.json with other values."""
    folder = checkpoint_folder(run, "last")
    assert folder is not None
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"parameters": "many"}, "parameters 'many'"),
        ({"seconds": True}, "seconds True"),
        ({"step": "4"}, "step '4'"),
        ({"best": "high"}, "best 'high'"),
        ({"best_window": 1.5}, "best_window 1.5"),
        ({"val_soft_dice_5": [0.5]}, "val_soft_dice_5 [0.5]"),
        ({"seconds": float("nan")}, "values that no bundle can hold"),
        ({"precision": "\ud800"}, "values that no bundle can hold"),
        ({"data": 3}, "data 3"),
        ({"data": {"train": {}, "val": SPLIT}}, "no data, train, cases"),
        ({"data": {"train": SPLIT, "val": {"cases": 1, "slices": "two"}}}, "data, val, slices 'two'"),
        ({"machine": None}, "machine None"),
        ({"val_protocol": []}, "val_protocol []"),
        ({"init": {"name": "run"}}, "no init, sha256"),
        ({"init": {"name": "run", "sha256": "0", "init": "run"}}, "init 'run'"),
        ({"init": {"name": "run", "sha256": "0", "seconds": "1"}}, "seconds '1'"),
        ({"imported": {"repository": "a/b", "variant": "consensus", "file": "a.pt"}}, "no imported, sha256"),
    ],
)
def test_a_checkpoint_that_tells_nonsense_of_its_training_is_refused(
    run: Path, values: dict[str, Any], says: str
) -> None:
    path = changed(run, **values)
    for read in (load_run, read_initial):
        with pytest.raises(CdiffError) as caught:
            read(run)
        assert str(caught.value).startswith(f"{path} has ")
        assert says in str(caught.value)


def test_what_is_not_told_is_not_needed(run: Path) -> None:
    path = changed(run)
    path.write_text(json.dumps({"step": json.loads(path.read_text())["step"]}))
    assert load_run(run).info.keys() == {"step"}


def test_a_configuration_of_a_huge_network_takes_no_memory(run: Path) -> None:
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["network"] |= {"base_channels": 4096, "channel_mult": [1] * len(config["network"]["channel_mult"])}
    path.write_text(json.dumps(config))
    with pytest.raises(CdiffError, match=r"ema\.safetensors does not fit its configuration"):
        load_run(run)
