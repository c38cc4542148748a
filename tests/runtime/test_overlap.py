"""Reading, engine and writing overlap: shown by events, never by the clock; order, bounds, errors, interrupts, the same bytes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.overlap import Outcome, overlapped
from cdiff.runtime.prepared import Prepared
from cdiff.runtime.results import Result
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.segmenter import Segmenter
from tests.runtime.test_segmenter import QUICK, SIZE, C, make_bundle, saved, volume

SECONDS = 20.0
"""How long a test waits for something that must happen; only a failure takes as long."""


class Ready:
    """As large as a scan."""


class Steps:
    """Three steps over numbers, each of which can be made to wait for another step's event or to raise."""

    def __init__(self) -> None:
        self.events: dict[tuple[str, int], threading.Event] = {}
        self.waits: dict[tuple[str, int], tuple[str, int]] = {}
        self.errors: dict[tuple[str, int], BaseException] = {}
        self.begun: list[tuple[str, int]] = []
        self.threads: dict[str, set[int]] = {}

    def event(self, step: str, number: int) -> threading.Event:
        return self.events.setdefault((step, number), threading.Event())

    def do(self, step: str, number: int) -> int:
        self.begun.append((step, number))
        self.threads.setdefault(step, set()).add(threading.get_ident())
        self.event(step, number).set()
        if (waited := self.waits.get((step, number))) is not None:
            assert self.event(*waited).wait(SECONDS), f"{step} {number} waited for {waited} in vain: nothing overlaps"
        if (error := self.errors.get((step, number))) is not None:
            raise error
        return number

    def run(self, items: Any) -> Iterator[Outcome[int, int]]:
        return overlapped(
            items,
            lambda number: self.do("read", number),
            lambda number, ready: self.do("work", number),
            lambda number, made: self.do("write", number),
        )


def test_the_next_is_read_and_the_last_written_while_one_is_worked_on() -> None:
    steps = Steps()
    for number in (1, 2, 3):
        steps.waits["work", number] = ("read", number + 1)
        steps.waits["write", number - 1] = ("work", number)
    assert [one.value for one in steps.run(range(5))] == list(range(5))
    assert steps.threads["work"] == {threading.get_ident()}
    assert all(len(threads) == 1 for threads in steps.threads.values())
    assert len(set.union(*steps.threads.values())) == 3


def test_no_more_than_three_are_under_way_however_slow_the_writing() -> None:
    steps, taken = Steps(), []

    def items() -> Iterator[int]:
        for number in range(6):
            taken.append(number)
            yield number

    steps.waits["write", 0] = ("work", 1)
    outcomes = steps.run(items())
    assert next(outcomes).item == 0
    # 0 was still being written when 1 was worked on; 2 was being read, and nobody had asked for 3.
    assert taken == [0, 1, 2]
    assert ("work", 2) not in steps.begun
    assert [one.item for one in outcomes] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("step", ["read", "work", "write"])
def test_an_error_stays_with_its_item(step: str) -> None:
    steps = Steps()
    steps.errors[step, 1] = error = CdiffError("bad")
    outcomes = list(steps.run(range(4)))
    assert [one.item for one in outcomes] == [0, 1, 2, 3]
    assert [one.error for one in outcomes] == [None, error, None, None]
    assert ("write", 1) in steps.begun or step != "write"
    assert [number for name, number in steps.begun if name == "write"] == [0, *[1] * (step == "write"), 2, 3]


def test_an_error_is_told_before_the_next_is_worked_on() -> None:
    """Which may take hours."""
    steps = Steps()
    steps.errors["read", 0] = CdiffError("bad")
    assert next(steps.run(range(3))).error is not None
    assert ("work", 1) not in steps.begun


def test_what_was_read_is_let_go_of_once_it_was_worked_on() -> None:
    begun = [threading.Event() for _ in range(5)]
    read: list[weakref.ref[Ready]] = []
    worked: list[int] = []

    def reading(number: int) -> Ready:
        begun[number].set()
        ready = Ready()
        read.append(weakref.ref(ready))
        return ready

    def working(number: int, ready: Ready) -> int:
        assert begun[number + 1].wait(SECONDS)  # the thread that read it has let go of it by then
        worked.append(number)
        return number

    begun[4].set()
    for _ in overlapped(range(4), reading, working, lambda number, made: made):
        assert [read[number]() for number in worked] == [None] * len(worked)


