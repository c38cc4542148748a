"""Which version-compatible engines may run the program code that they carry: those that this user's own builder made.

A version-compatible engine holds a part of TensorRT itself, machine code that the processor runs with the user's rights when the engine is
loaded. TensorRT therefore refuses such an engine unless it is told that the file can be trusted. A bundle may come from anywhere,
with whatever lies in its `engines/` and a record beside it that fits, so neither the record nor its hash says who made an engine. The builder
therefore notes the SHA-256 of each such engine in the user's own cache, outside any bundle, and only what is noted there is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from cdiff.runtime.engines.trt import user_cache
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_text

TRUST = "CDIFF_TRUST_ENGINES"
"""Environment variable: with the value 1 version-compatible engines are loaded wherever they come from."""


def note_own(digest: str, made: Path) -> None:
    """Called by the builder: the engine of that SHA-256, just written to `made`, is this user's own."""
    write_text(_note(digest), f"{made}\n")


def must_be_trusted(engine: Path, digest: str) -> None:
    """Raise CdiffError unless the engine of that SHA-256 was built by this user, or the user trusts all of them.

    digest: of the very bytes that will be loaded, not of the file as it was some time before.
    """
    if os.environ.get(TRUST) != "1" and not _note(digest).is_file():
        raise CdiffError(
            f"{engine} is version-compatible: loading it runs code that it carries, and it was not built by you on this machine; "
            f"build it here, or, where you trust its source, set {TRUST}=1"
        )


def _note(digest: str) -> Path:
    return user_cache().parent / "own-engines" / digest
