"""A run becomes a bundle that opens, agrees with PyTorch and says so; or nothing is written and one line says why."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import cdiff
from cdiff.export.exporter import export_run
from cdiff.export.reference import TorchEngine
from cdiff.export.verify import BOUNDS, verify
from cdiff.runtime.bundle import Bundle, open_bundle
from cdiff.runtime.engines.base import Float32
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import DENOISER, ENCODER
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.train.config import Config
from cdiff.train.sections import DataConfig
from tests.export.networks import FLAT, random_network, random_run

CONFIG = Config(
    network=replace(FLAT, target="eps", variance="learned"),
    data=DataConfig(framing="tile", slice_axis=1, intensity_scope="volume", intensity_lower=2.0),
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("exporter") / "run", CONFIG, val_soft_dice_5=0.5)


@pytest.fixture(scope="module")
def bundle(run: Path) -> Bundle:
    return open_bundle(export_run(run, run.parent / "model").path)


def test_the_manifest_describes_the_run(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.name == "model"
    assert (manifest.levels, manifest.T, manifest.image_size, manifest.features_channels) == (3, 50, (16, 16), 8)
    assert (manifest.target, manifest.variance, manifest.precision) == ("eps", "learned", "float32")
    assert (manifest.framing, manifest.slice_axis) == ("tile", 1)
    assert manifest.normalisation == CONFIG.data.intensity
    assert manifest.noise_schedule == CONFIG.schedule
    assert manifest.scores["validation"]["soft_dice_5"] == 0.5
    assert manifest.fast == {"sampler": "ddim", "steps": CONFIG.training.val_steps, "runs": 4}
    assert set(manifest.files) == {"README.md", "denoiser.onnx", "encoder.onnx", "model.safetensors"}


def test_the_recorded_errors_are_below_their_bounds(bundle: Bundle) -> None:
    recorded = bundle.manifest.verification
    assert recorded["bounds"] == BOUNDS["float32"]
    assert set(recorded["largest"]) == set(BOUNDS["float32"])
    # None at all is right, too: on some processors both sides of a small graph round alike.
    assert all(0 <= error < recorded["bounds"][key] for key, error in recorded["largest"].items())
    assert "real" not in recorded


def test_the_averaged_weights_are_the_ones_exported(bundle: Bundle) -> None:
    wanted = random_network(CONFIG.network).state_dict()
    with safe_open(bundle.file("model.safetensors"), "pt") as file:
        assert Config.from_json(json.loads(file.metadata()["config"])) == CONFIG
        assert set(file.keys()) == set(wanted)
        assert all(torch.equal(file.get_tensor(name), wanted[name]) for name in wanted)


def test_half_precision_is_read_back_and_real_slices_are_used(run: Path, bundle: Bundle, tmp_path: Path) -> None:
    slices = np.random.default_rng(0).uniform(-1, 1, (3, 1, 24, 20)).astype(np.float32)
    seen: list[tuple[int, int]] = []
    run = Path(shutil.copytree(run, tmp_path / "run"))
    np.savez(run / "samples.npz", images=slices)
    half = export_run(run, tmp_path / "half", fp16=True, fast_steps=1, progress=lambda *at: seen.append(at))
    manifest = open_bundle(half.path).manifest
    assert manifest.fast["steps"] == 1
    assert manifest.precision == "float16"
    assert manifest.verification["half_share"] == {"encoder": 1.0, "denoiser": 1.0}
    assert {"random", "real"} <= set(manifest.verification)
    # Half precision shows: the errors are beyond float32's, and below their bounds all the same.
    assert manifest.verification["largest"]["denoiser"] > 1e-5
    assert manifest.verification["largest"]["maps"] < BOUNDS["float16"]["maps"]
    assert half.denoiser.stat().st_size < 0.75 * bundle.denoiser.stat().st_size
    assert seen == [(part, 5) for part in range(6)]


@pytest.fixture(scope="module")
def zoomed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same network for slices at two zooms, exported amid a caller's autocast, type and device of new tensors."""
    folder = tmp_path_factory.mktemp("zoomed")
    centred = random_run(folder / "run", replace(CONFIG, data=replace(CONFIG.data, framing="centre")))
    with around():
        return export_run(centred, folder / "bundle", zooms=(1, 1.25))


