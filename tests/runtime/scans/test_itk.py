"""NRRD and MetaImage: the voxels, grid and maps of the same scan as NIfTI, masks and data sets of such files, and what is refused."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
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


def test_voxels_in_several_files(tmp_path: Path) -> None:
    array = voxels(8, 9, 3)
    path = written(tmp_path / "x.mhd", image(array, orthogonal()))
    for n in range(3):
        (tmp_path / f"s{n}.raw").write_bytes(array[:, :, n].tobytes(order="F"))
    text = path.read_bytes()
    for named in (b"LIST\ns0.raw\ns1.raw\ns2.raw", b"s%d.raw 0 2 1"):
        path.write_bytes(text.replace(b"x.raw", named))
        np.testing.assert_array_equal(read_scan(path).grid.restore(read_scan(path).slices)[..., 0], array)
    path = written(tmp_path / "y.nhdr", image(array, orthogonal()))
    text = path.read_bytes().replace(b"encoding: gzip", b"encoding: raw")
    for named in (b"LIST\ns0.raw\ns1.raw\ns2.raw", b"s%01d.raw 0 2 1", b"LIST 2\ns0.raw\ns1.raw\ns2.raw"):
        path.write_bytes(text.replace(b"y.raw", named))
        np.testing.assert_array_equal(read_scan(path).grid.restore(read_scan(path).slices)[..., 0], array)


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


def cut(path: Path, end: int = -50) -> Path:
    path.write_bytes(path.read_bytes()[:end])
    return path


def edited(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def made(folder: Path, kind: str) -> Path:
    return written(folder / f"x.{kind}", image(voxels(8, 9, 3), orthogonal()))


def bad_lost(folder: Path) -> Path:
    path = made(folder, "mhd")
    (folder / "x.raw").unlink()
    return path


def bad_text(folder: Path) -> Path:
    (folder / "x.nrrd").write_text("this is no scan" * 100)
    return folder / "x.nrrd"


def bad_nan(folder: Path) -> Path:
    array = voxels(8, 9, 3).astype(np.float32)
    array[1, 2, 0] = np.nan
    return written(folder / "x.mha", image(array))


def bad_spacing(folder: Path) -> Path:
    path = written(folder / "x.mha", image(voxels(8, 9, 3)))
    return edited(path, b"ElementSpacing = 1 1 1", b"ElementSpacing = 0 1 1")


def bad_unit(folder: Path) -> Path:
    return edited(made(folder, "nrrd"), b"kinds:", b'space units: "cm" "cm" "cm"\nkinds:')


def bad_complex(folder: Path) -> Path:
    parts = [sitk.Cast(image(voxels(8, 9, 3)), sitk.sitkFloat32)] * 2
    return written(folder / "x.nrrd", sitk.RealAndImaginaryToComplex(*parts))


def bad_packed(folder: Path) -> Path:
    """ITK says so on the terminal and returns what came of it."""
    path = written(folder / "x.mha", image(voxels(8, 9, 3)), packed=True)
    data = bytearray(path.read_bytes())
    data[-60] ^= 0xFF
    path.write_bytes(data)
    return path


def bad_length(folder: Path) -> Path:
    path = written(folder / "x.mha", image(voxels(8, 9, 3)), packed=True)
    path.write_bytes(re.sub(rb"CompressedDataSize = \d+\n", b"", path.read_bytes()))
    return path


def bad_file(folder: Path) -> Path:
    path = made(folder, "mhd")
    cut(folder / "x.raw", -2)
    return path


def bad_list(folder: Path) -> Path:
    path = made(folder, "mhd")
    for n in range(2):
        (folder / f"{n}.raw").write_bytes(bytes(144))
    return edited(path, b"ElementDataFile = x.raw", b"ElementDataFile = LIST\n0.raw\n1.raw")


def bad_pipe(folder: Path) -> Path:
    path = made(folder, "mhd")
    os.mkfifo(folder / "pipe")
    return edited(path, b"ElementDataFile = x.raw", b"ElementDataFile = pipe")


def bad_nrrd_pipe(folder: Path) -> Path:
    path = written(folder / "x.nhdr", image(voxels(8, 9, 3)))
    os.mkfifo(folder / "pipe")
    return edited(path, b"data file: x.raw", b"data file: pipe")


def naming(kind: str, named: bytes) -> Callable[[Path], Path]:
    """A file whose header names its voxels' file otherwise."""

    def bad(folder: Path) -> Path:
        path = made(folder, kind)
        return edited(path, b"x.raw", named)

    return bad


def bad_twice(folder: Path) -> Path:
    """ITK takes the last, which a look at the first would not see."""
    return edited(made(folder, "mhd"), b"NDims", b"Comment = ElementDataFile = x.raw\nNDims")


def bad_axes(folder: Path) -> Path:
    """ITK ends the process over it."""
    path = folder / "x.nrrd"
    path.write_bytes(
        b"NRRD0004\ntype: uint8\ndimension: 16\nsizes: 4 4" + b" 1" * 14 + b"\nencoding: raw\n\n" + bytes(16)
    )
    return path


def bad_long_header(folder: Path) -> Path:
    return edited(made(folder, "nrrd"), b"type:", b"# " + b"x" * 2**20 + b"\ntype:")


def bad_words(folder: Path) -> Path:
    """Of which ITK would look for every one of 4 thousand million numbers."""
    path = edited(made(folder, "mha"), b"BinaryData = True", b"BinaryData = False")
    return edited(path, b"DimSize = 8 9 3", b"DimSize = 1290 1290 1290")


