"""model.safetensors of a bundle, the same bytes for the same weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import write_tensors

LENGTH = struct.Struct("<Q")
"""The file begins with the length of its head, which is JSON padded with spaces; the tensors' bytes follow (safetensors' README, Format)."""


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to `path`, readable by others than the owner too.

    safetensors writes the metadata in an order that differs from process to process, so two exports of one run would differ in their
    hashes: it is sorted here, in place. Raises CdiffError when the file cannot be written, or when the sorted head is longer than the one
    that safetensors wrote, which only another form of head could be.
    """
    write_tensors(path, dict(tensors), dict(metadata))
    with open(path, "r+b") as file:
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        head = json.loads(file.read(length))
        head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise CdiffError(f"{path}: safetensors wrote a header in an unexpected form; report its version as a bug")
        file.seek(LENGTH.size)
        file.write(text.ljust(length))