@contextlib.contextmanager
def around() -> Iterator[None]:
    """What a program may have set around cdiff, and still finds set afterwards."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
            assert torch.is_autocast_enabled("cpu")
        assert (torch.get_default_dtype(), torch.get_default_device()) == (torch.float64, torch.device("meta"))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_what_the_program_around_set_changes_no_graph_and_no_map(bundle: Bundle, zoomed: Bundle) -> None:
    """A caller's autocast, type and device of new tensors: none is in the graphs, nor in the maps of the engine torch."""

    def drawn() -> Float32:
        scan = np.random.default_rng(0).random((16, 2, 16))
        return cdiff.load(bundle.path, engine="torch").segment(scan, runs=1, steps=2).maps

    plain = drawn()
    with around():
        np.testing.assert_array_equal(drawn(), plain)
    for name in (ENCODER, DENOISER):
        assert zoomed.manifest.files[name] == bundle.manifest.files[name]


def test_a_graph_of_other_weights_is_refused(bundle: Bundle) -> None:
    network = random_network(CONFIG.network)
    network.denoiser.last.bias += 0.02
    with pytest.raises(CdiffError, match="denoiser error"):
        verify(bundle, TorchEngine(network, CONFIG.schedule), None)
    network = random_network(CONFIG.network)
    network.encoder.first.weight *= 1.01
    with pytest.raises(CdiffError, match="encoder error"):
        verify(bundle, TorchEngine(network, CONFIG.schedule), None)
    with pytest.raises(CdiffError, match="denoiser error"):
        verify(bundle, TorchEngine(random_network(CONFIG.network), NoiseSchedule(50, beta_end=0.019)), None)


def test_the_error_of_maps_is_in_the_maps_unit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """An x0 that is off everywhere by 4e-5 is off by as much of the way from 0 to 1, and by half as much of that from -1 to 1."""
    network = random_network(replace(CONFIG.network, target="x0", variance="fixed"))
    network.denoiser.last.weight *= 1e-3
    network.denoiser.last.bias.fill_(0.5)
    shifted = copy.deepcopy(network)
    shifted.denoiser.last.bias += 4e-5
    monkeypatch.setattr("cdiff.export.verify.open_engine", lambda *_: TorchEngine(shifted, CONFIG.schedule))
    for outside, expected in ((0, 4e-5), (-1, 2e-5)):
        manifest = replace(bundle.manifest, target="x0", variance="fixed", outside=outside)
        found = verify(replace(bundle, manifest=manifest), TorchEngine(network, CONFIG.schedule), None)
        assert found["largest"]["maps"] == pytest.approx(expected, rel=0.02)
        assert found["random"]["maps_largest"] == pytest.approx(expected, rel=0.1)


def test_a_broken_network_leaves_no_bundle(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", CONFIG)
    (weights,) = run.glob("checkpoints/*/ema.safetensors")
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["denoiser.last.bias"][:] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(CdiffError, match=r"ema\.safetensors has changed since it was written"):
        export_run(run, tmp_path / "bundle")
    (weights.parent / "checkpoint.json").write_text("{}")  # as an older version, which wrote no hashes
    with pytest.raises(CdiffError, match=r"differ from PyTorch|not finite"):
        export_run(run, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_zooms_are_stated_and_each_has_its_mirrored_views(bundle: Bundle, zoomed: Bundle, tmp_path: Path) -> None:
    for name in (ENCODER, DENOISER):  # of one network, so the same files
        assert (zoomed.path / name).read_bytes() == bundle.file(name).read_bytes()
    assert zoomed.manifest.zooms == (1, 1.25)
    assert zoomed.manifest.fast["runs"] == 8
    card = (zoomed.path / "README.md").read_text()
    assert "| runs see | the slice at 1 and 1.25 times its size, in turn |" in card
    tiled = random_run(tmp_path / "tiles", replace(CONFIG, data=replace(CONFIG.data, framing="tile")))
    with pytest.raises(CdiffError, match="framing 'tile' looks at whole slices"):
        export_run(tiled, tmp_path / "none", zooms=(1, 1.25))
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_exported_gets_one_line(run: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CdiffError, match="already exists"):
        export_run(run, bundle.path)
    with pytest.raises(CdiffError, match=str(tmp_path)):
        export_run(tmp_path, tmp_path / "bundle")
    for name in ("\udcff", "\udcff/bundle"):  # ONNX Runtime would be blamed for the second, after the graphs were made
        with pytest.raises(CdiffError, match=r"/\\xff.* has a name that is not UTF-8"):
            export_run(run, tmp_path / name)
    with pytest.raises(CdiffError, match="51 steps are asked for, but the model was trained with 50"):
        export_run(run, tmp_path / "bundle", fast_steps=51)
    assert list(tmp_path.iterdir()) == []
    run = Path(shutil.copytree(run, tmp_path / "run"))
    np.savez(run / "samples.npz", images=np.zeros((2, 3, 16, 16), np.float32))
    with pytest.raises(CdiffError, match=r"samples.npz cannot be read .*shape \[2, 3, 16, 16\]"):
        export_run(run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [run]
