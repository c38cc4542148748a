"""Training slices from case folders, in memory, and batches as pure functions of (seed, step), so that a resumed run sees the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdiff.runtime.data import partition
from cdiff.runtime.data.case import ARRAY, listed, natural
from cdiff.runtime.data.cases import Case, DataSet, find_cases, read_case
from cdiff.runtime.data.oddities import Oddities
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.framing import Framing, resize
from cdiff.runtime.scans.lie import NEARLY_ALL, usual
from cdiff.runtime.scans.scale import span
from cdiff.runtime.variants import ANNOTATOR, variant_called
from cdiff.runtime.words import by, several
from cdiff.train.augment import Window, cut, random_window, recoloured
from cdiff.train.config import Config
from cdiff.train.seen import BEFORE, Seen, again

Rectangle = tuple[tuple[int, int], tuple[int, int]]
"""(first row, the row after the last), (first column, the column after the last), pixels."""
BACKGROUND = 0.1  # the share of windows drawn anywhere, so that a network trained on windows has seen plain background
FEW = 0.01
"""Structures that the model does not see are not reported while they are on at most this share of the marked slices."""


@dataclass
class Slices:
    """The slices of some cases: images float32 [channels, h, w] in [-1, 1], masks uint8 [C, h, w], sizes as they come.

    raters: how many of a slice's masks somebody drew; the rest are empty, and stand for missing annotators. names: each slice's
    case. seen: the cases that were read, in the order of their slices.
    """

    images: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    raters: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def rectangle(self, i: int) -> Rectangle | None:
        """The smallest rectangle around everything drawn on slice i; None if nothing was."""
        drawn = self.masks[i].any(dim=0)
        rows, columns = drawn.any(dim=1).nonzero(), drawn.any(dim=0).nonzero()
        if not len(rows):
            return None
        return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)

    def point(self, i: int, share: float) -> tuple[float, float]:
        """Row and column of the centre of a drawn pixel of slice i: counted row by row, `share` (0 <= share < 1) of them come before it."""
        drawn = self.masks[i].any(dim=0).nonzero()
        row, column = drawn[int(share * len(drawn))].tolist()
        return row + 0.5, column + 0.5


@dataclass
class Data:
    """What a training run learns from and is validated on, with `summary` saying what was found and left out.

    before: the cases that the initial weights had learned from.
    """

    train: Slices
    val: Slices
    summary: dict[str, Any]
    notes: list[str]
    before: list[Seen] = field(default_factory=list)

    @property
    def seen(self) -> dict[str, list[Seen]]:
        """The cases that were read for "train" and "val", which a resumed run must find again, and those of `before`."""
        return {"train": self.train.seen, "val": self.val.seen, BEFORE: self.before}

    def learned_before(self, before: list[Seen]) -> None:
        """Record that the initial weights had learned from these cases. If the run validates on any, note it, and drop "held_out"."""
        self.before = before
        if known := again(self.val.seen, before):
            self.notes.append(
                f"the weights that this run starts from were trained on {len(known)} of the {len(self.val.seen)} cases to validate on "
                f"({listed(known)}): its scores there are too good; validate on others, in a folder Validation"
            )
            self.summary.pop("held_out", None)


def read_data(root: Path, config: Config) -> Data:
    """Read every case below `root`. Without split folders, `val_fraction` of the cases (by name, seeded) are held out.

    Raises CdiffError for unreadable or unusable data.
    """
    C = config.network.levels
    found = _found(root, config)
    needed = C if config.data.missing_raters == "skip" else None
    split = partition.partition(found, root, config.data.val_fraction, config.training.seed, needed)
    train, val, notes = split.train, split.val, [*found.notes, *split.notes]
    summary: dict[str, Any] = {"annotators": C, "layout": found.layout}
    if split.held_out:
        summary["held_out"] = dict(split.held_out)
    if config.data.labels:
        summary["labels"] = list(config.data.labels)
    if config.data.masks_by != ARRAY:
        summary["masks_by"] = config.data.masks_by
    if found.modalities:
        summary["modalities"] = list(found.modalities)
    variant = variant_called(config.network.variant)
    whose = _usual_annotators(train, C) if variant is ANNOTATOR else ()
    size = config.network.image_size
    odd = Oddities(resampled=(size, size) if config.data.framing == "resize" else None)
    train_slices = _read(train, config, C, notes, whose, odd)
    if (lie := usual(odd.lies, NEARLY_ALL)) is not None:
        summary["axes"] = [lie.first, lie.second, lie.through]
    if (mm := span(odd.pixels)) is not None:
        summary["pixel_mm"] = [float(f"{edge:.4g}") for edge in mm]
    val_slices = _read(val, config, C, notes, whose, odd)
    notes += odd.told()
    for name, cases, slices in (("train", train, train_slices), ("val", val, val_slices)):
        if not len(slices):
            skipped = cases and config.data.missing_raters == "skip" and all(len(case.masks) != C for case in cases)
            why = partition.none_has(name, cases, C, variant) if skipped else "; ".join(notes) or "all were empty"
            raise CdiffError(f"no usable {name} slice in {root}: {why}")
        summary[name] = {"cases": len(set(slices.names)), "cases_found": len(cases), "slices": len(slices)}
    if config.data.framing == "centre":
        notes += _off_centre([*train_slices.masks, *val_slices.masks], size)
    sizes = {tuple(image.shape[-2:]) for image in train_slices.images}
    # Resampled slices no longer have the size that they came in.
    if len(sizes) == 1 and config.data.framing != "resize":
        summary["slice_size"] = list(sizes.pop())
    summary["notes"] = notes  # the same list, so that it also gets what is noted later
    return Data(train_slices, val_slices, summary, notes)


def _off_centre(masks: Sequence[Tensor], size: int) -> list[str]:
    """A note on structures outside the central `size` pixels, which is all that the model sees; none where they are few."""
    framing = Framing("centre", (size, size))
    marked = [one for one in masks if one.any()]
    seen = [framing.frame(np.empty((1, 1, *one.shape[1:]), np.float32)).reach for one in marked]
    unseen = sum(not one[:, *box].any() for one, box in zip(marked, seen, strict=True))
    if unseen <= FEW * len(marked):
        return []
    return [
        f"on {unseen} of {len(marked)} marked slices all that was drawn lies outside the central {by((size, size))} pixels, but with "
        "framing=centre the model sees nothing else; cut the images around the structure, or set framing=tile or resize"
    ]


def fit_to_data(config: Config, root: Path, settings: list[str]) -> Config:
    """The configuration with `settings` (key=value) applied, and C and the number of channels taken from the data unless
    `levels=` and `image_channels=` are among them."""
    config = config.with_settings(settings)
    given = {setting.partition("=")[0] for setting in settings}
    if {"levels", "image_channels"} <= given:
        return config
    cases = partition.training_cases(_found(root, config), root)
    fitted = {"levels": partition.count_annotators(cases), "image_channels": partition.count_channels(cases)}
    return config.with_values({key: value for key, value in fitted.items() if key not in given})


def _found(root: Path, config: Config) -> DataSet:
    data = config.data
    return find_cases(root, data.task or None, layout=data.layout, labels=data.labels, masks_by=data.masks_by)


def _usual_annotators(cases: list[Case], C: int) -> tuple[str, ...]:
    """The annotators' names in most cases with C masks; empty where no case has C."""
    names = Counter(case.raters for case in cases if len(case.masks) == C)
    return names.most_common(1)[0][0] if names else ()


