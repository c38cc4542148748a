"""What is not read of a folder of cases: left out and told, or refused because its names say two things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from cdiff.runtime.data.cases import find_cases, read_case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.inputs import scans_at
from tests.layouts import disc, save, write_qubiq


def test_links_to_files_that_were_not_fetched_are_named(tmp_path: Path) -> None:
    """As DataLad and git-annex leave them: the case and the annotator are there, and reading says what is missing."""
    write_qubiq(tmp_path, {"Training": 3})
    for path in sorted((tmp_path / "Training/case02").iterdir()):
        path.unlink()
        path.symlink_to(f"../../.git/annex/{path.name}")
    mask = tmp_path / "Training/case03/task01_seg02.nii.gz"
    mask.unlink()
    mask.symlink_to("../../.git/annex/x.nii.gz")
    cases = find_cases(tmp_path)["train"]
    assert [(case.name, len(case.masks)) for case in cases] == [("case01", 3), ("case02", 3), ("case03", 3)]
    for case, name in ((cases[1], "image"), (cases[2], "x")):
        with pytest.raises(CdiffError, match=rf"is a link to .*annex/{name}\.nii\.gz, which does not exist; fetch"):
            read_case(case)
    assert [scan.name for scan in scans_at(tmp_path / "Training")] == ["case01", "case02", "case03"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("image", "mask", "mask1"), r"mask\.png and mask1\.png in .*case01 are masks of one annotator; rename"),
        (("image", "mask_anna", "mask-anna"), r"mask-anna\.png and mask_anna\.png in .* are masks of one annotator"),
        (("image_p1", "image_p2", "mask_p1", "mask_p2"), r"several images with masks of their own \(image_p1, mask_p1"),
        (("image_p1", "image_p2", "mask_p1_A", "mask_p2_A", "mask_p2_B"), r"several images .*give each a folder"),
    ],
)
def test_names_that_say_two_things_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for case in ("case01", "case02"):
        (tmp_path / case).mkdir()
        for name in names if case == "case01" else ("image", "mask_anna"):
            Image.fromarray(disc((16, 16))).save(tmp_path / f"{case}/{name}.png")
    with pytest.raises(CdiffError, match=message):
        find_cases(tmp_path)
    with pytest.raises(CdiffError, match=rf"the case in .*case01 cannot be used: .*{message}"):
        find_cases(tmp_path / "case01", strict=False)
    assert [problem.case for problem in find_cases(tmp_path, strict=False).problems] == ["case01"]


def test_masks_called_after_one_modality_alone_or_kept_in_two_kinds(tmp_path: Path) -> None:
    for name in ("image_a", "image_b", "mask_a", "mask_ben"):
        save(tmp_path / f"case01/{name}.nii.gz", disc((16, 16)))
    Image.fromarray(disc((16, 16))).save(tmp_path / "case01/mask_ben.png")
    assert find_cases(tmp_path)["all"][0].raters == ("a", "ben")


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    root = write_qubiq(tmp_path, {"Training": 5}) / "Training"
    for case in ("case01", "case02"):
        save(root / case / "label_dora.nii.gz", disc((16, 16)))
    (root / "case02/image.png").write_bytes(b"a preview")
    (root / "case03/image.nii.gz").rename(root / "case03/scan.nii.gz")
    save(root / "anna/mask_anna.nii.gz", disc((16, 16)))
    save(root / "case06/scan.nii.gz", disc((16, 16)))
    write_qubiq(root / "case04/followup", {"": 1})
    (root / "case07").symlink_to(tmp_path / "a disk that is away")
    found = find_cases(tmp_path)
    assert [case.name for case in found["train"]] == ["case01", "case02", "case04", "case05"]
    assert found.notes == [
        f"{root / 'anna'} has masks but no image.nii.gz: left out",
        f"{root / 'case03'} has masks but no image.nii.gz: left out",
        "files beside those of a case, not used: label_dora.nii.gz (in 2 folders), image.png",
        "folders with scans that are not cases, left out: Training/case06",
        "folders of cases inside a case's folder, left out: Training/case04/followup",
        "links to files that do not exist, left out: Training/case07",
    ]


def test_a_folder_inside_a_case_that_cannot_be_listed_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (write_qubiq(tmp_path, {"Training": 2}) / "Training/case01/private").mkdir()
    listed = Path.iterdir

    def refused(self: Path) -> Iterator[Path]:
        if self.name == "private":
            raise PermissionError(13, "Permission denied")
        return iter(listed(self))

    monkeypatch.setattr(Path, "iterdir", refused)
    assert len(find_cases(tmp_path)["train"]) == 2


def test_an_image_without_masks_above_the_cases_does_not_hide_them(tmp_path: Path) -> None:
    write_qubiq(tmp_path, {"Training": 2, "Testing": 2})
    clean = find_cases(tmp_path)
    for place in (tmp_path, tmp_path / "Testing"):
        Image.fromarray(disc((16, 16))).save(place / "image.png")
    found = find_cases(tmp_path)
    assert found == clean
    assert found.notes == ["images without masks above folders of cases, left out: image.png, Testing/image.png"]


def test_outputs_and_pictures_of_the_data_set_are_not_told(tmp_path: Path) -> None:
    """What a check and a run of segment leave there, and what lies hidden."""
    root = write_qubiq(tmp_path, {"Training": 2}) / "Training"
    for folder, scan in ((root / "case01", "image"), (tmp_path / "maps", "case01")):
        for name in ("soft.nii.gz", "mask.nii.gz", "preview.png"):
            save(folder / f"{scan}_{name}.nii.gz", disc((16, 16))).rename(folder / f"{scan}_{name}")
        (folder / f"{scan}.json").write_text("{}")
    for path in (tmp_path / "my-data_sheet.png", root / "figure.png", root / "case02/._image.nii.gz"):
        path.write_bytes(b"a picture")
    assert find_cases(tmp_path).notes == []


def test_masks_of_another_structure_may_be_called_as_they_are(tmp_path: Path) -> None:
    write_qubiq(tmp_path, {"Training": 2})
    for name in ("mask", "mask1"):
        save(tmp_path / f"Training/case01/{name}.nii.gz", disc((32, 32, 1)))
    assert len(find_cases(tmp_path, "task01")["train"]) == 2
    with pytest.raises(CdiffError, match=r"mask.nii.gz and mask1.nii.gz in .* are both one annotator's mask"):
        find_cases(tmp_path, "mask")


def test_what_lies_there_in_place_of_cases_is_said(tmp_path: Path) -> None:
    """Archives that nobody unpacked, or not into folders, and masks of other names."""
    (tmp_path / "training_data_v3_QC.zip").write_bytes(b"PK")
    with pytest.raises(CdiffError, match=r"no case in .*; unpack training_data_v3_QC\.zip first$"):
        find_cases(tmp_path)
    # As some programs unpack an archive of Windows.
    (flat := tmp_path / r"Training\case01\image.nii.gz").write_bytes(b"")
    with pytest.raises(
        CdiffError, match=r"; Training\\case01\\image\.nii\.gz should lie in folders: unpack the archive"
    ):
        find_cases(tmp_path)
    flat.unlink()
    for case in ("case01", "case02"):
        for name in ("image", "annotation_1", "annotation_2"):
            save(tmp_path / case / f"{name}.nii.gz", disc((16, 16)))
    with pytest.raises(
        CdiffError, match=r"no mask task01_seg01.*; files beside those of a case, not used: annotation_1"
    ):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (("img",), r"if img\.nii\.gz is the image, rename it to that"),
        (("adc", "dwi"), r"rename the image among adc\.nii\.gz, dwi\.nii\.gz to that, or each modality to image_NAME"),
        ((), "add the image under that name"),
    ],
)
def test_cases_whose_images_have_another_name_are_said(tmp_path: Path, names: tuple[str, ...], remedy: str) -> None:
    root = write_qubiq(tmp_path, {"Training": 3}) / "Training"
    for case in root.iterdir():
        (case / "image.nii.gz").unlink()
        for name in names:
            save(case / f"{name}.nii.gz", disc((32, 32, 1)))
    text = rf"no case in .*; {root}/case01 has masks but no image\.nii\.gz \(nor have 2 more folders\): {remedy}$"
    with pytest.raises(CdiffError, match=text):
        find_cases(tmp_path)
