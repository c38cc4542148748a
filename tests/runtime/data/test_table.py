"""Tables of cases: what a row says, what contradicts itself, and which table or other layout of a folder is meant."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cdiff.runtime.data.case import is_output
from cdiff.runtime.data.cases import find_cases, read_case
from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.data.table import is_table, read_table
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.inputs import scans_at
from cdiff.runtime.scans.scan import read_scan
from tests.layouts import disc, save, write_qubiq, write_table


def test_a_table_of_one_row_a_case(tmp_path: Path) -> None:
    table = write_table(tmp_path, 4, raters=3, modalities=("t1", "t2"))
    text = table.read_text().replace("files/p1_m2.png", "")  # an annotator who never looked
    table.write_text("\ufeff" + text.replace(",", ";"), encoding="utf-8")
    found = find_cases(table)
    assert found == find_cases(tmp_path)
    table.write_text("\ufeffsep=;\r\n" + text.replace(",", ";"), encoding="utf-8")  # as Excel asks for it
    assert find_cases(tmp_path) == found
    assert (found.layout, found.modalities) == ("table", ("t1", "t2"))
    assert {split: [case.name for case in cases] for split, cases in found.items()} == {
        "train": ["p0", "p1", "p2"],
        "val": ["p3"],
    }
    assert found["train"][1].raters == ("1", "3")
    image, masks = read_case(found["train"][0], channels=2)
    assert image.shape == (1, 2, 32, 36)
    assert image.max() > 20_000
    np.testing.assert_array_equal(masks[0, 2], disc((32, 36), 0.6, 0))


def test_a_table_of_one_row_a_mask(tmp_path: Path) -> None:
    write_table(tmp_path, 2, raters=2)
    rows = [
        f"{i},{'pat' if i else 'tap'},files/p{i}.png,anna,files/p{i}_m1.png,34\n{i},,,ben,files/p{i}_m2.png,34"
        for i in (0, 1)
    ]
    long = tmp_path / "long.csv"
    long.write_text("Case,Patient,Image,Rater,Mask,age\n" + "\n".join(rows) + "\n")
    found = find_cases(long)
    assert [(case.name, case.raters, case.patient) for case in found["all"]] == [
        ("0", ("anna", "ben"), "tap"),
        ("1", ("anna", "ben"), "pat"),
    ]
    assert any("not used: age" in note for note in found.notes)
    with pytest.raises(CdiffError, match=r"in several ways: the table cases\.csv, the table long\.csv"):
        find_cases(tmp_path)


def test_names_may_hold_numbers_of_any_length(tmp_path: Path) -> None:
    """Python makes no whole number of more than 4300 digits."""
    long = "9" * 5000
    table = write_table(tmp_path, 2, raters=2)
    text = table.read_text().replace("mask1", f"mask1{long}").replace("mask2", "mask02")
    table.write_text(text.replace("p0,", f"p{long},"))
    found = find_cases(table)
    assert [case.name for cases in found.values() for case in cases] == [f"p{long}", "p1"]
    assert {case.raters for cases in found.values() for case in cases} == {("02", f"1{long}")}
    with pytest.raises(CdiffError, match=rf"has masks of the task '{long}'"):
        find_cases(table, long)


def test_annotators_go_by_a_sign_that_is_a_digit_and_no_number(tmp_path: Path) -> None:
    """As of a second reading: Python takes ² for a digit, and for no whole number."""
    table = tmp_path / "cases.csv"
    table.write_text("image,mask_10,mask_9,mask_²\na.png,ten.png,nine.png,again.png\n", encoding="utf-8")
    assert find_cases(table)["all"][0].raters == ("9", "10", "²")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,age\na.png,3\n", "columns image, age; the columns image"),
        ("image,mask,mask\nx.png,m.png,n.png\n", "has a second column mask; give each a name"),
        ("image,mask1,mask_1\nx.png,m.png,n.png\n", "has a second column mask_1"),
        ("image,Image,mask\nx.png,y.png,m.png\n", "has a second column Image"),
        ("case,image,mask,case\na,x.png,m.png,b\n", "has a second column case"),
        ("image,mask1\n", "names no case"),
        ("sep=|\ncase|image|mask1\na|x.png|m.png\na|x.png|n.png\n", "row 4 names the case a again"),
        ("case,image,mask1\na,x.png,m.png\na,x.png,n.png\n", "row 3 names the case a again"),
        ("image,mask1,split\nx.png,m.png,later\n", "row 2 has the split 'later'"),
        ("image,mask1,split\nx.png,m.png,train\ny.png,m.png,\n", r"split for some cases only \(none for y\)"),
        ("case,image_a,image_b,mask\nk,x.png,,m.png\n", "row 2, case k: image_b is empty"),
        ("case,image,rater,mask\nk,x.png,r,m.png\nk,,r,n.png\n", "row 3 gives a second mask of rater r"),
        (
            "case,image,rater,mask\nk,x.png,r,m.png\nk,y.png,s,n.png\n",
            "row 3 gives the case k another image or split",
        ),
        (
            "case,image,rater,mask,split\nk,x.png,r,m.png,train\nk,,s,n.png,val\n",
            "row 3 gives the case k another image or split",
        ),
        (
            "image,mask1\nx.png,m.png,\ny.png,m.png,n.png\n",
            "row 3 has n.png in column 3, which has no name in the first line",
        ),
        ("image,mask,,\nx.png,m.png,n.png,o.png\n", "row 2 has n.png in column 3, which has no name in the first line"),
        ("image,mask1,mask2\nx.png,m.png,\n\ny.png,m.png\n", "row 4 has 2 cells for 3 columns"),
        ("", "is empty"),
        (
            'image,mask1,note\nx.png,m.png,"large\ny.png,n.png,\n',
            r"t\.csv cannot be read .* from line 2 on .*quotation mark",
        ),
        ('image,mask1,note\nx.png,m.png,"large\ny.png,n.png,"small"\n', r"t\.csv cannot be read .* from line 2 on"),
    ],
)
def test_a_table_that_contradicts_itself_names_the_row(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "t.csv"
    table.write_text(text)
    with pytest.raises(CdiffError, match=message):
        find_cases(table)


def test_a_column_without_a_name_is_not_used(tmp_path: Path) -> None:
    """As a data frame's index is saved."""
    (tmp_path / "cases.csv").write_text(",image,mask1,mask2\n0,a.png,a1.png,a2.png\n1,b.png,b1.png,\n")
    found = find_cases(tmp_path)
    assert {case.name: case.raters for case in found["all"]} == {"a": ("1", "2"), "b": ("1",)}


