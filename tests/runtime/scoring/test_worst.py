"""The sheet of the worst slices: which they are, and that the maps drawn are those that were scored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.scoring import worst as sheet
from cdiff.runtime.scoring.choice import choose_split
from cdiff.runtime.scoring.evaluate import Protocol, Segmented, evaluate
from cdiff.runtime.scoring.metrics import soft_dice
from cdiff.runtime.scoring.worst import worst_slices, write_worst
from cdiff.runtime.segmenter import Segmenter


def report_of(**cases: list[float | None]) -> dict[str, Any]:
    def slices(scores: list[float | None]) -> list[dict[str, Any]]:
        return [{"slice": i + 3, "soft_dice_5": s, "soft_dice_5_annotators": 0.5} for i, s in enumerate(scores)]

    return {"cases": [{"case": name, "slices": slices(scores)} for name, scores in cases.items()]}


def test_each_case_gives_its_worst_slice_and_the_worst_come_first() -> None:
    report = report_of(a=[0.5, 0.25, None], b=[0.75], c=[None], d=[0.125, 0.0])
    cases: Any = [SimpleNamespace(name=name) for name in "abcde"]
    found = worst_slices(report, cases, 2)
    assert [(one.case.name, one.slice, one.soft_dice) for one in found] == [("d", 4, 0.0), ("a", 4, 0.25)]
    assert [one.case.name for one in worst_slices(report, cases, 9)] == ["d", "a", "b"], "c has no scored slice"


def test_cases_of_one_name_in_two_splits_are_told_apart(tiny_data: Path) -> None:
    _, cases = choose_split(find_cases(tiny_data), "all")
    found = worst_slices(report_of(**{"val/case01": [0.5], "train/case01": [0.25]}), cases, 2)
    assert [one.case.image.parts[-3:-1] for one in found] == [("Training", "case01"), ("Validation", "case01")]


def test_the_maps_drawn_are_those_that_were_scored(
    tiny_data: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter, cases = Segmenter.open(tiny_bundle), find_cases(tiny_data)["val"]
    protocol = Protocol(runs=2, steps=3, sampler="ddim", combine="vote", mirror=True, seed=5)
    report = evaluate(segmenter, cases, protocol)
    chosen = worst_slices(report, cases, 3)
    drawn: list[np.ndarray] = []
    show = sheet.drawing.show_soft

    def watched(axes: Any, soft: np.ndarray, box: Any, view: Any) -> Any:
        drawn.append(soft)
        return show(axes, soft, box, view)

    monkeypatch.setattr(sheet.drawing, "show_soft", watched)
    ticks: list[tuple[int, int]] = []
    write_worst(
        tmp_path / "worst.png", Segmented(segmenter), chosen, protocol, lambda done, total: ticks.append((done, total))
    )
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    assert [soft_dice(model, truth) for truth, model in pairs] == pytest.approx([one.soft_dice for one in chosen])
    assert ticks == sorted(ticks)
    assert ticks[-1] == (1000 * len(chosen), 1000 * len(chosen))
    assert Image.open(tmp_path / "worst.png").size[0] > 1000
