"""What is given to a command reaches what does its work: all of it, and under its own name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.cli.console import err
from cdiff.export.tensorrt import BuildOptions
from cdiff.runtime.bundle import shipped_bundle
from cdiff.runtime.data.case import Case
from cdiff.runtime.data.cases import find_cases
from cdiff.runtime.data.partition import partition
from cdiff.runtime.engines.trt import RTX_CAPABILITIES, Gpu, profile_for
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.results import Result
from cdiff.runtime.scoring.evaluate import Protocol
from cdiff.runtime.scoring.publish import write_report
from cdiff.runtime.segmenter import RUNS
from tests.export.engine_bundles import pair_bundle
from tests.runtime.test_segmenter import make_bundle
from tests.synthetic import write_synthetic_dataset


def given_to(work: str, patch: pytest.MonkeyPatch, *command: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a command calls the function `work` with, once; it gets no further. "told" are the names of what tells how it goes."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def double(*given: Any, **named: Any) -> None:
        told = {name for name in ("progress", "notice", "say") if callable(named.get(name))}
        calls.append((given, {name: value for name, value in named.items() if name not in told}))
        if told:
            calls[0][1]["told"] = told
        raise CdiffError("so far")

    patch.setattr(work, double)
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert (result.exit_code, "error: so far" in result.stderr) == (2, True), result.output
    (call,) = calls
    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_synthetic_dataset(tmp_path / "data", {"Training": 2, "Validation": 2}, raters=3, shape=(16, 16, 2))


def test_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan, model = tmp_path / "a.nii", make_bundle(tmp_path / "tiny")
    scan.touch()
    cut = ("--slices", "1:3", "--slice-axis", 0, "--at", "1,2,3", "--shrink", 2, "--series", 4)
    command = ("segment", scan, "--model", model)
    (_, path), named = given_to("cdiff.runtime.segmenter.Segmenter.prepare", monkeypatch, *command, *cut)
    assert path == scan
    assert named == {"slices": "1:3", "slice_axis": 0, "at": "1,2,3", "shrink": 2, "series": 4}
    chain = ("--runs", 3, "--steps", 2, "--sampler", "ddim", "--levels", "vote", "--zooms", "1,2", "--seed", 5)
    with monkeypatch.context() as patch:
        patch.setattr("cdiff.runtime.segmenter.Segmenter.prepare", lambda *_, **__: "ready")
        (_, ready), named = given_to("cdiff.runtime.segmenter.Segmenter.segment", patch, *command, *chain)
    assert ready == "ready"
    assert named == {
        **{"runs": 3, "steps": 2, "sampler": "ddim", "fast": False, "combine": "vote", "mirror": None, "zooms": (1, 2)},
        **{"seed": 5, "told": {"progress"}},
    }
    files: tuple[object, ...] = ("--no-preview", "--page", "--dicom-seg", "-o", tmp_path / "maps")
    given, named = given_to("cdiff.runtime.results.must_be_free", monkeypatch, *command, *files)
    assert given[:2] == (tmp_path / "maps", "a")
    assert named == {"preview": False, "page": True, "dicom_seg": True}
    seen: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr("cdiff.runtime.results.must_be_free", lambda *_, **__: None)
        patch.setattr("cdiff.runtime.dicom_seg.must_allow_dicom_seg", seen.append)
        patch.setattr("cdiff.runtime.segmenter.Segmenter.prepare", lambda *_, **__: SimpleNamespace(scan="as read"))
        patch.setattr("cdiff.runtime.segmenter.Segmenter.segment", lambda *_, **__: object.__new__(Result))
        (_, *where), named = given_to("cdiff.runtime.results.Result.save", patch, *command, *files)
    assert (where, seen) == ([tmp_path / "maps", "a"], ["as read"])
    assert named == {"preview": False, "page": True, "dicom_seg": True}
    given, named = given_to("cdiff.load", monkeypatch, *command, "--engine", "torch", "--device", "cuda:1")
    assert (given, named.pop("build") is not None) == ((model,), True)
    assert named == {"engine": "torch", "device": "cuda:1"}


def test_evaluate(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = ("--runs", 3, "--steps", 2, "--sampler", "ddim", "--fast", "--levels", "vote", "--mirror", "--seed", 5)
    which = ("--split", "train", "--group", "c.", "--all-slices", "--slices-per-case", 2)
    command = ("evaluate", "--data", data, "--model", make_bundle(tmp_path / "tiny"), *chain, *which, "--raters", "use")
    (_, cases, protocol), named = given_to(
        "cdiff.runtime.scoring.evaluate.score_cases", monkeypatch, *command, "--limit", 1
    )
    assert [case.name for case in cases] == ["case01"]
    assert protocol == Protocol(
        runs=3, steps=2, sampler="ddim", fast=True, combine="vote", mirror=True, seed=5, all_slices=True,
        slices_per_case=2, raters="use",
    )  # fmt: skip
    assert named.pop("write") is not None
    about = {"data": {"folder": "data", "split": "train", "task": None}, "group": "c."}
    assert named == {**about, "out": None, "told": {"progress", "notice"}}
    more = (*command, "--report", tmp_path / "report", "--steps-curve", "1,2", "--worst", 3, "--limit", 2)
    known: dict[str, Any] = {"a": "report"}
    monkeypatch.setattr("cdiff.runtime.scoring.evaluate.score_cases", lambda *_, **__: known)
    (_, cases, *given), named = given_to("cdiff.runtime.scoring.publish.sweep_steps", monkeypatch, *more)
    assert (len(cases), given) == (2, [protocol, (1, 2), tmp_path / "report"])
    assert named == {**about, "known": known, "told": {"progress", "notice"}}
    monkeypatch.setattr("cdiff.runtime.scoring.publish.sweep_steps", lambda *_, **__: None)
    worst: list[object] = []
    bars: list[tuple[str, bool]] = []
    monkeypatch.setattr("cdiff.runtime.scoring.worst.worst_slices", lambda *given: worst.extend(given) or "the worst")
    monkeypatch.setattr("cdiff.cli.evaluate.Meter", lambda label, quiet: bars.append((label, quiet)) or nullcontext())
    given, _ = given_to("cdiff.runtime.scoring.worst.write_worst", monkeypatch, *more, "-q")
    assert worst == [known, cases, 3]
    assert (given[0], *given[2:4]) == (tmp_path / "report/worst.png", "the worst", protocol)
    assert bars == [("evaluate", True), ("steps", True), ("worst", True)]
    which = ("--task", "task02", "--layout", "brats", "--labels", "1,4")
    given, named = given_to("cdiff.runtime.data.cases.find_cases", monkeypatch, *command, *which)
    assert (given, named) == ((data, "task02"), {"layout": "brats", "labels": (1, 4)})


def test_evaluate_of_maps_that_are_drawn(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their masks are read as asked, or as they lie, for there is no model that was trained on some."""

    def double(maps: Path, cases: list[Case], notice: Callable[[str], None]) -> tuple[Path, int]:
        for line in ("of one map", "of one map"):
            notice(line)
        return maps, len(cases)

    monkeypatch.setattr("cdiff.runtime.scoring.written.WrittenMaps", double)
    monkeypatch.chdir(data)
    command, score = ("evaluate", "--data", ".", "--maps", tmp_path), "cdiff.runtime.scoring.evaluate.score_cases"
    report, copy = tmp_path / "report", tmp_path / "scores.json"
    asked = ("--labels", "1,4", "--masks-by", "header", "--limit", 1, "--json", copy)
    (source, cases, _), named = given_to(score, monkeypatch, *command, *asked)
    assert source == (tmp_path, 1)
    assert [(case.name, case.labels, case.masks_by) for case in cases] == [("case01", (1, 4), "header")]
    about = {"folder": "data", "split": "val", "task": None}
    assert named["data"] == about | {"labels": [1, 4], "masks_by": "header"}
    assert (named["out"], named["write"]) == (copy, write_json)
    (_, cases, _), named = given_to(score, monkeypatch, *command, "--report", report, "--json", copy)
    assert [(case.labels, case.masks_by) for case in cases] == [((), "array")] * 2
    assert named["data"] == about
    assert (named["out"], named["write"]) == (report / "scores.json", write_report)
    _, named = given_to(score, monkeypatch, *command, "--split", "train", "--task", "task01")
    assert named["data"] == {"folder": "data", "split": "train", "task": "task01"}
    for quiet in ((), ("-q",)):
        said = CliRunner().invoke(app, [*map(str, command), *quiet]).stderr.splitlines()
        which = () if quiet else ("split val (train left out): 2 cases",)
        assert said == [*which, "note: of one map", "error: so far"]


