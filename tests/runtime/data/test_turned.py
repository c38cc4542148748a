"""An annotator whose masks are stored turned is found by how well they fit the others'; disagreement alone is not taken for a turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.data.turned import TURNS, gains, how_turned
from cdiff.runtime.scoring.metrics import dice
from tests.layouts import save


def blobs(shape: tuple[int, int], seed: int, annotators: int = 3) -> NDArray[np.bool_]:
    """Masks [2, n, H, W] of annotators who nearly agree on an ellipse that no turn leaves as it is, empty in the second slice."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(shape)
    centre = rng.uniform(0.3, 0.45, 2) * shape
    distance = ((rows - centre[0]) / 5) ** 2 + ((columns - centre[1]) / 9) ** 2
    first = np.stack([distance < rng.uniform(0.8, 1.2) for _ in range(annotators)])
    return np.stack([first, np.zeros_like(first)])


@pytest.mark.parametrize("how", TURNS)
def test_each_turn_is_found_by_name(how: str) -> None:
    """The turn that is told is the one that puts the masks right, whichever way they were stored."""
    scores = []
    for seed in range(3):
        masks = blobs((32, 32), seed)
        right = masks[:, 1].copy()
        stored = next(turn(right) for turn in TURNS.values() if np.array_equal(TURNS[how](turn(right)), right))
        masks[:, 1] = stored
        scores.append(gains(masks)[1])
    assert how_turned(scores) == how


def test_a_gain_is_what_soft_dice_says() -> None:
    masks = blobs((24, 32), 0, annotators=2)
    masks[:, 1] = masks[:, 1, :, ::-1]
    drawn = masks[0]
    got = gains(masks)[0]
    for k, turn in enumerate(TURNS.values()):
        turned = turn(drawn[:1])[0]
        if turned.shape == drawn[0].shape:
            assert got[k] == pytest.approx(dice(turned, drawn[1]) - dice(drawn[0], drawn[1]))
        else:
            assert np.isnan(got[k])
    assert np.isnan(got).sum() == 4  # slices that are not square keep their shape in three of the turns
    masks[:, 1] = False
    assert np.isnan(gains(masks)).all()
    several = blobs((24, 24), 1, annotators=4)
    several[:, 0] = several[:, 0, ::-1]
    first, others = several[:, 0], several[:, 1:].mean(axis=1)
    fits = [2 * (one * others).sum() / (one.sum() + others.sum()) for one in (first, first[:, ::-1])]
    assert gains(several)[0, 0] == pytest.approx(fits[1] - fits[0])


def test_disagreement_is_no_turn() -> None:
    """One case that fits better mirrored, two cases, or a gain that the next case takes back, are what annotators do."""
    mirrored, none = np.full(7, -0.4), np.full(7, -0.4)
    mirrored[0] = 0.5
    assert how_turned([mirrored] * 2) is None
    assert how_turned([mirrored, none, none]) is None
    assert how_turned([mirrored, mirrored, none]) == next(iter(TURNS))
    assert how_turned([mirrored / 10] * 3) is None
    apart = np.full((3, 7), -0.1)
    apart[range(3), range(3)] = 0.9  # much better turned, and each another way
    assert how_turned(list(apart)) is None


def test_two_turns_that_fit_alike_do_not_hide_each_other() -> None:
    """Of a prostate stored upside down, on the slices' middle line, 180 degrees put as many cases right as the mirror: neither had most."""
    one, other = (np.where(np.arange(7) < 2, 0.5, np.nan) for _ in range(2))
    one[0], other[1] = 0.53, 0.51
    assert how_turned([one, other] * 2) == next(iter(TURNS))


def test_a_check_tells_whose_masks_are_turned_and_how_each_agrees(tmp_path: Path) -> None:
    for seed in range(3):
        masks = blobs((32, 32), seed).transpose(1, 2, 3, 0)  # as NIfTI: annotator, then the axes of the file
        save(tmp_path / f"case{seed}" / "image.nii.gz", np.random.default_rng(seed).normal(100, 5, (32, 32, 2)))
        for k, mask in enumerate(masks):
            stored = mask[::-1] if k == 1 else mask
            save(tmp_path / f"case{seed}" / f"task01_seg0{k + 1}.nii.gz", stored.astype(np.uint8))
    report = check_data(tmp_path).report
    assert [finding["text"] for finding in report["findings"] if finding["kind"] == "turned"] == [
        "the masks of seg02 would fit the others' better mirrored along the first axis of their slices: "
        "are they stored as the others are?"
    ]
    agreement = report["pairwise_dice"]["by_annotator"]
    assert agreement["seg02"] < min(agreement["seg01"], agreement["seg03"])
    assert np.mean(list(agreement.values())) == pytest.approx(report["pairwise_dice"]["mean"])
