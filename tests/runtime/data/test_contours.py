"""Structure sets as masks: the pixels whose centres an outline encloses, in the slices that it lies in, and one line where that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from pydicom import dcmread

from cdiff.runtime.data.case import Case
from cdiff.runtime.data.cases import read_case
from cdiff.runtime.data.contours import Contours, enclosed, lay
from cdiff.runtime.data.masks import mask_slices, read_mask
from cdiff.runtime.data.oddities import Oddities
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.grid import Grid
from cdiff.runtime.scans.scan import read_scan
from tests.runtime.data.rtstruct import Loop, rectangle, write_rtstruct
from tests.runtime.dicom_files import orthogonal, upright, write_series
from tests.runtime.scan_files import restored

BRIGHT = 500
SHAPE = (24, 20, 6)
SAGITTAL = np.array([[0, 0, 2.5, 10], [0.7, 0, 0, 20], [0, -0.8, 0, 30]], dtype=float)
BOX = rectangle(3.5, 2.6, 9.4, 14.3)
"""Its edges lie between the centres of pixels: of columns 4 to 9 and rows 3 to 14."""
INNER = rectangle(5.5, 5.5, 7.5, 10.5)
KEYHOLE = [(3.5, 2.6), (9.4, 2.6), (9.4, 14.3), (3.5, 14.3), (3.5, 6), (5.5, 6), (5.5, 10.5), (7.5, 10.5), (7.5, 5.5), (5.5, 5.5), (5.5, 6), (3.5, 6)]  # fmt: skip
"""BOX without INNER in one outline: through a cut along a line of centres."""


def box(slices: slice = slice(1, 4), hole: bool = False) -> NDArray[np.uint8]:
    """What BOX marks in some slices [columns, rows, slices], without INNER where there is a hole."""
    marked = np.zeros(SHAPE, np.uint8)
    marked[4:10, 3:15, slices] = 1
    marked[6:8, 6:11] *= not hole
    return marked


def series(folder: Path, marked: NDArray[np.uint8], lps: Any = None, **more: Any) -> Path:
    """A series that is bright where something is marked."""
    voxels = np.where(marked, BRIGHT, -BRIGHT).astype(np.int16)
    return write_series(folder, voxels, orthogonal() if lps is None else lps, **more)


def in_slices(*loops: list[tuple[float, float]], slices: tuple[int, ...] = (1, 2, 3)) -> list[Loop]:
    return [(k, loop) for k in slices for loop in loops]


def on(image: Path, mask: Path | str) -> NDArray[np.bool_]:
    grid = read_scan(image).grid
    case = Case("case", image, (Path(mask),))
    return mask_slices(read_mask(Path(mask), grid), grid, case, Path(mask))


def notes(image: Path, mask: Path) -> tuple[str, ...]:
    return read_mask(mask, read_scan(image).grid).notes


def must_be(image: Path, mask: Path | str) -> None:
    """What is bright is what is marked."""
    np.testing.assert_array_equal(on(image, mask), read_scan(image).slices[:, 0] > 0)


@pytest.mark.parametrize("turned", [False, True])
def test_a_box_marks_the_pixels_whose_centres_it_holds(turned: bool, tmp_path: Path) -> None:
    """In an oblique series, and in a sagittal one that dcm2niix turns, so that contours lie along another axis of the array."""
    lps, more = (SAGITTAL, {"change": lambda _, file: upright(file)}) if turned else (orthogonal(), {})
    images = series(tmp_path / "images", box(), lps, **more)
    assert (read_scan(images).slices.shape[0] != SHAPE[2]) == turned, "it is no longer turned: then this tests nothing"
    must_be(images, write_rtstruct(tmp_path / "r.dcm", images, lps, {"GTV": in_slices(BOX)}))


def test_a_centre_on_the_outline_is_inside(tmp_path: Path) -> None:
    """Whatever the rounding of coordinates, on all four sides: as programs draw that trace the outermost pixels' centres."""
    images = series(tmp_path / "images", box())
    on_centres = in_slices(rectangle(4.005, 3.005, 8.995, 13.995))
    must_be(images, write_rtstruct(tmp_path / "r.dcm", images, orthogonal(), {"GTV": on_centres}))


