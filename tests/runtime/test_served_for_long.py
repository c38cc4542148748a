"""A program that keeps a model loaded and segments scan after scan, whatever becomes of each: what it holds is counted, and does not grow."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.results import Result
from cdiff.runtime.scans.scan import Scan
from cdiff.runtime.segmenter import Segmenter
from tests.runtime.dicom_files import orthogonal, write_series
from tests.runtime.test_segmenter import QUICK, SIZE, make_bundle, saved, volume


class Stop(Exception):
    """What a caller's progress raises."""


def raising(error: type[BaseException]) -> Any:
    def progress(*_: Any) -> None:
        raise error

    return progress


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go within a test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Any]]]:
    """Every scan and result that is made within a test, which the garbage collector does not help to go."""
    made: list[weakref.ref[Any]] = []
    for kind in (Scan, Result):
        before = kind.__init__

        def counted(self: Any, *args: Any, _before: Any = before, **named: Any) -> None:
            made.append(weakref.ref(self))
            _before(self, *args, **named)

        monkeypatch.setattr(kind, "__init__", counted)
    gc.disable()
    yield made
    gc.enable()


def held() -> tuple[int, list[str]]:
    """Open files, and the names of threads."""
    return len(os.listdir("/proc/self/fd")), sorted(thread.name for thread in threading.enumerate())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted through /proc")
def test_files_threads_and_scans_do_not_grow(
    bundle: Path, tmp_path: Path, temporary: Path, alive: list[weakref.ref[Any]]
) -> None:
    model = Segmenter.open(bundle)
    series = write_series(
        tmp_path / "series", np.zeros((SIZE, SIZE, 2), np.int16) + np.arange(2, dtype=np.int16), orthogonal()
    )
    (tmp_path / "damaged.nii.gz").write_bytes(b"none")
    kept: list[CdiffError] = []

    def serve(round_: int) -> None:
        """A round of what may happen to a server's scans, of sizes that no other round has."""
        path = saved(tmp_path / f"{round_}.nii.gz", volume(SIZE + round_, SIZE, 1 + round_ % 3))
        array = volume(SIZE, SIZE + round_, 2).astype(np.float32)
        model.segment(path, **QUICK).save(tmp_path / "maps", preview=round_ == 0)
        model.segment(array, keep_runs=True, **QUICK)
        model.segment(series, **QUICK)
        with pytest.raises(CdiffError):
            model.segment(tmp_path / "damaged.nii.gz", **QUICK)
        for error in (Stop, KeyboardInterrupt):
            with pytest.raises(error):
                model.segment(array, progress=raising(error), **QUICK)
            with pytest.raises(error):
                list(model.segment_many([path, array], progress=raising(error), **QUICK))
        for one in model.segment_many(
            [path, tmp_path / "damaged.nii.gz", array, array], save_to=tmp_path / "maps", preview=False, **QUICK
        ):
            kept.extend([one.error] if one.error else [])
        given_up = model.segment_many([array] * 4, **QUICK)
        assert next(given_up).value is not None

    for round_ in range(2):  # what is made once
        serve(round_)
    before = held()
    for round_ in range(2, 7):
        serve(round_)
    assert held() == before
    assert list(temporary.iterdir()) == []
    assert len(kept) == 2 * 7  # remembered, and no scan with them
    assert len(alive) > 7 * 10
    assert [one() for one in alive if one() is not None] == []


def test_a_model_that_is_dropped_is_gone_with_its_sessions(bundle: Path, alive: list[weakref.ref[Any]]) -> None:
    model = Segmenter.open(bundle)
    model.segment(volume(SIZE, SIZE, 1).astype(np.float32), **QUICK)
    engine: Any = model.engine
    parts = [weakref.ref(one) for one in (model, engine, engine._encoder, engine._denoiser)]
    del model, engine
    assert [one() for one in parts] == [None] * 4
