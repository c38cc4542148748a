"""How slices lie in the patient: a model of axial slices that is given sagittal ones says so, wherever scans are read."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.prepared import notes, prepare
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.lie import ACROSS, ALONG, UP, Lie, directions, lie_of, otherwise, usual
from cdiff.runtime.scoring.evaluate import Protocol, evaluate
from cdiff.runtime.segmenter import Segmenter
from cdiff.train.data import fit_to_data, read_data
from cdiff.train.presets import preset
from tests.layouts import disc, noisy
from tests.runtime.test_manifest import example
from tests.runtime.test_segmenter import C, make_bundle

AXIAL = Lie(ACROSS, ALONG, UP)
LPS = np.diag([-0.7, -0.8, 2.5, 1.0])
LPS[:3, 3] = (90, 120, -40)
NAMES = {"L": ACROSS, "R": ACROSS, "A": ALONG, "P": ALONG, "S": UP, "I": UP}


def grid(affine: NDArray[np.float64], shape: tuple[int, ...] = (5, 6, 7), slice_axis: int | None = 2) -> Grid:
    return Grid(shape, slice_axis, nib.Nifti1Image(np.zeros(shape, np.uint8), affine).header)


def turned(angle: float) -> NDArray[np.float64]:
    """LPS turned about the up-down axis."""
    out, (c, s) = LPS.copy(), (np.cos(angle), np.sin(angle))
    out[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ out[:3, :3]
    return out


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("flips", list(product([1, -1], repeat=3)))
def test_the_directions_are_those_that_nibabel_reads(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    image = nib.Nifti1Image(np.zeros((5, 6, 7), np.uint8), turned(0.5))
    stored = image.as_reoriented(np.stack([order, flips], axis=1).astype(float))
    codes = [NAMES[code] for code in nib.aff2axcodes(stored.affine)]
    assert directions(grid(stored.affine)) == tuple(codes)
    for cut in range(3):
        lie = lie_of(grid(stored.affine, slice_axis=cut))
        assert lie == Lie(*codes[:cut], *codes[cut + 1 :], codes[cut])


def without_codes() -> Grid:
    """A header whose numbers say it, and whose codes say that these mean nothing."""
    image = nib.Nifti1Image(np.zeros((5, 6, 7), np.uint8), LPS)
    image.set_sform(LPS, code=0)
    image.set_qform(LPS, code=0)
    return Grid((5, 6, 7), 2, image.header)


@pytest.mark.parametrize(
    "nothing",
    [
        grid(np.eye(4)),
        grid(np.diag([0.7, 0.7, 2.5, 1])),  # spacing alone
        grid(np.diag([-0.7, -0.7, 2.5, 1])),  # the same by SimpleITK
        grid(turned(0.75)),  # nearly between two directions
        grid(turned(0.55)),  # by more than 30 degrees
        grid(LPS, (5, 6), None),
        Grid((5, 6, 7), 2),
        without_codes(),
    ],
)
def test_a_header_that_does_not_say_it_says_nothing(nothing: Grid) -> None:
    assert directions(nothing) is lie_of(nothing) is None


def test_a_diagonal_header_says_it_from_somewhere_or_turned() -> None:
    assert lie_of(grid(np.diag([-1.0, 1, 1, 1]))) == lie_of(grid(LPS)) == AXIAL


def test_what_most_have_in_common_is_usual() -> None:
    other = Lie(ALONG, UP, ACROSS)
    assert usual([]) is usual([None]) is usual([AXIAL, other]) is None
    assert usual([AXIAL, other, other, *[None] * 5]) == other
    assert usual([other, *[AXIAL] * 9], 0.9) == AXIAL
    assert usual([other, *[AXIAL] * 8], 0.9) is None


def test_the_difference_is_told_in_words() -> None:
    assert otherwise(Lie(ALONG, UP, ACROSS), AXIAL, "others") == "slices are sagittal, but others are axial"
    assert (
        otherwise(Lie(ALONG, ACROSS, UP), AXIAL, "others")
        == "slices have the front-back axis first, but others have the left-right axis first"
    )
    assert (
        otherwise(AXIAL, AXIAL, "others")
        is otherwise(None, AXIAL, "others")
        is otherwise(AXIAL, None, "others")
        is None
    )


def model(**data: Any) -> Any:
    return example(levels=3, image_size=(32, 32), slice_axis=2, training={"data": data})


def saved(path: Path, axes: tuple[int, ...] = (0, 1, 2)) -> Path:
    """An LPS volume whose axes are stored in another order."""
    image = nib.Nifti1Image(np.random.default_rng(0).random((32, 40, 24)).astype(np.float32), LPS)
    nib.save(image.as_reoriented(np.stack([axes, [1, 1, 1]], axis=1).astype(float)), path)
    return path


def told(path: Path, **how: Any) -> list[str]:
    manifest = model(axes=[ACROSS, ALONG, UP])
    return [
        note
        for note in notes(prepare(path, manifest, None, **{"slice_axis": None} | how), manifest)
        if "by its header" in note
    ]


def test_a_scan_that_lies_otherwise_than_the_training_is_told_with_the_remedy(tmp_path: Path) -> None:
    assert told(saved(tmp_path / "a.nii.gz")) == []
    sagittal = saved(tmp_path / "b.nii.gz", (2, 0, 1))
    (note,) = told(sagittal)
    assert note.startswith(
        "by its header this scan's slices are sagittal, but those that the model learned from are axial: --slice-axis 1"
    )
    (note,) = told(sagittal, slice_axis=1)
    assert (
        "have the front-back axis first, but those that the model learned from have the left-right axis first" in note
    )
    assert told(saved(tmp_path / "c.nii.gz", (2, 1, 0)), slice_axis=2) != []


def test_strips_have_one_remedy(tmp_path: Path) -> None:
    """By their shape they lie along another axis too, which a model that knows nothing of its training's goes by."""
    image = nib.Nifti1Image(np.random.default_rng(0).random((40, 40, 6)).astype(np.float32), LPS)
    nib.save(image.as_reoriented(np.array([[1, 1], [2, 1], [0, 1]], float)), tmp_path / "a.nii.gz")
    for axes, by_header in (([ACROSS, ALONG, UP], True), (None, False)):
        manifest = model(axes=axes)
        found = notes(prepare(tmp_path / "a.nii.gz", manifest, None, None), manifest)
        assert [note.startswith("by its header") for note in found if "--slice-axis 0" in note] == [by_header]


