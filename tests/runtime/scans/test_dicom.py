"""DICOM: every voxel at the millimetres that the standard's equation gives it, the maps that come of it, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcm2niix
import nibabel as nib
import numpy as np
import pydicom
import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.dicom import is_dicom
from cdiff.runtime.scans.inputs import scans_at
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.segmenter import Segmenter
from tests.runtime.dicom_files import converter, moved, orthogonal, write_series
from tests.runtime.scan_files import restored
from tests.runtime.test_segmenter import QUICK, make_bundle

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
WRITES_JPEG_LS = "needs pyjpegls to write JPEG-LS, which not every Python has a wheel of"


def scan_voxels(slices: int = 5) -> Any:
    return np.random.default_rng(3).integers(-1000, 1500, (24, 20, slices)).astype(np.int16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return Segmenter.open(make_bundle(tmp_path_factory.mktemp("dicom") / "tiny"))


@pytest.mark.parametrize("packed", [None, pydicom.uid.RLELossless, pydicom.uid.JPEGLSLossless])
def test_every_voxel_lies_where_the_standard_says(packed: Any, tmp_path: Path) -> None:
    """Voxel (i, j) of slice k at position + i * across * spacing + j * down * spacing (PS3.3, C.7.6.2.1.1), oblique, whatever the files' order."""
    if packed == pydicom.uid.JPEGLSLossless:
        pytest.importorskip("jpeg_ls", reason=WRITES_JPEG_LS)
    voxels, lps = scan_voxels(), orthogonal()
    change = None if packed is None else lambda _, file: file.compress(packed)
    scan = read_scan(write_series(tmp_path / "series", voxels, lps, change=change))
    assert scan.grid.header is not None
    affine = scan.grid.header.get_best_affine()
    ijk = np.stack(np.meshgrid(*map(np.arange, voxels.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    there = ijk @ lps[:, :3].T + lps[:, 3]
    found = np.linalg.solve(affine[:3, :3], (there @ LPS_TO_RAS).T - affine[:3, 3:]).T
    np.testing.assert_allclose(found, np.rint(found), atol=1e-3)
    at = tuple(np.rint(found).astype(int).T)
    stored = restored(scan.grid, scan.slices)[..., 0]
    np.testing.assert_array_equal(stored[at], voxels.reshape(-1))
    assert scan.grid.spacing == pytest.approx((0.7, 0.8, 2.5), rel=1e-5)
    assert scan.name == "series"
    assert scan.reader.startswith("dcm2niix v")
    assert scan.reader.endswith("series 3")


def test_maps_are_those_of_the_converted_file(model: Segmenter, tmp_path: Path) -> None:
    """And they lie on its grid; the report says what converted it, and holds nothing of the patient."""
    folder = write_series(tmp_path / "scan", scan_voxels(), orthogonal())
    subprocess.run([dcm2niix.bin, "-z", "n", "-f", "same", "-o", tmp_path, folder], check=True, capture_output=True)
    found, same = model.segment(folder, **QUICK), model.segment(tmp_path / "same.nii", **QUICK)
    np.testing.assert_array_equal(found.levels, same.levels)
    assert 0.01 < float(found.soft.mean()) < 0.99, "maps of nothing would not tell"
    report = found.save(tmp_path / "out")
    np.testing.assert_allclose(
        nib.load(tmp_path / "out/scan_soft.nii.gz").affine, nib.load(tmp_path / "same.nii").affine
    )
    assert report["input"]["reader"].startswith("dcm2niix")
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix == ".json")
    assert b"Doe" not in written
    assert b"20200102" not in written.replace(report["created"].encode(), b"")


def test_the_hash_is_of_every_file(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a", scan_voxels(), orthogonal())
    shutil.copytree(folder, tmp_path / "b")
    assert read_scan(folder).sha256 == read_scan(tmp_path / "b").sha256
    file = sorted((tmp_path / "b").iterdir())[-1]
    data = pydicom.dcmread(file)
    data.PixelData = bytes(len(data.PixelData))
    data.save_as(file)
    assert read_scan(folder).sha256 != read_scan(tmp_path / "b").sha256


def test_one_file_is_one_slice_of_its_series(tmp_path: Path) -> None:
    voxels = scan_voxels()
    folder = write_series(tmp_path / "a", voxels, orthogonal())
    file = (folder / "IM0014").rename(folder / "IM0014.dcm")  # slice 2
    scan = read_scan(file)
    assert scan.slices.shape == (1, 1, 24, 20)
    assert scan.name == "IM0014"
    np.testing.assert_array_equal(np.sort(scan.slices.ravel()), np.sort(voxels[:, :, 2].ravel()))


def test_a_series_of_several_is_named_by_its_number(tmp_path: Path) -> None:
    voxels = scan_voxels()
    folder = write_series(tmp_path / "study", voxels, orthogonal(), number=4, description="lung/1.25")
    other = write_series(tmp_path / "other", voxels[:, :, :2] - 1, orthogonal(), number=12, description="")
    for file in other.iterdir():
        shutil.copy(file, folder / f"B{file.name}")
    with pytest.raises(
        CdiffError, match=r"holds 2 DICOM series: 4 \(lung/1\.25, 5 images\), 12 \(2 images\); name one with --series"
    ):
        read_scan(folder)
    assert len(read_scan(folder, series=4).slices) == 5
    assert len(read_scan(folder, series=12).slices) == 2
    with pytest.raises(CdiffError, match=r"has no series 5; it holds 4 \(lung"):
        read_scan(folder, series=5)
    for file in write_series(tmp_path / "again", voxels[:, :, :2], orthogonal(), number=4).iterdir():
        shutil.copy(file, folder / f"C{file.name}")
    with pytest.raises(
        CdiffError,
        match=r"holds several series with the same number: 4 .*, 4 .*, 12 .*; give each series its own folder",
    ):
        read_scan(folder, series=4)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    for scan in (tmp_path / "a.nii", voxels):
        with pytest.raises(CdiffError, match="series 4 is for a DICOM folder"):
            read_scan(scan, series=4)


def test_one_series_good_and_another_uneven(tmp_path: Path) -> None:
    """Scouts are often uneven: that must not stop the volume beside them."""
    folder = write_series(tmp_path / "study", scan_voxels(), orthogonal(), number=4)
    uneven = write_series(tmp_path / "x", scan_voxels(), orthogonal(), number=1, keep=(0, 1, 4))
    for file in uneven.iterdir():
        shutil.copy(file, folder / f"B{file.name}")
    assert len(read_scan(folder, series=4).slices) == 5
    with pytest.raises(CdiffError, match="the distance between slices varies"):
        read_scan(folder, series=1)


def bad_gap(folder: Path) -> None:
    write_series(folder, scan_voxels(8), orthogonal(), keep=(0, 1, 2, 4, 5, 6, 7))


def bad_tilt(folder: Path) -> None:
    write_series(folder, scan_voxels(8), orthogonal(), change=lambda k, file: moved(file, (0, 0.8 * k, 0)))


def bad_time_points(folder: Path) -> None:
    up = orthogonal()[:, 2]
    write_series(folder, scan_voxels(8), orthogonal(), change=lambda k, file: moved(file, -(k - k // 2) * up))


def bad_empty(folder: Path) -> None:
    """The last slice, whose absence leaves no gap."""
    write_series(folder, scan_voxels(), orthogonal())
    (folder / "IM0028").write_bytes(b"")


def bad_short(folder: Path) -> None:
    write_series(folder, scan_voxels(), orthogonal())
    (folder / "IM0014").write_bytes((folder / "IM0014").read_bytes()[:-200])


def bad_no_image(folder: Path) -> None:
    folder.mkdir()
    (folder / "x.dcm").write_bytes(b"\0" * 128 + b"nothing")


def bad_report(folder: Path) -> None:
    def without_pixels(_: int, file: Any) -> None:
        file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = pydicom.uid.BasicTextSRStorage
        del file.Rows, file.PixelData

    write_series(folder, scan_voxels(1), orthogonal(), change=without_pixels)


def bad_header(folder: Path) -> None:
    """The last slice's, whose absence leaves no gap."""
    write_series(folder, scan_voxels(), orthogonal())
    (folder / "IM0028").write_bytes((folder / "IM0028").read_bytes()[:500])


def bad_zeros(folder: Path) -> None:
    """As a copy that was broken off may be: of full length."""
    write_series(folder, scan_voxels(), orthogonal())
    (folder / "IM0028").write_bytes(bytes((folder / "IM0028").stat().st_size))


def bad_link(folder: Path) -> None:
    write_series(folder, scan_voxels(), orthogonal())
    (folder / "IM0028").unlink()
    (folder / "IM0028").symlink_to("../annex/IM0028")


def bad_colours(folder: Path) -> None:
    write_series(folder, scan_voxels(1), orthogonal(), change=lambda _, file: in_colours(file))


def in_colours(file: Any) -> None:
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PlanarConfiguration = 3, "RGB", 0
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
    file.PixelData = bytes(file.Rows * file.Columns * 3)


def bad_signed_bytes(folder: Path) -> None:
    def signed(_: int, file: Any) -> None:
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 1
        file.PixelData = bytes(file.Rows * file.Columns)

    write_series(folder, scan_voxels(2), orthogonal(), change=signed)


def bad_codec(folder: Path) -> None:
    """One image's fragment ends early."""
    pytest.importorskip("jpeg_ls", reason=WRITES_JPEG_LS)

    def packed(k: int, file: Any) -> None:
        file.compress(pydicom.uid.JPEGLSLossless)
        if k == 2:
            whole = next(pydicom.encaps.generate_frames(file.PixelData))
            file.PixelData = pydicom.encaps.encapsulate([whole[: len(whole) // 2]])

    write_series(folder, scan_voxels(), orthogonal(), change=packed)


def bad_numberless(folder: Path) -> None:
    for name in ("a", "b"):
        part = write_series(
            folder.parent / name, scan_voxels(2), orthogonal(), change=lambda _, file: file.pop("SeriesNumber")
        )
        folder.mkdir(exist_ok=True)
        for file in part.iterdir():
            shutil.copy(file, folder / f"{name}{file.name}")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a slice is missing": (
        bad_gap,
        r"series 3 \(chest, 7 images\): the distance between slices varies: one may be missing",
    ),
    "a tilted gantry": (bad_tilt, "the gantry was tilted; convert it with dcm2niix"),
    "time points": (bad_time_points, r"is 4-D \(24 x 20 x 4 x 2\)"),
    "an empty file": (bad_empty, r"IM0028 is empty \(0 bytes\)"),
    "a file that ends early": (bad_short, "IM0014 holds 760 bytes of pixels where its header promises 960"),
    "no image": (bad_no_image, "is not a DICOM file that can be read"),
    "a header that ends early": (bad_header, r"IM0028 is truncated or damaged \(its DICOM header ends early\)"),
    "a file of zeros": (bad_zeros, "IM0028 is not a DICOM file that can be read"),
    "a link to nothing": (bad_link, r"IM0028 is a link to \.\./annex/IM0028, which does not exist"),
    "colours": (bad_colours, r"IM0000 is in colour \(RGB\), but only grey DICOM is read"),
    "signed bytes": (bad_signed_bytes, "IM0000 holds signed bytes"),
    "packed pixels that end early": (
        bad_codec,
        "IM0014 does not hold 1 whole compressed image of 20 x 24 pixels of 16 bits",
    ),
    "no pixels": (bad_report, "holds no DICOM image; name"),
    "no series number twice": (bad_numberless, "several series with the same number: without a number"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_one_even_volume_is_refused(what: str, tmp_path: Path) -> None:
    make, message = BAD[what]
    make(tmp_path / "bad")
    with pytest.raises(CdiffError, match=message) as error:
        read_scan(tmp_path / "bad")
    assert "\n" not in str(error.value)


def test_what_is_packed_as_a_whole_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pydicom would take gigabytes for a few megabytes, of a file that dcm2niix then does not read."""

    def deflated(k: int, file: Any) -> None:
        file.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian

    folder = write_series(tmp_path / "x", scan_voxels(), orthogonal(), change=deflated)

    def unpack(*_: object) -> bytes:
        raise AssertionError("it was unpacked")

    monkeypatch.setattr("zlib.decompress", unpack)
    with pytest.raises(CdiffError, match=r"x/IM\d+ is compressed as a whole .* inflate it: dcmconv \+te IN OUT"):
        read_scan(folder)


@pytest.mark.parametrize("package", ["dcm2niix", "pydicom"])
def test_without_its_readers_it_is_said_what_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_series(tmp_path / "a", scan_voxels(), orthogonal())
    monkeypatch.setitem(sys.modules, package, None)
    if package == "dcm2niix":  # nor one of the system's
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        CdiffError, match=rf"is DICOM, and {package}.* is not installed; try: pip install '\.\[formats\]'"
    ):
        read_scan(folder)


def test_a_converter_that_never_ends_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin/dcm2niix"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nwhile :; do :; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr("cdiff.runtime.scans.dicom.LONGEST", 0.6)
    folder = write_series(tmp_path / "a", scan_voxels(), orthogonal())
    with pytest.raises(CdiffError, match=r"dcm2niix did not finish within 0.01 minutes"):
        read_scan(folder)


def test_what_a_converter_made_before_it_crashed_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a whole file of a part of the images."""
    folder = write_series(tmp_path / "a", scan_voxels(), orthogonal())
    converter(tmp_path, "kill -SEGV $$", monkeypatch)
    with pytest.raises(CdiffError, match=r"a, series 3 .*: dcm2niix crashed \(signal 11\); look for damaged files"):
        read_scan(folder)


def test_a_folder_whose_files_cannot_be_read_is_a_scan_that_says_so(tmp_path: Path) -> None:
    """Left out of a folder's scans it would be missed by nobody."""
    good, bad = (write_series(tmp_path / "all" / name, scan_voxels(2), orthogonal()) for name in ("good", "bad"))
    for file in bad.iterdir():
        file.write_bytes(file.read_bytes()[:140])
    assert [scan.path for scan in scans_at(good.parent)] == [bad, good]
    with pytest.raises(CdiffError, match="header ends early"):
        read_scan(bad)


def test_folders_of_dicom_are_scans(tmp_path: Path) -> None:
    """A patient's series in folders of their own; an index of the disc and what lies beside are none; NIfTI of the same scan goes first."""
    root = tmp_path / "export"
    for name in ("p1/ct", "p1/mr", "p2/ct"):
        write_series(root / name, scan_voxels(2), orthogonal())
    (root / "p1/ct/thumb.png").touch()
    (root / "p2/ct/notes.txt").write_text("DICM")
    (root / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    nib.save(nib.Nifti1Image(scan_voxels(2), np.eye(4)), root / "one.nii.gz")
    assert [scan.name for scan in scans_at(root)] == ["one", "p1_ct", "p1_mr", "p2_ct"]
    (alone,) = scans_at(root / "p1/ct")
    assert (alone.name, alone.path) == ("ct", root / "p1/ct")
    nib.save(nib.Nifti1Image(scan_voxels(2), np.eye(4)), root / "p2/ct/converted.nii.gz")
    assert [scan.name for scan in scans_at(root / "p2/ct")] == ["converted"]
    for name in ("image.png", "mask_anna.png"):  # a case, as training takes it
        (root / "p1/mr" / name).touch()
    assert [scan.path for scan in scans_at(root / "p1/mr")] == [root / "p1/mr/image.png"]


def test_reports_and_our_own_segmentations_are_no_scans(model: Segmenter, tmp_path: Path) -> None:
    """Of an export: every one has folders of them, and a report may lie above the series."""
    root = tmp_path / "export"
    for name in ("p1/ct", "p1/mr"):
        write_series(root / name, scan_voxels(2), orthogonal())
    bad_report(root / "p1/dose")
    bad_report(root)
    model.segment(root / "p1/ct", **QUICK).save(root / "maps", dicom_seg=True)
    assert [scan.name for scan in scans_at(root)] == ["p1_ct", "p1_mr"]
    with pytest.raises(CdiffError, match=r"no scan in .*dose: expected"):
        scans_at(root / "p1/dose")


def test_series_below_a_series_are_told(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a", scan_voxels(2), orthogonal())
    for name in ("thick", ".trash"):
        write_series(folder / name, scan_voxels(2), orthogonal())
    bad_report(folder / "dose")
    scan = read_scan(folder)
    assert len(scan.slices) == 2
    (note,) = scan.warnings
    assert "were not read: thick; to read them, name those folders" in note


def test_a_file_is_dicom_by_its_mark_or_its_suffix_in_either_case(tmp_path: Path) -> None:
    for name, held in (("A.DCM", b"x"), ("a.dcm", b""), ("a", b"\0" * 128 + b"DICM")):
        (tmp_path / name).write_bytes(held)
        assert is_dicom(tmp_path / name)
    for name in ("DICOMDIR", "dicomdir", "A.PNG", "a.NII.gz"):
        (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM")
        assert not is_dicom(tmp_path / name)


def test_an_index_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(CdiffError, match="DICOMDIR lists what is on a disc and holds no image; name the folder"):
        read_scan(tmp_path / "DICOMDIR")


def test_maps_written_beside_the_files_do_not_hide_them(model: Segmenter, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "a", scan_voxels(2), orthogonal())
    model.segment(folder, **QUICK).save(folder)
    (again,) = scans_at(folder)
    assert again.path == folder
    assert read_scan(again.path).slices.shape[0] == 2
