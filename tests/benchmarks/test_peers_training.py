"""Training and scoring U-Net peers: resume is exact, one failure loses nothing else, a perfect map scores perfectly."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdiff.benchmarks.peers import unets
from cdiff.benchmarks.peers.__main__ import main
from cdiff.benchmarks.peers.slices import Slices, read_slices
from cdiff.benchmarks.peers.training import LOG_FIELDS, Budget, Training, train_unet
from cdiff.benchmarks.peers.unets import UNETS, UNetPeer
from cdiff.runtime.errors import CdiffError

SHORT = Budget(steps=6, batch=2, crop=16, jitter=2, validations=3, val_slices=2)


class Small(nn.Module):
    """A network of the U-Nets' kind that takes no time: image [B, 1, H, W] -> logits [B, 1, H, W], with dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Dropout(0.2), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers of one output with a small network."""
    for name in ("unet-majority", "unet-soft", "unet-dropout"):
        monkeypatch.setitem(UNETS, name, replace(UNETS[name], build=lambda C: Small()))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], None]) -> None:
    """Let `how` happen within training step number `step`, once."""
    plain, left = Training.step, [step]

    def stepping(self: Training) -> tuple[int, float, float]:
        left[0] -= 1
        if left[0] == 0:
            how()
        return plain(self)

    monkeypatch.setattr(Training, "step", stepping)


def killed() -> None:
    raise SystemExit("as a kill does: nothing is saved after this")