@pytest.mark.parametrize("step", ["read", "work", "write"])
def test_one_that_the_memory_is_not_enough_for_costs_no_other(step: str) -> None:
    steps = Steps()
    steps.errors[step, 1] = MemoryError("Unable to allocate 8 GiB")
    first, second, third = steps.run(range(3))
    assert first.error is third.error is None
    assert "the memory is not enough (Unable to allocate 8 GiB)" in str(second.error)


@pytest.mark.parametrize("step", ["read", "work", "write"])
@pytest.mark.parametrize("kind", [CdiffError, MemoryError])
def test_an_error_that_is_kept_keeps_no_scan(step: str, kind: type[Exception]) -> None:
    """A server may remember thousands; no cycle waits for the garbage collector either, which does not count bytes."""
    held: dict[str, weakref.ref[Ready]] = {}

    def made(at: str) -> Ready:
        scan = Ready()
        held[at] = weakref.ref(scan)
        if at == step:
            try:
                raise ValueError("of a library")
            except ValueError:
                raise kind("of this scan") from KeyError("another, which nobody raised")
        return scan

    gc.disable()
    try:
        (outcome,) = overlapped(
            [0], lambda n: made("read"), lambda n, ready: made("work"), lambda n, maps: made("write")
        )
        assert "of this scan" in str(outcome.error)
        assert step in held
        assert [at for at, scan in held.items() if scan() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("step", ["read", "work", "write"])
def test_an_error_that_is_kept_keeps_nothing_of_the_callers(step: str) -> None:
    """From Python 3.12 on its frames led to those of the caller, and with them to a generator that was given up and its threads."""

    def fail(at: str) -> None:
        if at == step:
            raise CdiffError("bad")

    def serve() -> tuple[CdiffError | None, weakref.ref[Ready]]:
        mine = Ready()
        (outcome,) = overlapped([0], lambda n: fail("read"), lambda n, r: fail("work"), lambda n, m: fail("write"))
        return outcome.error, weakref.ref(mine)

    gc.disable()
    try:
        error, mine = serve()
        assert isinstance(error, CdiffError)
        assert mine() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_what_is_being_written_is_finished_whatever_ends_the_work(error: BaseException) -> None:
    steps, finished = Steps(), []
    steps.waits["work", 1] = ("write", 0)
    steps.errors["work", 1] = error

    def write(number: int, made: int) -> int:
        steps.event("write", number).set()
        steps.event("never", 0).wait(0.2)  # still at it when the error comes
        finished.append(number)
        return number

    with pytest.raises(type(error)):
        list(overlapped(range(9), lambda n: steps.do("read", n), lambda n, ready: steps.do("work", n), write))
    assert finished == [0]
    assert ("read", 3) not in steps.begun


def test_an_error_of_the_items_comes_after_what_became_of_those_before_it() -> None:
    steps, told = Steps(), []

    def items() -> Iterator[int]:
        yield from range(2)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        told.extend(one.value for one in steps.run(items()))
    assert told == [0, 1]


def test_a_caller_that_stops_asking_ends_the_threads() -> None:
    before = threading.active_count()
    outcomes = overlapped(range(9), lambda n: n, lambda n, ready: n, lambda n, made: n)
    assert next(outcomes).value == 0
    outcomes.close()
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return Segmenter.open(make_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


def test_many_scans_give_the_files_that_each_alone_gives(segmenter: Segmenter, tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / f"{name}.nii.gz", volume(SIZE, SIZE, depth)) for name, depth in (("a", 1), ("b", 3), ("c", 2))
    ]
    alone, together = tmp_path / "alone", tmp_path / "together"
    for path in paths:
        segmenter.segment(path, **QUICK).save(alone, preview=False)
    outcomes = list(segmenter.segment_many(paths, save_to=together, preview=False, **QUICK))
    assert [one.item for one in outcomes] == paths
    for one in outcomes:
        assert one.value is not None
        assert one.value.report["outputs"].keys() == {
            f"{one.value.name}_{kind}.nii.gz" for kind in ("soft", "levels", "uncertainty", "mask")
        }
    maps = sorted(path.name for path in alone.glob("*.nii.gz"))
    assert len(maps) == 12
    for name in maps:
        assert (together / name).read_bytes() == (alone / name).read_bytes(), name
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())


