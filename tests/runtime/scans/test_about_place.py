"""What is told of maps that do not have the structure where the user said that it is."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import cdiff
from cdiff.runtime.prepared import about_place
from cdiff.runtime.scoring.metrics import soft_dice
from cdiff.runtime.segmenter import Segmenter
from cdiff.runtime.stack import Stack
from tests.conftest import REPOSITORY
from tests.runtime.scans.test_place import centre_model
from tests.runtime.test_segmenter import QUICK, volume

DEMO = REPOSITORY / "cdiff" / "demo"


def stack_of(soft: np.ndarray) -> Stack:
    """Soft maps [n,h,w] as those of one level."""
    return Stack(soft[:, None], 0 * soft)


@pytest.fixture
def model(tmp_path: Path) -> Segmenter:
    return centre_model(tmp_path / "b")


def test_who_names_a_place_that_the_map_leaves_out_is_told(model: Segmenter) -> None:
    """A mass that fills the window looks like nothing to a model of nodules: an empty map must not pass for an answer."""
    array = volume(60, 60, 3)
    for side, shrink, larger in ((60, None, 2), (64, 2, 4), (60, 2, None)):  # 4 windows of 16 pixels do not fit into 60
        soft = np.zeros((2, side, side), np.float32)
        soft[0] = soft[1, 20] = 1  # another slice, and elsewhere in this one
        ready = model.prepare(volume(side, side, 3), at=(30, 20, 2), slices="1:3", shrink=shrink)
        soft[1, 30, 20] = 0.49
        note, *_ = about_place(ready, model.manifest, stack_of(soft))
        assert note.startswith(
            "the mask leaves out 30,20,2, where you say that the structure is (there the soft map is 0.49)"
        )
        assert ("--shrink" in note) == (larger is not None)
        assert larger is None or f"--shrink {larger} lets it see" in note
        soft[1, 30, 20] = 0.5
        assert not any("leaves out" in note for note in about_place(ready, model.manifest, stack_of(soft)))
        (note,) = about_place(ready, model.manifest, stack_of(0 * soft))
        assert "(there the soft map is 0.00)" in note, "a map of nothing has no middle that could lie elsewhere"
        assert about_place(model.prepare(volume(side, side, 3)), model.manifest, stack_of(0 * soft)) == []
    found = model.segment(array, at=(30, 20, 1), **QUICK)
    told = any("leaves out 30,20,1, where" in note for note in found.report["warnings"])
    assert told == (found.soft[30, 20, 1] < 0.5)


def marked_at(row: int, column: int) -> np.ndarray:
    """Slices 1 and 2 of which the second has a square of 5 x 5 pixels around a pixel, and the first is marked elsewhere."""
    soft = np.zeros((2, 80, 90), np.float32)
    soft[0, :9, :9] = 1
    soft[1, row - 2 : row + 3, column - 2 : column + 3] = 0.5
    return soft


def test_what_lies_beside_the_middle_of_the_window_is_told_with_its_place(model: Segmenter) -> None:
    ready = model.prepare(volume(80, 90, 3), at=(30, 50, 2), slices="1:3")
    for place in ((30, 50), (31, 51), (30, 49)):  # a tenth of its 16 pixels is as far as training moves its windows
        assert about_place(ready, model.manifest, stack_of(marked_at(*place))) == []
    soft = marked_at(32, 48)
    (note,) = about_place(ready, model.manifest, stack_of(soft))
    assert "the slice of 30,50,2 lies 3 pixels from that point" in note
    assert "--at 32,48,2 (in Python at=(32, 48, 2)) centres it" in note
    for narrow, told in ((10, False), (9, True)):  # a tenth of the shorter side
        strip = model.prepare(volume(80, narrow, 3), at=(30, 5, 2), slices="1:3")
        assert bool(about_place(strip, model.manifest, stack_of(marked_at(31, 5)[..., :narrow]))) == told
    shrunk = model.prepare(volume(80, 90, 3), at=(30, 50, 2), slices="1:3", shrink=2)
    assert about_place(shrunk, model.manifest, stack_of(soft)) == [], "the window is twice as wide"
    turned = model.prepare(volume(3, 80, 90), at=(2, 30, 50), slices="1:3", slice_axis=0)
    assert "--at 2,32,48 " in about_place(turned, model.manifest, stack_of(soft))[0]
    flat = model.prepare(volume(80, 90, 1)[..., 0], at=(30, 50))
    assert "--at 32,48 " in about_place(flat, model.manifest, stack_of(soft[1:]))[0]


def test_what_lies_at_the_slices_edge_cannot_be_put_in_the_middle(model: Segmenter) -> None:
    """The window is as near as it can be, so there is nothing to advise."""
    ready = model.prepare(volume(80, 90, 3), at=(4, 5, 2), slices="1:3")
    assert about_place(ready, model.manifest, stack_of(marked_at(6, 7))) == []


def test_following_the_note_on_the_demo_finds_the_nodule_again() -> None:
    model, image = cdiff.load(), nib.load(DEMO / "image.nii.gz").get_fdata()
    truth = np.mean([nib.load(path).get_fdata() for path in sorted(DEMO.glob("*seg*.nii.gz"))], axis=0)
    k = int(truth.sum((0, 1)).argmax())
    first = model.segment(image, at=(64 - 14, 64, k), fast=True)
    (note,) = (note for note in first.report["warnings"] if "draws best what lies in the middle" in note)
    named = note.partition("--at ")[2].partition(" ")[0]
    again = model.segment(image, at=named, fast=True)
    assert not any("draws best" in note for note in again.report["warnings"])
    assert soft_dice(again.soft[..., k], truth[..., k]) > soft_dice(first.soft[..., k], truth[..., k])
