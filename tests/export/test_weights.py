"""The weights of a bundle: the same bytes each time, and what safetensors reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cdiff.export import weights
from cdiff.export.weights import write_weights
from cdiff.runtime.bundle import shipped_bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import WEIGHTS
from cdiff.train.checkpoint import read_tensors

METADATA = {"format": "pt", "config": json.dumps({"name": "Knötchen", "levels": 4}), "a": '\\ " \n Knötchen', "z": ""}


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    """safetensors orders four keys in 24 ways at random: twelve files of it are hardly ever equal."""
    tensors = {name: torch.arange(n, dtype=torch.float32) for n, name in enumerate(("b", "a", "c.weight"), start=3)}
    paths = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for path in paths:
        write_weights(path, tensors, METADATA)
    assert len({path.read_bytes() for path in paths}) == 1
    with safe_open(paths[0], "pt") as file:
        assert file.metadata() == METADATA
    found = read_tensors(paths[0])
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert paths[0].stat().st_mode & 0o044 == 0o044


def test_a_head_of_any_length_fits_its_place(tmp_path: Path) -> None:
    """One in eight is exactly as long as its place, which has spaces to the next multiple of eight."""
    tensors = {"a": torch.arange(5.0)}
    for spaces in range(8):
        metadata = METADATA | {"z": "z" * spaces}
        write_weights(tmp_path / "weights", tensors, metadata)
        with safe_open(tmp_path / "weights", "pt") as file:
            assert file.metadata() == metadata
        assert torch.equal(read_tensors(tmp_path / "weights")["a"], tensors["a"])


def test_a_head_in_another_form_is_not_written_over_the_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b'{"__metadata__":{},"a":[1E9]}'  # written again it is 1000000000.0
    whole = weights.LENGTH.pack(len(head)) + head + bytes(range(20))
    monkeypatch.setattr(weights, "write_tensors", lambda path, *_: path.write_bytes(whole))
    with pytest.raises(CdiffError, match="a header in an unexpected form"):
        write_weights(tmp_path / "weights", {}, {})
    assert (tmp_path / "weights").read_bytes() == whole


def test_the_shipped_weights_keep_their_size_when_written_again(tmp_path: Path) -> None:
    """All but the order of the metadata is as safetensors writes it, so that what was shipped has no other size."""
    shipped = shipped_bundle() / WEIGHTS
    with safe_open(shipped, "pt") as file:
        metadata = file.metadata()
    write_weights(tmp_path / "again", read_tensors(shipped), metadata)
    assert (tmp_path / "again").stat().st_size == shipped.stat().st_size
    with safe_open(tmp_path / "again", "pt") as file:
        assert file.metadata() == metadata
