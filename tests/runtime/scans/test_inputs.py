"""Which scans a path names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.prepared import notes, prepare
from cdiff.runtime.scans.inputs import scans_at, scans_named
from cdiff.runtime.scans.scan import read_scan
from tests.runtime.test_manifest import example


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _names(path: Path) -> dict[str, str]:
    return {scan.name: scan.path.relative_to(path).as_posix() for scan in scans_at(path)}


def test_one_file_is_called_by_its_name(tmp_path: Path) -> None:
    for file, name in (("a.b.nii.gz", "a.b"), ("c.nii", "c"), ("d.PNG", "d"), ("e.txt", "e")):
        _touch(tmp_path / file)
        (scan,) = scans_at(tmp_path / file)
        assert (scan.name, scan.path) == (name, tmp_path / file)


def test_a_pipe_or_device_is_told_as_that(tmp_path: Path) -> None:
    """It was taken for a folder that could not be listed."""
    for name in ("pipe", "pipe.nii.gz"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "stdin").symlink_to("/dev/null")
    for name in ("pipe", "pipe.nii.gz", "stdin"):
        (scan,) = scans_at(tmp_path / name)
        with pytest.raises(CdiffError, match="is a device or a pipe, not a file"):
            read_scan(scan.path)


def test_a_folder_of_scans_and_cases(tmp_path: Path) -> None:
    _touch(tmp_path / "b.nii.gz", tmp_path / "a.png", tmp_path / "notes.txt", tmp_path / ".part-1.nii.gz")
    _touch(tmp_path / "case01/image.nii.gz", tmp_path / "case01/task01_seg01.nii.gz", tmp_path / "empty/readme")
    assert _names(tmp_path) == {"a": "a.png", "b": "b.nii.gz", "case01": "case01/image.nii.gz"}


def test_cases_in_a_folder_for_each_patient(tmp_path: Path) -> None:
    """As training takes them below a split folder; a split is not gone into unasked."""
    _touch(tmp_path / "p1/a/image.nii.gz", tmp_path / "p1/b/image.nii.gz", tmp_path / "p2/a/image.nii.gz")
    _touch(tmp_path / "p3/image.nii.gz", tmp_path / ".cache/a/image.nii.gz", tmp_path / "Training/c/image.nii.gz")
    assert list(_names(tmp_path)) == ["p1_a", "p1_b", "p2_a", "p3"]
    _touch(
        tmp_path / "p2/.trash/image.nii.gz",
        tmp_path / "q/r/s/t/u/image.nii.gz",
        tmp_path / "q/r/s/t/u1/v/w/x/y/image.nii.gz",
    )
    assert list(_names(tmp_path)) == ["p1_a", "p1_b", "p2_a", "p3", "q_r_s_t_u"], (
        "nothing hidden, and no deeper than eight folders"
    )


def test_a_folder_that_cannot_be_listed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By segmenting as by training, which look for cases in the same way."""
    _touch(tmp_path / "p1/a/image.nii.gz", tmp_path / "p2/a/image.nii.gz")
    listed = Path.iterdir

    def refused(self: Path) -> Iterator[Path]:
        if self.name == "p2":
            raise PermissionError(13, "Permission denied")
        return iter(listed(self))

    monkeypatch.setattr(Path, "iterdir", refused)
    for read in (scans_at, find_cases):
        with pytest.raises(CdiffError, match=r"p2 cannot be listed \(Permission denied\)"):
            read(tmp_path)


def test_a_folder_that_may_be_listed_and_not_entered_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path / "p1/a/image.nii.gz", tmp_path / "p2/a/image.nii.gz")
    see = os.stat

    def refused(path: Any, **how: Any) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/p2/"):
            raise PermissionError(13, "Permission denied")
        return see(path, **how)

    monkeypatch.setattr(os, "stat", refused)
    for read in (scans_at, find_cases):
        with pytest.raises(CdiffError, match=r"p2 cannot be listed \(Permission denied\)"):
            read(tmp_path)


def test_a_case_folder_is_one_scan(tmp_path: Path) -> None:
    _touch(tmp_path / "case07/image.nii", tmp_path / "case07/task01_seg01.nii.gz", tmp_path / "case07/task02_seg03.nii")
    assert _names(tmp_path / "case07") == {"case07": "image.nii"}


def test_outputs_in_the_folder_are_not_scans(tmp_path: Path) -> None:
    """Running twice with OUT in the scans' folder; a scan that merely ends like an output has no report beside it."""
    _touch(tmp_path / "a.nii.gz", tmp_path / "b_mask.nii.gz", tmp_path / "a.json")
    _touch(
        *(tmp_path / f"a_{kind}.nii.gz" for kind in ("soft", "levels", "uncertainty", "mask")),
        tmp_path / "a_preview.png",
    )
    assert list(_names(tmp_path)) == ["a", "b_mask"]


