"""Checkpoints where there is no room for them, and for whom they are."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import PART, write_json
from cdiff.train.checkpoint import (
    EMA,
    check_weights,
    checkpoint_folder,
    config_of_weights,
    load_run,
    read_json,
    read_state,
    read_tensors,
    read_weights,
    save_checkpoint,
    write_tensors,
)
from cdiff.train.presets import preset


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system refuses to make a file larger than `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["model.safetensors", "optimiser.pt"])
def test_a_disk_that_is_full_is_one_line_and_the_checkpoint_before_stays(tmp_path: Path, file: str) -> None:
    def save(step: int, values: int) -> None:
        weights = {"a": torch.zeros(values if file == "model.safetensors" else 1)}
        info = {"step": step, "is_best": False}
        save_checkpoint(tmp_path, network=weights, ema=weights, optimiser={"state": torch.zeros(values)}, info=info)

    save(1, 10)
    with (
        no_file_above(20_000),
        pytest.raises(CdiffError, match=f"cannot write {file} into .*; check the space") as caught,
    ):
        save(2, 100_000)
    assert "\n" not in str(caught.value)
    assert checkpoint_folder(tmp_path, "last") == tmp_path / "checkpoints" / "step-0000001"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]


def test_an_optimisers_state_with_a_changed_byte_is_refused(tmp_path: Path) -> None:
    """By its archive's check sums, at which PyTorch does not look; the training would go on from other numbers."""
    state = {"optimiser": {"momentum": torch.arange(100.0)}, "scaler": {}}
    save_checkpoint(tmp_path, network={}, ema={}, optimiser=state, info={"step": 1, "is_best": False})
    path = tmp_path / "checkpoints" / "step-0000001" / "optimiser.pt"
    assert torch.equal(read_state(path)["optimiser"]["momentum"], torch.arange(100.0))
    data = path.read_bytes()
    place = data.index(torch.arange(100.0).numpy().tobytes()) + 50
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(CdiffError, match=r"optimiser\.pt cannot be read \(.*Bad CRC-32|is not what was written"):
        read_state(path)


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_weights_with_a_changed_byte_are_refused(file: str, tmp_path: Path) -> None:
    """Which fit and are finite: nothing else would show that maps or a training that goes on come from other numbers."""
    weights = {"a": torch.arange(100.0)}
    save_checkpoint(tmp_path, network=weights, ema=weights, optimiser={}, info={"step": 1, "is_best": False})
    folder = tmp_path / "checkpoints" / "step-0000001"
    assert read_weights(folder, file)["a"].equal(weights["a"])
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:-4] + torch.tensor([98.0]).numpy().tobytes())
    with pytest.raises(CdiffError, match=rf"{file} has changed since it was written .* remove \"sha256\" there"):
        read_weights(folder, file)
    told = read_json(folder / "checkpoint.json")
    for older in ({file: None}, None):  # changed on purpose; written by an older version
        (folder / "checkpoint.json").write_text(json.dumps(told | {"sha256": older}))
        assert read_weights(folder, file)["a"][-1] == 98


def test_what_a_kill_left_of_a_checkpoint_goes_with_the_next(tmp_path: Path) -> None:
    """It is the largest file that a killed process can leave."""
    left = tmp_path / "checkpoints" / f"{PART}0"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, network={}, ema={}, optimiser={}, info={"step": 1, "is_best": False})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_run_may_be_read_by_whom_the_umask_lets(umask: int, mode: int, tmp_path: Path) -> None:
    """Whoever exports it need not be who trained it, unless that one wants it so."""
    weights, info = {"w": torch.zeros(3)}, {"step": 1, "is_best": True}
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path, network=weights, ema=weights, optimiser={}, info=info)
    finally:
        os.umask(before)
    folder = checkpoint_folder(tmp_path, "last")
    assert folder is not None
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("[1]", "does not say which network"),
        ('{"network": 1}', "JSON object"),
    ],
)
def test_weights_that_say_something_else_of_their_network_are_one_line(tmp_path: Path, config: str, said: str) -> None:
    write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(3)}, {"config": config})
    with pytest.raises(CdiffError, match=said) as caught:
        config_of_weights(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


def test_every_tensor_that_does_not_fit_is_named() -> None:
    network = torch.nn.Linear(2, 3)
    check_weights(network, network.state_dict(), Path("w"))
    wrong = (
        r"^w does not fit its configuration: missing bias, unexpected b, weight is \[3, 4\], not \[3, 2\] \(3 in all\)$"
    )
    with pytest.raises(CdiffError, match=wrong):
        check_weights(network, {"weight": torch.zeros(3, 4), "b": torch.zeros(1)}, Path("w"))


@pytest.mark.parametrize("name", ['""', '".."', '"a/b"', "3", "null"])
def test_a_pointer_leaves_the_run_s_checkpoints_nowhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "last.json").write_text(f'{{"checkpoint": {name}}}')
    with pytest.raises(CdiffError, match=r"last\.json names no checkpoint of the run; copy the run again$"):
        checkpoint_folder(tmp_path, "last")


@pytest.mark.parametrize(("text", "said"), [("{", r"cannot be read \(.*of a training run\?"), ("[]", "does not hold")])
def test_a_file_that_holds_no_object_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CdiffError, match=rf"a\.json {said}"):
        read_json(tmp_path / "a.json")


def test_weights_that_do_not_say_whose_they_are(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CdiffError, match="does not say which network it belongs to; export the bundle again"):
        config_of_weights(tmp_path / "w.safetensors")


def test_weights_in_a_folder_whose_name_is_no_text_are_not_called_damaged(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / EMA)
    (tmp_path / EMA).rename(folder / EMA)
    with pytest.raises(CdiffError, match=r"M\\xfcller/ema.safetensors has a name that is not UTF-8; rename"):
        read_tensors(folder / EMA)


def test_a_run_that_was_killed_before_its_first_checkpoint_is_to_be_resumed(tmp_path: Path) -> None:
    """It is a run by its configuration already, and the same command without --resume would be refused."""
    write_json(tmp_path / "config.json", preset("tiny").to_json())
    with pytest.raises(CdiffError, match=r"no checkpoint yet; .*cdiff train --data DIR --out .* --resume\)$"):
        load_run(tmp_path)