@pytest.mark.parametrize("loops", [(BOX, INNER), (INNER, BOX), (KEYHOLE,), (BOX, INNER, BOX)])
@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_a_contour_in_another_is_a_hole(loops: Any, kind: str, tmp_path: Path) -> None:
    """And one that is there twice counts once."""
    images = series(tmp_path / "images", box(hole=True))
    mask = write_rtstruct(tmp_path / "r.dcm", images, orthogonal(), {"ring": in_slices(*loops)}, kinds=[kind])
    must_be(images, mask)
    assert notes(images, mask) == ()


def test_polygons_are_filled_as_by_matplotlib() -> None:
    """Stars with edges that cross, two in one slice, one partly outside: by its test of single points, of those beside the edges."""
    rng, shape = np.random.default_rng(3), (40, 33)
    centres = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, 2)
    around = [centres + shift for shift in ((0, 0), (-0.02, -0.02), (-0.02, 0.02), (0.02, -0.02), (0.02, 0.02))]
    for corners in (3, 5, 12, 30):
        loops = [rng.uniform(-5, 45, (corners, 2)), rng.uniform(5, 30, (corners, 2))]
        one, other = (np.array([Outline(loop).contains_points(at) for at in around]) for loop in loops)
        for drawn, found in ((loops[:1], one), (loops, one ^ other)):
            beside = (found == found[0]).all(axis=0).reshape(shape)
            assert beside.mean() > 0.8
            assert 0.05 < found[0].mean() < 0.95
            np.testing.assert_array_equal(enclosed(drawn, shape)[beside], found[0].reshape(shape)[beside])


def test_contours_lie_on_the_nifti_of_their_series_too(tmp_path: Path) -> None:
    """Its affine is enough, also where the array is turned round and cropped; of its identifiers nothing is known."""
    images = series(tmp_path / "images", box())
    mask = write_rtstruct(tmp_path / "r.dcm", images, orthogonal(), {"GTV": in_slices(BOX)}, frame="1.2.3")
    scan = read_scan(images)
    voxels = restored(scan.grid, scan.slices)[..., 0]
    image = nib.Nifti1Image(voxels, scan.grid.affine).slicer[2:, 1:, 1:]
    turned = nib.as_closest_canonical(image)
    assert turned.affine[0, 0] * image.affine[0, 0] < 0
    for name, stored in (("as.nii.gz", image), ("turned.nii.gz", turned)):
        nib.save(stored, tmp_path / name)
        must_be(tmp_path / name, mask)
    flat = tmp_path / "flat.nii.gz"  # a slice alone, whose neighbours its header does not know
    nib.save(nib.Nifti1Image(voxels[..., 0], scan.grid.affine), flat)
    below, among = (
        write_rtstruct(tmp_path / f"{first}.dcm", images, orthogonal(), {"GTV": in_slices(BOX, slices=(first, 4, 8))})
        for first in (3, 0)
    )
    with pytest.raises(CdiffError, match="lie outside its image"):
        on(flat, below)
    np.testing.assert_array_equal(on(flat, among)[0], on(images, among)[0])
    assert notes(flat, among) == ("has 2 of 3 contours wholly or partly outside its image",)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "lost.nii.gz")
    with pytest.raises(CdiffError, match=r"r\.dcm cannot be laid on its image: .* does not say where its voxels lie"):
        on(tmp_path / "lost.nii.gz", mask)


def test_contours_of_another_scan_are_refused_and_of_another_series_told(tmp_path: Path) -> None:
    images = series(tmp_path / "images", box())
    drawn = {"GTV": in_slices(BOX)}
    other = write_rtstruct(tmp_path / "other.dcm", images, orthogonal(), drawn, frame="1.2.3")
    with pytest.raises(
        CdiffError, match=r"other\.dcm cannot be laid on its image: its frame of reference is not its image's"
    ):
        on(images, other)
    phase = write_rtstruct(tmp_path / "phase.dcm", images, orthogonal(), drawn, series="1.2.3")
    must_be(images, phase)
    assert notes(images, phase) == (
        "was drawn on another series than its image, though in the same frame of reference",
    )