def test_scans_may_come_one_after_another_in_one_array(segmenter: Segmenter) -> None:
    """As who streams them gives them; also what is shown of each is its own."""
    scans = [np.moveaxis(volume(SIZE, SIZE, 2), 2, 0).astype(np.float32) + 40 * n for n in range(4)]
    scans[1] = scans[1][:, ::-1]

    def streamed() -> Iterator[np.ndarray[Any, Any]]:
        buffer = np.empty_like(scans[0], order="C")
        for scan in scans:
            buffer[...] = scan
            yield buffer
        buffer[...] = 0

    outcomes = list(segmenter.segment_many(streamed(), slice_axis=0, **QUICK))
    for one, scan in zip(outcomes, scans, strict=True):
        assert one.value is not None
        alone = segmenter.segment(scan, slice_axis=0, **QUICK)
        np.testing.assert_array_equal(one.value.levels, alone.levels)
        np.testing.assert_array_equal(one.value.image, alone.image)


def test_what_is_asked_of_many_scans_is_asked_of_each(segmenter: Segmenter, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii.gz", np.moveaxis(volume(SIZE, SIZE, 3), 2, 0))
    where: dict[str, Any] = {"slices": "1:2", "slice_axis": 0}
    (one,) = segmenter.segment_many([path], save_to=tmp_path / "maps", preview=False, page=True, **where, **QUICK)
    assert one.value is not None
    np.testing.assert_array_equal(one.value.levels, segmenter.segment(path, **where, **QUICK).levels)
    assert one.value.report["slices"] == {"first": 1, "end": 2, "of": 3}
    assert (tmp_path / "maps/a_page.html").is_file()
    assert not (tmp_path / "maps/a_preview.png").exists()
    for alone in ({"at": (1, 1, 1)}, {"shrink": 2}):  # of one scan
        with pytest.raises(CdiffError, match="segment_many takes many"):
            segmenter.segment_many([path], **alone, **QUICK)


def test_one_scan_in_place_of_several_is_refused(segmenter: Segmenter) -> None:
    """Or each letter of a path and each row of a volume would be a scan."""
    array = volume(SIZE, SIZE, 3)
    for one in ("a.nii.gz", Path("a.nii.gz"), array, nib.Nifti1Image(array, np.eye(4))):
        with pytest.raises(CdiffError, match="put it in a list"):
            segmenter.segment_many(cast(Any, one), **QUICK)


def test_an_array_of_paths_is_a_list_of_scans(segmenter: Segmenter, tmp_path: Path) -> None:
    """As a table's column is."""
    paths = [saved(tmp_path / f"{name}.nii", volume(SIZE, SIZE, 1)) for name in "ab"]
    for array in (np.array([str(path) for path in paths]), np.array(paths, dtype=object)):
        found = list(segmenter.segment_many(cast(Any, array), **QUICK))
        assert [one.value and one.value.name for one in found] == ["a", "b"]


def test_progress_of_many_scans_says_whose_it_is(segmenter: Segmenter) -> None:
    """The engine may be a scan ahead of the outcomes: by the order alone, one scan had the steps of two and the last had none."""
    scans = {depth: volume(SIZE, SIZE, depth) for depth in (1, 3, 2)}
    alone: dict[int, list[tuple[int, int]]] = {depth: [] for depth in scans}
    together: dict[int, list[tuple[int, int]]] = {depth: [] for depth in scans}
    for depth, scan in scans.items():
        segmenter.segment(scan, **QUICK, progress=lambda *now, depth=depth: alone[depth].append(now))

    def progress(scan: Any, done: int, total: int) -> None:
        together[scan.shape[2]].append((done, total))

    assert all(one.error is None for one in segmenter.segment_many(scans.values(), **QUICK, progress=progress))
    assert together == alone
    for depth, seen in together.items():
        assert seen[-1] == (depth * C * 2 * 3, depth * C * 2 * 3), "levels, runs and steps"


def test_a_bad_scan_among_many_and_two_of_one_name(segmenter: Segmenter, tmp_path: Path) -> None:
    good = saved(tmp_path / "good.nii.gz", volume(SIZE, SIZE, 1))
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(good.read_bytes()[:60])
    (tmp_path / "other").mkdir()
    twin = saved(tmp_path / "other" / "good.nii.gz", volume(SIZE, SIZE, 2))
    outcomes = list(segmenter.segment_many([bad, good, twin], save_to=tmp_path / "out", **QUICK))
    assert [one.error is None for one in outcomes] == [False, True, False]
    assert "bad.nii.gz" in str(outcomes[0].error)
    assert "another scan is called good" in str(outcomes[2].error)
    assert nib.load(tmp_path / "out" / "good_soft.nii.gz").shape == (SIZE, SIZE, 1)


def test_the_engine_works_on_one_scan_while_the_next_is_read(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real segmenter, its engine held up until the next scan's reading and the last one's writing have begun."""
    paths = [saved(tmp_path / f"{name}.nii", volume(SIZE, SIZE)) for name in "abc"]
    read = {path.stem: threading.Event() for path in paths}
    written = {path.stem: threading.Event() for path in paths}
    prepare, segment, save = segmenter.prepare, segmenter.segment, Result.save

    def noted(scan: Any, **options: Any) -> Prepared:
        read[Path(scan).stem].set()
        return prepare(scan, **options)

    def held(ready: Prepared, **options: Any) -> Result:
        place = "abc".index(ready.scan.name)
        for events, other in ((read, "abc"[place + 1 : place + 2]), (written, "abc"[place - 1 : place])):
            assert not other or events[other].wait(SECONDS), f"scan {other} was not dealt with meanwhile"
        return segment(ready, **options)

    def noted_save(result: Result, *arguments: Any, **options: Any) -> dict[str, Any]:
        written[result.name].set()
        return save(result, *arguments, **options)

    monkeypatch.setattr(segmenter, "prepare", noted)
    monkeypatch.setattr(segmenter, "segment", held)
    monkeypatch.setattr(Result, "save", noted_save)
    outcomes = list(segmenter.segment_many(paths, save_to=tmp_path / "maps", preview=False, **QUICK))
    assert [one.error for one in outcomes] == [None, None, None]


def test_a_scan_that_was_read_is_taken_as_it_is(segmenter: Segmenter, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", volume(SIZE, SIZE, 3))
    read, options = read_scan(path), {**QUICK, "slices": "1:3"}
    given, named = segmenter.segment(read, **options), segmenter.segment(path, **options)
    np.testing.assert_array_equal(given.levels, named.levels)
    assert given.name == named.name
    assert given.report["input"] == named.report["input"]
    for late in ({"slice_axis": 1}, {"series": 3}):
        with pytest.raises(CdiffError, match="read already; give slice_axis and series to read_scan"):
            segmenter.segment(read, **late, **QUICK)


def test_a_prepared_scan_has_its_slices_already(segmenter: Segmenter) -> None:
    array = volume(SIZE, SIZE, 3)
    ready = segmenter.prepare(array, slices="1:2")
    np.testing.assert_array_equal(
        segmenter.segment(ready, **QUICK).soft, segmenter.segment(array, **QUICK, slices="1:2").soft
    )
    for late in ({"slices": "0:1"}, {"slice_axis": 1}, {"at": (1, 1, 1)}, {"shrink": 2}, {"series": 3}):
        with pytest.raises(CdiffError, match="already; give slices, slice_axis, at, shrink and series to prepare"):
            segmenter.segment(ready, **QUICK, **late)