def test_two_scans_of_one_name_are_refused(tmp_path: Path) -> None:
    _touch(tmp_path / "a.nii.gz", tmp_path / "a.png")
    with pytest.raises(CdiffError, match="a_soft"):
        scans_at(tmp_path)
    _touch(tmp_path / "p/b.nii.gz", tmp_path / "q/b.nii.gz")
    with pytest.raises(CdiffError, match=r"p/b.nii.gz and .*/q/b.nii.gz would both write b_soft"):
        scans_named([tmp_path / "p", tmp_path / "q"])


def test_nothing_there_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CdiffError, match="does not exist"):
        scans_at(tmp_path / "nowhere")
    with pytest.raises(CdiffError, match=r"no scan in .*image\.nii\.gz"):
        scans_at(tmp_path)
    _touch(tmp_path / "Testing/case01/image.nii.gz")
    with pytest.raises(CdiffError, match=r"holds the split Testing; name .*Testing$"):
        scans_at(tmp_path)


def test_masks_named_with_their_image_are_no_scans(tmp_path: Path) -> None:
    """A shell's * in a case folder; without an image beside it a file called mask is what somebody wants segmented."""
    files = [tmp_path / name for name in ("image.nii.gz", "mask_anna.nii.gz", "mask2.nii.gz", "other.nii.gz")]
    _touch(*files, tmp_path / "b/masked.nii.gz")
    notes: list[str] = []
    found = scans_named([*files, tmp_path / "b/masked.nii.gz"], notes=notes)
    assert [scan.name for scan in found] == ["image", "other", "masked"]
    assert notes == ["mask_anna.nii.gz, mask2.nii.gz: left out, since their names say that they are masks or results"]
    assert [scan.name for scan in scans_named(files[1:3])] == ["mask_anna", "mask2"]


def test_results_beside_their_scan_are_none(tmp_path: Path) -> None:
    """A shell's * in a folder that was segmented into itself, or a folder in it: not its report, its page or its DICOM either."""
    own = [tmp_path / f"a{end}" for end in (".json", "_levels.dcm", "_page.html", "_preview.png", "_soft.nii.gz")]
    scan, other = tmp_path / "a.nii.gz", tmp_path / "b.json"
    _touch(*own, scan, other)
    notes: list[str] = []
    assert [found.path for found in scans_named([*own, scan], notes=notes)] == [scan]
    assert notes == [
        f"{', '.join(path.name for path in own)}: left out, since their names say that they are masks or results"
    ]
    assert [found.name for found in scans_named([scan, other])] == ["a", "b"]
    _touch(tmp_path / "maps/c.json", tmp_path / "maps/c_soft.nii.gz", tmp_path / "maps/.DS_Store")
    assert [found.path for found in scans_named([scan, tmp_path / "maps"])] == [scan]
    _touch(tmp_path / "both/c.json", tmp_path / "both/c_soft.nii.gz", tmp_path / "both/d.nii.gz")
    assert [found.name for found in scans_named([scan, tmp_path / "both"])] == ["a", "d"]
    with pytest.raises(CdiffError, match="no scan in"):
        scans_named([tmp_path / "maps"])


def test_folders_whose_scans_are_passed_over_are_told(tmp_path: Path) -> None:
    """A folder for each patient with a scan of any name in it: neither a case nor a scan of the folder that was named."""
    _touch(
        tmp_path / "p1/scan.nii.gz",
        tmp_path / "p2/t/a.png",
        tmp_path / "labels/mask_anna.png",
        tmp_path / "Testing/b.png",
    )
    with pytest.raises(CdiffError, match=r"holds the split Testing; name .*/Testing$"):
        scans_at(tmp_path)
    (tmp_path / "Testing/b.png").unlink()
    (tmp_path / "Testing").rmdir()
    with pytest.raises(
        CdiffError,
        match=r"^scans in folders below .* are taken only if called image\.nii\.gz; left out: p1, p2/t; name such a folder itself, or a table",
    ):
        scans_at(tmp_path)
    _touch(tmp_path / "own.nii.gz", tmp_path / "p3/image.nii.gz", tmp_path / "p3/thumbnail.png")
    _touch(tmp_path / "maps/own_soft.nii.gz", tmp_path / "maps/own.json", tmp_path / "p4/task01_seg01.nii.gz")
    _touch(tmp_path / "Testing/b.png")
    left: list[Path] = []
    assert [scan.name for scan in scans_at(tmp_path, left=left)] == ["own", "p3"]
    assert left == [tmp_path / "Testing", tmp_path / "p1", tmp_path / "p2/t"]