def test_a_model_that_was_not_told_says_nothing(tmp_path: Path) -> None:
    manifest = model()
    assert manifest.lie is None
    found = notes(prepare(saved(tmp_path / "b.nii.gz", (2, 0, 1)), manifest, None, None), manifest)
    assert not any("by its header" in note for note in found)


def write_case(folder: Path, axes: tuple[int, ...] = (0, 1, 2)) -> None:
    """A case whose image and masks are stored with their axes in another order."""
    folder.mkdir(parents=True)
    inside = disc((32, 32, 32))
    for name, voxels in [("image", noisy(inside))] + [
        (f"task01_seg0{k}", inside.astype(np.uint8)) for k in range(1, C + 1)
    ]:
        image = nib.Nifti1Image(voxels, LPS).as_reoriented(np.stack([axes, [1, 1, 1]], axis=1).astype(float))
        nib.save(image, folder / f"{name}.nii.gz")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten training cases of which one is stored otherwise."""
    for number in range(10):
        write_case(tmp_path / f"data/Training/case{number}", (1, 0, 2) if number == 7 else (0, 1, 2))
    write_case(tmp_path / "data/Validation/case10", (2, 1, 0))
    write_case(tmp_path / "data/Validation/case7")  # another one of that name
    return tmp_path / "data"


def test_cases_that_lie_otherwise_than_most_are_told_and_the_model_learns_how_most_lie(data: Path) -> None:
    read = read_data(data, fit_to_data(preset("tiny"), data, []))
    assert read.summary["axes"] == [ACROSS, ALONG, UP]
    (note,) = read.notes
    assert note.startswith(
        "images whose slices are oriented differently from most, in 2 cases (case7, case10): case7: its slices have the front-back axis first"
    ), note
    write_case(data / "Training/case8b", (2, 1, 0))
    assert "axes" not in read_data(data, fit_to_data(preset("tiny"), data, [])).summary


def test_the_check_tells_them_too(data: Path) -> None:
    found = [(f["case"], f["text"]) for f in check_data(data).report["findings"] if f["kind"] == "slices"]
    assert found == [
        (
            "case7",
            "the image's slices have the front-back axis first, but those of most images have the left-right axis first, by its header",
        ),
        ("case10", "the image's slices are sagittal, but those of most images are axial, by its header"),
    ]


def test_evaluation_tells_cases_that_lie_otherwise_than_the_training(data: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", training={"data": {"axes": [ACROSS, ALONG, UP]}}, framing="resize")
    said: list[str] = []
    cases = find_cases(data)["val"]
    evaluate(Segmenter.open(bundle), cases, Protocol(runs=1, steps=1, slices_per_case=1), notice=said.append)
    assert any(
        "differently from those in training, in 1 case (case10): case10: its slices are sagittal" in line
        for line in said
    )
