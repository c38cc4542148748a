"""What is written of a result: maps on the input's grid, uncertainty, volumes, a report that vouches for the files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime import outputs
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import PART, most_bytes_of_a_name, sha256
from cdiff.runtime.report import build_report, describe_input, volumes
from cdiff.runtime.results import Result
from cdiff.runtime.scans.inputs import scans_at
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.stack import Stack, entropy
from cdiff.runtime.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
C = 3
OBLIQUE = np.array([[-0.68, 0.1, 0.2, 11], [0.12, 0.79, -0.3, -20], [0.05, 0.2, 2.4, 5], [0, 0, 0, 1.0]])


def segmented(scan: Any, slices: range | None = None, axis: int = 2, channels: int = 1) -> Result:
    """A result with maps that differ in every pixel, slice and level."""
    read = read_scan(scan, slice_axis=axis, channels=channels)
    slices = slices or range(len(read.slices))
    h, w = read.slices.shape[2:]
    levels = np.random.default_rng(3).random((len(slices), C, h, w), dtype=np.float32)
    stack = Stack(levels, levels.std(axis=1))
    return Result(
        read.grid,
        read.slices,
        slices,
        stack,
        read.name,
        build_report({"volumes": volumes(stack, read.grid)}),
    )


def scan_file(
    folder: Path, shape: tuple[int, ...], *, qform: int = 1, sform: int = 2, kind: Any = nib.Nifti1Image
) -> Path:
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    image = kind(array, None)
    zooms = np.linalg.norm(OBLIQUE[:3, :3], axis=0)[: len(shape)]
    image.header.set_zooms((*zooms, *[1.0] * (len(shape) - len(zooms))))
    image.header.set_qform(OBLIQUE, code=qform)
    image.header.set_sform(OBLIQUE + np.eye(4) * 0.001, code=sform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"Doe^Jane 1950-01-01"
    image.header["cal_max"] = 400
    image.header.set_slope_inter(2.0, -100.0)
    nib.save(image, folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 2), (0, 1), (1, 0), (0, 0)])
def test_the_maps_lie_where_the_input_lies(tmp_path: Path, codes: tuple[int, int], kind: Any) -> None:
    path = scan_file(tmp_path, (5, 6, 4), qform=codes[0], sform=codes[1], kind=kind)
    segmented(path).save(tmp_path / "out", preview=False)
    given = nib.load(path)
    for name, dtype, shape in (
        ("soft", np.float32, (5, 6, 4)),
        ("levels", np.float32, (5, 6, 4, C)),
        ("uncertainty", np.float32, (5, 6, 4, 2)),
        ("mask", np.uint8, (5, 6, 4)),
    ):
        made = nib.load(tmp_path / "out" / f"scan_{name}.nii.gz")
        assert type(made) is kind
        assert made.shape == shape
        assert made.get_data_dtype() == dtype
        np.testing.assert_array_equal(made.affine, given.affine)
        for field in ("qform_code", "sform_code", "xyzt_units", "quatern_b", "qoffset_x"):
            expected = given.header[field] & 7 if field == "xyzt_units" else given.header[field]
            assert made.header[field] == expected, field
        np.testing.assert_array_equal(made.header["pixdim"][:4], given.header["pixdim"][:4])
        assert made.dataobj.slope == 1
        assert made.dataobj.inter == 0
        assert b"Doe" not in made.header.binaryblock
        assert made.header["cal_max"] == 1


def test_what_is_written_is_what_the_result_holds(tmp_path: Path) -> None:
    result = segmented(scan_file(tmp_path, (5, 6, 4)), axis=1)
    result.save(tmp_path, "a", preview=False)
    for name in ("soft", "levels", "uncertainty", "mask"):
        written = np.asarray(nib.load(tmp_path / f"a_{name}.nii.gz").dataobj)
        np.testing.assert_array_equal(written, getattr(result, name))
    assert result.soft[1, 3, 2] == pytest.approx(result.stack.levels[3, :, 1, 2].mean())
    assert result.levels[1, 3, 2, 1] == result.stack.levels[3, 1, 1, 2]
    np.testing.assert_array_equal(result.mask, result.soft >= 0.5)


@pytest.mark.parametrize(("shape", "written"), [((5, 6), (5, 6)), ((5, 6, 1), (5, 6, 1)), ((5, 6, 3, 1), (5, 6, 3, 1))])
def test_the_shape_is_kept(tmp_path: Path, shape: tuple[int, ...], written: tuple[int, ...]) -> None:
    result = segmented(scan_file(tmp_path, shape))
    result.save(tmp_path, preview=False)
    assert result.soft.shape == written
    assert nib.load(tmp_path / "scan_soft.nii.gz").shape == written
    assert nib.load(tmp_path / "scan_mask.nii.gz").shape == written
    # Levels lie on the fourth axis whatever the input: a third one would be read as slices.
    assert nib.load(tmp_path / "scan_levels.nii.gz").shape == (*(*written, 1)[:3], C)


def test_slices_that_were_not_computed_are_not_zeros(tmp_path: Path) -> None:
    result = segmented(scan_file(tmp_path, (5, 6, 4)), range(1, 3))
    assert np.isnan(result.soft[..., [0, 3]]).all()
    assert np.isnan(result.levels[..., [0, 3], :]).all()
    assert np.isnan(result.uncertainty[..., [0, 3], :]).all()
    assert np.isfinite(result.uncertainty[..., 1:3, :]).all()
    assert not result.mask[..., [0, 3]].any()
    assert result.mask.any()
    np.testing.assert_array_equal(result.levels[..., 1, :], np.moveaxis(result.stack.levels[0], 0, -1))
    report = result.save(tmp_path, preview=True)
    assert set(report["outputs"]) == {
        f"scan_{k}" for k in ("soft.nii.gz", "levels.nii.gz", "uncertainty.nii.gz", "mask.nii.gz", "preview.png")
    }


def test_entropy_against_its_definition() -> None:
    p = np.array([0, 0.5, 1, 0.25, np.nan], np.float32)
    h = entropy(p)
    np.testing.assert_allclose(h[:4], [0, 1, 0, 2 - 0.75 * np.log2(3)], rtol=1e-6)
    assert np.isnan(h[4])


@pytest.mark.parametrize("name", ["soft", "uncertainty", "mask"])
def test_maps_of_a_long_scan_are_made_slice_by_slice(name: str) -> None:
    """In float64 they would take several times as much memory as all that is kept."""
    maps = np.random.default_rng(0).random((30, 2, 64, 64), dtype=np.float32)
    stack = Stack(maps, maps[:, 0])
    tracemalloc.start()
    made = getattr(stack, name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    soft = maps[:, 0].nbytes
    assert peak < made.nbytes + 1.5 * soft
    np.testing.assert_allclose(stack.soft, (maps[:, 0] + maps[:, 1]) / 2, atol=1e-7)
    np.testing.assert_array_equal(stack.uncertainty[:, 0], entropy(stack.soft))


def test_a_half_of_the_annotators_is_inside_wherever_it_is_said(tmp_path: Path) -> None:
    """Of two, one draws the first pixel, both the second: the mask's file, the result's own and the volume's count hold both."""
    read = read_scan(np.zeros((2, 2, 1), np.float32))
    maps = np.zeros((1, 2, 2, 2), np.float32)
    maps[0, :, 0, 1] = maps[0, 0, 0, 0] = 1
    stack = Stack(maps, np.zeros((1, 2, 2), np.float32))
    result = Result(read.grid, read.slices, range(1), stack, "scan")
    result.save(tmp_path)
    written = np.asarray(nib.load(tmp_path / "scan_mask.nii.gz").dataobj)  # type: ignore[attr-defined]
    for mask in (written, result.mask):
        assert mask[..., 0].tolist() == [[1, 1], [0, 0]]
    assert volumes(stack, read.grid)["mask"]["voxels"] == 2


