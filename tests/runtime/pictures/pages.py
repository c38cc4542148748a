"""Results of noise, their pages, and what a page's script reads."""

from __future__ import annotations

import base64
import json
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.results import Result
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.stack import Stack
from cdiff.runtime.variants import VARIANTS


def result(
    shape: tuple[int, ...] = (24, 18, 5), codes: str = "LPS", C: int = 3, variant: str = "consensus", **read: Any
) -> Result:
    """Maps of noise, so that every voxel's are its own, in a scan whose axes point to `codes`; slices 1 to the last but one."""
    rng = np.random.default_rng(0)
    where = nib.orientations.axcodes2ornt(tuple(codes))
    affine = np.zeros((4, 4))
    for axis, (to, sign) in enumerate(where):
        affine[int(to), axis] = sign * (0.5, 0.75, 2.0)[axis]
    affine[:, 3] = (10, -20, 30, 1)
    scan = read_scan(nib.Nifti1Image(rng.normal(size=shape).astype(np.float32), affine), **read)
    n, _, h, w = scan.slices.shape
    chosen = range(1, n - 1) if n > 2 else range(n)
    maps = rng.random((len(chosen), C if VARIANTS[variant].told else 1, h, w), dtype=np.float32)
    stack = Stack(maps, rng.random(maps[:, 0].shape, dtype=np.float32) / 2, None, VARIANTS[variant], C)
    return Result(scan.grid, scan.slices, chosen, stack, "x", {"warnings": ["a <b>note</b>"]})


class Script(HTMLParser):
    """Collects the script elements' text, as a browser's parser ends them, and every address that anything names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script"
        self.scripts += [""] if self.inside else []
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def contents(page: Path) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
    """What the page's script reads: all but the slices, and these [channels, rows, columns]."""
    data = json.loads(Script(page.read_text(encoding="utf-8")).scripts[0])
    slices = [
        np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(-1, *data["size"])
        for text in data["slices"]
    ]
    return data, slices