def test_splits_deeper_down_are_named_too(tmp_path: Path) -> None:
    """A benchmark's folder, which training and data check take with --task, holds its splits below each data set's."""
    _touch(tmp_path / "b/kidney/Validation/case01/image.nii.gz", tmp_path / "a/kidney/Training/case01/image.nii.gz")
    with pytest.raises(CdiffError, match=r"the splits a/kidney/Training, b/kidney/Validation; name one .*/Training$"):
        scans_at(tmp_path)


def test_splits_beside_the_scans_that_are_taken_are_told(tmp_path: Path) -> None:
    """As in QUBIQ 2021's training data, where the pancreas has no split folder and everything else has one."""
    places = ("pancreas/case1-1", "kidney/Training/case01", "prostate/Training/case01")
    _touch(*(tmp_path / place / "image.nii.gz" for place in places))
    (tmp_path / "empty/Testing").mkdir(parents=True)
    notes: list[str] = []
    assert [scan.name for scan in scans_named([tmp_path], notes=notes)] == ["pancreas_case1-1"]
    assert notes == [f"the splits kidney/Training, prostate/Training below {tmp_path} were left out; name one of them"]
    notes.clear()
    _touch(tmp_path / "kidney/p1/scan.nii.gz", tmp_path / "kidney/case02/image.nii.gz")
    scans_named([tmp_path / "kidney"], notes=notes)
    split, other = notes
    assert split == f"the split Training below {tmp_path / 'kidney'} was left out; name it"
    assert other.endswith("left out: p1; name such a folder itself, or a table")


def test_a_model_of_several_channels_takes_a_case_folders_files_as_one_scan(tmp_path: Path) -> None:
    _touch(*(tmp_path / f"case01/image_{name}.nii.gz" for name in ("t2", "t1")), tmp_path / "case01/mask_anna.nii.gz")
    for place in (tmp_path, tmp_path / "case01"):
        (scan,) = scans_at(place, channels=2)
        assert scan.name == "case01"
        assert scan.path == (tmp_path / "case01/image_t1.nii.gz", tmp_path / "case01/image_t2.nii.gz")
    (scan,) = scans_at(tmp_path, channels=2, modalities=("t2", "t1"))
    assert [path.name for path in scan.path if isinstance(scan.path, tuple)] == ["image_t2.nii.gz", "image_t1.nii.gz"]
    _touch(tmp_path / "case02/image.nii.gz", tmp_path / "mixed/image_t1.nii.gz", tmp_path / "mixed/image_t2.png")
    whole = next(scan for scan in scans_at(tmp_path, channels=2, modalities=("t2", "t1")) if scan.name == "case02")
    assert whole.path == tmp_path / "case02/image.nii.gz", "one file may hold them all"
    assert [scan.name for scan in scans_at(tmp_path / "mixed", channels=2)] == ["image_t1", "image_t2"]
    with pytest.raises(CdiffError, match=r"case01 has no flair \(it has t1, t2\); the model was trained on t1, flair"):
        scans_at(tmp_path, channels=2, modalities=("t1", "flair"))


