"""How far a training window may be changed. The defaults are the paper's: scale 0.9-1.1, rotation 0-15 degrees, translation 0-0.1
(section 4)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cdiff.runtime.errors import CdiffError

TOP = {"rotation": 180.0, "zoom": 0.9, "shift": 0.5, "contrast": 0.9, "brightness": 2.0, "pixel_noise": 2.0}


@dataclass(frozen=True)
class Ranges:
    """Each change is drawn evenly from minus to plus its range.

    rotation: degrees. zoom: 0.1 makes the structure 0.9 to 1.1 times as large. shift: share of the window's side. contrast: 0.2
    multiplies the image by 0.8 to 1.2; brightness: what is added to it, in units of the network's input (mostly -1 to 1).
    pixel_noise: the standard deviation of normal noise on every pixel, drawn from 0 to this. Raises CdiffError beyond `TOP`.
    """

    rotation: float = 15.0
    zoom: float = 0.1
    shift: float = 0.1
    contrast: float = 0.0
    brightness: float = 0.0
    pixel_noise: float = 0.0

    def __post_init__(self) -> None:
        for part in fields(self):
            value, top = getattr(self, part.name), TOP[part.name]
            if not 0 <= value <= top:
                raise CdiffError(f"{part.name}={value} must lie in 0..{top:g}")


PUBLISHED = Ranges()