def test_cases_go_by_their_images_names_where_these_tell_them_apart(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    for rows, names in (
        ("a/x.nii.gz,m.png\nb/y.nii.gz,n.png\n", ["x", "y"]),
        ("a/x.nii.gz,m.png\nb/x.nii.gz,n.png\n", ["a/x.nii.gz", "b/x.nii.gz"]),
    ):
        table.write_text("image,mask1\n" + rows)
        assert [entry.name for entry in read_table(table, [])] == names


def test_a_folders_only_table_says_why_it_is_none(tmp_path: Path) -> None:
    table = write_table(tmp_path, 2)
    text = table.read_text()
    table.write_text("\n\n" + text.replace(",", ";"))
    assert len(find_cases(tmp_path)["train"]) == 1
    table.write_bytes(text.replace("p0", "caf\u00e9").encode("utf-16"))
    with pytest.raises(CdiffError, match=r"cases\.csv is not UTF-8 text; save it as CSV UTF-8"):
        find_cases(tmp_path)
    table.write_bytes(text.encode("utf-16-le"))
    with pytest.raises(CdiffError, match=r"cases\.csv is not UTF-8 text; save it as CSV UTF-8"):
        find_cases(tmp_path)
    table.write_text('scan,outline\na.png,"b.png\n\n')
    with pytest.raises(CdiffError, match=r"cases\.csv has the columns scan, outline; the columns image"):
        find_cases(tmp_path)


def test_two_layouts_in_one_folder_have_to_be_chosen(tmp_path: Path) -> None:
    write_table(tmp_path, 2)
    write_qubiq(tmp_path, {"Training": 1})
    with pytest.raises(CdiffError, match="--layout"):
        find_cases(tmp_path)
    assert len(find_cases(tmp_path, layout="table")["train"]) == 1
    assert find_cases(tmp_path, layout="cases")["train"][0].name == "case01"
    with pytest.raises(CdiffError, match="no case in"):
        find_cases(tmp_path, layout="brats")
    with pytest.raises(CdiffError, match="'zip' is not known; use auto, cases, brats, table"):
        find_cases(tmp_path, layout="zip")
    assert len(find_cases(tmp_path / "cases.csv", layout="table")["train"]) == 1
    with pytest.raises(CdiffError, match=r"cases\.csv is a file; give a folder of case folders, or a table"):
        find_cases(tmp_path / "cases.csv", layout="cases")


def test_a_table_of_the_very_files_that_look_like_another_layout(tmp_path: Path) -> None:
    """The example of docs/own-data.md: its scans are called as BraTS's are."""
    rows = []
    for patient in ("p1", "p2"):
        files = [f"scans/{patient}_{name}.nii.gz" for name in ("t1", "flair")]
        files += [f"masks/{patient}_{name}.nii.gz" for name in ("anna", "ben")]
        for file in files:
            save(tmp_path / file, disc((16, 16)))
        rows.append(",".join((patient, *files)))
    table = tmp_path / "cases.csv"
    table.write_text("\n".join(("case,image_t1,image_flair,mask_anna,mask_ben", *rows)))
    assert find_cases(tmp_path) == find_cases(table)
    assert find_cases(tmp_path).layout == "table"
    loud = table.rename(tmp_path / "CASES.CSV")
    assert find_cases(tmp_path) == find_cases(loud)
    assert [scan.name for scan in scans_at(loud, 2)] == ["p1", "p2"]
    loud.rename(table)
    for more in ("", f"\n{rows[1]}\n{rows[1]}"):  # it leaves a case out, or contradicts itself
        table.write_text("\n".join(("case,image_t1,image_flair,mask_anna,mask_ben", rows[0])) + more)
        with pytest.raises(CdiffError, match=r"several ways: brats \(2 cases\), the table cases\.csv"):
            find_cases(tmp_path)


def test_another_table_in_the_folder_is_no_layout(tmp_path: Path) -> None:
    write_qubiq(tmp_path, {"Training": 1})
    (tmp_path / "patients.csv").write_text("patient,age\n1,70\n")
    (tmp_path / "outlines.csv").write_text(f'patient,polygon\n1,"{"1," * 70_000}"\n')  # beyond what Python's csv reads
    assert find_cases(tmp_path).layout == "cases"


def test_columns_called_as_images_that_name_no_scan_make_no_table(tmp_path: Path) -> None:
    """A register of the patients, beside case folders or a table; alone it is taken for the table that was meant."""
    register = "patient,image_date,mask_quality\n1,2020.03.01,good\n2,,poor\n"
    (tmp_path / "clinical.csv").write_text(register)
    with pytest.raises(CdiffError, match=r"clinical\.csv, row 3"):
        find_cases(tmp_path)
    write_qubiq(tmp_path / "one", {"Training": 2})
    write_table(tmp_path / "two", 2)
    for place, layout in (("one", "cases"), ("two", "table")):
        (tmp_path / place / "clinical.csv").write_text(register)
        assert find_cases(tmp_path / place).layout == layout


@pytest.mark.parametrize(("cell", "copied"), [("p1_m2", "p0_m1"), ("p1_m2", "p1_m1"), ("p1", "p0")])
def test_a_file_that_is_named_twice_is_told(tmp_path: Path, cell: str, copied: str) -> None:
    """As a row or a cell that was copied and not changed: a mask of another case, or of another annotator, and an image."""
    table = write_table(tmp_path, 3)
    assert find_cases(table).notes == []
    table.write_text(table.read_text().replace(f"/{cell}.png", f"/{copied}.png"))
    (note,) = find_cases(table).notes
    assert note.startswith(f"cases.csv names more than once: {tmp_path}/files/{copied}.png; an image is of one case")


def test_a_note_with_commas_is_no_mask(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text(",image,mask1,note\na.png,a.png,a1.png,large, round\nb.png,b.png,b1.png,,\n")
    assert [case.raters for case in find_cases(tmp_path)["all"]] == [("1",), ("1",)]


def test_quotation_marks_that_say_no_harm(tmp_path: Path) -> None:
    """A cell of two lines, an inch, words in quotation marks within a cell that has none or badly written ones."""
    rows = ['"a\nb",', '5" wide,', '"the "left" one",', '"x" ,', ",last"]
    table = tmp_path / "t.csv"
    table.write_text(
        "case,image,mask1,note,\n" + "".join(f"{i},x{i}.png,m{i}.png,{row}\n" for i, row in enumerate(rows))
    )
    assert [case.image.name for case in find_cases(table)["all"]] == [f"x{i}.png" for i in range(5)]


def test_a_name_with_a_character_that_no_file_has_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_bytes(b"case,image\na,a\0.png\n")
    with pytest.raises(CdiffError, match=r"cases\.csv is not UTF-8 text"):
        scans_at(tmp_path / "cases.csv")


def test_a_name_that_no_file_can_have_is_told_of_its_case(tmp_path: Path) -> None:
    """Asking whether a file of such a name is there raises before Python 3.14."""
    table = write_table(tmp_path, cases=3)
    long = "x" * 300
    text = table.read_text().replace("files/p0.png", f"files/{long}.png").replace("files/p1_m1.png", f"{long}.nii.gz")
    table.write_text(text)
    findings = [one["text"] for one in check_data(table).report["findings"] if one["severity"] == "error"]
    assert sum("cannot be read: File name too long" in text or "does not exist" in text for text in findings) == 2
    (scan, *_) = scans_at(table)
    with pytest.raises(CdiffError, match=r"cannot be read: File name too long|does not exist"):
        read_scan(scan.path)


def test_a_table_that_never_ends_or_begins_is_none(tmp_path: Path) -> None:
    """A folder of scans is looked through for tables."""
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "zeros.csv").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.csv", tmp_path / "zeros.csv"):
        assert not is_table(path)
        with pytest.raises(CdiffError, match="is a device or a pipe, not a file"):
            read_table(path, [])


def test_a_report_whose_map_could_have_no_name_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 246}.json"
    path.write_text("{}")
    assert not is_output(path)