def bad_meta_unit(folder: Path) -> Path:
    return edited(made(folder, "mha"), b"ElementSpacing", b"DistanceUnits = cm\nElementSpacing")


def bad_axis_unit(folder: Path) -> Path:
    path = written(folder / "x.nrrd", image(voxels(8, 9, 3)))
    data = re.sub(
        rb"space directions:.*\nkinds:.*\n", b'spacings: .1 .1 .2\nunits: "cm" "cm" "cm"\n', path.read_bytes()
    )
    path.write_bytes(re.sub(rb"space( origin)?: .*\n", b"", data))
    return path


def changed(old: bytes, new: bytes) -> Callable[[Path], Path]:
    """A MetaImage with other words in its header."""
    return lambda folder: edited(written(folder / "x.mha", image(voxels(8, 9, 3))), old, new)


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "NRRD that ends early": (lambda folder: cut(made(folder, "nrrd")), "is truncated or damaged"),
    "MetaImage that ends early": (lambda folder: cut(made(folder, "mha")), "is truncated or damaged"),
    "packed that ends early": (
        lambda folder: cut(written(folder / "x.nrrd", image(voxels(8, 9, 3)), packed=True)),
        "is truncated or damaged",
    ),
    "no voxels' file": (bad_lost, r"has its voxels in .*x\.raw, which does not exist; copy it too"),
    "packed that is damaged": (bad_packed, r"is truncated or damaged \(Error -3 while decompressing"),
    "packed, its length unknown": (bad_length, "does not say how long its packed voxels are"),
    "a file that ends early": (bad_file, r"x\.raw holds less than the header of x\.mhd promises \(432 bytes of voxels\)"),
    "fewer files than slices": (bad_list, "names 2 files for the voxels of 3; correct the list"),
    "a pipe": (bad_pipe, "has its voxels in .*pipe, which is no file"),
    "a pipe for NRRD": (bad_nrrd_pipe, "has its voxels in .*pipe, which is no file"),
    "a pattern for C's printf": (naming("nhdr", b"%d%n%s 0 2 1"), "is no name with one number in it"),
    "another one": (naming("mhd", b"%s 0 2 1"), "is no name with one number in it"),
    "a wide one": (naming("nhdr", b"%999999999d 0 2 1"), "is no name with one number in it"),
    "files without end": (naming("mhd", b"%d 1 900000000 1"), "in 900000000 files, and at most 100000 are read"),
    "another folder's file": (naming("nhdr", b"/etc/passwd"), "has its voxels in /etc/passwd, outside its own folder"),
    "the same by another way": (naming("mhd", b"../x.raw"), r"has its voxels in .*\.\./x\.raw, outside its own folder"),
    "a list with another folder's file": (naming("nhdr", b"LIST\nx.raw\n/dev/zero"), "in /dev/zero, outside its own folder"),
    "a name that no file can have": (naming("mhd", b"x" * 5000), "which does not exist"),
    "voxels named twice": (bad_twice, "does not name its voxels once"),
    "MetaImage of axes without end": (changed(b"NDims = 3", b"NDims = 18446744073709551619"), "18446744073709551619 axes of 8 9 3 voxels"),
    "MetaImage without a size": (changed(b"DimSize = 8 9 3\n", b""), "its header: DimSize does not stand there once"),
    "MetaImage of two sizes": (changed(b"DimSize = 8 9 3\n", b"DimSize = 8 9 3\n" * 2), "DimSize does not stand there once"),
    "MetaImage of a size of zero": (changed(b"DimSize = 8 9 3", b"DimSize = 8 0 3"), "its header: 8 0 3 voxels"),
    "MetaImage of a size too few": (changed(b"DimSize = 8 9 3", b"DimSize = 8 9"), "3 axes of 8 9 voxels"),
    "MetaImage in another order": (
        changed(b"NDims = 3\n", b"Offset = 1 2 3\nNDims = 3\n"), "Offset stands before NDims, which says how long it is",
    ),
    "MetaImage whose last line is cut": (changed(b"= LOCAL\n", b"= LOCAL\0\1"), r"the voxels are in .LOCAL\\x00\\x01"),
    "axes without end": (bad_axes, "has 16 axes where 2-D or 3-D is meant"),
    "a header without end": (bad_long_header, "has a header of more than 1048576 bytes"),
    "fewer numbers in words": (bad_words, "holds less than the header of x.mha promises"),
    "MetaImage in centimetres": (bad_meta_unit, "gives its lengths in cm; save it in millimetres"),
    "centimetres without a space": (bad_axis_unit, "gives its lengths in cm; save it in millimetres"),
    "text": (bad_text, "is not a NRRD or MetaImage file that can be read"),
    "not a number": (bad_nan, r"holds 1 NaN or infinite values \(the first at \(1, 2, 0\)\)"),
    "no spacing": (bad_spacing, "spacing"),
    "centimetres": (bad_unit, "gives its lengths in cm; save it in millimetres"),
    "complex numbers": (bad_complex, "real numbers are needed"),
    "too large": (
        changed(b"DimSize = 8 9 3", b"DimSize = 90000 90000 3"),
        "claims 90000 x 90000 x 3 voxels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_in_one_line(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, message = BAD[what]
    with pytest.raises(CdiffError, match=message) as error:
        read_scan(make(tmp_path))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", ""), "ITK says nothing of its own"


def test_without_simpleitk_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, "nrrd")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(CdiffError, match=r"is NRRD or MetaImage, and SimpleITK, .* try: pip install '\.\[formats\]'"):
        read_scan(path)
