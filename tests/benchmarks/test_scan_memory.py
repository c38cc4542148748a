"""The memory of `cdiff segment`: one process that is measured, on a small scan, and what is measured of a large one."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cdiff.benchmarks import scan_memory
from cdiff.benchmarks.memory import peak_memory
from cdiff.benchmarks.scan_memory import Row, main, measure, write_chest
from cdiff.runtime.errors import CdiffError


def test_a_process_of_its_own_is_measured(tmp_path: Path) -> None:
    """Python, NumPy and ONNX Runtime take most of what a small scan needs; this process, which holds more, does not count."""
    write_chest(tmp_path / "chest.nii.gz", 160, 2)
    voxels = np.asanyarray(nib.load(tmp_path / "chest.nii.gz").dataobj)
    assert (voxels.dtype, voxels.shape, int(voxels[80, 80, 1])) == (np.int16, (160, 160, 2), 40)
    held = np.ones(2**27)  # 1 GiB
    row = measure(tmp_path / "chest.nii.gz", tmp_path / "maps", "--at", "80,80,1", "--runs", "1", "--steps", "1", "-q")
    assert 60 * 2**20 < row["peak_mib"] * 2**20 < held.nbytes < peak_memory()
    assert (tmp_path / "maps/chest_soft.nii.gz").is_file()
    with pytest.raises(CdiffError, match=r"ended with 2: error: .*nothing\.nii\.gz"):
        measure(tmp_path / "nothing.nii.gz", tmp_path / "out")


def test_one_slice_all_slices_and_a_page_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(scan: Path, out: Path, *options: str) -> Row:
        assert nib.load(scan).shape == (64, 64, 5)
        return {"options": " ".join(options), "peak_mib": 7, "seconds": 0.1}

    monkeypatch.setattr(scan_memory, "measure", told)
    assert main(["--side", "64", "--slices", "5", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    same = "--at 32,32,2 --runs 1 --steps 1 -q"
    assert [row["options"] for row in found["rows"]] == [same, f"{same} --slices 0:5", f"{same} --slices 0:5 --page"]
