"""Training learns, stops anywhere, and goes on as if it had not stopped."""

from __future__ import annotations

import errno
import inspect
import json
import math
import shutil
import struct
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256, write_json
from cdiff.train.checkpoint import checkpoint_folder, load_run, read_json
from cdiff.train.config import Config
from cdiff.train.data import Data, read_data
from cdiff.train.fabric import fabric_on
from cdiff.train.held import held
from cdiff.train.learner import Learner
from cdiff.train.log import read_log
from cdiff.train.pace import batch_size
from cdiff.train.presets import preset
from cdiff.train.run import Run
from cdiff.train.trainer import check_out, train
from tests.synthetic import write_synthetic_dataset


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    folder = checkpoint_folder(run, "last")
    assert folder is not None
    return load_file(folder / f"{name}.safetensors")


def last_info(run: Path) -> dict[str, Any]:
    folder = checkpoint_folder(run, "last")
    assert folder is not None
    return read_json(folder / "checkpoint.json")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_stop_and_resume_ends_with_the_same_weights(tiny_data: Path, tmp_path: Path) -> None:
    config = preset("tiny").with_values({"steps": 7, "val_every": 3, "log_every": 1, "dropout": 0.2, "decay": "cosine"})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, tiny_data, whole, quiet=True)
    assert train(config, tiny_data, parts, max_steps=4, quiet=True).step == 4
    assert train(config, tiny_data, parts, resume=True, quiet=True).step == 7
    for name in ("model", "ema"):
        assert_same(weights(whole, name), weights(parts, name))
    columns = ("step", "loss", "lr", "val_soft_dice_5")
    logs = [[{k: row[k] for k in columns} for row in read_log(run / "log.csv")] for run in (whole, parts)]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [str(k) for k in range(1, 8)]
    assert json.loads((whole / "best.json").read_text()) == json.loads((parts / "best.json").read_text())


def test_a_save_between_validations_leaves_the_last_ones_score(tiny_data: Path, tmp_path: Path) -> None:
    """However often the run is saved: a bundle states the score of the checkpoint that it was made of."""
    config = preset("tiny").with_values({"steps": 2, "val_every": 2, "save_every_s": 0.0})
    result = train(config, tiny_data, tmp_path / "run", quiet=True)
    assert load_run(tmp_path / "run").info["val_soft_dice_5"] == result.best
    assert result.best is not None


def test_the_run_loads_with_its_averaged_weights(tiny_run: Path) -> None:
    loaded = load_run(tiny_run)
    assert_same(dict(loaded.network.state_dict()), weights(tiny_run, "ema"))
    assert not loaded.network.training
    assert loaded.info["step"] == 4
    assert loaded.info["data"]["train"]["slices"] == 16
    assert loaded.schedule.T == loaded.config.network.T
    images = np.load(tiny_run / "samples.npz")["images"]
    assert images.shape[1:] == (1, 32, 32)
    assert np.abs(images).max() <= 1


def test_nothing_of_a_checkpoint_needs_unpickling(tiny_run: Path) -> None:
    folder = checkpoint_folder(tiny_run, "last")
    assert folder is not None
    assert set(torch.load(folder / "optimiser.pt", weights_only=True)) == {"optimiser", "scaler"}
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "optimiser.pt",
        "checkpoint.json",
    }