def test_volumes_counted_by_hand(tmp_path: Path) -> None:
    levels = np.zeros((2, 2, 3, 4), np.float32)
    levels[0, 0, :2] = 0.5  # 8 voxels at level 1
    levels[1, 1, 0, 0] = 1.0  # 1 voxel at level 2
    path = scan_file(tmp_path, (3, 4, 2))
    grid = read_scan(path).grid
    ml = (
        abs(float(np.linalg.det(nib.load(path).affine[:3, :3]))) / 1000
    )  # OBLIQUE leans: less than its spacing multiplied
    found = volumes(Stack(levels, levels[:, 0]), grid)
    assert [(v["level"], v["voxels"]) for v in found["levels"]] == [(1, 8), (2, 1)]
    assert found["levels"][0]["ml"] == pytest.approx(8 * ml, rel=1e-3)
    assert found["mask"]["voxels"] == 1  # the soft map there is (0 + 1) / 2
    assert found["expected"]["voxels"] == pytest.approx(8 * 0.25 + 0.5)
    assert "ml" not in volumes(Stack(levels[:1], levels[:1, 0]), read_scan(np.ones((3, 4))).grid)["mask"]


def test_areas_and_each_annotator_s_size_counted_by_hand() -> None:
    flat = nib.Nifti1Image(np.ones((3, 4), np.float32), np.diag([0.5, 0.25, 1, 1]))
    maps = np.zeros((1, 2, 3, 4), np.float32)
    maps[0, 0, :2], maps[0, 1, 2, 0] = 0.5, 1
    found = volumes(Stack(maps, maps[:, 0], None, VARIANTS["annotator"], 2), read_scan(flat).grid)
    assert found["annotators"] == [
        {"annotator": 1, "voxels": 8, "mm2": 1.0},
        {"annotator": 2, "voxels": 1, "mm2": 0.125},
    ]
    assert found["mask"] == {"voxels": 1, "mm2": 0.125}
    assert found["expected"] == {"voxels": 2.5, "mm2": 0.3125}
    assert "unreliable" not in found
    flat.header.set_zooms((1, 1))
    flat.set_sform(None)
    fake = volumes(Stack(maps, maps[:, 0]), read_scan(flat).grid)
    assert fake["unreliable"].startswith("mm2: ")


