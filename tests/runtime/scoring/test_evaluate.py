"""Evaluation with a segmenter whose maps are known: what is scored, what is left out, and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.data.cases import Case
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.scan import Scan, read_scan
from cdiff.runtime.scoring.choice import choose_split, labelled_as_trained
from cdiff.runtime.scoring.evaluate import FORMAT, Protocol, case_sha256
from cdiff.runtime.scoring.scores import evenly, marked_slices
from tests.runtime.known_maps import KnownMaps, case_in, run, without_seconds
from tests.runtime.test_manifest import example


def test_long_scans_are_segmented_part_by_part(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for two slices' runs: four slices come in two parts, and every score is the same."""
    whole = run(KnownMaps(tmp_path / "b", 3, shift=1), cases)
    monkeypatch.setattr("cdiff.runtime.scoring.evaluate.RUNS_AT_ONCE", 2 * 3 * 2 * 24 * 20)
    segmenter = KnownMaps(tmp_path / "b", 3, shift=1)
    seen: list[int] = []
    parts = run(segmenter, cases, progress=lambda done, total: seen.append(done))
    assert segmenter.asked[:2] == [("case01", slice(0, 2)), ("case01", slice(2, 4))]
    assert without_seconds(parts) == without_seconds(whole)
    assert seen == sorted(seen)
    assert seen[-1] == 16_000


def test_a_finished_report_is_not_computed_again(cases: list[Case], tmp_path: Path) -> None:
    """The same command again: only a case that is new, or was edited, is; another protocol computes everything."""
    out, told = tmp_path / "scores.json", list[str]()
    first = run(KnownMaps(tmp_path / "b", 3, shift=1), cases[:3], out=out)
    again = KnownMaps(tmp_path / "b", 3, shift=1)
    second = run(again, cases, out=out, notice=told.append, group="case0[1-4]")
    assert [name for name, _ in again.asked] == ["case04"]
    assert "3 cases are not computed again" in told[0]
    assert [case["slices"] for case in second["cases"][:3]] == [case["slices"] for case in first["cases"]]
    told.clear()
    run(again, cases[:1], out=out, notice=told.append)
    assert len(again.asked) == 1
    assert "1 of its 4 cases is not computed again; the others were not asked for" in told[0]
    told.clear()
    run(again, cases[:1], out=out, notice=told.append)
    assert told[0].endswith(": its 1 case is not computed again")
    other = KnownMaps(tmp_path / "b", 3, shift=1)
    run(other, cases, Protocol(seed=1), out=out)
    assert len(other.asked) == 4


