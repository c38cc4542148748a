"""`cdiff export --engine`: builds where it can, says when where it cannot, and refuses options that go together with nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cdiff.cli.app import app
from cdiff.runtime.bundle import Bundle
from cdiff.runtime.engines.trt import Gpu
from tests.export.engine_bundles import pair_bundle


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr("cdiff.runtime.gpus.visible_gpus", lambda: [])
    monkeypatch.setattr("cdiff.export.tensorrt.visible_gpus", lambda: [])
    return pair_bundle(tmp_path / "bundle")


def run(code: int, *arguments: object) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_tensorrt_without_a_gpu_says_when_it_will_build(bundle: Bundle) -> None:
    _, said = run(
        0, bundle.path, "--engine", "tensorrt", "--refit", "--version-compatible", "--hardware-compatible", "ampere+"
    )
    assert "at the first run" in said
    assert not bundle.engines.exists()


def test_a_bundle_that_is_there_can_be_served(bundle: Bundle, tmp_path: Path) -> None:
    printed, said = run(0, bundle.path, "--triton", tmp_path / "models")
    assert printed == f"{tmp_path / 'models/test'}\n"
    assert "engines" not in said, "none were asked for"
    assert (tmp_path / "models/test/1/bundle/manifest.json").is_file()


def test_a_server_without_the_engines_that_were_asked_for_is_told_of(bundle: Bundle, tmp_path: Path) -> None:
    _, said = run(0, bundle.path, "--engine", "tensorrt", "--triton", tmp_path / "models")
    assert "has no TensorRT engines, and its server builds none" in " ".join(said.split())


def test_a_model_that_is_served_already_is_said_before_engines_are_built(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(0, bundle.path, "--triton", tmp_path / "models")
    monkeypatch.setattr("cdiff.cli.export.build_ahead", lambda *_, **__: pytest.fail("built"))
    _, said = run(2, bundle.path, "--engine", "tensorrt", "--triton", tmp_path / "models")
    assert "models/test already exists" in said


def test_a_missing_tensorrt_is_said_at_once_where_its_gpu_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run is exported; on a machine without one it is not asked for."""
    monkeypatch.setattr("cdiff.runtime.gpus.visible_gpus", lambda: [Gpu("a card", "8.9", 2**30)])
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    _, said = run(2, tmp_path, "--out", tmp_path / "bundle", "--engine", "tensorrt")
    assert "is not installed" in said


def test_where_triton_reads_must_be_writable_before_anything_is_exported(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _, said = run(2, tiny_run, "--out", tmp_path / "bundle", "--triton", tmp_path / "file")
    assert "file is not a folder" in said
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--capability", "8.9", "--capability", "99.9"], "does not build for compute capability 99.9; it knows 7.5"),
        (["--capability", "89"], "does not build for compute capability 89; it knows 7.5"),
        (["--refit"], "builds engines that can be refitted only on a machine with a GPU"),
    ],
)
def test_what_rtx_cannot_build_is_said_before_anything_is_exported(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], reason: str
) -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: pip install '.[rtx]' in cdiff's clone"
    )
    monkeypatch.setattr("cdiff.export.tensorrt.visible_gpus", lambda: [])
    _, said = run(2, tiny_run, "--out", tmp_path / "bundle", "--engine", "tensorrt-rtx", *options)
    assert reason in said
    assert said.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


def test_tensorrt_for_rtx_builds_without_a_gpu(bundle: Bundle) -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: pip install '.[rtx]' in cdiff's clone"
    )
    arguments = (bundle.path, "--engine", "tensorrt-rtx", "--capability", "8.9", "--capability", "12.0", "--rows", 4)
    printed, said = run(0, *arguments)
    assert "8.9, 12.0, up to 4 rows" in said
    engines = [Path(line) for line in printed.splitlines()]
    assert [engine.name for engine in engines] == ["encoder.engine", "denoiser.engine"]
    assert all(engine.is_file() for engine in engines)
    times = [engine.stat().st_mtime_ns for engine in engines]
    assert run(0, *arguments)[0] == printed
    assert [engine.stat().st_mtime_ns for engine in engines] == times, "what is there is not built again"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "is a bundle already"),
        (["--engine", "tensorrt-rtx", "--fp16"], "in its own precision"),
        (["--engine", "tensorrt-rtx", "--out", "elsewhere"], "in place"),
        (["--engine", "tensorrt-rtx", "--fast-steps", "1"], "give a run folder"),
        (["--engine", "tensorrt-rtx", "--zooms", "1,2"], "give a run folder"),
        (["--rows", "4"], "need --engine"),
        (["--runs", "4"], "need --engine"),
        (["--refit"], "need --engine"),
        (["--capability", "8.9"], "need --engine"),
        (["--engine", "tensorrt", "--capability", "8.9"], "--capability is for --engine tensorrt-rtx"),
        (["--engine", "tensorrt-rtx", "--version-compatible"], "no version-compatible engines"),
        (["--engine", "tensorrt-rtx", "--hardware-compatible", "ampere+"], "--hardware-compatible"),
    ],
)
def test_options_that_do_not_go_together(bundle: Bundle, options: list[str], reason: str) -> None:
    _, said = run(2, bundle.path, *options)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert reason in said
    assert not bundle.engines.exists()


@pytest.mark.parametrize("workspace", ["1e999", "nan", "0"])
def test_a_workspace_that_is_no_size(bundle: Bundle, workspace: str) -> None:
    assert "Invalid value for '--workspace'" in run(2, bundle.path, "--engine", "tensorrt", "--workspace", workspace)[1]


def test_a_run_that_is_not_there_and_one_without_an_output(tmp_path: Path) -> None:
    assert "does not exist" in run(2, tmp_path / "nothing")[1]
    assert "--out BUNDLE" in run(2, tmp_path)[1]


def test_a_library_that_is_missing_is_said_before_the_graphs_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    _, said = run(2, tmp_path, "--out", tmp_path / "bundle", "--engine", "tensorrt-rtx")
    assert "'.[rtx]'" in said