def test_evaluate_takes_what_the_training_held_out_and_says_each_note_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_synthetic_dataset(tmp_path / "data", 6, raters=2, shape=(16, 16, 1))
    (data / "case01/image_2.nii.gz").touch()
    split = partition(find_cases(data), data, 0.3, 5, 2)
    read = {"labels": [2], "masks_by": "header"}
    trained = {"data": {"held_out": dict(split.held_out or {}), "notes": list(split.notes), **read}}
    scored: list[str] = []

    def double(_: Any, cases: list[Case], *__: Any, notice: Callable[[str], None], **___: Any) -> None:
        scored[:] = [case.name for case in cases]
        assert {(case.labels, case.masks_by) for case in cases} == {((2,), "header")}
        for line in ("of one case", "of one case"):
            notice(line)
        raise CdiffError("so far")

    monkeypatch.setattr("cdiff.runtime.scoring.evaluate.score_cases", double)
    beside = "note: files beside those of a case, not used: image_2.nii.gz"
    other = "note: the model was trained on task02, but task01 is scored"
    for task, warned in (("task02", [other]), ("task1", [])):
        model = make_bundle(tmp_path / task, training=trained, task=f"tiny/{task}")
        command = ["evaluate", "--data", str(data), "--model", str(model)]
        first, *said, error = CliRunner().invoke(app, command).stderr.splitlines()
        assert scored == [case.name for case in split.val]
        assert 0 < len(scored) < 6
        assert first == beside
        assert said[1:] == [
            f"split val (held out of this data when the model was trained): {len(scored)} cases",
            *warned,
            "labels 2 count as inside, as when the model was trained",
            "masks are laid where their headers put them, as when the model was trained",
            "note: of one case",
        ]
        assert error == "error: so far"
        said = CliRunner().invoke(app, [*command, "-q"]).stderr.splitlines()
        assert said == [beside, *warned, "note: of one case", error]


