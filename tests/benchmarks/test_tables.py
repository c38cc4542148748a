"""What `cdiff benchmark` prints: the numbers of its report, each in its row and unit."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from cdiff.benchmarks.tables import summary

PARTS = {"read": 1.0, "encode": 2.0, "denoise": 5.0, "noise": 0.5, "update": 0.25, "collect": 0.25, "other": 1.0}
REPORT: dict[str, Any] = {
    "machine": {"cpu": "a processor", "cores": 4, "threads": 2, "torch": "2.13", "versions": {"onnxruntime": "1.31"}},
    "model": {
        "name": "tiny", "parameters": 2_150_000, "image_size": [64, 48], "levels": 3, "precision": "float32", "T": 100
    },
    "protocol": {"slices": 3, "scan": "a.nii", "runs": 4, "steps": 10, "sampler": "ddim", "repeats": 5},
    "contenders": {"published": {"engine": "torch"}, "exported": {"engine": "onnxruntime"}},
    "end_to_end": {
        "published": {"seconds": 30.0, "slices_a_minute": 6.0, "peak_bytes": 512 * 2**20, "parts": PARTS},
        "exported": {
            "seconds": 12.0, "slices_a_minute": 15.0, "peak_bytes": 256 * 2**20, "parts": PARTS | {"denoise": 15.0},
            "estimate_25_runs_all_steps_seconds_a_slice": 250.0,
        },
    },
    "ratios": {"exported_over_published": {"median": 2.5}},
    "denoiser_call": {
        kind: {"1": {"ms": ms, "ms_a_row": ms}, "8": {"ms": 4 * ms, "ms_a_row": ms / 2}}
        for kind, ms in (("published", 30.0), ("exported", 12.0))
    },
    "floor": {
        "end_to_end_seconds": 9.0, "ms_a_row": 2.5, "matmul_flop_per_s": 5e10, "encoder_flop": 1.5e9, "denoiser_flop": 2.5e9,
    },
    "agreement": {"exported": {"max": 2e-5}},
    "write_seconds": 0.75,
}  # fmt: skip


def test_every_number_of_the_report_stands_in_its_row() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(summary(REPORT))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    published, exported = "PyTorch, one run after another", "exported engine (onnxruntime)"
    assert [row for row in rows if row[0] == published] == [
        [published, "30.00", "6.00", "1.00 x", "512"],
        [published, "30.0 (30.0)", "120.0 (15.0)"],
    ]
    assert [row for row in rows if row[0] == exported] == [
        [exported, "12.00", "15.00", "2.50 x", "256"],
        [exported, "12.0 (12.0)", "48.0 (6.0)"],
    ]
    assert [row[1:] for row in rows if row[0].startswith("floor")] == [
        ["9.00", "20.00", "", ""],
        ["2.5 (2.5)", "20.0 (2.5)"],
    ]
    shares = {row[0]: row[1:] for row in rows[-len(PARTS) :]}
    assert shares == {
        "reading the scan": ["10.0", "5.0"], "encoder": ["20.0", "10.0"], "denoiser": ["50.0", "75.0"],
        "drawing noise": ["5.0", "2.5"], "the sampler's update": ["2.5", "1.2"], "adding up maps": ["2.5", "1.2"],
        "anything else": ["10.0", "5.0"],
    }  # fmt: skip
    for said in (
        "a processor, 4 cores, threads used: 2; torch 2.13, onnxruntime 1.31",
        "model tiny: 2.15 M parameters, 64x48, 3 levels, float32",
        "3 slices of a.nii, 4 runs, 10 steps of ddim; medians of 5 rounds",
        "50 GFLOP/s in float32. A slice's encoding is 1.50 GFLOP, a row's denoiser call 2.50.",
        "takes 0.75 s more. A slice with 25 runs of all 100 steps: about 250 s by the exported engine",
        "by at most 2.0e-05.",
    ):
        assert said in " ".join(text.split()), said