def test_the_order_in_which_one_files_channels_are_taken_is_told(tmp_path: Path) -> None:
    """Files are put in the order of the training by their names, and one file of all has none."""
    for name, shape in (("all", (8, 8, 2, 2)), ("t1", (8, 8, 2)), ("t2", (8, 8, 2))):
        nib.save(nib.Nifti1Image(np.ones(shape, np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    one, two = tmp_path / "all.nii.gz", [tmp_path / "t2.nii.gz", tmp_path / "t1.nii.gz"]
    named = example(image_channels=2, training={"data": {"modalities": ["t2", "t1"]}})
    for scan, manifest, told in ((one, named, True), (two, named, False), (one, example(image_channels=2), False)):
        said = [
            note
            for note in notes(prepare(scan, manifest, None, None), manifest)
            if "taken as t2, t1, in the order of the training" in note
        ]
        assert len(said) == told
    with pytest.raises(CdiffError, match=r"the files are t1, t2, but the model was trained on t2, t1; give them"):
        prepare(two[::-1], named, None, None)


def test_brats_files_are_one_scan_for_four_channels_and_files_for_one(tmp_path: Path) -> None:
    names = [f"brats_train_006_{kind}_080_w.nii.gz" for kind in ("flair", "t1", "t1ce", "t2", "seg")]
    _touch(*(tmp_path / "000246" / name for name in names))
    (scan,) = scans_at(tmp_path, channels=4)
    assert scan.name == "000246"
    assert isinstance(scan.path, tuple)
    assert [path.name.split("_")[3] for path in scan.path] == ["t1", "t1ce", "t2", "flair"]
    assert len(scans_at(tmp_path / "000246")) == 5


def test_a_tables_images(tmp_path: Path) -> None:
    _touch(tmp_path / "a.png", tmp_path / "b.png", tmp_path / "cases.csv")
    (tmp_path / "cases.csv").write_text("image\na.png\nb.png\n")
    assert [(scan.name, scan.path) for scan in scans_at(tmp_path / "cases.csv")] == [
        ("a", tmp_path / "a.png"),
        ("b", tmp_path / "b.png"),
    ]


def test_a_tables_case_in_a_folder_writes_into_none(tmp_path: Path) -> None:
    _touch(tmp_path / "a.png")
    (tmp_path / "cases.csv").write_text("case,image\np1/scan2,a.png\n")
    assert [scan.name for scan in scans_at(tmp_path / "cases.csv")] == ["p1_scan2"]


def test_pictures_of_one_folder_stay_scans_of_their_own(tmp_path: Path) -> None:
    """Colour pictures that somebody numbered, or called image, are not the channels of one. What a Mac hides beside each is no picture."""
    _touch(*(tmp_path / f"numbered/image_{k:03d}.png" for k in (1, 2, 3)))
    _touch(tmp_path / "named/image.png", tmp_path / "named/image2.png")
    _touch(tmp_path / "case/image.png", tmp_path / "case/._image.png", tmp_path / "case/mask_anna.png")
    for channels in (1, 3):
        assert [scan.name for scan in scans_at(tmp_path / "numbered", channels)] == [
            "image_001",
            "image_002",
            "image_003",
        ]
        assert [scan.name for scan in scans_at(tmp_path / "named", channels)] == ["image", "image2"]
        assert [scan.name for scan in scans_at(tmp_path / "case", channels)] == ["case"]


def test_a_pictures_case_folder_is_a_case_whatever_else_lies_in_it(tmp_path: Path) -> None:
    """As for training: with masks beside it image.png is the scan, and so it is once its outputs lie there."""
    _touch(*(tmp_path / "marked" / name for name in ("image.png", "mask_anna.png", "thumbnail.png")))
    for name in ("plain", "both"):
        _touch(tmp_path / name / "image.png", tmp_path / f"{name}/{name}.json")
        _touch(tmp_path / f"{name}/{name}_soft.nii.gz", tmp_path / f"{name}/{name}_preview.png")
    _touch(tmp_path / "both/task01_seg01.png")
    wanted = {name: f"{name}/image.png" for name in ("both", "marked", "plain")}
    assert _names(tmp_path) == wanted
    for name in wanted:
        assert _names(tmp_path / name) == {name: "image.png"}


def test_another_picture_does_not_hide_a_case_in_a_folder_of_cases(tmp_path: Path) -> None:
    """Training reads such cases; but several images without masks are none."""
    for name in ("case01/image.png", "case02/image.png", "case02/sketch.png", "photos/image.png", "photos/image2.png"):
        _touch(tmp_path / name)
    assert _names(tmp_path) == {"case01": "case01/image.png", "case02": "case02/image.png"}
    assert _names(tmp_path / "case02") == {"image": "image.png", "sketch": "sketch.png"}


def test_other_volumes_beside_a_cases_image_are_no_scans(tmp_path: Path) -> None:
    """What a program left there is not segmented; to someone who named that very folder, it is told: one of many scans may be called image."""
    case = tmp_path / "case01"
    names = ("Image.NII.GZ", "image_t1.nii.gz", "registered.nii.gz", "a.png", "seg01.nii.gz", "mask_anna.nii.gz")
    _touch(*(case / name for name in (*names, "case01.json", "case01_soft.nii.gz")))
    for named, told in ((tmp_path, False), (case, True)):
        found: list[str] = []
        assert [scan.path for scan in scans_named([named], notes=found)] == [case / "Image.NII.GZ"]
        words = f"{case} is taken for a case folder, because of the image in it; files beside that, left out: "
        assert found == [f"{words}a.png, image_t1.nii.gz, registered.nii.gz; name such a file itself"] * told
    assert _names(tmp_path) == {"case01": "case01/Image.NII.GZ"}
    assert _names(case) == {"case01": "Image.NII.GZ"}


def test_a_lone_named_modality(tmp_path: Path) -> None:
    _touch(tmp_path / "case01/image_t1.nii.gz")
    (scan,) = scans_at(tmp_path, 1, ("t1",))
    assert (scan.name, scan.path) == ("case01", tmp_path / "case01/image_t1.nii.gz")
    assert [scan.name for scan in scans_at(tmp_path / "case01")] == ["image_t1"]
