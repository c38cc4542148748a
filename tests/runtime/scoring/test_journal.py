"""What an evaluation keeps beside its report while it works: killed anywhere, two at once, files that change meanwhile."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.data.cases import Case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scoring.changed import stamps_of, unchanged
from cdiff.runtime.scoring.evaluate import Protocol
from cdiff.runtime.scoring.journal import SEAL, Journal, fingerprint, sealed
from cdiff.runtime.scoring.publish import write_report
from tests.runtime.known_maps import KnownMaps, run, without_seconds


def test_two_evaluations_do_not_share_a_journal(cases: list[Case], tmp_path: Path) -> None:
    """The rows of one would be the other's when that is gone on with."""
    out, partial = tmp_path / "scores.json", tmp_path / "scores.partial.jsonl"
    refused: list[str] = []

    def another(done: int, total: int) -> None:
        before = partial.read_bytes()
        with pytest.raises(CdiffError, match="is being written by another evaluation") as caught:
            run(KnownMaps(tmp_path / "other", 3), cases, Protocol(seed=1), out=out)
        refused.append(str(caught.value))
        assert partial.read_bytes() == before
        run(KnownMaps(tmp_path / "other", 3), cases[:1], Protocol(seed=1), out=tmp_path / "beside.json")

    report = run(KnownMaps(tmp_path / "b", 3), cases[:2], out=out, progress=another)
    assert refused
    assert json.loads(out.read_text()) == report
    assert not list(tmp_path.glob("*.jsonl*"))


def test_a_journal_that_is_renamed_or_removed_meanwhile_is_not_the_one_that_is_held(tmp_path: Path) -> None:
    for away in (os.remove, lambda path: os.rename(path, f"{path}.old")):
        with Journal(tmp_path / "a.json", {}, ("inputs",), [], lambda line: None) as first:
            away(first.path)
            with Journal(tmp_path / "a.json", {}, ("inputs",), [], lambda line: None) as second:
                second.add({"inputs": "x"})
                assert json.loads(second.path.read_text().splitlines()[1]) == {"inputs": "x"}
                second.remove()


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some of a cluster: better without a lock than not at all."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("cdiff.runtime.scoring.journal.fcntl.flock", none)
    must_keep_a_row(tmp_path / "a.json")


def test_a_header_that_a_kill_cut_off_gives_way_to_a_whole_one(tmp_path: Path) -> None:
    """Behind what is left of it nothing would be found again."""
    (tmp_path / "a.partial.jsonl").write_text('{"see')
    must_keep_a_row(tmp_path / "a.json")


def must_keep_a_row(report: Path) -> None:
    row = sealed({"inputs": "a"}, fingerprint({}))
    for known in ({}, {"a": row}):
        with Journal(report, {}, ("inputs", SEAL), ["a"], lambda line: None) as journal:
            assert journal.rows == known
            journal.add(row)


def test_a_journal_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    """Whoever may write everywhere opens any file, but no folder."""
    (tmp_path / "a.partial.jsonl").mkdir()
    with pytest.raises(CdiffError, match=r"^cannot write to .*a\.partial\.jsonl: is a directory; check the space and"):
        Journal(tmp_path / "a.json", {}, ("inputs",), [], print)


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_while_the_report_is_put_in_place_no_case_is_lost(
    cases: list[Case], tmp_path: Path, replaced: bool
) -> None:
    """Over an older report of the same, which gives way first: its cases are hours of work."""
    out = tmp_path / "report" / "scores.json"
    known = cases if replaced else cases[:3]
    whole = run(KnownMaps(tmp_path / "b", 3, shift=1), cases)
    run(KnownMaps(tmp_path / "b", 3, shift=1), known, out=out, write=write_report)

    def killed(path: Path, report: dict[str, Any]) -> None:
        path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        run(KnownMaps(tmp_path / "b", 3, shift=1), cases, out=out, write=killed)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    rest = KnownMaps(tmp_path / "b", 3, shift=1)
    assert without_seconds(run(rest, cases, out=out, write=write_report)) == without_seconds(whole)
    assert rest.asked == []