def test_a_contour_counts_for_the_slice_that_it_lies_in_alone(tmp_path: Path) -> None:
    images = series(tmp_path / "images", box())

    def moved(between: float, slices: tuple[int, ...] = (1, 2, 3)) -> Path:
        drawn = {"GTV": in_slices(BOX, slices=slices)}
        return write_rtstruct(tmp_path / "r.dcm", images, orthogonal(), drawn, between=between)

    must_be(images, moved(0.2))
    assert notes(images, moved(0.2)) == (
        "has contours that lie up to 0.20 of the slice spacing away from the slices that they count for",
    )
    with pytest.raises(CdiffError, match=r"up to 0\.5 of the slice spacing away from its image's slices"):
        on(images, moved(0.5))
    with pytest.raises(CdiffError, match=r"in only one of every 2 slices of its image"):
        on(images, moved(0, (0, 2, 4)))
    with pytest.raises(CdiffError, match=r"lie outside its image"):
        on(images, moved(0, (7, 8)))
    across = [(k, [(4, 3), (9, 3), (9, 14)]) for k in (1, 2, 3)]
    tilted = orthogonal()
    tilted[:, 0] += 0.3 * tilted[:, 2]
    mask = write_rtstruct(tmp_path / "r.dcm", images, tilted, {"GTV": across})
    with pytest.raises(CdiffError, match="away from its image's slices"):
        on(images, mask)


def test_a_contour_beyond_any_side_of_its_slice_is_refused_and_one_across_it_told() -> None:
    sides = (20, 24, 5)
    grid = Grid(sides, 2, nib.Nifti1Image(np.zeros(sides, np.uint8), np.diag([2.0, 3, 4, 1])).header)

    def laid(low: tuple[float, float], high: tuple[float, float]) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
        """Of a box between two corners in voxels of the third slice."""
        corners = np.array([(low[0], low[1]), (high[0], low[1]), high, (low[0], high[1])])
        return lay(Contours((np.column_stack([corners * (2, 3), np.full(4, 8)]),), "", frozenset()), grid)

    for beyond in ((-5.5, 3.5), (20.5, 3.5), (3.5, -5.5), (3.5, 24.5)):
        with pytest.raises(CdiffError, match="lie outside its image"):
            laid(beyond, (beyond[0] + 4, beyond[1] + 4))
    for low, high in (((-2.5, 3.5), (1.5, 7.5)), ((17.5, 3.5), (21.5, 7.5)), ((3.5, -2.5), (7.5, 1.5)), ((3.5, 21.5), (7.5, 25.5))):  # fmt: skip
        marked, told = laid(low, high)
        assert marked.sum() == marked[..., 2].sum() == 8
        assert told == ("has 1 of 1 contour wholly or partly outside its image",)
    marked, told = laid((-0.5, -0.5), (19.5, 23.5))
    assert (marked[..., 2].all(), told) == (True, ())


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    """Also in training, case by case, and what lies inside is marked all the same."""
    images = series(tmp_path / "images", box(slice(4, 6)))
    drawn = [*in_slices(BOX, slices=(4, 5, 6)), (5, [(12, 12)]), (5, [(13, 12)])]  # the last is said to be closed
    mask = write_rtstruct(tmp_path / "r.dcm", images, orthogonal(), {"GTV": drawn}, kinds=["CLOSED_PLANAR"] * 3 + ["POINT"])  # fmt: skip
    must_be(images, mask)
    said = (
        "has 2 contours that enclose nothing (POINT): left out",
        "has 1 of 3 contours wholly or partly outside its image",
    )
    assert notes(images, mask) == said
    odd = Oddities()
    read_case(Case("p1", images, (mask,)), odd=odd)
    assert any(f"in 1 case (p1): p1: r.dcm {said[0]}" in line for line in odd.told())
    crossing = in_slices(BOX, rectangle(8.5, 2.6, 12.4, 9.5))
    mask = write_rtstruct(tmp_path / "crossing.dcm", images, orthogonal(), {"GTV": crossing})
    assert notes(images, mask) == ("has contours that cross each other, in 3 slices: an area that two of them enclose counts as outside",)  # fmt: skip


def test_a_structure_without_a_contour_marks_nothing_and_that_is_told(tmp_path: Path) -> None:
    images = series(tmp_path / "images", box())
    mask = write_rtstruct(tmp_path / "r.dcm", images, orthogonal(), {"anna": in_slices(BOX), "ben": []})
    must_be(images, mask)  # the only one that has contours needs no name
    assert not on(images, f"{mask}#ben").any()
    (told,) = notes(images, Path(f"{mask}#ben"))
    assert told.startswith("has no contours, so its annotator counts as having marked nothing")