def test_damaged_or_foreign_weights_are_named(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    folder = checkpoint_folder(run, "last")
    assert folder is not None
    config = json.loads((run / "config.json").read_text())
    config["network"]["base_channels"] = 16
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CdiffError, match="does not fit"):
        load_run(run)
    (run / "config.json").write_bytes((tiny_run / "config.json").read_bytes())
    (folder / "ema.safetensors").write_bytes((folder / "ema.safetensors").read_bytes()[:500])
    with pytest.raises(CdiffError, match=r"ema\.safetensors cannot be read"):
        load_run(run)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("optimiser.pt", b"", r"optimiser\.pt cannot be read"),
        ("optimiser.pt", None, r"optimiser\.pt cannot be read"),
        ("optimiser.pt", b"cos\nsystem\n(S'false'\ntR.", r"optimiser\.pt cannot be read"),
        ("optimiser.pt", {"scaler": {}}, r"optimiser\.pt cannot be read"),
        ("optimiser.pt", {"optimiser": {"state": {}, "param_groups": []}, "scaler": {}}, "is from another network"),
        ("ema.safetensors", struct.pack("<Q", 2) + b"{}", r"ema\.safetensors has changed since it was written"),
        ("model.safetensors", struct.pack("<Q", 2) + b"{}", r"model\.safetensors has changed since it was written"),
        ("checkpoint.json", b'{"step": 1}', "does not say how far"),
        ("checkpoint.json", b'{"step": 1e999, "seconds": 1, "best_window": 0, "best": 0}', "does not say how far"),
        ("../../last.json", b"{}", "names no checkpoint"),
        ("../../last.json", b'{"checkpoint": "../checkpoints/step-0000001"}', "names no checkpoint"),
        ("../../last.json", b"[" * 100_000, r"last\.json cannot be read"),
    ],
)
def test_a_run_with_a_damaged_checkpoint_is_not_resumed(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, name: str, data: Any, said: str
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    folder = checkpoint_folder(tmp_path / "run", "last")
    assert folder is not None
    if isinstance(data, dict):
        torch.save(data, folder / name)
    elif data is None:
        (folder / name).write_bytes((folder / name).read_bytes()[:2000])
    else:
        (folder / name).write_bytes(data)
    with pytest.raises(CdiffError, match=said) as caught:
        train(preset("tiny"), tiny_data, tmp_path / "run", resume=True, quiet=True)
    assert "\n" not in str(caught.value)


def test_an_out_folder_is_never_overwritten_or_resumed_with_other_settings(tiny_run: Path, tmp_path: Path) -> None:
    """And that is said before the data are read."""
    with pytest.raises(CdiffError, match="--resume"):
        train(preset("tiny"), tmp_path, tiny_run, quiet=True)
    other = preset("tiny").with_values({"lr": 0.5})
    for dry_run in (False, True):
        with pytest.raises(CdiffError, match=r"lr: 0\.002 there, 0\.5 now"):
            train(other, tmp_path, tiny_run, resume=True, dry_run=dry_run, quiet=True)
    with pytest.raises(CdiffError, match="no run to resume"):
        train(preset("tiny"), tmp_path, tmp_path / "new", resume=True, quiet=True)


def test_a_run_that_is_being_trained_is_left_alone_by_a_second_training(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(preset("tiny"), tiny_data, run, max_steps=1, quiet=True)
    with held(run), pytest.raises(CdiffError, match=r"run is being trained by another process; wait until that ends"):
        train(preset("tiny"), tiny_data, run, resume=True, max_steps=2, quiet=True)
    with held(run):
        train(preset("tiny"), tiny_data, run, resume=True, dry_run=True, quiet=True)  # which writes nothing
    assert train(preset("tiny"), tiny_data, run, resume=True, max_steps=2, quiet=True).step == 2


def test_only_a_training_in_the_folder_keeps_another_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CdiffError, match=r"cannot open .*nowhere: No such file"), held(tmp_path / "nowhere"):
        pass

    def none_here(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none_here)
    with held(tmp_path), held(tmp_path):  # nobody can be kept out
        pass


@pytest.mark.parametrize("ended", [False, True])
def test_of_two_trainings_begun_at_once_the_second_stops_before_it_writes(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """The first, of another process as it were (in one no second begins), makes its run while the second still reads its data."""
    run = tmp_path / "run"
    with ExitStack() as stack:

        def read(data: Path, config: Config) -> Data:
            monkeypatch.undo()
            inspect.unwrap(train)(preset("tiny"), tiny_data, run, max_steps=1, quiet=True)
            if not ended:
                stack.enter_context(held(run))
            return read_data(data, config)

        monkeypatch.setattr("cdiff.train.trainer.read_data", read)
        with pytest.raises(CdiffError, match="already holds a run" if ended else "being trained by another process"):
            train(preset("tiny"), tiny_data, run, max_steps=3, quiet=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000001"]


def test_validation_cases_without_a_mask_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    data = write_synthetic_dataset(tmp_path / "data", {"Training": 2, "Validation": 1}, raters=3, shape=(32, 32))
    for mask in (data / "Validation").rglob("*_seg*.nii.gz"):
        nib.save(nib.Nifti1Image(np.zeros((32, 32), np.uint8), np.eye(4)), mask)
    with pytest.raises(CdiffError, match=r"no validation slice .* put a case with a mask .* --set seed=1"):
        train(preset("tiny"), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    result = train(preset("tiny"), tiny_data, tmp_path / "run", dry_run=True, quiet=True)
    assert np.isfinite(result.loss)
    assert result.parameters > 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("amp", ["off", "fp16"])  # no loss scale mends a loss
def test_a_loss_that_is_not_finite_stops_the_run(tiny_data: Path, tmp_path: Path, amp: str) -> None:
    config = preset("tiny").with_values({"amp": amp})
    run = Run(config, read_data(tiny_data, config), fabric_on(torch.device("cpu"), amp), tmp_path)
    with torch.no_grad():
        run.learner.network.denoiser.last.bias.fill_(float("nan"))  # type: ignore[union-attr]
    for k, says in enumerate(("no lr has moved a weight yet", r"start a new run with a lower lr \(now 0\.0004\)")):
        with pytest.raises(CdiffError, match=f"the loss became nan at step {k + 1}; {says}"):
            run.step(k)


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_data: Path, tmp_path: Path) -> None:
    """Large last weights make a loss that is still a float32, and gradients before them whose squares are not."""
    run = Run(preset("tiny"), read_data(tiny_data, preset("tiny")), fabric_on(torch.device("cpu")), tmp_path)
    with torch.no_grad():
        run.learner.network.denoiser.last.weight.fill_(1e12)  # type: ignore[union-attr]
    with pytest.raises(CdiffError, match="the gradient became inf at step 1; no lr has moved a weight yet"):
        run.step(0)


def test_a_loss_scale_that_is_too_large_for_fp16_leaves_the_step_out(tiny_data: Path, tmp_path: Path) -> None:
    config = preset("tiny").with_values({"amp": "fp16"})
    fabric = fabric_on(torch.device("cpu"), "fp16")
    run = Run(config, read_data(tiny_data, config), fabric, tmp_path)
    precision = fabric.strategy.precision
    precision.load_state_dict(precision.state_dict() | {"scale": 2.0**100})
    before = [value.clone() for value in run.learner.network.parameters()]
    loss, norm = run.step(0)
    assert (np.isfinite(loss), np.isfinite(norm)) == (True, False)
    assert all(torch.equal(a, b) for a, b in zip(before, run.learner.network.parameters(), strict=True))
    assert precision.state_dict()["scale"] == 2.0**99


def test_a_gradient_that_no_loss_scale_helps_stops_an_fp16_run(tiny_data: Path, tmp_path: Path) -> None:
    """Else every step to the end of the run would be left out, and nothing said."""
    config = preset("tiny").with_values({"amp": "fp16"})
    fabric = fabric_on(torch.device("cpu"), "fp16")
    run = Run(config, read_data(tiny_data, config), fabric, tmp_path)
    run.learner.network.denoiser.last.weight.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[union-attr]
    precision = fabric.strategy.precision
    precision.load_state_dict(precision.state_dict() | {"scale": 4.0})
    run.step(0)
    with pytest.raises(CdiffError, match=r"the gradient became (nan|inf) at step 2"):
        run.step(1)


def test_warm_up_decay_and_windows_follow_the_progress(tiny_data: Path, tmp_path: Path) -> None:
    config: Config = preset("tiny").with_values(
        {"framing": "tile", "crop": 16, "late": 0.25, "decay": "cosine", "steps": 100, "warmup": 10, "late_batch": 2}
    )
    run = Run(config, read_data(tiny_data, config), fabric_on(torch.device("cpu")), tmp_path)
    lr = config.training.lr
    assert run.lr() == pytest.approx(lr / 10)
    run.done = 50
    assert (run.lr(), run.window()) == (pytest.approx(lr / 2), 16)
    run.done = 75
    assert run.window() == 32
    assert [batch_size(config, window) for window in (16, 32)] == [config.training.batch, 2] == [4, 2]
    assert np.isfinite(run.step(75)[0])
    assert [group["lr"] for group in run.learner.optimiser.param_groups] == [run.lr()]
    assert 0 < run.lr() < lr / 2
    run.done = 100
    assert run.lr() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "change", [{"target": "eps"}, {"target": "v"}, {"variance": "learned"}, {"rrdbs": 0}, {"amp": "bf16"}]
)
def test_every_variant_takes_steps(tiny_data: Path, tmp_path: Path, change: dict[str, object]) -> None:
    config = preset("tiny").with_values({**change, "steps": 2, "val_every": 2})
    result = train(config, tiny_data, tmp_path / "run", quiet=True)
    assert np.isfinite(result.loss)
    assert result.best is not None


def test_a_run_can_start_from_anothers_averaged_weights(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = preset("tiny").with_values({"lr": 1e-30, "weight_decay": 0.0, "steps": 1})
    train(config, tiny_data, tmp_path / "run", init=tiny_run, quiet=True)
    start = weights(tiny_run, "ema")
    for which in ("model", "ema"):
        for name, value in weights(tmp_path / "run", which).items():
            torch.testing.assert_close(value, start[name], rtol=0, atol=1e-12)
    with pytest.raises(CdiffError, match="leave one of them out"):
        train(config, tiny_data, tmp_path / "run", init=tiny_run, resume=True, quiet=True)
    with pytest.raises(CdiffError, match="no weights to start from"):
        train(config, tiny_data, tmp_path / "other", init=tmp_path, quiet=True)
    with pytest.raises(CdiffError, match="its weights are of another network; add --set base_channels=8, or leave out"):
        train(config.with_values({"base_channels": 16}), tiny_data, tmp_path / "third", init=tiny_run, quiet=True)
    assert not (tmp_path / "third").exists()


def test_a_run_from_other_weights_says_whose_they_were_also_when_it_is_resumed(
    tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = preset("tiny").with_values({"steps": 2, "val_every": 2})
    train(config, tiny_data, tmp_path / "second", init=tiny_run, max_steps=1, quiet=True)
    train(config, tiny_data, tmp_path / "second", resume=True, quiet=True)
    second = last_info(tmp_path / "second")
    folder = checkpoint_folder(tiny_run, "last")
    assert folder is not None
    first = {"name": tiny_run.name, "sha256": sha256(folder / "ema.safetensors")}
    assert second["step"] == 2
    assert second["init"] == first
    train(config, tiny_data, tmp_path / "third", init=tmp_path / "second", max_steps=1, quiet=True)
    third = last_info(tmp_path / "third")["init"]
    assert (third["name"], third["init"]) == ("second", first)
    assert "init" not in load_run(tiny_run).info


def test_a_run_from_other_weights_resumes_with_them_after_a_kill_in_its_first_step(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = preset("tiny").with_values({"steps": 2, "val_every": 2})
    train(config, tiny_data, tmp_path / "whole", init=tiny_run, quiet=True)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tiny_data, tmp_path / "cut", init=tiny_run, quiet=True)
    dry = train(config, tiny_data, tmp_path / "cut", resume=True, dry_run=True, quiet=True)
    assert dry.step == 0
    train(config, tiny_data, tmp_path / "cut", resume=True, quiet=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert float(read_log(tmp_path / "cut" / "log.csv")[-1]["step"]) == 2
    assert np.isfinite(dry.loss)


def test_a_run_that_knows_no_structure_takes_one_once(tmp_path: Path) -> None:
    """As an imported run, whose data were never seen here."""
    plain = preset("tiny")
    first, second = (plain.with_settings([f"task=task0{i}"]) for i in (1, 2))
    write_json(tmp_path / "config.json", plain.to_json())
    check_out(tmp_path, first, resume=True)
    write_json(tmp_path / "config.json", first.to_json())
    with pytest.raises(CdiffError, match="task: task01 there, task02 now"):
        check_out(tmp_path, second, resume=True)


def test_what_is_said_is_neither_wrapped_nor_taken_for_markup(tmp_path: Path) -> None:
    """In a log of 80 columns a validation's score stood on a line of its own, and a case called [red] lost its name."""
    data, said = tmp_path / "data", StringIO()
    write_synthetic_dataset(data, {"Training": 3, "Validation": 1}, raters=2, shape=(32, 32, 1))
    case = (data / "Training/case01").rename(data / "Training/[red]")
    (case / "task01_seg02.nii.gz").unlink()
    config = preset("tiny").with_values({"levels": 2, "steps": 1, "val_every": 1, "log_every": 1})
    train(config, data, tmp_path / "run", console=Console(file=said, width=20))
    note, found, step = said.getvalue().splitlines()
    assert note == "note: [red] has 1 mask, not 2: skipped"
    assert found.startswith("training on 2 slices of 2 cases, validating on 1 of 1; ")
    assert step.startswith("step 1 ")
    assert " val_soft_dice_5 0." in step


def test_quiet_leaves_the_notes(tmp_path: Path) -> None:
    data, said = tmp_path / "data", StringIO()
    write_synthetic_dataset(data, {"Training": 3, "Validation": 1}, raters=2, shape=(32, 32, 1))
    (data / "Training/case01/task01_seg02.nii.gz").unlink()
    config = preset("tiny").with_values({"levels": 2})
    train(config, data, tmp_path / "run", dry_run=True, quiet=True, console=Console(file=said))
    assert said.getvalue() == "note: case01 has 1 mask, not 2: skipped\n"


def test_resuming_what_was_never_begun_says_so(tmp_path: Path) -> None:
    with pytest.raises(CdiffError, match=r"run/config\.json does not exist; is this the folder of a training run\?$"):
        load_run(tmp_path / "run")
