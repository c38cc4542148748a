"""How much memory `cdiff segment` takes for a scan as large as a hospital's, a synthetic one: peak of the process, and seconds.

    python -m cdiff.benchmarks.scan_memory --json benchmarks/results/scan_memory.json

The shipped model at a place that is named, with one run of one step: more of them take time, and no more memory.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from cdiff.benchmarks.script import parser_of, script
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.host import processor
from cdiff.runtime.words import by

CHILD = """
import atexit
from cdiff.benchmarks.memory import peak_memory
atexit.register(lambda: print(peak_memory()))
from cdiff.cli.app import main
main()
"""
Row = dict[str, Any]


def write_chest(path: Path, side: int, slices: int) -> None:
    """A volume of noise [side, side, slices], int16, as bright as lung and with a ball as bright as tissue in its middle."""
    rng = np.random.default_rng(0)
    voxels = np.empty((side, side, slices), np.int16, order="F")
    i, j = np.ogrid[:side, :side]
    beside = (i - side // 2) ** 2 + (j - side // 2) ** 2
    for k in range(slices):
        voxels[..., k] = np.where(beside + (k - slices // 2) ** 2 < 12**2, 40, rng.normal(-800, 60, (side, side)))
    image = nib.Nifti1Image(voxels, np.diag([0.7, 0.7, 1.0, 1.0]))
    nib.save(image, path)


def measure(scan: Path, out: Path, *options: str) -> Row:
    """Peak bytes and seconds of `cdiff segment` of a scan in a process of its own. Raises CdiffError where that fails."""
    words = ["segment", str(scan), "-o", str(out), *options]
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise CdiffError(f"cdiff {' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
    peak = int(done.stdout.split()[-1])
    return {"options": " ".join(options), "peak_mib": round(peak / 2**20), "seconds": round(seconds, 1)}


@script
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = parser_of("scan_memory", __doc__)
    parser.add_argument("--side", type=int, default=512, help="pixels of a slice along either axis (512)")
    parser.add_argument("--slices", type=int, default=600, help="slices (600)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write the numbers")
    options = parser.parse_args(argv)
    side, slices = options.side, options.slices
    place = ("--at", f"{side // 2},{side // 2},{slices // 2}", "--runs", "1", "--steps", "1", "-q")
    with tempfile.TemporaryDirectory(prefix="cdiff-") as folder:
        scan = Path(folder) / "chest.nii.gz"
        write_chest(scan, side, slices)
        rows = [
            measure(scan, Path(folder) / "maps", *place, *more)
            for more in ((), ("--slices", f"0:{slices}"), ("--slices", f"0:{slices}", "--page"))
        ]
    print(f"{by((side, side, slices))} voxels, int16")
    for row in rows:
        print(f"  {row['peak_mib']:6} MiB, {row['seconds']:6} s: {row['options']}")
    if options.json:
        write_json(options.json, {"machine": processor(), "shape": [side, side, slices], "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
