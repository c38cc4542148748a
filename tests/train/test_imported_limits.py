"""Checkpoints of the published codes that say too little, or hold what they should not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import load_run
from cdiff.train.imported.importer import import_checkpoint
from cdiff.train.imported.options import Options
from tests.train.published import recorded


def test_a_soft_label_checkpoint_without_a_table_takes_its_number_of_annotators(tmp_path: Path) -> None:
    """As the published script writes it: args.json holds no number, and the network no table."""
    case = recorded("consensus")
    args = case.args | {"soft_label_training": True, "consensus_training": False, "number_of_annotators": None}
    path = dataclasses.replace(case, args=args).save(tmp_path / "soft")
    tensors = case.tensors()
    del tensors["label_emb.weight"]
    torch.save(tensors, path)
    unknown = import_checkpoint(path, tmp_path / "unknown")
    assert any("number_of_annotators=C" in note for note in unknown.notes)
    told = import_checkpoint(path, tmp_path / "told", settings=["number_of_annotators=6"])
    assert told.config.network.levels == 6
    assert not any("number_of_annotators" in note for note in told.notes)
    network = load_run(told.path).network.state_dict()
    assert all(torch.equal(value, network[name]) for name, value in load_run(unknown.path).network.state_dict().items())


def test_what_no_tensor_shows_is_said_where_nothing_says_it(tmp_path: Path) -> None:
    case = recorded("implicit")
    path = case.save(tmp_path / "given")
    (path.parent / "args.json").unlink(missing_ok=True)
    named = [f"{name}={value}" for name, value in case.args.items() if value is not None]
    plain = [one for one in named if not one.startswith("num_heads=")]
    (note,) = [n for n in import_checkpoint(path, tmp_path / "a", settings=plain).notes if "taken for granted" in n]
    assert "num_heads=1" in note
    fewer = import_checkpoint(path, tmp_path / "b", settings=[*plain, "num_heads=1", "diffusion_steps=100"]).notes
    assert not any("num_heads=" in n for n in fewer)
    assert any("1000 steps" in n for n in fewer)


def test_the_published_loaders_crop_can_be_asked_for(tmp_path: Path) -> None:
    case = recorded("implicit")
    path = case.save(tmp_path / "given")
    done = import_checkpoint(path, tmp_path / "resized")
    assert done.config.data.framing == "resize"
    assert any("--image-size 224" in note for note in done.notes)
    cropped = import_checkpoint(path, tmp_path / "cropped", image_size=224)
    assert (cropped.config.data.framing, cropped.config.network.image_size) == ("centre", 224)


@pytest.mark.parametrize("how", ["sparse", "meta", "float8", "too large", "flipped"])
def test_tensors_that_are_no_plain_finite_numbers_are_one_line(how: str, tmp_path: Path) -> None:
    case = recorded("consensus")
    path = case.save(tmp_path / "given")
    tensors, name = case.tensors(), "rrdb.HRconv.weight"
    weight = tensors[name]
    changed = {
        "sparse": weight.to_sparse(),
        "meta": weight.to("meta"),
        "float8": weight.to(torch.float8_e4m3fn),
        "too large": torch.full(weight.shape, 1e300, dtype=torch.float64),
        "flipped": weight,
    }
    torch.save(tensors | {name: changed[how]}, path)
    if how == "flipped":
        data = bytearray(path.read_bytes())
        place = data.find(weight.numpy().tobytes())
        assert place > 0
        data[place] ^= 1
        path.write_bytes(data)
    with pytest.raises(CdiffError, match="is damaged" if how == "flipped" else rf"(wrong type|not finite) {name}"):
        import_checkpoint(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option", ["num_res_blocks=10000000", "rrdb_blocks=1000000", "num_channels=320000000", "lr=inf"]
)
def test_options_beyond_reason_are_one_line(option: str) -> None:
    with pytest.raises(CdiffError, match=f"the published option {option.partition('=')[0]}="):
        Options.read("consensus", recorded("consensus").args, [option])
