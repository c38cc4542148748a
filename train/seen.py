"""Which cases a run learns from, kept with it as RUN/data.json, so that a resumed run must find the same ones."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.data.case import listed
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.words import by, several
from cdiff.train.checkpoint import read_json

NAME = "data.json"
PARTS = {"train": "to train on", "val": "to validate on"}
BEFORE = "before"
"""The part that holds the cases that the initial weights had learned from: those of the run that they came from (--init)."""


@dataclass(frozen=True)
class Seen:
    """A case as it was read, before it is resampled or normalised; moving its folder changes nothing here.

    masks: how many. shape: slices, rows, columns. marked: pixels that are marked, over all masks. mean: of the image's values.
    drawn: SHA-256 of the masks' pixels, one bit each. values: SHA-256 of the image's, float32; "" in runs older than this field.
    """

    name: str
    masks: int
    shape: tuple[int, int, int]
    marked: int
    mean: float
    drawn: str
    values: str = ""

    @classmethod
    def of(cls, name: str, image: NDArray[np.float32], masks: NDArray[np.bool_]) -> Seen:
        """image [S, channels, H, W] as stored, masks [S, C, H, W]."""
        slices, _, rows, columns = image.shape
        mean = float(image.mean(dtype=np.float64))
        drawn = hashlib.sha256(np.packbits(masks).tobytes()).hexdigest()
        values = hashlib.sha256(np.ascontiguousarray(image, "<f4").data).hexdigest()
        return cls(name, masks.shape[1], (slices, rows, columns), int(masks.sum()), mean, drawn, values)

    def differs(self, then: Seen) -> str:
        """What differs from `then`, in words; "" where training sees the same. The name alone is no difference."""
        if self.masks != then.masks:
            return f"has {several(self.masks, 'mask')} and had {then.masks}"
        if self.shape != then.shape:
            return f"is {by(self.shape)} and was {by(then.shape)}"
        if self.marked != then.marked:
            return f"has {self.marked} pixels marked and had {then.marked}"
        if self.drawn != then.drawn:
            return "has other pixels marked, or others' masks in another order"
        # Sums in another order, as on another machine, differ in their last digits.
        if not math.isclose(self.mean, then.mean, rel_tol=1e-5, abs_tol=1e-6):
            return f"has a mean of {self.mean:.6g} and had {then.mean:.6g}"
        other = then.values and self.values != then.values
        return f"has an image of the same mean, {self.mean:.6g}, with other values" if other else ""


def write_seen(run: Path, seen: dict[str, list[Seen]]) -> None:
    """Write to the run's data.json the cases that it trains on ("train") and validates on ("val"), in the order of their slices, and BEFORE."""
    write_json(run / NAME, {part: [asdict(case) for case in cases] for part, cases in seen.items()})


def seen_before(run: Path) -> list[Seen]:
    """The cases that the weights of `run` had learned from when it began; empty where it does not say."""
    return _read(run / NAME)[BEFORE] if (run / NAME).exists() else []


def learned_from(run: Path) -> list[Seen]:
    """The cases that the weights of `run` have learned from by now, each once; empty where it does not say, as for any bundle."""
    if not (run / NAME).exists():
        return []
    began = _read(run / NAME)
    return list(dict.fromkeys([*began["train"], *began[BEFORE]]))


def again(val: list[Seen], before: list[Seen]) -> list[str]:
    """The names of the cases in `val` that are among those in `before`, which the weights learned from."""
    return [case.name for case in val if any(not case.differs(one) for one in before)]


def check_seen(run: Path, seen: dict[str, list[Seen]], data: Path) -> None:
    """Raise CdiffError, in one line, where the run began with other cases than `seen`, which were read from `data`.

    Does nothing for a run that does not say which cases it began with, such as an imported one.
    """
    if not (run / NAME).exists():
        return
    if found := differences(seen, _read(run / NAME)):
        raise CdiffError(
            f"{data} does not hold what {run} began with ({found}); resume with the data as it was, or start a new "
            f"run from its weights: --init {run} with another --out"
        )


def differences(now: dict[str, list[Seen]], then: dict[str, list[Seen]]) -> str:
    """How the cases to train on and to validate on differ `now` from `then`, in words; "" where training sees the same."""
    return "; ".join(f"cases {PARTS[part]}: {what}" for part in PARTS if (what := _differences(now[part], then[part])))


def _differences(now: list[Seen], then: list[Seen]) -> str:
    if len(now) == len(then) and not any(a.differs(b) for a, b in zip(now, then, strict=True)):
        return ""
    by_name = {case.name: case for case in then}
    names = {case.name for case in now}
    gone = [name for name in by_name if name not in names]
    new = [case.name for case in now if case.name not in by_name]
    changed = [(case.name, what) for case in now if case.name in by_name and (what := case.differs(by_name[case.name]))]
    words = [f"{listed(gone)} gone"] if gone else []
    words += [f"{listed(new)} new"] if new else []
    if changed:
        name, what = changed[0]
        words.append(f"{name} {what}" + (f", and {len(changed) - 1} more differ" if len(changed) > 1 else ""))
    return ", ".join(words) or "another order"


def _read(path: Path) -> dict[str, list[Seen]]:
    data: dict[str, Any] = read_json(path)
    try:
        parts = {part: data[part] for part in PARTS} | {BEFORE: data.get(BEFORE, [])}
        read = {
            part: [Seen(**case | {"shape": tuple(case["shape"])}) for case in cases] for part, cases in parts.items()
        }
        for case in (case for cases in read.values() for case in cases):
            _must_be_typed(case)
        return read
    except (KeyError, TypeError) as error:
        raise CdiffError(
            f"{path} does not say which cases the run began with ({error!r}); it is damaged: remove it to resume without comparing"
        ) from None


def _must_be_typed(case: Seen) -> None:
    """Raise TypeError where a value is not of the type that was written."""
    numbers, texts = (case.masks, case.marked, *case.shape), (case.name, case.drawn, case.values)
    if not all(type(number) is int for number in numbers) or len(case.shape) != 3:
        raise TypeError(f"{numbers} are not all whole numbers")
    if type(case.mean) not in (int, float) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{case.mean!r} or one of {texts} is of another kind")