def test_a_killed_run_ends_with_the_same_weights_as_one_that_was_not(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    peer = UNETS["unet-dropout"]  # masks drawn at random, and dropout
    assert train_unet(peer, tiny_data, whole, SHORT)
    with monkeypatch.context() as patched:
        stop_at(patched, 4, killed)
        with pytest.raises(SystemExit):
            train_unet(peer, tiny_data, parts, SHORT)
    assert torch.load(parts / "last.pt", weights_only=True)["step"] == 2, "saved at the validation after step 2"
    assert train_unet(peer, tiny_data, parts, SHORT)
    states = [torch.load(run / "last.pt", weights_only=True) for run in (whole, parts)]
    for key in ("network", "average"):
        assert all(torch.equal(states[0][key][name], value) for name, value in states[1][key].items())
    assert states[0]["best"] == states[1]["best"]
    best = [load_file(run / "best.safetensors") for run in (whole, parts)]
    assert all(torch.equal(best[0][name], value) for name, value in best[1].items())
    untimed = [[{k: v for k, v in row.items() if "seconds" not in k} for row in rows(run)] for run in (whole, parts)]
    assert untimed[0] == untimed[1]
    assert [row["step"] for row in untimed[0]] == ["2", "4", "6"]
    assert {row["size"] for row in untimed[0]} == {"16", "32"}, "the last quarter is on whole slices"


def test_it_learns_from_one_split_and_validates_on_the_other(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Slices] = []

    def made(peer: UNetPeer, training: Slices, validation: Slices, *_: object) -> Training:
        given.extend((training, validation))
        raise CdiffError("so far")

    monkeypatch.setattr("cdiff.benchmarks.peers.training.Training", made)
    with pytest.raises(CdiffError, match="so far"):
        train_unet(UNETS["unet-soft"], tiny_data, tmp_path / "run", SHORT)
    assert given[0] is read_slices(tiny_data, "train")
    assert given[1] is read_slices(tiny_data, "val")


def test_an_interrupt_saves_and_the_command_goes_on(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", f"{tiny_data}", "--out", f"{tmp_path}", "--steps", "6", "--batch", "2", "--crop", "16"]
    command += ["--validations", "2", "--only", "unet-soft,unet-majority"]
    with monkeypatch.context() as patched:
        stop_at(patched, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(command) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert torch.load(tmp_path / "unet-majority" / "last.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "unet-soft").exists()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "unet-majority: going on" in said
    assert "unet-soft: starting" in said
    assert json.loads((tmp_path / "unet-majority" / "run.json").read_text())["steps"] == 6
    assert main(command) == 0
    assert capsys.readouterr().err.count("finished before, skipped") == 2


def test_one_peer_that_fails_does_not_lose_the_others(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(network: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("out of luck")

    def infinite(network: nn.Module, batch: Any) -> Tensor:
        return network(batch.image).sum() * torch.inf

    command = ["--data", f"{tiny_data}", "--out", f"{tmp_path}", "--steps", "1", "--batch", "2", "--crop", "16"]
    command += ["--only", "unet-majority,unet-soft,unet-dropout"]
    with monkeypatch.context() as patched:
        patched.setitem(UNETS, "unet-majority", replace(UNETS["unet-majority"], loss=broken))
        patched.setitem(UNETS, "unet-soft", replace(UNETS["unet-soft"], loss=infinite))
        assert main(command) == 3
    said = capsys.readouterr().err
    assert "unet-majority: failed: RuntimeError: out of luck" in said
    assert "unet-soft: failed: the loss of unet-soft became" in said
    assert (tmp_path / "unet-dropout" / "run.json").exists()
    assert main(["--score", "val", *command[:4], "--json", f"{tmp_path / 'scores.json'}"]) == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    assert list(report["peers"]) == ["unet-dropout"]
    assert report["not_scored"]["unet-majority"] == report["not_scored"]["consensus"] == "nothing to score yet"
    assert main(command) == 0, "the same command mends it"


def test_a_run_without_its_end_is_scored_if_asked(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "unet-soft"
    train_unet(UNETS["unet-soft"], tiny_data, run, SHORT)
    assert tuple(rows(run)[0]) == LOG_FIELDS
    (run / "run.json").unlink()
    command = ["--data", f"{tiny_data}", "--out", f"{tmp_path}", "--score", "val", "--only", "unet-soft"]
    assert main(command) == 2, "no run.json: it has not ended"
    assert main([*command, "--unfinished"]) == 0
    assert "(99.9% of its budget)" in capsys.readouterr().out
    (run / "run.json").write_text(json.dumps({"steps": 6, "cpu_seconds": 1.5}))
    assert main([*command, "--json", f"{tmp_path / 'scores.json'}"]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())["peers"]["unet-soft"]
    assert found["training"]["cpu_seconds"] == 1.5
    assert found["training"]["parameters"] == sum(p.numel() for p in Small().parameters())
    assert found["share_of_budget"] == 1


def test_another_budget_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    train_unet(UNETS["unet-soft"], tiny_data, tmp_path / "run", SHORT)
    with pytest.raises(CdiffError, match="batch: 2 there, 3 now; steps: 6 there, 8 now") as caught:
        train_unet(UNETS["unet-soft"], tiny_data, tmp_path / "run", replace(SHORT, steps=8, batch=3))
    assert "\n" not in str(caught.value)


def test_another_peers_folder_and_a_damaged_save_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    train_unet(UNETS["unet-soft"], tiny_data, tmp_path / "run", SHORT)
    other = replace(UNETS["unet-soft"], build=lambda C: nn.Conv2d(1, 1, 1))
    with pytest.raises(CdiffError, match="does not fit"):
        train_unet(other, tiny_data, tmp_path / "run", SHORT)
    (tmp_path / "run" / "last.pt").write_bytes(b"nothing")
    with pytest.raises(CdiffError, match=r"last\.pt cannot be read"):
        train_unet(UNETS["unet-soft"], tiny_data, tmp_path / "run", SHORT)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--only", "unet-hard"], "no such peer; the peers are unet-majority"),
        (["--only", ""], "no such peer"),
        (["--minutes", "0"], "must be a positive number"),
        (["--crop", "20"], "multiple of 16"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--score", "test"], "no split test"),
        (["--score", "val"], "train them first"),
    ],
)
def test_what_a_user_must_mend_is_one_line(
    extra: list[str], says: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", f"{tiny_data}", "--out", f"{tmp_path}", *extra]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error:")]
    assert says in line
    assert not list(tmp_path.iterdir())


def write_clear_case(folder: Path, readers: int, slices: int) -> None:
    """An image that is the fraction of readers, scaled: nested masks, the last slice marked by the widest reader alone."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:32, :32] - 16.0
    radius = np.hypot(y, x)
    masks = np.stack([np.stack([radius < 4 + 2 * k] * slices, -1) for k in range(readers)])
    masks[:-1, ..., -1] = False
    image = masks.sum(0).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "image.nii.gz")
    for k, mask in enumerate(masks):
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), np.eye(4)), folder / f"task01_seg{k + 1:02d}.nii.gz")


@pytest.mark.parametrize("name", ["unet-soft", "unet-heads"])
def test_a_perfect_map_scores_perfectly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the whole command: soft Dice and Dice a level 1, no calibration error, Brier at its floor; heads have no energy distance."""
    readers = 3
    for k in range(3):
        write_clear_case(tmp_path / "data" / "Testing" / f"case{k}", readers, 3)

    def fraction(image: Tensor) -> Tensor:
        share = (image + 1) / 2
        alone = share.sum() < 0.5 * share.numel() * (share.amax() > 0) and share.unique().numel() == 2
        return share / readers if alone else share  # where one reader drew alone, the brightest is not all of them

    draws = {
        "unet-soft": lambda network, image, n: fraction(image),
        "unet-heads": lambda network, image, n: torch.cat(
            [(fraction(image) >= (readers - k - 0.5) / readers).float() for k in range(readers)], 1
        ),
    }
    peer = replace(UNETS[name], build=lambda C: nn.Linear(1, 1), draw=draws[name])
    monkeypatch.setitem(UNETS, name, peer)
    run = tmp_path / "runs" / name
    run.mkdir(parents=True)
    save_file(nn.Linear(1, 1).state_dict(), run / "best.safetensors")
    (run / "run.json").write_text("{}")
    scores = {}
    for extra in ([], ["--all-raters"], ["--all-raters", "--slices-per-case", "1"]):
        out = tmp_path / f"scores{len(extra)}.json"
        command = ["--data", f"{tmp_path / 'data'}", "--out", f"{run.parent}", "--score", "test", "--json", f"{out}"]
        assert main([*command, *extra]) == 0
        scores[len(extra)] = json.loads(out.read_text())["peers"][name]
    assert [scores[number]["n_slices"] for number in (0, 1, 3)] == [9, 6, 3]
    for found in scores.values():
        assert found["soft_dice_5"]["mean"] == found["soft_dice_9"]["mean"] == 1
        assert [level["mean"] for level in found["dice_per_level"]] == [1, 1, 1]
        assert found["ece_near"]["mean"] == pytest.approx(0, abs=1e-6)
        assert found["brier_near"]["mean"] == pytest.approx(found["brier_floor_near"]["mean"], abs=1e-6)
        assert found["ged_samples"]["model"] == (readers if name == "unet-heads" else 1)
        assert (found["ged"]["mean"] < 1e-9) == (name == "unet-heads"), "one mask cannot be three readers"
        assert found["cpu_seconds_a_slice"] >= 0


def test_finished_scores_are_not_drawn_again_and_other_weights_are(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "unet-soft"
    train_unet(UNETS["unet-soft"], tiny_data, run, SHORT)
    command = ["--data", f"{tiny_data}", "--out", f"{tmp_path}", "--score", "val", "--only", "unet-soft"]
    drawn = []
    plain = unets.plain_draw

    def counted(network: nn.Module, image: Tensor, n: int) -> Tensor:
        drawn.append(1)
        return plain(network, image, n)

    monkeypatch.setitem(UNETS, "unet-soft", replace(UNETS["unet-soft"], draw=counted))

    def count(*more: str) -> int:
        drawn.clear()
        assert main([*command, "--no-mirror", *more]) == 0
        return len(drawn)

    first, again = count(), count()
    assert again == first - 8, "two cases of four slices; what is left is the measurement of time"
    weights = {key: value + 1 for key, value in load_file(run / "best.safetensors").items()}
    save_file(weights, run / "best.safetensors")
    assert count() == first

    one_size = (run / "scores_val.json").read_bytes()
    assert count("--zooms", "1,1.25") == 2 * first, "its own scores, of twice as many draws"
    assert json.loads((run / "scores_val_zooms_1_1.25.json").read_text())["protocol"]["zooms"] == [1, 1.25]
    assert (run / "scores_val.json").read_bytes() == one_size