def test_one_of_several_structures_must_be_named(tmp_path: Path) -> None:
    images = series(tmp_path / "images", box(slice(2, 4)))
    both = [
        ("GTV-1vis-1", in_slices(BOX)),
        ("GTV//2 #b", in_slices(BOX, slices=(2, 3))),
        ("twice", in_slices(BOX)),
        ("twice", in_slices(BOX, slices=(2, 3))),
    ]
    mask = write_rtstruct(tmp_path / "r#1.dcm", images, orthogonal(), both)
    for name in ("GTV//2 #b", "4"):
        must_be(images, f"{mask}#{name}")
    assert on(images, f"{mask}#GTV-1vis-1").sum() == box().sum()
    for name, message in (
        (
            "",
            r"r#1\.dcm holds contours of several structures: 1 \(GTV-1vis-1\), .*; name the one .* such as r#1\.dcm#1",
        ),
        ("#gtv", r"r#1\.dcm#gtv does not exist: the file holds 1 \(GTV-1vis-1\), 2 \(GTV//2 #b\), 3 \(twice\)"),
        ("#twice", r"r#1\.dcm#twice is the name of several structures; name one by its number \(3, 4\)"),
    ):
        with pytest.raises(CdiffError, match=message):
            on(images, f"{mask}{name}")
    (tmp_path / "r#1.dcm#twice").write_bytes(write_rtstruct(tmp_path / "x", images, orthogonal(), both[1:2]).read_bytes())  # fmt: skip
    must_be(images, tmp_path / "r#1.dcm#twice")  # a file of the whole name is meant first


def test_what_holds_no_outline_is_refused(tmp_path: Path) -> None:
    images = series(tmp_path / "images", box())
    points = write_rtstruct(tmp_path / "r.dcm", images, orthogonal(), {"centre": in_slices(BOX)}, kinds=["OPEN_PLANAR"])
    with pytest.raises(CdiffError, match=r"r\.dcm#centre has no closed contour, only OPEN_PLANAR"):
        on(images, f"{points}#centre")
    with pytest.raises(CdiffError, match=r"r\.dcm holds no closed contours"):
        on(images, points)
    file = dcmread(write_rtstruct(tmp_path / "r.dcm", images, orthogonal(), {"GTV": in_slices(BOX)}))
    file.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2", "3", "4"]
    file.save_as(tmp_path / "r.dcm")
    with pytest.raises(CdiffError, match=r"r\.dcm cannot be read as an RTSTRUCT"):
        on(images, tmp_path / "r.dcm")
    file.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2", "1e9"]
    file.save_as(tmp_path / "r.dcm")
    with pytest.raises(CdiffError, match=r"r\.dcm cannot be read as an RTSTRUCT \(.* too large to lie in a patient\)"):
        on(images, tmp_path / "r.dcm")


def test_a_structure_set_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    """Read as it stands it would be another outline, or a reader who marked nothing."""
    images, path = series(tmp_path / "images", box()), tmp_path / "r.dcm"
    two = {"a": in_slices(BOX), "b": in_slices(BOX)}

    def changed(change: Callable[[Any], None]) -> None:
        file = dcmread(write_rtstruct(path, images, orthogonal(), two))
        change(file)
        file.save_as(path)

    def cut(file: Any) -> None:
        contour = file.ROIContourSequence[0].ContourSequence[0]
        contour.ContourData = list(contour.ContourData)[:-3]

    changed(cut)
    with pytest.raises(CdiffError, match="a contour has 3 points, but its header promises 4"):
        on(images, Path(f"{path}#a"))
    must_be(images, Path(f"{path}#b"))
    changed(lambda file: setattr(file.ROIContourSequence[0], "ReferencedROINumber", 9))
    with pytest.raises(CdiffError, match="it has contours of a structure 9, which it does not list"):
        on(images, Path(f"{path}#a"))
    must_be(images, Path(f"{path}#b"))
    changed(lambda file: setattr(file.ROIContourSequence[0], "ReferencedROINumber", 2))
    with pytest.raises(CdiffError, match="two of its structures have the same ReferencedROINumber"):
        on(images, Path(f"{path}#b"))
