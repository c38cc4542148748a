"""`cdiff import` as its user runs it: what it prints and refuses, and that what it writes goes all the way to maps."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.export.reference import TorchEngine
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.train.checkpoint import checkpoint_folder, load_run, read_config, read_json, read_tensors
from tests.synthetic import write_synthetic_dataset
from tests.train.published import Recorded, recorded


def cdiff(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded("consensus").save(tmp_path_factory.mktemp("published"))


def test_it_says_what_it_found_and_prints_the_run(checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = cdiff("import", checkpoint, "--out", tmp_path / "run", "--mean", "12.5", "--std", "3")
    assert (code, out.strip()) == (0, str(tmp_path / "run"))
    tensors = read_tensors(checkpoint_folder(tmp_path / "run", "last") / "ema.safetensors")
    assert f"consensus code, consensus: {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M parameters, " in err
    assert "32x32, 1 channel, 3 levels, T = 100, step 2500" in err
    assert "note" not in err
    assert read_config(tmp_path / "run").data.intensity_mean == (12.5,)
    code, out, err = cdiff("import", checkpoint, "--out", tmp_path / "other", "-q")
    assert (code, out.strip()) == (0, str(tmp_path / "other"))
    assert "each slice's own are used instead" in err  # a note is printed with -q too


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--option", "rrdb_blocks=2"], "missing    rrdb.RRDB_trunk.1.RDB1.conv1.bias [32]\n"),
        (["--from", "implicit-ensemble"], "is from the consensus code, not implicit-ensemble"),
        (["--option", "rrdb_blocks"], "write it as name=value"),
        (["--mean", "one", "--std", "1"], "give numbers with commas"),
        (["--mean", "1,2", "--std", "1"], "must be as many numbers"),
        (["--args", "nowhere.json"], "nowhere.json does not exist"),
        (["--args", "."], "error: . is a folder; give the args.json"),
    ],
)
def test_mistakes_are_one_error_and_no_run(arguments: list[str], says: str, checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = cdiff("import", checkpoint, "--out", tmp_path / "run", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("error") == 1
    assert says in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_from_a_published_checkpoint_to_maps(tmp_path: Path) -> None:
    case: Recorded = recorded("implicit")
    path = case.save(tmp_path / "published", "emasavedmodel_0.9999_050000.pt")
    run, bundle, maps = tmp_path / "run", tmp_path / "bundle", tmp_path / "maps"
    scan = np.random.default_rng(0).uniform(0, 1, (32, 32, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(scan, np.eye(4)), tmp_path / "scan.nii.gz")

    assert cdiff("import", path, "--out", run)[0] == 0
    assert cdiff("export", run, "--out", bundle, "-q")[:2] == (0, f"{bundle}\n")
    card = (bundle / "README.md").read_text()
    assert "JuliaWolleb/Diffusion-based-Segmentation" in card
    assert "none: values as stored" in card
    given = ("--runs", 2, "--steps", 4, "--seed", 5, "--no-preview", "-q")
    code, _, err = cdiff("segment", tmp_path / "scan.nii.gz", "-o", maps, "--model", bundle, *given)
    assert code == 0, err

    # The same chains by the imported network in PyTorch, on the values as stored.
    loaded = load_run(run)
    windows = Framing("resize", (32, 32)).frame(np.moveaxis(scan, 2, 0)[None])
    table = sampler_table("ddpm", loaded.schedule, 4)
    (wanted,) = segment_windows(TorchEngine(loaded.network, loaded.schedule), windows, table, levels=1, runs=2, seed=5)
    soft = np.asarray(nib.load(maps / "scan_soft.nii.gz").dataobj)
    assert soft.std() > 0.1
    # That code's masks are 0 and 1: the map is the mean of its samples themselves, and not of (x + 1)/2; 0 where that is below.
    samples = 2 * wanted.level_means[0] - 1
    np.testing.assert_allclose(soft.reshape(32, 32), np.maximum(samples, 0), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_training_goes_on_from_an_imported_run(checkpoint: Path, tmp_path: Path) -> None:
    data = write_synthetic_dataset(tmp_path / "data", {"Training": 2, "Validation": 1}, raters=3, shape=(32, 32, 2))
    run = tmp_path / "run"
    assert cdiff("import", checkpoint, "--out", run, "-q")[0] == 0
    before = load_run(run).network.state_dict()  # it has this one checkpoint
    code, _, err = cdiff("train", "--data", data, "--out", run, "--resume", "--max-steps", 2501, "-q")
    assert code == 0, err
    folder = checkpoint_folder(run, "last")
    assert folder is not None
    assert read_json(folder / "checkpoint.json")["step"] == 2501
    after = read_tensors(folder / "ema.safetensors")
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert "denoiser.last.weight" in changed
    assert max((after[name] - before[name]).abs().max().item() for name in changed) < 1e-3
