"""NRRD and MetaImage: the voxels, grid and maps of the same scan as NIfTI, masks and data sets of such files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.data.masks import read_mask
from cdiff.runtime.data.partition import count_channels
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.inputs import scans_at
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.segmenter import Segmenter
from tests.runtime.dicom_files import orthogonal
from tests.runtime.scan_files import restored
from tests.runtime.test_segmenter import QUICK, make_bundle

KINDS = ("nrrd", "nhdr", "mha", "mhd")


def voxels(*shape: int) -> Any:
    return np.random.default_rng(4).integers(-900, 1500, shape).astype(np.int16)


def image(array: Any, lps: Any = None) -> Any:
    """An ITK image of an array [i, j, k] that lies as `lps` [3, 4] says."""
    made = sitk.GetImageFromArray(np.transpose(array))
    if lps is not None:
        lengths = np.linalg.norm(lps[:, :3], axis=0)
        made.SetSpacing(lengths.tolist())
        made.SetOrigin(lps[:, 3].tolist())
        made.SetDirection((lps[:, :3] / lengths).ravel().tolist())
    return made


def written(path: Path, what: Any, *, packed: bool = False) -> Path:
    sitk.WriteImage(what, str(path), packed)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return Segmenter.open(make_bundle(tmp_path_factory.mktemp("itk") / "tiny"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_is_what_it_is_as_nifti(kind: str, packed: bool, model: Segmenter, tmp_path: Path) -> None:
    """The same oblique volume written by ITK as both: voxels and maps bit for bit, on one grid, and the maps' files lie there too."""
    made = image(voxels(20, 24, 3), orthogonal())
    path = written(tmp_path / f"scan.{kind}", made, packed=packed)
    same = read_scan(written(tmp_path / "same.nii.gz", made))
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.slices, same.slices)
    assert scan.grid.differs_from(same.grid) is None
    assert scan.grid.view == same.grid.view
    assert scan.name == "scan"
    assert scan.reader == f"SimpleITK {sitk.Version_VersionString()}"
    found, wanted = model.segment(scan, **QUICK), model.segment(same, **QUICK)
    np.testing.assert_array_equal(found.levels, wanted.levels)
    assert 0.01 < float(found.soft.mean()) < 0.99, "maps of nothing would not tell"
    found.save(tmp_path / "out")
    wanted.save(tmp_path / "out")
    one, other = (nib.load(tmp_path / f"out/{name}_soft.nii.gz") for name in ("scan", "same"))
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-4)
    np.testing.assert_allclose(one.get_qform(), other.get_qform(), atol=1e-4)


def test_what_a_file_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    """Neither spacing nor place: a placeholder, and no letters for left and right; nor with a spacing alone."""
    scan = read_scan(written(tmp_path / "a.mha", image(voxels(8, 9, 3))))
    assert scan.grid.is_placeholder
    assert not scan.grid.has_orientation
    assert scan.grid.header["sform_code"] == scan.grid.header["qform_code"] == 0, "other programs believe the codes"
    away = read_scan(written(tmp_path / "a.mha", image(voxels(8, 9, 3), np.column_stack([np.eye(3), np.full(3, 40)]))))
    np.testing.assert_array_equal(away.grid.affine[:3, 3], (-40, -40, 40))  # voxels of 1 mm that lie somewhere
    path = written(tmp_path / "c.nrrd", image(voxels(8, 9, 3)))
    spaced = path.read_bytes().replace(b"space: left-posterior-superior\n", b"")
    spaced = re.sub(rb"space directions:.*", b"spacings: 0.5 0.6 2.5", spaced)
    path.write_bytes(re.sub(rb"space origin:.*\n", b"", spaced))
    scan = read_scan(path)
    assert scan.grid.spacing == pytest.approx((0.5, 0.6, 2.5))
    assert not scan.grid.has_orientation
    for space in (b"scanner-xyz", b"3D-right-handed", b"3D-left-handed"):
        path = written(tmp_path / "d.nrrd", image(voxels(8, 9, 3), orthogonal()))
        elsewhere = read_scan(edited(path, b"space: left-posterior-superior", b"space: " + space))
        assert elsewhere.grid.spacing == pytest.approx((0.7, 0.8, 2.5))
        assert not elsewhere.grid.has_orientation, "its axes are the scanner's or nobody's"
    flat = read_scan(written(tmp_path / "b.nrrd", image(voxels(8, 9))))
    assert flat.slices.shape == (1, 1, 8, 9)