def test_rows_that_name_no_files_are_no_cases_computed_before(cases: list[Case], tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    first = run(KnownMaps(tmp_path / "b", 3), cases[:2], out=out)
    for damaged in (7, [{**first["cases"][0], "inputs": [1]}, 3]):
        out.write_text(json.dumps(first | {"cases": damaged}))
        again = KnownMaps(tmp_path / "b", 3)
        assert without_seconds(run(again, cases[:2], out=out)) == without_seconds(first)
        assert len(again.asked) == 2


def test_a_case_of_any_name_is_gone_on_from(cases: list[Case], tmp_path: Path) -> None:
    """U+2028 ends a line to some readers, and is a letter of a file's name."""
    out, named = tmp_path / "scores.json", [replace(case, name=f"a\u2028{case.name}") for case in cases]
    with pytest.raises(KeyboardInterrupt):
        run(KnownMaps(tmp_path / "b", 3, stop_after=2), named, out=out)
    rest = KnownMaps(tmp_path / "b", 3)
    assert run(rest, named, out=out)["cases"][0]["case"] == named[0].name
    assert len(rest.asked) == 2


@pytest.mark.parametrize(
    "damage", ["other format", "a row without its scores", "not an object", "not JSON", "not ended"]
)
def test_a_journal_of_another_shape_is_not_used(cases: list[Case], tmp_path: Path, damage: str) -> None:
    out, partial = tmp_path / "scores.json", tmp_path / "scores.partial.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(KnownMaps(tmp_path / "b", 3, stop_after=2), cases, out=out)
    lines = partial.read_text().splitlines()
    header, row = json.loads(lines[0]), json.loads(lines[1])
    if damage == "other format":
        del header["format"]
    elif damage == "a row without its scores":
        del row["by_runs"]
    lines[:2] = [json.dumps(header), json.dumps(row)]
    if damage.startswith("not"):
        lines[0] = {"not an object": "[1, 2]", "not JSON": "{", "not ended": "[" * 100_000}[damage]
        out.write_text(lines[0])
    partial.write_text("\n".join(lines) + "\n")
    rest, told = KnownMaps(tmp_path / "b", 3), list[str]()
    report = run(rest, cases, out=out, notice=told.append)
    assert report["n_cases"] == 4
    computed = {"other format": 4, "a row without its scores": 3, "not an object": 4, "not JSON": 4, "not ended": 4}[
        damage
    ]
    assert len(rest.asked) == computed
    if damage == "other format":
        assert f"format none (now {FORMAT})" in told[0]
        assert (tmp_path / "scores.partial.jsonl.old").exists()
    if damage in ("not JSON", "not ended"):  # the report is lost, and its cases are computed anew: that is said
        assert told[0] == f"{out} exists but cannot be read as a report: this evaluation will replace it"


def test_a_report_that_would_be_called_as_a_folder_is_refused_before_the_work(
    cases: list[Case], tmp_path: Path
) -> None:
    (tmp_path / "scores.json").mkdir()
    segmenter = KnownMaps(tmp_path / "b", 3)
    with pytest.raises(CdiffError, match=r"scores\.json is a folder; name a file for the report"):
        run(segmenter, cases, out=tmp_path / "scores.json")
    assert not segmenter.asked


def test_only_marked_slices_are_scored_and_computed(cases: list[Case], tmp_path: Path) -> None:
    """Case 1: nobody marked slice 0 or 3. `all_raters` leaves slice 3 of the others out."""
    for path in cases[0].masks:
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj).copy()
        voxels[..., [0, 3]] = 0
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
    segmenter = KnownMaps(tmp_path / "b", 3)
    report = run(segmenter, cases)
    assert report["n_slices"] == 14
    assert segmenter.asked[0] == ("case01", slice(1, 3))
    assert [s["slice"] for s in report["cases"][0]["slices"]] == [1, 2]
    assert report["soft_dice_5"]["mean"] == 1

    strict = run(KnownMaps(tmp_path / "b", 3), cases, Protocol(all_raters=True))
    assert [len(case["slices"]) for case in strict["cases"]] == [2, 3, 3, 3]


def test_marked_slices() -> None:
    masks = np.zeros((3, 2, 4, 4), dtype=bool)
    masks[1, 0, 0, 0] = masks[2, :, 1, 1] = True
    assert marked_slices(masks, all_raters=False).tolist() == [1, 2]
    assert marked_slices(masks, all_raters=True).tolist() == [2]


def test_a_sample_of_each_case(cases: list[Case], tmp_path: Path) -> None:
    """One slice of four is the third, two are the second and the last; nothing else is computed, and the scores are those slices' own."""
    whole = run(KnownMaps(tmp_path / "b", 3, shift=1), cases)
    segmenter, seen = KnownMaps(tmp_path / "b", 3, shift=1), list[int]()
    one = run(segmenter, cases, Protocol(slices_per_case=1), progress=lambda done, total: seen.append(done))
    assert segmenter.asked == [(case.name, slice(2, 3)) for case in cases]
    assert [case["slices"] for case in one["cases"]] == [case["slices"][2:3] for case in whole["cases"]]
    assert one["n_slices"] == 4
    assert seen == sorted(seen)
    assert seen[-1] == 4000

    segmenter = KnownMaps(tmp_path / "b", 3, shift=1)
    two = run(segmenter, cases, Protocol(slices_per_case=2))
    assert segmenter.asked[:2] == [("case01", slice(1, 2)), ("case01", slice(3, 4))]
    assert [case["slices"] for case in two["cases"]] == [case["slices"][1::2] for case in whole["cases"]]
    with pytest.raises(CdiffError, match="slices_per_case 0"):
        run(segmenter, cases, Protocol(slices_per_case=0))


def test_a_scan_is_read_once_for_all_its_parts(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(scan: Path, **options: int) -> Scan:
        read.append(scan)
        return read_scan(scan, **options)

    monkeypatch.setattr("cdiff.runtime.scoring.evaluate.read_scan", counted)
    segmenter = KnownMaps(tmp_path / "b", 3)
    run(segmenter, cases, Protocol(slices_per_case=2))
    assert len(segmenter.asked) == 2 * len(cases)
    assert read == [case.image for case in cases]


def test_a_gap_between_marked_slices_is_not_computed(cases: list[Case], tmp_path: Path) -> None:
    for path in cases[0].masks:
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj).copy()
        voxels[..., 1] = 0
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
    segmenter = KnownMaps(tmp_path / "b", 3)
    report = run(segmenter, cases[:1])
    assert segmenter.asked == [("case01", slice(0, 1)), ("case01", slice(2, 4))]
    assert [row["slice"] for row in report["cases"][0]["slices"]] == [0, 2, 3]