def test_a_report_says_how_its_input_was_read(tmp_path: Path) -> None:
    path = scan_file(tmp_path, (3, 4, 2))
    header = nib.load(path).header
    assert describe_input(read_scan(path, slice_axis=0)) == {
        "path": str(path),
        "sha256": sha256(path),
        "shape": [3, 4, 2],
        "channels": 1,
        "slice_axis": 0,
        "slice_axis_note": "cut along axis 0 of the array as stored; in-plane axes as stored",
        "spacing_mm": [round(float(one), 6) for one in header.get_zooms()],
        "sform_code": int(header["sform_code"]),
        "qform_code": int(header["qform_code"]),
        "maps_affine": "the input's",
    }
    bare = describe_input(read_scan(np.ones((3, 4, 2), np.float32), channels=2))
    assert (bare["shape"], bare["channels"], bare["slice_axis"]) == ([3, 4], 2, None)
    assert bare["slice_axis_note"] == "a 2-D image is one slice"
    assert [bare[key] for key in ("spacing_mm", "sform_code", "qform_code")] == [None] * 3
    assert bare["maps_affine"] == "identity: the input has none"


def test_the_report_vouches_for_every_file(tmp_path: Path) -> None:
    result = segmented(scan_file(tmp_path, (5, 6, 4)))
    returned = result.save(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert report == returned
    assert set(report["outputs"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"scan.json"}
    for name, entry in report["outputs"].items():
        assert entry == {"sha256": sha256(tmp_path / "out" / name), "bytes": (tmp_path / "out" / name).stat().st_size}
    assert "outputs" not in result.report


def test_saving_twice_writes_the_same_bytes_and_drops_an_old_preview(tmp_path: Path) -> None:
    result = segmented(scan_file(tmp_path, (5, 6, 4)))
    first = result.save(tmp_path / "out", "a")["outputs"]
    assert result.save(tmp_path / "out", "a")["outputs"] == first
    result.save(tmp_path / "out", "a", preview=False)
    assert not (tmp_path / "out" / "a_preview.png").exists()


def test_the_folder_is_not_listed_for_each_scan_that_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands, it holds five files each: the last one's save would go through all of them, and all saves through their square."""
    listed: list[Path] = []
    reports = outputs._reports
    monkeypatch.setattr(outputs, "_reports", lambda folder: listed.append(folder) or reports(folder))
    result = segmented(scan_file(tmp_path, (4, 5)))
    for n in range(3):
        result.save(tmp_path / "maps", f"scan{n}", preview=False)
        result.save(tmp_path / "maps", f"scan{n}", preview=False)  # also where its own older maps are
    assert listed == []


def test_a_page_is_listed_and_an_old_one_dropped(tmp_path: Path) -> None:
    result = segmented(scan_file(tmp_path, (5, 6, 4)))
    report = result.save(tmp_path / "out", "a", preview=False, page=True)
    assert report["outputs"]["a_page.html"]["bytes"] == (tmp_path / "out" / "a_page.html").stat().st_size
    result.save(tmp_path / "out", "a", preview=False)
    assert not (tmp_path / "out" / "a_page.html").exists()
    (tmp_path / "out" / "a_page.html").write_text("mine")
    with pytest.raises(CdiffError, match=r"a_page\.html exists"):
        result.save(tmp_path / "out", "a", preview=False, page=True)


@pytest.mark.parametrize("name", ["scan_mask.nii.gz", "scan_preview.png", "scan.json"])
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, name: str) -> None:
    """A reader's mask beside the scan, a picture of it, the JSON that dcm2niix writes with a scan."""
    result = segmented(scan_file(tmp_path, (5, 6, 4)))
    for theirs in ("[" * 100_000, '{"Modality": "CT"}'):
        (tmp_path / name).write_text(theirs)
        with pytest.raises(CdiffError, match=name):
            result.save(tmp_path)
        assert (tmp_path / name).read_text() == theirs
    assert {path.name for path in tmp_path.iterdir()} == {"scan.nii.gz", name}
    if name.endswith("png"):
        result.save(tmp_path, preview=False)
        assert (tmp_path / name).read_text() == '{"Modality": "CT"}'


KILLED = """
import os, sys
from pathlib import Path
from tests.runtime.test_results import segmented

renamed, replace = [], os.replace

def kill_at_the_second(source, target):
    if len(renamed) == 1:
        os._exit(9)
    renamed.append(target)
    replace(source, target)

os.replace = kill_at_the_second
segmented(Path(sys.argv[1])).save(sys.argv[2])
"""


def test_a_save_killed_between_its_files_can_be_done_again(tmp_path: Path) -> None:
    """The old report is gone and the new one not in place yet: the maps are still known as ours, another's file is not."""
    scan = scan_file(tmp_path, (8, 9, 2))
    out = tmp_path / "out"
    segmented(scan).save(out)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(scan), str(out)], cwd=ROOT, check=False)
    assert killed.returncode == 9
    assert not (out / "scan.json").exists()
    again = segmented(scan)
    again.save(out)
    assert np.array_equal(np.asanyarray(nib.load(out / "scan_soft.nii.gz").dataobj), again.soft)
    (out / "scan.json").unlink()
    for part in out.glob(".part-*.json"):
        part.unlink()
    with pytest.raises(CdiffError, match=r"scan_.*exists and would be replaced"):
        again.save(out)