def test_what_a_writer_adds_to_a_nrrd_is_no_field_of_it(tmp_path: Path) -> None:
    path = edited(made(tmp_path, "nrrd"), b"kinds:", b'space units:="cm": of old\n# space units: "cm"\nkinds:')
    assert read_scan(path).grid.spacing == pytest.approx((0.7, 0.8, 2.5))
    edited(path, b"kinds:", b'space units: "???" "???" "???"\nkinds:')  # NRRD's word for: nobody knows
    assert read_scan(path).grid.spacing == pytest.approx((0.7, 0.8, 2.5))


def test_bytes_that_a_nrrd_skips_are_no_voxels(tmp_path: Path) -> None:
    path, before = made(tmp_path, "nrrd"), bytes(200)  # more than a slice
    wanted = read_scan(path).slices
    edited(path, b"encoding: raw\n", b"encoding: raw\nbyte skip: 200\n")
    edited(path, b"\n\n", b"\n\n" + before)
    np.testing.assert_array_equal(read_scan(path).slices, wanted)


def test_a_single_time_point_lies_where_it_lies(tmp_path: Path) -> None:
    """A fourth axis of length one took spacing and place away."""
    array = voxels(8, 9, 3)
    flat = read_scan(written(tmp_path / "flat.mha", image(array, orthogonal())))
    film = sitk.JoinSeries([image(array, orthogonal())])
    scan = read_scan(written(tmp_path / "film.mha", film))
    np.testing.assert_array_equal(scan.slices, flat.slices)
    assert scan.grid.differs_from(flat.grid) is None
    assert scan.grid.has_orientation
    assert scan.grid.spacing == pytest.approx((0.7, 0.8, 2.5))


@pytest.mark.parametrize(
    ("long", "short"),
    [("left-posterior-superior", "LPS"), ("right-anterior-superior", "RAS"), ("left-anterior-superior", "LAS")],
)
def test_a_space_with_time_is_the_one_without(long: str, short: str, tmp_path: Path) -> None:
    """ITK turns a volume to its own axes, and leaves one of a film as it is: left would be right, or front back."""
    flat = image(voxels(8, 9, 3), orthogonal())
    plain = edited(written(tmp_path / "a.nrrd", flat), b"space: left-posterior-superior", f"space: {long}".encode())
    for space in (f"{long}-time", f"{short}T"):
        film = written(tmp_path / "film.nrrd", sitk.JoinSeries([flat]))
        grid = read_scan(edited(film, b"space dimension: 4", f"space: {space}".encode())).grid
        np.testing.assert_allclose(grid.affine, read_scan(plain).grid.affine, atol=1e-5)
        assert grid.has_orientation


def test_voxels_in_several_files(tmp_path: Path) -> None:
    array = voxels(8, 9, 3)
    path = written(tmp_path / "x.mhd", image(array, orthogonal()))
    for n in range(3):
        (tmp_path / f"s{n}.raw").write_bytes(array[:, :, n].tobytes(order="F"))
    text = path.read_bytes()
    for named in (b"LIST\ns0.raw\ns1.raw\ns2.raw", b"s%d.raw 0 2 1"):
        path.write_bytes(text.replace(b"x.raw", named))
        np.testing.assert_array_equal(restored(read_scan(path).grid, read_scan(path).slices)[..., 0], array)
    path = written(tmp_path / "y.nhdr", image(array, orthogonal()))
    text = path.read_bytes().replace(b"encoding: gzip", b"encoding: raw")
    for named in (b"LIST\ns0.raw\ns1.raw\ns2.raw", b"s%01d.raw 0 2 1", b"LIST 2\ns0.raw\ns1.raw\ns2.raw"):
        path.write_bytes(text.replace(b"y.raw", named))
        np.testing.assert_array_equal(restored(read_scan(path).grid, read_scan(path).slices)[..., 0], array)


