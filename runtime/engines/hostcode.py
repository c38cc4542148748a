"""Decides which version-compatible engines may run the program code that they carry: only those that this user built.

A version-compatible engine contains a part of TensorRT itself: machine code that the processor runs with the user's rights when the engine
is loaded. TensorRT refuses such an engine unless it is told that the file can be trusted. A bundle may come from anywhere, with any
engine in its `engines/` and a record that fits it, so neither the record nor its hash proves who made an engine. The builder
therefore notes the SHA-256 of each such engine in the user's own cache, outside any bundle, and only engines noted there are loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from cdiff.runtime.engines.trt import user_cache
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_text

TRUST = "CDIFF_TRUST_ENGINES"
"""Environment variable: if it is 1, version-compatible engines are loaded wherever they come from."""


def note_own(digest: str, made: Path) -> None:
    """Note, as the builder does, that the engine with this SHA-256, just written to `made`, is this user's own."""
    write_text(_note(digest), f"{made}\n")


def must_be_trusted(engine: Path, digest: str) -> None:
    """Raise CdiffError unless this user built the engine with the SHA-256 `digest`, or trusts all engines (`TRUST`).

    digest: of the very bytes that will be loaded, because the file may have changed since an earlier read.
    """
    if os.environ.get(TRUST) != "1" and not _note(digest).is_file():
        raise CdiffError(
            f"{engine} is version-compatible: loading it runs code that it carries, and it was not built by you on this machine; "
            f"build it here, or, where you trust its source, set {TRUST}=1"
        )


def _note(digest: str) -> Path:
    return user_cache().parent / "own-engines" / digest