def test_a_result_of_an_array_has_the_identity(tmp_path: Path) -> None:
    result = segmented(np.random.default_rng(0).random((5, 6)))
    result.save(tmp_path, preview=False)
    made = nib.load(tmp_path / "scan_soft.nii.gz")
    np.testing.assert_array_equal(made.affine, np.eye(4))
    np.testing.assert_array_equal(np.asarray(made.dataobj), result.soft)


def test_a_picture_too_long_for_nifti_1_is_written_as_nifti_2(tmp_path: Path) -> None:
    result = segmented(np.random.default_rng(0).random((2, 2**15)))
    result.save(tmp_path)
    for kind, shape in (("soft", (2, 2**15)), ("levels", (2, 2**15, 1, C))):
        made = nib.load(tmp_path / f"scan_{kind}.nii.gz")
        assert isinstance(made, nib.Nifti2Image)
        assert made.shape == shape
        np.testing.assert_array_equal(made.affine, np.eye(4))
    np.testing.assert_array_equal(read_scan(tmp_path / "scan_soft.nii.gz").slices[0, 0], result.soft)


def test_results_lie_in_lists_and_sets_as_other_objects_do() -> None:
    """Their arrays were compared, whose truth is ambiguous, and there was no hash."""
    one, other = segmented(np.eye(4)), segmented(np.eye(4))
    assert other in [one, other]
    assert len({one, other, one.stack, other.stack}) == 4


@pytest.mark.parametrize("name", ["a/b", "../a", ""])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CdiffError, match="name"):
        dataclasses.replace(segmented(np.eye(4)), name="").save(tmp_path / "out", name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_too_long_for_its_files_is_told_before_any_is_there(tmp_path: Path) -> None:
    """The shorter ones were put in place, and no report with them: the next try would not even have known them as ours."""
    result, longest = segmented(np.eye(4)), most_bytes_of_a_name(tmp_path)
    name = "é" + "n" * (longest - len("_uncertainty.nii.gz") - 1)
    with pytest.raises(
        CdiffError, match=rf"_uncertainty\.nii\.gz is too long .* \({longest + 1} bytes of at most {longest}\)"
    ):
        result.save(tmp_path / "out", name, preview=False)
    assert list(tmp_path.iterdir()) == []
    result.save(tmp_path / "out", name[1:], preview=False)
    assert (tmp_path / f"out/{name[1:]}.json").is_file()


def test_a_long_scan_is_never_whole_in_memory_for_its_files(tmp_path: Path) -> None:
    """A level at a time is: the maps of a scan in one piece would be the most memory that a whole run takes."""
    result = segmented(np.zeros((256, 256, 40), np.float32), range(20, 21))
    tracemalloc.start()
    result.save(tmp_path, preview=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * result.soft.nbytes


def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path) -> None:
    """Killed after the older report gave way: its page must not stay beside a result that has none, and its maps are no scans."""
    scan = scan_file(tmp_path, (5, 6, 4))
    segmented(scan).save(tmp_path, preview=False, page=True)
    (tmp_path / "scan.json").rename(tmp_path / f"{PART}0.json")
    assert [one.name for one in scans_at(tmp_path)] == ["scan"]
    segmented(scan).save(tmp_path, preview=False)
    assert not (tmp_path / "scan_page.html").exists()
    listed = json.loads((tmp_path / "scan.json").read_text())["outputs"]
    assert {path.name for path in tmp_path.glob("scan_*")} == set(listed)