def test_a_file_of_another_format_is_not_read_by_its(tmp_path: Path) -> None:
    """ITK would look for the format by itself, among some twenty."""
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((9, 8), np.uint8)), tmp_path / "x.bmp")
    (tmp_path / "x.bmp").rename(tmp_path / "x.mha")
    assert sitk.ReadImage(tmp_path / "x.mha").GetSize() == (8, 9)
    with pytest.raises(CdiffError, match="is not a NRRD or MetaImage file that can be read"):
        read_scan(tmp_path / "x.mha")


def test_axes_that_are_not_at_right_angles_stay_so(tmp_path: Path) -> None:
    """The volume counts a voxel as it leans, as for NIfTI."""
    path = written(tmp_path / "a.mha", image(voxels(8, 9, 3), np.array([[1.0, 0, 0, 5], [0, 1, 0, 0], [0, 0, 2, 0]])))
    leaning = path.read_bytes().replace(
        b"TransformMatrix = 1 0 0 0 1 0 0 0 1", b"TransformMatrix = 1 0 0 0 1 0 0 .6 .8"
    )
    path.write_bytes(leaning)
    assert read_scan(path).grid.voxel_mm == pytest.approx(1.6, rel=1e-3)


def test_modalities_may_be_components_or_files(tmp_path: Path) -> None:
    parts = [voxels(8, 9, 3) + n for n in range(2)]
    both = sitk.Compose(*[sitk.Cast(image(part, orthogonal()), sitk.sitkFloat32) for part in parts])
    one = read_scan(written(tmp_path / "both.nrrd", both), channels=2)
    files = [written(tmp_path / f"{n}.mha", image(part, orthogonal())) for n, part in enumerate(parts)]
    np.testing.assert_array_equal(one.slices, read_scan(files, channels=2).slices)
    with pytest.raises(CdiffError, match=r"is 4-D \(8 x 9 x 3 x 2\)"):
        read_scan(tmp_path / "both.nrrd")


def test_the_hash_is_of_the_voxels_too(tmp_path: Path) -> None:
    """They lie in another file than the one that is named."""
    first = read_scan(written(tmp_path / "a.mhd", image(voxels(8, 9, 3)))).sha256
    assert read_scan(tmp_path / "a.mhd").sha256 == first
    written(tmp_path / "a.mhd", image(voxels(8, 9, 3) + 1))
    assert read_scan(tmp_path / "a.mhd").sha256 != first


def test_data_sets_of_such_files(tmp_path: Path) -> None:
    """Images, masks and folders of scans; the file with the voxels is no scan of its own."""
    for n in range(2):
        case = tmp_path / f"data/case{n}"
        case.mkdir(parents=True)
        written(case / "image.mhd", image(voxels(8, 9, 3), orthogonal()))
        for rater in ("anna", "ben"):
            written(case / f"mask_{rater}.nrrd", image((voxels(8, 9, 3) > 0).astype(np.uint8), orthogonal()))
    found = find_cases(tmp_path / "data")["all"]
    assert [(case.image.name, case.raters) for case in found] == [("image.mhd", ("anna", "ben"))] * 2
    assert read_mask(found[0].masks[0]).values.sum() == np.count_nonzero(voxels(8, 9, 3) > 0)
    assert count_channels(found) == 1
    assert [scan.name for scan in scans_at(tmp_path / "data")] == ["case0", "case1"]
    written(tmp_path / "data/case0/image.nii.gz", image(voxels(8, 9, 3), orthogonal()))
    with pytest.raises(CdiffError, match=r"image.mhd and image.nii.gz in .*case0 are both the case's image"):
        find_cases(tmp_path / "data")


def edited(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def made(folder: Path, kind: str) -> Path:
    return written(folder / f"x.{kind}", image(voxels(8, 9, 3), orthogonal()))


@pytest.mark.parametrize("line", [b"note:=", b"# ", b"content: "])
def test_what_a_writer_adds_to_a_nrrd_may_be_long(tmp_path: Path, line: bytes) -> None:
    path = made(tmp_path, "nrrd")
    plain = read_scan(path).slices
    np.testing.assert_array_equal(read_scan(edited(path, b"endian", line + b"x" * 9000 + b"\nendian")).slices, plain)


def test_without_simpleitk_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, "nrrd")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(CdiffError, match=r"is NRRD or MetaImage, and SimpleITK, .* try: pip install '\.\[formats\]'"):
        read_scan(path)
