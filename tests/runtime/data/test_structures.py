"""Which file and structure a mask's path names, where names hold the sign between them, slashes or numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdiff.runtime.data.structures import number_of, one_must_be_named, parted
from cdiff.runtime.errors import CdiffError


@pytest.mark.parametrize(
    ("named", "file", "name"),
    [
        ("a.dcm", "a.dcm", ""),
        ("a.dcm#x", "a.dcm", "x"),
        ("a.dcm#x#y", "a.dcm", "x#y"),
        ("a#b.dcm", "a#b.dcm", ""),
        ("a#b.dcm#x#y", "a#b.dcm", "x#y"),
        ("folder#2/a.dcm#x", "folder#2/a.dcm", "x"),
        ("a.dcm#1#z", "a.dcm#1", "z"),  # the longest beginning that is a file
        ("none.dcm#x", "none.dcm#x", ""),
        ("folder#2#x", "folder#2#x", ""),  # a folder is no file
    ],
)
def test_a_file_may_have_the_sign_in_its_name(named: str, file: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "folder#2").mkdir()
    for one in ("a.dcm", "a.dcm#1", "a#b.dcm", "folder#2/a.dcm"):
        (tmp_path / one).touch()
    assert parted(tmp_path / named) == (tmp_path / file, name)


def test_a_structure_goes_by_its_name_before_its_number() -> None:
    there = [(1, "2"), (2, "1"), (3, "left//lung"), (4, ""), (5, "twice"), (6, "twice")]
    for name, number in (("2", 1), ("1", 2), ("left/lung", 3), ("4", 4), ("6", 6)):
        assert number_of(name, Path("a.dcm"), there) == number
    with pytest.raises(CdiffError, match=r"several structures; name one by its number \(5, 6\)"):
        number_of("twice", Path("a.dcm"), there)
    for name in ("", "7", "Twice"):
        with pytest.raises(CdiffError, match="does not exist: the file holds"):
            number_of(name, Path("a.dcm"), there)


@pytest.mark.parametrize(
    ("there", "example"), [([(3, "a"), (4, "b")], "f#a"), ([(3, "a"), (4, "a")], "f#3"), ([(3, "a"), (4, "")], "f#3")]
)
def test_the_structure_that_a_message_names_can_be_named(there: list[tuple[int, str]], example: str) -> None:
    assert str(one_must_be_named(Path("f"), there, "has two")).endswith(f"such as {example}")