def test_data_check(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("data", "check", data, "--slice-axis", 1, "--sheet", tmp_path / "sheet.png")
    given, _ = given_to("cdiff.runtime.pictures.sheet.write_sheet", monkeypatch, *command)
    assert (given[0], given[3]) == (tmp_path / "sheet.png", 1)
    which = ("--task", "task01", "--layout", "table", "--labels", "2,3", "--masks-by", "header")
    given, named = given_to("cdiff.runtime.data.datacheck.check_data", monkeypatch, *command, *which)
    assert given == (data, "task01")
    assert named == {"layout": "table", "labels": (2, 3), "masks_by": "header", "slice_axis": 1, "told": {"progress"}}
    given, named = given_to("cdiff.runtime.data.datacheck.check_data", monkeypatch, "data", "check", data)
    assert given == (data, None)
    assert named == {"layout": "auto", "labels": (), "masks_by": "array", "slice_axis": 2, "told": {"progress"}}


def test_train(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = ("--task", "task01", "--layout", "cases", "--labels", 1, "--masks-by", "header", "--variant", "annotator")
    how = ("--preset", "tiny", "--set", "lr=0.5", "--max-steps", 7, "--init", "other", "--device", "cuda:3", "-q")
    command = ("train", "--data", data, "--out", tmp_path / "run", *which, *how)
    (configure, *given), named = given_to("cdiff.train.trainer.train", monkeypatch, *command)
    assert (given, named.pop("console")) == ([data, tmp_path / "run"], err)
    assert named == {
        **{"resume": False, "max_steps": 7, "dry_run": False, "init": Path("other"), "device": "cuda:3", "quiet": True}
    }
    config = configure()
    assert (config.network.variant, config.training.lr, config.network.image_size) == ("annotator", 0.5, 32)
    assert (config.data.task, config.data.layout, config.data.labels) == ("task01", "cases", (1,))
    assert config.data.masks_by == "header"
    (configure, *_), named = given_to("cdiff.train.trainer.train", monkeypatch, *command, "--resume", "--dry-run")
    assert (named["resume"], named["dry_run"]) == (True, True)
    assert configure() == config, "a preset that is named counts with --resume too"


def test_import(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = ("--image-size", 64, "--mean", "1,2", "--std", "3,4")
    told = ("--args", "a.json", "--from", "consensus", "--option", "num_heads=1", "--option", "dropout=0")
    command = ("import", "ema.pt", "--out", "run", *told, *numbers, "--images", "train")
    given, named = given_to("cdiff.train.imported.importer.import_checkpoint", monkeypatch, *command)
    assert given == (Path("ema.pt"), Path("run"))
    assert named == {
        **{"args": Path("a.json"), "source": "consensus", "settings": ["num_heads=1", "dropout=0"], "image_size": 64},
        **{"mean": (1, 2), "std": (3, 4), "images": Path("train")},
    }


ENGINES: dict[str, Any] = {
    "refit": True, "version_compatible": True, "hardware_compatible": "ampere+", "workspace_bytes": 2**29
}  # fmt: skip


@pytest.mark.parametrize("rows", [None, 4])
def test_export(rows: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, free = pair_bundle(tmp_path / "bundle", precision="float16"), 2**22
    how = ("--refit", "--version-compatible", "--hardware-compatible", "ampere+", "--workspace", 0.5, "--runs", 60)
    command = ("export", bundle.path, *how, *(() if rows is None else ("--rows", rows)))
    rtx = (*command, "--engine", "tensorrt-rtx", "--capability", "8.9", "--capability", "12.0")
    with monkeypatch.context() as patch:
        given, named = given_to("cdiff.cli.export.check", patch, *rtx)
        assert (given, named) == (("tensorrt-rtx", BuildOptions(**ENGINES), 60, rows, ["8.9", "12.0"]), {})
    monkeypatch.setattr("cdiff.cli.export.check", lambda *_: None)
    gpus = [Gpu("a card", "8.9", free)]
    monkeypatch.setattr("cdiff.runtime.gpus.visible_gpus", lambda: gpus)
    profile = profile_for(bundle.manifest, 60, free, max_rows=rows)
    assert rows or profile.max_rows < 180, "the memory must count for this to mean anything"
    for words, where in ((rtx, ("8.9", "12.0")), ((*command, "--engine", "tensorrt"), gpus[0])):
        given, named = given_to("cdiff.export.tensorrt.build_engines", monkeypatch, *words)
        assert (given[0].path, *given[1:]) == (bundle.path, words[words.index("--engine") + 1], where, profile)
        assert named == {"options": BuildOptions(**ENGINES), "told": {"progress", "say"}}
    given, _ = given_to("cdiff.export.tensorrt.build_engines", monkeypatch, *command, "--engine", "tensorrt-rtx")
    assert given[2] == RTX_CAPABILITIES["float16"] != RTX_CAPABILITIES["float32"]
    usual = ("export", bundle.path, "--engine", "tensorrt-rtx")
    given, _ = given_to("cdiff.export.tensorrt.build_engines", monkeypatch, *usual)
    assert given[3] == profile_for(bundle.manifest, RUNS, free) != profile_for(bundle.manifest, 1, free)
    graphs = ("--fp16", "--fast-steps", 3, "--zooms", "1,1.25")
    command = ("export", tmp_path / "run", "--out", tmp_path / "new", *graphs)
    given, named = given_to("cdiff.export.exporter.export_run", monkeypatch, *command)
    assert given == (tmp_path / "run", tmp_path / "new")
    assert named == {"fp16": True, "fast_steps": 3, "zooms": (1, 1.25), "told": {"progress"}}


def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = ("--model", "m", "--engine", "onnxruntime", "--device", "cuda:1", "--scan", "s.nii", "--slices", "2:3")
    how = ("--batch", "2,4", "--runs", 3, "--steps", 5, "--repeats", 2, "--threads", 6, "--compile")
    given, named = given_to("cdiff.benchmarks.benchmark.benchmark", monkeypatch, "benchmark", *what, *how)
    assert given == (Path("m"),)
    assert named == {
        **{"engine": "onnxruntime", "device": "cuda:1", "scan": Path("s.nii"), "slices": "2:3", "batches": (2, 4)},
        **{"runs": 3, "steps": 5, "repeats": 2, "threads": 6, "compiled": True, "told": {"progress", "notice"}},
    }
    given, named = given_to("cdiff.benchmarks.benchmark.benchmark", monkeypatch, "benchmark")
    assert given == (shipped_bundle(),)
    assert named == {
        **{"engine": "auto", "device": "cpu", "scan": None, "slices": None, "batches": (1, 8, 32), "runs": 4},
        **{"steps": None, "repeats": 3, "threads": None, "compiled": False, "told": {"progress", "notice"}},
    }
    given, _ = given_to("cdiff.export.exporter.export_run", monkeypatch, "benchmark", "--run", "run")
    assert given[0] == Path("run")
    both = CliRunner().invoke(app, ["benchmark", "--run", "run", "--model", "m"])
    assert (both.exit_code, "give one of them" in both.stderr) == (2, True)
