"""Scores one case's maps against its annotators: every slice, and the case as a whole (definitions: docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.expected import expected_counts, expected_dice
from cdiff.runtime.scoring.calibration import BINS, auroc, brier, crps, reliability
from cdiff.runtime.scoring.curves import FIVE_OF_NINE, run_counts, soft_dice_by_runs
from cdiff.runtime.scoring.metrics import (
    NINE,
    Counts,
    at_least,
    dice_of,
    energy_distance,
    ged,
    iou_of,
    overlap,
    overlap_by_threshold,
    overlap_of_annotators,
    overlap_of_pairs,
    overlap_of_panels,
    overlap_with_each,
)
from cdiff.runtime.scoring.surface import hd95_px_and_mm, near
from cdiff.runtime.stack import entropy

if TYPE_CHECKING:
    from cdiff.runtime.scans.grid import Grid
    from cdiff.runtime.stack import Stack

PER_SLICE = (
    "soft_dice_5",
    "soft_dice_9",
    "ged",
    "ged_no_diagonal",
    "ged_floor",
    "brier",
    "brier_near",
    "brier_floor",
    "brier_floor_near",
    "crps",
    "crps_near",
    "auroc_entropy",
    "auroc_entropy_near",
    "auroc_run_std",
    "auroc_run_std_near",
    "soft_dice_5_annotators",
    "soft_dice_9_annotators",
    "pairwise_dice_annotators",
    "dice_each",
    "dice_each_annotators",
    "dice_each_difference",
    "expected_dice",
    "expected_dice_difference",
    "false_positive_slices",
)
"""The scores with one number per slice."""
PER_LEVEL = ("dice_per_level", "iou_per_level", "hd95_px_per_level", "hd95_mm_per_level")
"""The scores with one number per slice and level."""
PER_THRESHOLD = "dice_per_threshold"
"""The score with one number per slice and threshold of NINE."""
PER_CASE = (
    "case_soft_dice_5",
    "case_soft_dice_9",
    "case_soft_dice_5_annotators",
    "case_soft_dice_9_annotators",
    "case_pairwise_dice_annotators",
    "case_dice_each",
    "case_dice_each_annotators",
    "case_dice_each_difference",
    "case_expected_dice",
    "case_expected_dice_difference",
)
"""The scores with one number per case, computed over all its scored slices together."""
PER_CASE_LEVEL = ("case_dice_per_level", "case_iou_per_level")
"""The scores with one number per case and level."""
PER_CASE_THRESHOLD = "case_dice_per_threshold"
"""The score with one number per case and threshold of NINE."""
EMPTY = {(True, True): "neither", (False, True): "model", (True, False): "annotators", (False, False): "both"}
"""Which of a slice's two level maps is empty, by (whether the model's has pixels, whether the annotators' has)."""
REGIONS = ("whole", "near")
"""Where calibration is measured: on every pixel of a slice, and on those in or near what any annotator marked (`surface.near`)."""


def marked_slices(masks: NDArray[np.bool_], all_raters: bool) -> NDArray[np.int64]:
    """The slices of masks [S,n,H,W] that at least one annotator marked or, with all_raters, that all of them marked."""
    readers = np.count_nonzero(masks.any(axis=(2, 3)), axis=1)
    return np.flatnonzero(readers >= (masks.shape[1] if all_raters else 1))


