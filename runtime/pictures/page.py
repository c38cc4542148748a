"""The page of a result: one HTML file with its slices and maps, to browse; it loads nothing and sends nothing."""

from __future__ import annotations

import base64
import json
import zlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.pictures import drawing
from cdiff.runtime.pictures.preview import SEEN, Turned, agreement, close_up_of, displayable, how
from cdiff.runtime.report import NOTICE
from cdiff.runtime.words import three_digits

if TYPE_CHECKING:
    from cdiff.runtime.results import Result
    from cdiff.runtime.stack import Float32
    from cdiff.runtime.variants import Variant

MOST = 120
"""The most slices that a page holds: a CT slice of 512 x 512 pixels takes about a fifth of a megabyte."""


def write_page(result: Result, path: Path, name: str) -> None:
    """Write the page of `result` to `path`, an HTML file that needs nothing beside it.

    Slices and maps are stored in 8 bits: a value read from it differs from the NIfTI file's by at most 0.002. If there are more than
    MOST slices, it holds those with agreement, thinned evenly to MOST. Raises OSError when it cannot be written.
    """
    template = resources.files("cdiff.runtime.pictures").joinpath("page.html").read_text(encoding="utf-8")
    # Without "<", the text cannot end the script element.
    text = json.dumps(_contents(result, name), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    path.write_text(template.replace("__DATA__", text), encoding="utf-8")


def _contents(result: Result, name: str) -> dict[str, Any]:
    """All the data that the page's script reads."""
    view, stack, grid, variant = result.grid.view, result.stack, result.grid, result.stack.variant
    soft, spread, outlines = (Turned(stack, attribute, view) for attribute in ("soft", "spread", variant.outlines))
    held = agreement(soft)
    kept, some = _kept(held.most)
    pictures = [displayable(result, result.slices[i]) for i in kept]
    box = close_up_of(result, soft)
    window = drawing.window_of(np.stack([picture[box] for picture in pictures]))
    rows, columns = pictures[0].shape[:2]
    best = int(np.argmin(abs(kept - held.fullest)))
    top = 0.25 if variant.spread == "variance" else 0.5  # the largest spread that values between 0 and 1 can have
    slices = [
        _packed([*np.atleast_3d(drawing.grey(picture, window)).transpose(2, 0, 1), soft[i], spread[i], *outlines[i]])
        for i, picture in zip(kept, pictures, strict=True)
    ]
    return {
        "name": name,
        "how": how(result.report),
        "notice": NOTICE,
        "warnings": result.report.get("warnings", []),
        "size": [rows, columns],
        "aspect": 1.0 if view.spacing is None else view.spacing[0] / view.spacing[1],
        "edges": view.edges,
        "axis": grid.slice_axis,
        "voxel": _as_stored(result),
        "affine": grid.affine[:3].tolist() if grid.has_orientation else None,
        "box": None
        if box == (slice(0, rows), slice(0, columns))
        else [end for part in box for end in (part.start, part.stop)],
        "first": best,
        "start": result.slices.start,
        "of": len(result.image),
        "numbers": [int(result.slices[i]) for i in kept],
        "some": some,
        "expected": _expected(result, kept),
        "areas": [np.count_nonzero(one >= 0.5, axis=(1, 2)).tolist() for one in outlines],
        "slices": slices,
        "channels": 3 if pictures[0].ndim == 3 else 1,
        "palettes": {"soft": _palette(drawing.SOFT_MAP), "entropy": _palette(drawing.entropy_shades())},
        "spread_top": top if any(np.any(one > 0) for one in spread) else 0,
        "names": {"soft": "soft map" if variant.of_annotators else "mean", "spread": f"{variant.spread} over runs"},
        "labels": {
            "soft": drawing.SOFT_LABEL if variant.of_annotators else drawing.RUNS_LABEL,
            "entropy": drawing.ENTROPY_LABEL,
            "spread": f"{variant.spread} over runs",
        },
        "outline_title": variant.outline_title,
        "outlines": [
            {
                "name": _name(variant, c),
                "label": f"{variant.outline_key}: {c}",
                "colour": _rgb(colour),
            }
            for c, colour in enumerate(
                drawing.outline_colours(len(outlines[0]), readers=variant.told == "annotator"), start=1
            )
        ],
        "size_title": "Sizes" if len(grid.spatial) == 3 else "Areas",
        "sizes": _sizes(result),
    }


def _kept(most: Float32) -> tuple[NDArray[np.intp], str]:
    """Which slices the page holds, and what it says if those are not all. most [n]: the largest value of each slice's soft map."""
    every = np.arange(len(most))
    if len(most) <= MOST:
        return every, ""
    held = np.flatnonzero(most >= SEEN)
    around = every[max(held[0] - 2, 0) : held[-1] + 3] if held.size else every
    chosen = np.unique(np.linspace(around[0], around[-1], min(MOST, len(around))).round().astype(np.intp))
    return chosen, f"; this page holds {len(chosen)} of them"


def _expected(result: Result, kept: NDArray[np.intp]) -> list[str]:
    """For each slice of the page, the text beside its number: the Dice that its mask is expected to have."""
    values = [one["mask"] for one in result.report.get("expected_dice", {}).get("slices", [])]
    return [f", expected Dice {values[i]:.2f}" if values and values[i] is not None else "" for i in kept]


def _packed(channels: list[Float32]) -> str:
    """Channels [rows, columns] with values 0 to 1, as bytes, deflated and in base64."""
    raw = np.rint(255 * np.stack(channels)).astype(np.uint8)
    return _text(zlib.compress(raw.tobytes(), 6))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _palette(colours: Any) -> str:
    """256 colours of three bytes each, in base64."""
    from matplotlib import colormaps

    shades = colormaps[colours] if isinstance(colours, str) else colours
    return _text((shades(np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes())


def _rgb(colour: Any) -> list[int]:
    from matplotlib.colors import to_rgb

    return [round(255 * part) for part in to_rgb(colour)]


def _name(variant: Variant, c: int) -> str:
    """The name of an outlined map."""
    if not variant.of_annotators:
        return "mask"
    return f"annotator {c}" if variant.told == "annotator" else f"at least {c}"


def _as_stored(result: Result) -> list[list[int]]:
    """For each in-plane axis as stored, its index as a linear function of the picture's row and column: [start, per row, per column]."""
    height, width = result.image.shape[-2:]
    functions = []
    for index in np.meshgrid(np.arange(height), np.arange(width), indexing="ij"):
        turned = result.grid.view(index)
        start = int(turned[0, 0])
        functions.append([start, *(int(n[0]) - start if n.size else 0 for n in (turned[1:2, 0], turned[0, 1:2]))])
    return functions


def _sizes(result: Result) -> list[list[str]]:
    volumes = result.report.get("volumes")
    if not volumes:
        return []
    parts = (
        [(f"at least {one['level']}", one) for one in volumes["levels"]] if result.stack.variant.of_annotators else []
    )
    parts += [("mask, at least half", volumes["mask"]), ("expected", volumes["expected"])]
    unit = next((unit for unit in ("ml", "mm2") if unit in volumes["mask"] and "unreliable" not in volumes), None)
    sizes = []
    for name, part in parts:
        cells = [name, f"{part['voxels']:,.0f} {'voxels' if len(result.grid.spatial) == 3 else 'pixels'}"]
        sizes.append([*cells, f"{three_digits(part[unit])} {unit.replace('2', '²')}"] if unit else cells)
    dice = result.report.get("expected_dice", {}).get("mask")
    return sizes if dice is None else [*sizes, ["expected Dice", f"{dice:.2f}"]]
