"""The kernels that TensorRT for RTX compiles when an engine first runs on a GPU, kept beside the engine for the next time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cdiff.runtime.engines.trt import user_cache
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder, write_bytes

LOG = logging.getLogger("cdiff")
FORMAT = 1


@dataclass(frozen=True)
class JitFile:
    """The file of one engine's kernels for one kind of GPU: a line of JSON that tells whose they are and their hash, then TensorRT's bytes.

    engine: the engine's file. engine_sha256: of its content. version: TensorRT's. gpu: the driver's name for it. TensorRT itself checks
    driver and GPU again when it gets the bytes.
    """

    engine: Path
    engine_sha256: str
    version: str
    gpu: str

    def read(self) -> bytes | None:
        """The bytes to give to TensorRT; None when there are none for exactly this engine, version and GPU, or they are damaged."""
        for path in self._places():
            try:
                head, _, blob = path.read_bytes().partition(b"\n")
                found = json.loads(head)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError) as error:
                LOG.warning("%s cannot be read (%s) and is not used; its kernels are compiled again", path, error)
                continue
            if not isinstance(found, dict) or {**found, "sha256": ""} != self._head(""):
                LOG.info("%s is for another engine, version or GPU; the kernels are compiled again", path)
            elif found.get("sha256") != hashlib.sha256(blob).hexdigest():
                LOG.warning("%s is damaged and is not used; its kernels are compiled again", path)
            else:
                return blob
        return None

    def write(self, blob: bytes) -> None:
        """Save the bytes, whole or not at all. If they cannot be written, that is no error: the kernels are compiled again next time."""
        head = json.dumps(self._head(hashlib.sha256(blob).hexdigest())).encode()
        beside, elsewhere = self._places()
        path = beside if os.access(beside.parent, os.W_OK) else elsewhere
        try:
            make_folder(path.parent)
            write_bytes(path, head + b"\n" + blob)
        except CdiffError as error:
            LOG.info("the compiled kernels are not kept: %s", error)

    def _head(self, digest: str) -> dict[str, object]:
        mine = {"engine": self.engine_sha256, "version": self.version, "gpu": self.gpu}
        return {"format": FORMAT, **mine, "sha256": digest}

    def _places(self) -> tuple[Path, Path]:
        """The file beside the engine, and the one in the user's cache, for an engine in a folder that cannot be written to."""
        name = f"kernels_{re.sub(r'[^A-Za-z0-9.+-]+', '-', self.gpu)}.cache"
        return self.engine.parent / name, user_cache() / self.engine.parent.name / name
