"""Checkpoints that are made to take memory or time out of all proportion: refused before PyTorch unpickles them."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from cdiff.runtime.errors import CdiffError
from cdiff.train.archive import must_be_as_written
from cdiff.train.imported.weights import read_state_dict


def with_pickle(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive as torch.save writes it, around such a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        parts = {"data.pkl": content, "byteorder": b"little", "data/0": bytes(256), "version": b"3\n"}
        for name, part in parts.items():
            archive.writestr(f"archive/{name}", part)
    return path


def pickled(value: Any) -> bytes:
    """The pickle that torch.save makes of a value, whose tensor has 256 bytes."""
    saved = io.BytesIO()
    torch.save(value, saved)
    with zipfile.ZipFile(saved) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def refused(path: Path) -> str:
    with pytest.raises(CdiffError) as caught:
        read_state_dict(path)
    return str(caught.value)


GREEDY = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x04\x85R."
"""bytearray(2**34)."""


@pytest.mark.parametrize("legacy", [False, True])
def test_bytes_of_any_number_are_not_made(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "ema.pt"
    if legacy:  # PyTorch's own number and version, what it ran on, then what was saved
        path.write_bytes(b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {})) + GREEDY)
    else:
        with_pickle(path, GREEDY)
    assert "holds more than tensors" in refused(path)


def test_a_key_of_tuples_of_tuples_is_not_looked_up(tmp_path: Path) -> None:
    """Each holds the one before twice: a hash of the 200th takes longer than the world is old."""
    doubled = b"".join(b"q" + bytes([number]) + b"h" + bytes([number]) + b"\x86" for number in range(200))
    assert "is not a PyTorch checkpoint" in refused(
        with_pickle(tmp_path / "a.pt", b"\x80\x02})" + doubled + b"K\x01s.")
    )
    renamed = b"q\xffh\xff\x86" * 200  # all kept under one number
    assert "is not a PyTorch checkpoint" in refused(
        with_pickle(tmp_path / "b.pt", b"\x80\x02})" + renamed + b"K\x01s.")
    )


def test_a_name_that_is_no_text_is_not_written_out(tmp_path: Path) -> None:
    """Of 17 tuples of twice the one before the text has a megabyte."""
    doubled = b"".join(b"q" + bytes([number]) + b"h" + bytes([number]) + b"\x86" for number in range(17))
    says = refused(with_pickle(tmp_path / "ema.pt", b"\x80\x02})" + doubled + b"K\x01s."))
    assert "some of its names are not text" in says
    assert len(refused(with_pickle(tmp_path / "long.pt", pickled({"a" * 5000: 1})))) < 1000


ORDERED = b"ccollections\nOrderedDict\nq\x01"
PAIR, COPY = b"K\x01K\x02\x86", b"h\x01h\x02\x85R"
LONG = b"(" + 1000 * PAIR + b"e"
NUMBERED = b"".join(b"M" + number.to_bytes(2, "little") + b"N" for number in range(1000))
SIZE = b"ctorch\nSize\n(" + 2000 * b"K\x01" + b"t\x85Rq\x02"
GREEDY_COPIES = {
    "a list with every six bytes": b"](" + ORDERED + b"]q\x02" + LONG + 1000 * COPY + b"e.",
    "of a list that grows": b"](" + ORDERED + b"]q\x02\x85q\x03h\x02" + LONG + 1000 * b"h\x01h\x03R" + b"e.",
    "of an object's own": b"](" + ORDERED + b")Rq\x03}q\x02(" + NUMBERED + b"uh\x03" + 1000 * b"h\x02b" + b"e.",
    "of sizes for keys": b"](" + SIZE + b"}(" + 1000 * b"h\x02N" + b"ue.",
    "of keys that are long": b"](" + ORDERED + b"]q\x02(" + b"(" + 2000 * b"N" + b"tK\x01\x86e" + 1000 * COPY + b"e.",
}
"""Each asks 1000 times for what takes 1000 steps or more; a megabyte of it would take a hundred thousand times as much."""


@pytest.mark.parametrize("what", GREEDY_COPIES)
def test_a_long_list_is_not_copied_without_end(what: str, tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "ema.pt", b"\x80\x02" + GREEDY_COPIES[what])
    with pytest.raises(pickle.UnpicklingError, match="it would take long"):
        must_be_as_written(path)
    assert "is not a PyTorch checkpoint" in refused(path)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


REPEATED = pickled(torch.zeros(1, dtype=torch.uint8).expand(1000))[2:-1]
LATIN, HEX = text("latin1") + b"\x86R", text("hex") + b"\x86R"
TYPED, DEVICE = b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n"
SAME_HASH = b"".join(
    b"\x8a\x0b" + (number * (2**61 - 1)).to_bytes(11, "little") + b"N" for number in range(2**20, 2**20 + 2000)
)
OUT_OF_PROPORTION = {
    "bytes of bytes, each twice as many": 11 * b"c_codecs\nencode\n" + text("a") + LATIN + 10 * HEX,
    "characters that are counted": b"ccollections\nCounter\n" + text("ab" * 500) + b"\x85R",
    "rows of a tensor": ORDERED + REPEATED + b"\x85R",
    "rows of one in a list": ORDERED + b"]" + REPEATED + b"a\x85R",
    "rows of one for arguments": ORDERED + REPEATED + b"R",
    "rows of one for an object's own": ORDERED + b")R" + REPEATED + b"b",
    "rows of one for a size": b"ctorch\nSize\n" + REPEATED + b"\x85R",
    "rows of one, through another call": TYPED + b"(ctorch\nSize\nq\x02h\x02" + REPEATED + b"\x85}tR",
    "numbers of a tensor as others": DEVICE + b"(" + REPEATED + b"ctorch\nfloat64\n" + text("cpu") + b"\x89tR",
    "whole numbers of one hash": b"}(" + SAME_HASH + b"u",
}


@pytest.mark.parametrize("what", OUT_OF_PROPORTION)
def test_no_call_makes_much_of_little(what: str, tmp_path: Path) -> None:
    """Each is small here; PyTorch, asked for tensors alone, takes all memory or all day for one of a few hundred bytes or some megabytes."""
    path = with_pickle(tmp_path / "ema.pt", b"\x80\x02" + OUT_OF_PROPORTION[what] + b".")
    with pytest.raises(pickle.UnpicklingError):
        must_be_as_written(path)


def test_the_pickle_that_is_looked_at_is_the_one_that_pytorch_reads(tmp_path: Path) -> None:
    """Where they differ the other one could hold anything."""
    good, path = pickled({"a": torch.zeros(64)}), tmp_path / "ema.pt"
    other = good.replace(text("a"), text("b"))
    first, second = (with_pickle(path, content).read_bytes() for content in (other, good))
    sizes = bytearray(first)  # of the pickle four bytes alone, to Python
    entry = sizes.index(b"PK\x01\x02")
    sizes[entry + 16 : entry + 24] = zlib.crc32(good[:4]).to_bytes(4, "little") + (4).to_bytes(4, "little")
    legacy = b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {})) + GREEDY
    torch.save({}, path)
    elsewhere = (
        path.read_bytes()[:-34] + bytes(8) + path.read_bytes()[-26:]
    )  # the end of its directory, as PyTorch finds it
    for content in (first + second, first + b"PK\x05\x06", bytes(sizes), legacy + second, elsewhere):
        path.write_bytes(content)
        with pytest.raises((OSError, pickle.UnpicklingError, zipfile.BadZipFile)):
            must_be_as_written(path)


def test_a_key_that_lies_deep_does_not_end_the_process(tmp_path: Path) -> None:
    """Nothing is shared, but a hash of tuples goes as deep as they do, and a program's stack does not."""
    path = with_pickle(tmp_path / "ema.pt", b"\x80\x02})" + 10**5 * b"\x85" + b"K\x01s.")
    assert "is not a PyTorch checkpoint" in refused(path)