@pytest.mark.parametrize(("count", "most"), [(1, 1), (7, 3), (8, 8), (5, 9), (200, 7)])
def test_slices_are_taken_evenly(count: int, most: int) -> None:
    slices = 3 + 2 * np.arange(count)
    taken = evenly(slices, most)
    assert len(taken) == min(count, most)
    assert set(taken) <= set(slices)
    places = (taken - 3) // 2
    gaps = np.diff([-1 - places[0], *places, 2 * count - places[-1]])  # the ends are mirrored: half a gap each
    assert gaps.max() - gaps.min() <= 2
    assert evenly(slices, None) is slices


def test_a_case_with_fewer_annotators_is_told_and_handled_as_chosen(cases: list[Case], tmp_path: Path) -> None:
    cases[1].masks[2].unlink()
    cases = [case_in(case.image.parent) for case in cases]
    told: list[str] = []
    skipped = run(KnownMaps(tmp_path / "b", 3), cases, notice=told.append)
    assert skipped["n_cases"] == 3
    assert skipped["left_out"]["other_number_of_annotators"] == {"case02": 2}
    assert "case02" in told[0]
    assert "2 annotators, but the model has 3 levels; left out" in told[0]

    told.clear()
    used = run(KnownMaps(tmp_path / "b", 3), cases, Protocol(raters="use"), notice=told.append)
    assert used["n_cases"] == 4
    assert used["cases"][1]["annotators"] == 2
    assert used["left_out"] == {"other_number_of_annotators": {}, "no_marked_slice": []}
    # Two annotators' 0, 1/2, 1 is not what three levels can say exactly, but the levels are compared like with like.
    assert all(entry["mean"] == 1 for entry in used["dice_per_level"])
    assert "share c/3" in told[0]


def test_no_case_left_says_what_to_do(cases: list[Case], tmp_path: Path) -> None:
    with pytest.raises(
        CdiffError,
        match=r"number of annotators differs from the model's 5 levels in 4 cases, and no slice is marked in 0 cases; .*--raters use",
    ):
        run(KnownMaps(tmp_path / "b", 5), cases)


def test_an_unreadable_mask_stops_before_any_work(cases: list[Case], tmp_path: Path) -> None:
    cases[3].masks[0].write_bytes(b"not a NIfTI file")
    segmenter = KnownMaps(tmp_path / "b", 3)
    with pytest.raises(CdiffError, match="task01_seg01"):
        run(segmenter, cases)
    assert segmenter.asked == []


def test_progress_reaches_the_end_and_never_goes_back(cases: list[Case], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(KnownMaps(tmp_path / "b", 3), cases, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (16_000, 16_000)
    assert len(seen) == 8


def test_an_interrupted_evaluation_goes_on(cases: list[Case], tmp_path: Path) -> None:
    whole = run(KnownMaps(tmp_path / "b", 3, shift=1), cases)
    out, partial = tmp_path / "scores.json", tmp_path / "scores.partial.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(KnownMaps(tmp_path / "b", 3, shift=1, stop_after=2), cases, out=out)
    assert not out.exists()
    with partial.open("a") as file:
        file.write('{"case": "case03", "inpu')  # what a kill in the middle of a line leaves

    rest = KnownMaps(tmp_path / "b", 3, shift=1)
    told: list[str] = []
    report = run(rest, cases, out=out, notice=told.append)
    assert [name for name, _ in rest.asked] == ["case03", "case04"]
    assert "2 finished cases" in told[0]
    assert without_seconds(report) == without_seconds(whole)
    assert json.loads(out.read_text()) == report
    assert not partial.exists()


@pytest.mark.parametrize("changed", ["seed", "model", "case"])
def test_rows_of_something_else_are_not_used(cases: list[Case], tmp_path: Path, changed: str) -> None:
    out = tmp_path / "scores.json"
    with pytest.raises(KeyboardInterrupt):
        run(KnownMaps(tmp_path / "b", 3, stop_after=3), cases, out=out)
    if changed == "case":
        image = nib.load(cases[1].image)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj) + 1, image.affine), cases[1].image)
    rest = KnownMaps(tmp_path / "b", 3, shift=int(changed == "model"))
    told: list[str] = []
    run(rest, cases, Protocol(seed=int(changed == "seed")), out=out, notice=told.append)
    if changed == "case":
        assert [name for name, _ in rest.asked] == ["case02", "case04"]
    else:
        assert len(rest.asked) == 4
        assert {"seed": "seed 0 (now 1)", "model": "bundle_sha256"}[changed] in told[0]
        assert (tmp_path / "scores.partial.jsonl.old").exists()