def _read(cases: list[Case], config: Config, C: int, notes: list[str], whose: tuple[str, ...], odd: Oddities) -> Slices:
    """The slices of the cases. whose: the annotators' names where they matter, else empty; a case by others is treated as lacking a mask."""
    out = Slices()
    for case in cases:
        others = bool(whose) and [natural(name) for name in case.raters] != [natural(name) for name in whose]
        if len(case.masks) != C or others:
            policy = config.data.missing_raters
            what, remedy = f"{several(len(case.masks), 'mask')}, not {C}", "missing_raters=skip"
            if len(case.masks) > C:
                remedy = f"levels={len(case.masks)} or {remedy}"
            elif not whose:  # else each mask's annotator must be known, and as-is does not ask
                remedy = f"{remedy} or as-is"
            if len(case.masks) == C:
                what = f"masks of {', '.join(case.raters)}, but other cases of {', '.join(whose)}"
                remedy = "missing_raters=skip, or a variant that does not tell annotators apart"
            what = f"{case.name} has {what}"
            if policy == "error" or (policy == "as-is" and len(case.masks) > C):
                raise CdiffError(f"{what}; set {remedy}")
            notes.append(f"{what}: {'skipped' if policy == 'skip' else 'used as it is'}")
            if policy == "skip":
                continue
        image, masks = read_case(case, config.data.slice_axis, config.network.image_channels, odd)
        out.seen.append(Seen.of(case.name, image, masks))
        image = config.data.intensity.apply(image)
        raters = masks.shape[1]
        if raters < C:
            missing = np.zeros((len(masks), C - raters, *masks.shape[2:]), bool)
            masks = np.concatenate([masks, missing], axis=1)
        if config.data.framing == "resize":
            image, masks = _resized(image, masks, config.network.image_size)
        for picture, drawn in zip(image, masks, strict=True):
            if config.data.empty_slices or drawn.any():
                out.images.append(torch.from_numpy(np.ascontiguousarray(picture)))
                out.masks.append(torch.from_numpy(np.ascontiguousarray(drawn, dtype=np.uint8)))
                out.raters.append(raters)
                out.names.append(case.name)
    return out


