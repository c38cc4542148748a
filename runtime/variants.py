"""What a model was trained to draw, and so what its maps mean: the variants of both papers, each a row of one table.

Amit et al. 2023, section 4, compare four ways to learn from C annotators; Wolleb et al. 2022 have a fifth. docs/variants.md
describes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scoring.metrics import at_least

Float32 = NDArray[np.float32]
Masks = NDArray[np.bool_]


def _as_drawn(maps: Float32, C: int) -> Float32:
    """The network draws the levels themselves."""
    return maps


def _counted(maps: Float32, C: int) -> Float32:
    """Where at least c of the annotators' maps reach one half: equation 1 of Amit et al., on the maps that the network drew for each."""
    votes = at_least(maps, 0.5).sum(axis=-3, keepdims=True)
    return np.asarray(votes >= np.arange(1, C + 1)[:, None, None], dtype=np.float32)


def _by_share(maps: Float32, C: int) -> Float32:
    """Where the soft map reaches (c - 1/2) / C: there the number of annotators, rounded to the nearest, is at least c."""
    soft = maps.mean(axis=-3, keepdims=True, dtype=np.float64)
    return np.concatenate([at_least(soft, (c - 0.5) / C) for c in range(1, C + 1)], axis=-3).astype(np.float32)


def _each_map(runs: NDArray[np.uint8], C: int) -> Masks:
    """Every map of every run, thresholded at one half: [K,R,h,w] -> [K R,h,w]. 128 of 255 is one half, rounded up."""
    return np.asarray((runs >= 128).reshape(-1, *runs.shape[2:]))


def _each_runs_levels(runs: NDArray[np.uint8], C: int) -> Masks:
    """The levels of every run's soft map: [1,R,h,w] -> [R C,h,w]. A fraction thresholded at one half would be no annotator's mask."""
    maps = np.moveaxis(runs, 1, 0).astype(np.float32) / np.float32(255)
    return np.asarray(_by_share(maps, C).reshape(-1, *runs.shape[2:]) > 0)


@dataclass(frozen=True)
class Variant:
    """One way to learn from C annotators, and what follows from it for the K maps of a slice; K is 1 or C.

    told: what the network is told besides the timestep, "level", "annotator" or nothing. drawn: what it learned to draw.
    soft, levels: what those maps hold, as files and reports word it; the soft map is always the mean over the K maps.
    spread: the statistic over runs in the second channel of the uncertainty. of_annotators: whether the soft map is a fraction of
    annotators. outlines: which maps a preview outlines; outline_title, outline_key: its texts. to_levels: turns maps [...,K,h,w]
    into levels [...,C,h,w], given C. to_samples: turns runs [K,R,h,w] uint8 into the masks that the energy distance compares with
    the annotators', given C. summary: the text of a model card, with {C}.
    """

    name: str
    told: Literal["level", "annotator", ""]
    drawn: str
    soft: str
    levels: str
    spread: Literal["std", "variance"]
    of_annotators: bool
    outlines: Literal["levels", "maps"]
    outline_title: str
    outline_key: str
    to_levels: Callable[[Float32, int], Float32]
    to_samples: Callable[[NDArray[np.uint8], int], Masks]
    summary: str

    def conditions(self, annotators: int) -> int:
        """K, the number of maps that a run draws per slice: one for each level or annotator, or one."""
        return annotators if self.told else 1

    @property
    def whose(self) -> str:
        """Whose mask the soft map gives the probability of, pixel by pixel, in words."""
        return "an annotator's" if self.of_annotators else "the true"

    @property
    def uncertainty(self) -> str:
        """The channels of the uncertainty, in words."""
        return f"entropy (bits); {self.spread} over runs"


CONSENSUS = Variant(
    name="consensus",
    told="level",
    drawn="the mask that at least c annotators share, c = 1 ... C",
    soft="fraction of annotators",
    levels="at least c annotators",
    spread="std",
    of_annotators=True,
    outlines="levels",
    outline_title="Outline of each level",
    outline_key="at least so many experts",
    to_levels=_as_drawn,
    to_samples=_each_map,
    summary="A consensus-diffusion segmenter: for each pixel, how many of {C} annotators would include it.",
)
ANNOTATOR = Variant(
    name="annotator",
    told="annotator",
    drawn="the mask of annotator i, i = 1 ... C",
    soft="fraction of annotators",
    levels="at least c of the annotators' maps",
    spread="std",
    of_annotators=True,
    outlines="maps",
    outline_title="Outline of each annotator",
    outline_key="as this annotator would draw it",
    to_levels=_counted,
    to_samples=_each_map,
    summary="A diffusion segmenter that draws as each of {C} annotators would: for each pixel, which of them would include it.",
)
NO_ANNOTATOR = Variant(
    name="no-annotator",
    told="",
    drawn="the mask of an annotator drawn at random, not told which",
    soft="fraction of annotators",
    levels="soft map at least (c-1/2)/C",
    spread="std",
    of_annotators=True,
    outlines="levels",
    outline_title="Outline of each level",
    outline_key="so many experts or more, about",
    to_levels=_by_share,
    to_samples=_each_map,
    summary="A diffusion segmenter whose runs vary as {C} annotators do: for each pixel, which share of them would include it.",
)
SOFT_LABEL = replace(
    NO_ANNOTATOR,
    name="soft-label",
    drawn="the fraction of annotators, 0 to 1",
    to_samples=_each_runs_levels,
    summary="A diffusion segmenter that draws a soft label: for each pixel, the fraction of {C} annotators who would include it.",
)
IMPLICIT_ENSEMBLE = Variant(
    name="implicit-ensemble",
    told="",
    drawn="one mask: the annotator's, or with several what at least half of them drew",
    soft="mean over runs: the ensemble",
    levels="soft map at least (c-1/2)/C",
    spread="variance",
    of_annotators=False,
    outlines="maps",
    outline_title="Outline of the mask",
    outline_key="where the mean over runs is one half",
    to_levels=_by_share,
    to_samples=_each_map,
    summary="An implicit ensemble of diffusion segmentations: for each pixel, the mean and the variance over runs.",
)

VARIANTS: dict[str, Variant] = {
    variant.name: variant for variant in (CONSENSUS, ANNOTATOR, NO_ANNOTATOR, SOFT_LABEL, IMPLICIT_ENSEMBLE)
}


def variant_called(name: str) -> Variant:
    """The variant called `name`. Raises CdiffError where there is none."""
    if name not in VARIANTS:
        raise CdiffError(f"variant={name!r} is not known; use {', '.join(VARIANTS)}")
    return VARIANTS[name]
