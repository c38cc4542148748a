"""Bundles for the engine tests: graphs that take milliseconds to build, written without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdiff.runtime.bundle import Bundle, write_bundle
from cdiff.runtime.manifest import Manifest
from tests.runtime.graphs import L, write_pair
from tests.runtime.test_manifest import example


def pair_bundle(folder: Path, **changes: Any) -> Bundle:
    """A bundle of `write_pair`'s graphs: 16 x 16 pixels, 3 levels, float32 unless changed."""

    def fill(part: Path) -> Manifest:
        write_pair(part)
        values = {"levels": 3, "T": 40, "image_size": (16, 16), "features_channels": L, "files": {}}
        return example(**(values | changes))

    return write_bundle(folder, fill)
