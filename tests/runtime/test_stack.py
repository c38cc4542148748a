"""Maps that are held where the model looked alone: the same maps, in the memory of that part."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdiff.runtime.pictures.preview import Turned, agreement
from cdiff.runtime.results import Result
from cdiff.runtime.sampling.framing import Framing, placed
from cdiff.runtime.sampling.sums import SliceSums
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.stack import Stack
from cdiff.runtime.variants import VARIANTS, variant_called
from tests.runtime.scan_files import nifti
from tests.runtime.scans.test_place import centre_model
from tests.runtime.test_segmenter import C, volume

BOX, SHAPE = (slice(3, 9), slice(20, 28)), (24, 40)
MAPS = ("maps", "run_std", "runs", "soft", "levels", "spread", "uncertainty", "mask")


def stacks(variant: str) -> tuple[Stack, Stack]:
    """Four slices with maps on a part of them; and the same on the whole."""
    rng, K = np.random.default_rng(0), variant_called(variant).conditions(C)
    maps, spread = rng.random((4, K, 6, 8), np.float32), rng.random((4, 6, 8), np.float32)
    runs = rng.integers(0, 256, (4, K, 2, 6, 8)).astype(np.uint8)
    on_part = Stack(maps, spread, runs, variant_called(variant), C, BOX, SHAPE)
    return on_part, Stack(*(placed(one, BOX, SHAPE) for one in (maps, spread, runs)), on_part.variant, C)


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_on_a_part_are_those_of_the_whole(variant: str, tmp_path: Path) -> None:
    """Every map of the stack, of some of its slices and of the result, and every file."""
    part, whole = stacks(variant)
    for name in MAPS:
        found = getattr(part, name)
        np.testing.assert_array_equal(found, getattr(whole, name))
        assert found.dtype == getattr(whole, name).dtype
        if name != "runs":
            np.testing.assert_array_equal(getattr(part[1:3], name), getattr(whole, name)[1:3])
    read = read_scan(volume(*SHAPE, 6))
    results = [Result(read.grid, read.slices, range(1, 5), stack) for stack in (part, whole)]
    for name in ("soft", "levels", "maps", "uncertainty", "mask"):
        np.testing.assert_array_equal(*(getattr(one, name) for one in results))
    reports = [one.save(tmp_path / str(k), page=True) for k, one in enumerate(results)]
    assert reports[0]["outputs"] == reports[1]["outputs"]


def test_of_a_large_scan_what_the_model_does_not_see_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the scan as the model sees it, nor maps, nor what volumes, files and pictures are made of."""
    model = centre_model(tmp_path / "tiny")
    array = volume(256, 256, 64)
    model.segment(array[..., :1], runs=1, steps=1)
    monkeypatch.setattr("cdiff.runtime.map_file.physical_cores", lambda: 1)  # each holds some blocks
    read = read_scan(nifti(tmp_path / "scan.nii.gz", array))
    tracemalloc.start()
    result = model.segment(read, runs=1, steps=1)
    segmented = tracemalloc.get_traced_memory()[1]
    result.save(tmp_path / "maps", preview=False)
    agreement(Turned(result.stack, "soft", read.grid.view))
    saved = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert segmented < 0.5 * read.slices.nbytes
    assert saved < 0.75 * read.slices.nbytes, "a few blocks and slices, one a MiB"


def test_a_volume_is_read_without_a_second_one_in_float32(tmp_path: Path) -> None:
    path = nifti(tmp_path / "scan.nii", np.random.default_rng(0).integers(0, 2000, (128, 128, 128)).astype(np.int16))
    read_scan(path)
    tracemalloc.start()
    read = read_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.8 * read.slices.nbytes  # the file itself is half as large


def test_a_map_in_bytes_is_never_whole_in_float32(tmp_path: Path) -> None:
    """The levels of a DICOM segmentation are."""
    read = read_scan(np.zeros((128, 128, 64), np.float32))
    maps = np.random.default_rng(0).random((64, 3, 128, 128), np.float32)
    result = Result(read.grid, read.slices, range(64), Stack(maps, maps[:, 0]))

    def marked(levels: Any) -> Any:
        return (levels >= 0.5).astype(np.uint8)

    tracemalloc.start()
    found = result.on_grid("levels", marked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * found.nbytes
    np.testing.assert_array_equal(found, result.levels >= 0.5)
    empty = dataclasses.replace(result, slices=range(32), stack=result.stack[:32]).on_grid("levels", marked)
    assert not empty[..., 32:, :].any()


def test_maps_of_masks_from_zero_are_those_of_x_itself() -> None:
    """Not of (x + 1)/2, as which they were summed: mean and spread over runs, and each run's, by hand."""
    x = np.random.default_rng(3).uniform(-1, 1, (2, 3, 4, 5)).astype(np.float32)  # levels, runs, h, w
    sums = SliceSums(Framing("resize", (4, 5)).frame(np.zeros((1, 1, 4, 5), np.float32)), 2, 3, True)
    for level, run in np.ndindex(2, 3):
        sums.add(0, level + 1, run, x[level, run])
    found = sums.result(0, 0).for_masks_from_zero()
    np.testing.assert_allclose(found.level_means, np.maximum(x.mean(axis=1), 0), atol=1e-6)
    np.testing.assert_allclose(found.run_std, x.mean(axis=0).std(axis=0), atol=1e-6)
    assert found.runs is not None
    np.testing.assert_allclose(found.runs / 255, np.maximum(x, 0), atol=1.001 / 255)