def _resized(
    image: NDArray[np.float32], masks: NDArray[np.bool_], size: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    if image.shape[-2:] == (size, size):
        return image, masks
    return resize(image, (size, size)), resize(masks.astype(np.float32), (size, size)) >= 0.5


@dataclass(frozen=True)
class Batch:
    """image [B, channels, n, n] float32, masks [B, C, n, n] bool, and raters int64 [B], how many of the masks somebody drew."""

    image: Tensor
    masks: Tensor
    raters: Tensor

    @property
    def votes(self) -> Tensor:
        """How many annotators drew each pixel: uint8 [B, 1, n, n]."""
        return self.masks.sum(dim=1, keepdim=True, dtype=torch.uint8)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.image.to(device), self.masks.to(device), self.raters.to(device))


def training_batch(
    slices: Slices, config: Config, step: int, batch: int, size: int, part: range | None = None
) -> Batch:
    """The batch of `batch` windows of `size` pixels at `step`: a function of (seed, step) alone; an epoch sees each slice once.

    part: which of the batch's images to cut; by default all. What is drawn at random for them does not depend on it.
    """
    seed, n, ranges = config.training.seed, len(slices), config.training.ranges
    rng = np.random.default_rng((seed, 1, step))
    chosen, windows, draws = [], [], []
    for position in range(batch):
        epoch, offset = divmod(step * batch + position, n)
        i = int(_order(seed, epoch, n)[offset])
        window = random_window(size, _centre(slices, i, size, config, rng), rng, ranges)
        if part is None or position in part:
            chosen.append(i)
            windows.append(window)
            draws.append(np.random.default_rng((seed, 2, step, position)))
    cuts = _batch(slices, chosen, windows)
    if ranges is None:
        return cuts
    images = [recoloured(image, draw, ranges) for image, draw in zip(cuts.image, draws, strict=True)]
    return replace(cuts, image=torch.stack(images))


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of n slices in an epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


def _centre(slices: Slices, i: int, size: int, config: Config, rng: np.random.Generator) -> tuple[float, float]:
    h, w = slices.images[i].shape[-2:]
    anywhere, where, jitter = rng.random(), rng.random(2), rng.uniform(-1, 1, 2) * config.data.jitter
    drawn = slices.rectangle(i)
    middle = None if drawn is None else tuple((first + after) / 2 for first, after in drawn)
    if drawn is not None and config.data.framing == "tile" and any(after - first > size for first, after in drawn):
        # Around the middle of several structures, or of a large one, a window may hold no outline at all.
        middle = slices.point(i, float(where[0]))
    out = []
    for axis, extent in enumerate((h, w)):
        low, high = min(size, extent) / 2, extent - min(size, extent) / 2
        if middle is None or anywhere < BACKGROUND:
            out.append(low + float(where[axis]) * (high - low))
        else:
            out.append(min(max(middle[axis] + float(jitter[axis]), low), high))
    return out[0], out[1]


def validation_windows(slices: Slices, chosen: list[int], size: int, mode: str) -> Batch:
    """One plain window for each chosen slice, of those that the framing `mode` cuts it into: what validation samples.

    Of several it is the first that holds the most votes: the middle of a large slice is mostly empty, and a model that draws nothing
    would be right there.
    """
    framing = Framing("tile" if mode == "tile" else "centre", (size, size))
    return _batch(slices, chosen, [_framed(slices.masks[i], framing) for i in chosen])


def _framed(masks: Tensor, framing: Framing) -> Window:
    (h, w), size = masks.shape[-2:], framing.size[0]
    # A slice smaller than the window is placed in it as the runtime pads it.
    above, left = (max(size - n, 0) // 2 for n in (h, w))
    votes = masks.sum(0)
    corners = [(y - above, x - left) for y, x in framing.frame(np.empty((1, 1, h, w), np.float32)).origins]
    held = [int(votes[max(y, 0) : y + size, max(x, 0) : x + size].sum()) for y, x in corners]
    y, x = corners[held.index(max(held))]
    return Window(size, (y + size / 2, x + size / 2))


def _batch(slices: Slices, chosen: list[int], windows: list[Window]) -> Batch:
    cuts = [cut(slices.images[i], slices.masks[i], window) for i, window in zip(chosen, windows, strict=True)]
    raters = torch.tensor([slices.raters[i] for i in chosen])
    return Batch(torch.stack([image for image, _ in cuts]), torch.stack([masks for _, masks in cuts]), raters)