def test_a_journal_that_cannot_be_set_aside_is_an_error_in_one_line(cases: list[Case], tmp_path: Path) -> None:
    out, partial = tmp_path / "scores.json", tmp_path / "scores.partial.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(KnownMaps(tmp_path / "b", 3, stop_after=1), cases, out=out)
    before = partial.read_bytes()
    (tmp_path / "scores.partial.jsonl.old").mkdir()
    with pytest.raises(
        CdiffError, match=r"cannot rename .*scores\.partial\.jsonl to scores\.partial\.jsonl\.old: is a directory"
    ):
        run(KnownMaps(tmp_path / "b", 3), cases, Protocol(seed=1), out=out)
    assert partial.read_bytes() == before


def test_what_a_case_holds_is_known_wherever_it_lies(cases: list[Case], tmp_path: Path) -> None:
    """Voxels beside a header that stays as it is, other values that are inside, a folder of DICOM files: none is the case that was scored."""
    itk = pytest.importorskip("SimpleITK")
    image, found = tmp_path / "image.mhd", set[str]()
    for value in (0, 1):
        itk.WriteImage(itk.GetImageFromArray(np.full((2, 3, 4), value, np.float32)), str(image))
        found.add(case_sha256(replace(cases[0], image=image)))
    (tmp_path / "series").mkdir()
    for value in (b"0", b"1"):
        (tmp_path / "series" / "1.dcm").write_bytes(value)
        found.add(case_sha256(replace(cases[0], image=tmp_path / "series")))
    found |= {case_sha256(replace(cases[0], labels=labels)) for labels in ((), (1,), (1, 2))}
    assert len(found) == 7


def test_choosing_the_split(cases: list[Case]) -> None:
    splits = {name: [case] for name, case in zip(("train", "val", "test"), cases, strict=False)}
    assert choose_split(splits)[0] == "test"
    assert choose_split({k: v for k, v in splits.items() if k != "test"})[0] == "val"
    assert choose_split({"all": cases}) == ("all", cases)
    assert choose_split(splits, "train") == ("train", [cases[0]])
    assert choose_split(splits, "all")[1] == cases[:3]
    with pytest.raises(CdiffError, match="train"):
        choose_split({"train": cases})
    with pytest.raises(CdiffError, match="has all"):
        choose_split({"all": cases}, "val")


def test_groups_that_join_same_named_cases_of_several_splits_are_told(cases: list[Case], tmp_path: Path) -> None:
    """Two patients may both be the first of their split; a pattern that finds the split as well keeps them apart."""
    _, named = choose_split({"train": cases[:2], "val": [replace(cases[2], name="case01"), cases[3]]}, "all")
    told: list[str] = []
    run(KnownMaps(tmp_path / "b", 3), named, group=r"case\d+", notice=told.append)
    assert told == [r"--group 'case\\d+' joins cases of one name in several folders (case01); are they of one patient?"]
    run(KnownMaps(tmp_path / "b", 3), named, group=r"(?:\w+/)?case\d+", notice=told.append)
    run(KnownMaps(tmp_path / "b", 3), named, notice=told.append)
    run(KnownMaps(tmp_path / "b", 3), cases, group="case", notice=told.append)
    assert len(told) == 1


def test_what_is_inside_a_mask_is_what_it_was_in_training_unless_the_user_says_otherwise(cases: list[Case]) -> None:
    told: list[str] = []
    trained, plain = example(training={"data": {"labels": [1, 4]}}), example(training={"data": {"annotators": 3}})
    found, inside = labelled_as_trained(cases, trained, (), told.append)
    assert inside == (1, 4) == trained.labels_inside
    assert [case.labels for case in found] == [(1, 4)] * len(cases)
    assert labelled_as_trained(cases, plain, (), told.append) == (cases, ())
    brats = [replace(case, labels=(1, 2, 4)) for case in cases]  # as their layout says
    assert labelled_as_trained(brats, plain, (), told.append) == (brats, ())
    assert labelled_as_trained(cases, trained, (4, 1), told.append)[1] == (4, 1)
    assert told == []
    assert labelled_as_trained(cases, trained, (2,), told.append)[1] == (2,)
    assert told == ["labels 2 are scored as inside, but the model was trained with 1,4"]
