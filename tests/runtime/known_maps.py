"""A segmenter whose maps are known, for evaluations without a model; cases for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from cdiff.runtime.data.cases import Case, read_case
from cdiff.runtime.files import sha256
from cdiff.runtime.scans.scan import Scan
from cdiff.runtime.scoring.evaluate import Protocol, evaluate
from cdiff.runtime.scoring.journal import SEAL
from cdiff.runtime.scoring.scores import true_levels
from cdiff.runtime.segmenter import Segmenter
from cdiff.runtime.stack import Stack
from tests.runtime.test_manifest import example


@dataclass
class KnownMaps:
    """Stands where a Segmenter does; its maps are the annotators' own consensus, moved by `shift` pixels."""

    bundle_folder: Path
    levels: int
    shift: int = 0
    stop_after: int | None = None
    noise: float = 0.0
    R: int = 2
    asked: list[tuple[str, slice]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bundle_folder.mkdir(exist_ok=True)
        (self.bundle_folder / "manifest.json").write_text(f"{self.levels} {self.shift}")
        self.manifest_sha256 = sha256(self.bundle_folder / "manifest.json")
        self.engine = SimpleNamespace(name="known", device="cpu")
        self.manifest = example(name="known", levels=self.levels)

    def segment(self, scan: Scan, *, slices: slice, keep_runs: bool, progress: Any, **chain: Any) -> Any:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        assert keep_runs
        folder = Path(scan.source).parent
        self.asked.append((folder.name, slices))
        masks = read_case(case_in(folder))[1][slices]
        levels = np.stack([true_levels(drawn, self.levels) for drawn in masks]).astype(np.float32)
        levels = np.roll(levels, self.shift, axis=-1)
        spread = np.random.default_rng(0).normal(0, self.noise, (1, 1, self.R, *levels.shape[2:]))
        runs = np.rint(255 * np.clip(levels[:, :, None] + spread, 0, 1)).astype(np.uint8)
        levels = (runs.mean(axis=2) / 255).astype(np.float32)
        progress(1, 2)
        report = {"runs": self.R, "steps": chain["steps"] or 5, "sampler": "ddim", "mirror": False}
        stack = Stack(levels, runs.mean(axis=1).std(axis=1).astype(np.float32) / 255, runs)
        return SimpleNamespace(stack=stack, report=report, grid=scan.grid)

    def runs(self, asked: int | None, fast: bool) -> int:
        return self.R


def case_in(folder: Path) -> Case:
    return Case(folder.name, folder / "image.nii.gz", tuple(sorted(folder.glob("task01_seg*.nii.gz"))))


def run(segmenter: KnownMaps, cases: list[Case], protocol: Protocol | None = None, **more: Any) -> dict[str, Any]:
    return evaluate(cast(Segmenter, segmenter), cases, protocol or Protocol(), **more)


def without_seconds(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says that is the same each time: neither how long a case took nor the seal, which holds for that too."""
    cases = [{key: value for key, value in case.items() if key not in ("seconds", SEAL)} for case in report["cases"]]
    return report | {"cases": cases}
