"""The maps' files: what nibabel would write, in one gzip stream, without holding or deflating what was not computed."""

from __future__ import annotations

import gzip
import io
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from cdiff.runtime import map_file
from cdiff.runtime.map_file import BLOCK, write_gzip, write_map
from cdiff.runtime.scans.grid import Grid
from tests.runtime.scan_files import restored

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tests have one core."""
    monkeypatch.setattr(map_file, "physical_cores", lambda: 2)


def grid_of(shape: tuple[int, ...], axis: int | None, kind: Any = nib.Nifti1Header) -> Grid:
    header = kind()
    header.set_data_shape(shape)
    header.set_sform(np.diag([0.7, 0.8, 2.5, 1.0]), code=1)
    return Grid(shape, axis, header)


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 6, 4), 2), ((5, 6, 4), 1), ((5, 6, 4), 0), ((5, 6, 4, 1), 2), ((5, 6), None), ((5, 6, 1), 2)],
)
def test_the_file_is_nibabel_s(
    tmp_path: Path, shape: tuple[int, ...], axis: int | None, kind: Any, levels: int | None
) -> None:
    grid = grid_of(shape, axis, kind)
    plane = [n for i, n in enumerate(grid.spatial) if i != axis]
    total = 1 if axis is None else shape[axis]
    slices = range(total // 3, max(total - 1, 1))
    maps = RNG.random((len(slices), *([levels] if levels else []), *plane), np.float32)
    whole = np.full((total, levels or 1, *plane), np.nan, np.float32)
    whole[slices.start : slices.stop] = maps if levels else maps[:, None]
    on_grid = restored(grid, whole)
    write_map(tmp_path / "new.nii.gz", grid, slices, maps, "a map")
    nib.save(grid.image(on_grid if levels else on_grid.reshape(shape), "a map"), tmp_path / "old.nii.gz")
    new, old = (gzip.decompress((tmp_path / name).read_bytes()) for name in ("new.nii.gz", "old.nii.gz"))
    assert new == old
    marked = (maps > 0.5).astype(np.uint8)
    write_map(tmp_path / "mask.nii.gz", grid, slices, marked, "a mask")
    expected = np.nan_to_num(on_grid if levels else on_grid.reshape(shape)) > 0.5
    written = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    np.testing.assert_array_equal(written, expected.reshape(written.shape))


@pytest.mark.parametrize("number", [0, 1, BLOCK // 4 - 1, BLOCK // 4, BLOCK // 4 * 3 + 5])
@pytest.mark.parametrize("value", [np.nan, 0.0, -0.0, None])
def test_the_stream_is_one_member_and_holds_every_bit(number: int, value: float | None) -> None:
    part = RNG.random(number, np.float32) if value is None else np.full(number, value, np.float32)
    parts: list[NDArray[Any]] = [np.arange(300, dtype=np.uint8), part, part.copy(), np.ones((5, 7), np.int64).T, -part]
    parts += [np.zeros(number, kind) for kind in (np.uint8, np.uint16)]  # as many of one value, and other bytes
    file = io.BytesIO()
    write_gzip(file, parts)
    stream = zlib.decompressobj(16 + zlib.MAX_WBITS)  # a gzip member, its checksum and length compared
    assert stream.decompress(file.getvalue()) == b"".join(each.tobytes() for each in parts)
    assert stream.eof
    assert stream.unused_data == b""


def test_an_array_that_is_used_again_for_the_next_part_is_written_as_it_was() -> None:
    """Blocks are deflated by threads, later than they were given, and one after another all the same."""
    array, expected = np.empty(BLOCK // 4 * 2 + 5, np.float32), []

    def parts() -> Iterator[NDArray[Any]]:
        for seed in range(6):
            array[:] = np.random.default_rng(seed).integers(0, 3, array.size)
            expected.append(array.tobytes())
            yield array
            array[:] = -1

    file = io.BytesIO()
    write_gzip(file, parts())
    assert gzip.decompress(file.getvalue()) == b"".join(expected)


def test_a_full_disk_is_told_and_leaves_no_thread() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            if self.tell() > 1000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left"):
        write_gzip(Full(), (RNG.random(BLOCK, np.float32) for _ in range(5)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cdiff-deflate")]


@pytest.mark.parametrize("slices", [range(70), range(25, 28), range(40, 70)])
def test_slices_that_share_a_block_are_where_they_belong(tmp_path: Path, slices: range) -> None:
    """26 of these slices fit into a block; a reader compares the sum that empty blocks' own were put together to."""
    maps = RNG.random((len(slices), 2, 90, 110), np.float32)
    write_map(tmp_path / "x.nii.gz", grid_of((90, 110, 70), 2), slices, maps, "maps")
    whole = np.full((70, 2, 90, 110), np.nan, np.float32)
    whole[slices.start : slices.stop] = maps
    gzip.decompress((tmp_path / "x.nii.gz").read_bytes())
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "x.nii.gz").dataobj), whole.transpose(2, 3, 0, 1))


def test_what_was_not_computed_is_neither_held_nor_deflated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slice of a long scan, four levels: a volume at once would be most of the memory that a run takes."""
    grid = grid_of((512, 512, 24), 2)
    volume = 512 * 512 * 24 * 4
    deflated: list[int] = []
    deflate = map_file._deflated

    def counted(block: NDArray[Any], level: int) -> tuple[bytes, int]:
        deflated.append(block.nbytes)
        return deflate(block, level)

    monkeypatch.setattr(map_file, "_deflated", counted)
    maps = RNG.random((1, 4, 512, 512), np.float32)
    tracemalloc.start()
    write_map(tmp_path / "levels.nii.gz", grid, range(7, 8), maps, "levels")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.2 * volume
    assert sum(deflated) < 0.25 * volume  # of four volumes: four slices and an empty one
    written = np.asarray(nib.load(tmp_path / "levels.nii.gz").dataobj)
    np.testing.assert_array_equal(written[:, :, 7], np.moveaxis(maps[0], 0, -1))
    assert np.isnan(np.delete(written, 7, axis=2)).all()