def evenly(slices: NDArray[np.int64], most: int | None) -> NDArray[np.int64]:
    """At most `most` of `slices`, each in the middle of one of as many equal parts, so that 1 takes the middle slice. None takes all.

    Raises CdiffError when `most` is less than 1.
    """
    if most is None or most >= len(slices):
        return slices
    if most < 1:
        raise CdiffError(f"slices_per_case {most} is out of range; at least one is needed")
    return slices[(2 * np.arange(most) + 1) * len(slices) // (2 * most)]


def true_levels(masks: NDArray[np.bool_], levels: int) -> NDArray[np.bool_]:
    """The consensus maps of n annotators at a model's C levels: masks [n,H,W] -> [C,H,W].

    Level c requires the share c / C of the annotators, which is at least c n / C of them; with n = C that is the
    paper's "at least c". Computed in integers, so exact.
    """
    votes = masks.sum(axis=0, dtype=np.int64) * levels
    return np.stack([votes >= c * len(masks) for c in range(1, levels + 1)])


@dataclass(frozen=True)
class Overlaps:
    """Pixel counts of all pairs of masks that are compared by Dice and IoU, in one slice or summed over several.

    thresholds [9,3]: soft map and fraction of annotators, at each threshold of NINE. levels [C,3]: the model's level maps and the
    true ones. others [n,9,3]: each annotator and the fraction of the others. pairs [n(n-1)/2,3]: each two annotators' masks. each [n,3]:
    the soft map at one half and each annotator. panels [n,3]: the majority of the others and each annotator. expected [3]: what the
    soft map itself predicts for `each` (`runtime.expected`).
    """

    thresholds: Counts
    levels: Counts
    others: Counts
    pairs: Counts
    each: Counts
    panels: Counts
    expected: NDArray[np.float64]

    def __add__(self, more: Overlaps) -> Overlaps:
        """The counts over the slices of both, which must be of the same case."""
        return Overlaps(*(getattr(self, part.name) + getattr(more, part.name) for part in fields(self)))

    def scores(self) -> dict[str, Any]:
        """Each score: a number, or one for each level or threshold; None where it is not defined, as some are not for a single annotator."""
        by_threshold, by_annotator = dice_of(self.thresholds), dice_of(self.others)
        each, panels = _mean(dice_of(self.each)), _mean(dice_of(self.panels))
        expected = _number(expected_dice(self.expected))
        return {
            "soft_dice_5": _mean(by_threshold[FIVE_OF_NINE]),
            "soft_dice_9": _mean(by_threshold),
            PER_THRESHOLD: by_threshold.tolist(),
            "dice_per_level": dice_of(self.levels).tolist(),
            "iou_per_level": iou_of(self.levels).tolist(),
            "soft_dice_5_annotators": _mean(by_annotator[:, FIVE_OF_NINE]),
            "soft_dice_9_annotators": _mean(by_annotator),
            "pairwise_dice_annotators": _mean(dice_of(self.pairs)),
            "dice_each": each,
            "dice_each_annotators": panels,
            "dice_each_difference": None if each is None or panels is None else each - panels,
            "expected_dice": expected,
            "expected_dice_difference": None if each is None or expected is None else expected - each,
        }


@dataclass(frozen=True)
class SliceMaps:
    """One slice. soft [H,W] and levels [C,H,W]: the model's maps. samples [N,H,W]: the masks that its runs give, for the energy distance.
    run_std [H,W]: how much the runs differ, None where that is not known. masks [n,H,W]: the annotators'."""

    soft: NDArray[np.float32]
    levels: NDArray[np.float32]
    samples: NDArray[np.bool_]
    run_std: NDArray[np.float32] | None
    masks: NDArray[np.bool_]

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """[H,W]: the soft map thresholded at one half."""
        return at_least(self.soft, 0.5)

    @cached_property
    def level_masks(self) -> NDArray[np.bool_]:
        """[C,H,W]: the level maps thresholded at one half."""
        return at_least(self.levels, 0.5)

    @cached_property
    def truth(self) -> NDArray[np.float64]:
        """[H,W]: the fraction of annotators."""
        return np.asarray(self.masks.mean(axis=0, dtype=np.float64))

    @cached_property
    def consensus(self) -> NDArray[np.bool_]:
        """[C,H,W]: the true level maps."""
        return true_levels(self.masks, len(self.levels))

    @cached_property
    def region(self) -> NDArray[np.bool_]:
        """[H,W]: the pixels in or near what any annotator marked."""
        return near(self.masks)

    @cached_property
    def marked(self) -> bool:
        """Whether any annotator marked anything."""
        return bool(self.masks.any())

    @cached_property
    def overlaps(self) -> Overlaps:
        """The counts from which this slice's Dice and IoU follow."""
        return Overlaps(
            overlap_by_threshold(self.soft, self.truth),
            np.stack([overlap(p, m) for p, m in zip(self.level_masks, self.consensus, strict=True)]),
            overlap_of_annotators(self.masks),
            overlap_of_pairs(self.masks),
            overlap_with_each(self.mask, self.masks),
            overlap_of_panels(self.masks),
            expected_counts(self.soft, self.mask),
        )


def score_slice(maps: SliceMaps, plane_mm: tuple[float, float] | None = None) -> dict[str, Any]:
    """A number for each of PER_SLICE, a list for each of PER_LEVEL and for PER_THRESHOLD; None where a score is not defined.

    plane_mm: a pixel's size in mm along H and W, None when unknown.
    """
    truth, region = maps.truth, maps.region
    noise = truth * (1 - truth)
    pixelwise = {
        **_means("brier", brier(maps.soft, truth), region),
        **_means("brier_floor", noise, region),
        **_means("crps", crps(maps.levels, maps.consensus), region),
    }
    if not maps.marked:
        # Where nobody marked anything, comparisons of shapes say nothing (an empty map would score 1): the only error is to mark something.
        return _undefined(len(maps.levels)) | _numbers(pixelwise | {"false_positive_slices": float(maps.mask.any())})
    distance = energy_distance(maps.samples, maps.masks)
    scores = {
        "ged": distance.with_diagonal,
        "ged_no_diagonal": distance.no_diagonal,
        "ged_floor": ged(maps.consensus, maps.masks),
        **pixelwise,
        **_found("auroc_entropy", entropy(maps.soft), noise > 0, region),
        **_found("auroc_run_std", maps.run_std, noise > 0, region),
    }
    pairs = list(zip(maps.level_masks, maps.consensus, strict=True))
    distances = [hd95_px_and_mm(p, m, plane_mm) for p, m in pairs]
    return {
        **_undefined(len(maps.levels)),
        **maps.overlaps.scores(),
        "hd95_px_per_level": [_number(pixels) for pixels, _ in distances],
        "hd95_mm_per_level": [_number(mm) for _, mm in distances],
        "empty_per_level": [EMPTY[bool(p.any()), bool(m.any())] for p, m in pairs],
        **_numbers(scores),
    }


class CaseTally:
    """Collects the scores of one case: call `add` for each part's maps, or `add_slice` for each slice where there are no runs, then `row`.

    masks [S,n,H,W]; slice_ids: the slices to score, at least one; combine: how runs become a level's map, "mean" or "vote".
    """

    def __init__(self, masks: NDArray[np.bool_], slice_ids: NDArray[np.int64], combine: str) -> None:
        self.masks, self.slice_ids, self.combine = masks, slice_ids, combine
        self._slices: list[dict[str, Any]] = []
        self._overlaps: Overlaps | None = None
        self._voxel_ml: float | None = None
        self._reliability = {region: np.zeros((3, BINS)) for region in REGIONS}
        self._counts: list[int] = []
        self._samples = 0
        self._curve: list[NDArray[np.float64]] = []

    def add(self, stack: Stack, first: int, grid: Grid) -> None:
        """Score those of the slices to score that `stack` holds, whose first is slice `first` of the scan. grid: the scan's.

        Raises ValueError when the stack was made without keep_runs.
        """
        if (runs := stack.runs) is None:
            raise ValueError("the energy distance needs the maps of every run: segment with keep_runs")
        R = runs.shape[2]
        self._counts = run_counts(R)
        soft, levels, run_std = stack.soft, stack.levels, stack.run_std
        for index in self.slice_ids[(self.slice_ids >= first) & (self.slice_ids < first + len(levels))]:
            place = index - first
            samples = stack.variant.to_samples(runs[place], levels.shape[1])
            # The spread of a single run is 0 everywhere and tells nothing.
            spread = run_std[place] if R > 1 else None
            maps = SliceMaps(soft[place], levels[place], samples, spread, self.masks[index])
            self.add_slice(int(index), maps, grid)
            if maps.marked:
                self._curve.append(soft_dice_by_runs(runs[place], maps.truth, self.combine, self._counts))

    def add_slice(self, index: int, maps: SliceMaps, grid: Grid) -> None:
        """Score slice `index` of the case."""
        self._voxel_ml = grid.voxel_ml if grid.measured_spacing else None
        self._samples = len(maps.samples)
        self._slices.append({"slice": index} | score_slice(maps, grid.plane_mm))
        self._overlaps = maps.overlaps if self._overlaps is None else self._overlaps + maps.overlaps
        self._reliability["whole"] += reliability(maps.soft, maps.truth)
        self._reliability["near"] += reliability(maps.soft[maps.region], maps.truth[maps.region])

    def row(self) -> dict[str, Any]:
        """In JSON's types: the scores of the slices and of the case as a whole, the number of masks for the energy distance, volumes, sums for
        the reliability diagram, and the marked slices' mean soft Dice by number of runs. Raises ValueError when no slice was added."""
        if self._overlaps is None:
            raise ValueError("no slice of the case was added; there is nothing to score")
        predicted, true = self._overlaps.levels[:, 1:].T.tolist()
        curve = np.mean(self._curve, axis=0).T.tolist() if self._curve else [[None] * len(self._counts)] * 2
        return {
            "samples": self._samples,
            "volumes": {"voxel_ml": self._voxel_ml, "predicted_voxels": predicted, "true_voxels": true},
            "reliability": {region: table.tolist() for region, table in self._reliability.items()},
            "by_runs": {"runs": self._counts, "soft_dice_5": curve[0], "soft_dice_9": curve[1]},
            "case_scores": {f"case_{name}": value for name, value in self._overlaps.scores().items()},
            "slices": self._slices,
        }


def _means(name: str, values: NDArray[np.float64], region: NDArray[np.bool_]) -> dict[str, float]:
    """The mean over the slice, and over the region, which is NaN for a region without pixels."""
    return {name: values.mean(), f"{name}_near": values[region].mean() if region.any() else np.nan}


def _found(
    name: str, unsure: NDArray[Any] | None, disagree: NDArray[np.bool_], region: NDArray[np.bool_]
) -> dict[str, float]:
    """How well (AUROC) a map of uncertainty finds the pixels where annotators disagree, on the slice and in the region."""
    if unsure is None:
        return {name: np.nan, f"{name}_near": np.nan}
    return {name: auroc(unsure, disagree), f"{name}_near": auroc(unsure[region], disagree[region])}


def _undefined(levels: int) -> dict[str, Any]:
    """A slice's scores, all undefined."""
    return {
        **{name: [None] * levels for name in (*PER_LEVEL, "empty_per_level")},
        PER_THRESHOLD: [None] * len(NINE),
        **dict.fromkeys(PER_SLICE),
    }


def _mean(scores: NDArray[np.float64]) -> float | None:
    """The mean over the last axis, then over the others: [...] -> one number; None for an empty array."""
    return float(scores.mean(axis=-1).mean()) if scores.size else None


def _numbers(scores: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in scores.items()}


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