def test_what_many_groups_of_an_optimiser_share_is_read(tmp_path: Path) -> None:
    """As where each layer has a learning rate of its own, or each tensor."""
    betas, path = (0.9, 0.999), tmp_path / "optimiser.pt"
    state = {number: {"step": torch.ones(()), "shape": torch.Size((3, 3))} for number in range(50)}
    torch.save({"state": state, "param_groups": [{"betas": betas, "lr": 1e-3} for _ in range(5000)]}, path)
    must_be_as_written(path)
    assert len(torch.load(path, weights_only=True)["param_groups"]) == 5000


def test_packed_parts_are_not_unpacked(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "ema.pt", pickled({"a": torch.zeros(64)}), zipfile.ZIP_DEFLATED)
    assert "its parts are compressed" in refused(path)


def test_tensors_of_more_bytes_than_the_file_are_refused(tmp_path: Path) -> None:
    """One number repeated: written out, as a run's weights are, it would fill the disk."""
    path = tmp_path / "ema.pt"
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)
    assert "is shorter than its tensors" in refused(path)
    torch.save({name: torch.arange(1000.0).view(10, 100)[row] for row, name in enumerate("abcdefghij")}, path)
    assert len(read_state_dict(path)) == 10  # parts of one tensor, as of a flat list of parameters


def test_what_a_file_puts_into_an_object_does_not_go_by_a_methods_name(tmp_path: Path) -> None:
    held: Any = OrderedDict(a=torch.ones(64))
    held.itemz, held["a"].dym, held["a"].floot = 3, 3, 3
    content = pickled(held).replace(b"itemz", b"items").replace(b"dym", b"dim").replace(b"floot", b"float")
    tensor = read_state_dict(with_pickle(tmp_path / "ema.pt", content))["a"]
    assert (tensor.dim(), tensor.float().numel()) == (1, 64)