@pytest.mark.parametrize("change", ["other values", "fewer slices", "cut off", "removed"])
@pytest.mark.parametrize("file", ["image", "mask"])
def test_a_case_that_changes_while_it_is_scored_is_one_line(
    cases: list[Case], tmp_path: Path, change: str, file: str
) -> None:
    out, path = tmp_path / "scores.json", cases[1].image if file == "image" else cases[1].masks[0]
    kept = path.read_bytes()

    def replace(done: int, total: int) -> None:
        """When the first case is done, which is after all masks were read."""
        if change == "removed":
            path.unlink(missing_ok=True)
        elif change == "cut off":
            path.write_bytes(kept[: len(kept) // 2])
        elif path.read_bytes() == kept:
            image = nib.load(path)
            voxels = np.asanyarray(image.dataobj)
            voxels = 1 - voxels if change == "other values" else voxels[..., :2]
            nib.save(nib.Nifti1Image(voxels.astype(np.uint8), image.affine), path)

    with pytest.raises(CdiffError, match=f"^{cases[1].name}: {path} has changed since the evaluation began") as caught:
        run(KnownMaps(tmp_path / "b", 3), cases, out=out, progress=replace)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    path.write_bytes(kept)
    rest = KnownMaps(tmp_path / "b", 3)
    assert run(rest, cases, out=out)["n_cases"] == 4
    assert [name for name, _ in rest.asked] == [case.name for case in cases[1:]]


@pytest.mark.parametrize("file", ["scan/2.dcm", "scan/3.dcm", "mask.raw", "mask.mhd"])
def test_a_file_of_a_folder_or_that_a_header_names_counts_too(tmp_path: Path, file: str) -> None:
    """A slice of a DICOM series, one that comes in addition, and the voxels of a MetaImage, whose header stays as it is."""
    (tmp_path / "scan").mkdir()
    for name in ("scan/1.dcm", "scan/2.dcm", "mask.raw", "beside.raw"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "mask.mhd").write_text(
        "ObjectType = Image\nNDims = 2\nDimSize = 3 1\nElementType = MET_UCHAR\nElementDataFile = mask.raw\n"
    )
    case = Case("a", tmp_path / "scan", (tmp_path / "mask.mhd",))
    other = tmp_path / "beside.raw"  # a modality that the model does not take
    stamps = stamps_of(dataclasses.replace(case, others=(other,)))
    other.write_bytes(b"newer")
    with unchanged(case, stamps):
        pass
    (tmp_path / file).write_bytes(b"newer")
    said = f"^a: {tmp_path / file} has changed"
    with pytest.raises(CdiffError, match=said), unchanged(case, stamps):
        pass
    with pytest.raises(CdiffError, match=said), unchanged(case, stamps):
        raise ValueError("of reading old and new together")
    with pytest.raises(ValueError, match="its own"), unchanged(case, stamps_of(case)):
        raise ValueError("its own")


@pytest.mark.parametrize("file", ["scores.json", "scores.partial.jsonl"])
@pytest.mark.parametrize("damage", ["a digit", "no scores", "too deep", "of another model", "no case"])
def test_cases_that_are_not_as_they_were_written_are_computed_anew(
    cases: list[Case], tmp_path: Path, file: str, damage: str
) -> None:
    """A wrong digit is a number like any other: nothing else would tell that a score is wrong."""
    out, partial = tmp_path / "scores.json", tmp_path / "scores.partial.jsonl"
    whole = without_seconds(run(KnownMaps(tmp_path / "b", 3, shift=1), cases[:2], out=out))
    other = run(KnownMaps(tmp_path / "other", 3, shift=2), cases[:1], out=tmp_path / "other.json")
    report = json.loads(out.read_text())
    first = report["cases"][0]
    if damage == "a digit":
        first["slices"][0]["ged"] += 0.1
    elif damage == "no scores":
        del first["slices"]
    elif damage == "too deep":
        first["chain"] = json.loads("[" * 900 + "]" * 900)
    else:
        report["cases"][0] = other["cases"][0] if damage == "of another model" else 3
    if file == out.name:
        out.write_text(json.dumps(report))
    else:
        out.unlink()
        with pytest.raises(KeyboardInterrupt):
            run(KnownMaps(tmp_path / "b", 3, shift=1, stop_after=0), cases[:2], out=out)
        with partial.open("a") as journal:
            journal.writelines(f"{json.dumps(row)}\n" for row in report["cases"])
    again, told = KnownMaps(tmp_path / "b", 3, shift=1), list[str]()
    assert without_seconds(run(again, cases[:2], out=out, notice=told.append)) == whole
    assert [name for name, _ in again.asked] == [cases[0].name]
    assert told[0] == f"{tmp_path / file}: 1 case in it damaged or of another evaluation, so not used"


@pytest.mark.parametrize("left", [0, 1, 20], ids=["whole", "no newline", "half a row"])
def test_what_a_kill_cut_off_is_not_joined_to_the_next_row(tmp_path: Path, left: int) -> None:
    """A row without its newline is whole JSON, but what is appended to it would make one line of both."""
    header, told = {"seed": 0}, list[str]()
    one, two, three = (sealed({"inputs": name, "dice": 0.5}, fingerprint(header)) for name in ("a", "b", "c"))

    def journal(*asked: str) -> Journal:
        return Journal(tmp_path / "scores.json", header, ("inputs", "dice", SEAL), asked, told.append)

    for _ in range(2):
        with journal("a", "b"):
            assert told == [], "there is nothing to go on from"
    with journal("a", "b") as first:
        first.add(one)
        first.add(two)
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[: len(whole) - left])
    kept = {"a": one} if left else {"a": one, "b": two}
    with journal("a", "b", "c") as second:
        assert second.rows == kept
        second.add(three)
    lines = second.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [header, *kept.values(), three]
    count = "1 finished case" if left else "2 finished cases"
    assert told == [f"{first.path} has {count} of an interrupted evaluation: going on from there"]
