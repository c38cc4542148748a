"""The layers: what may import what, and that segmenting needs neither PyTorch nor the training code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from cdiff.benchmarks.gpu_tests import marked_files
from tests.conftest import REPOSITORY

LAYERS = ("runtime", "train", "export", "benchmarks", "cli")  # bottom first: a layer imports those before it
HEAVY = {"torch", "lightning_fabric", "onnx", "onnxscript", "safetensors", "tensorboard", "diffusers"}

# Runs a command in a Python where importing what its first argument names, the training code or the exporter is an error.
WITHOUT = """
import sys
from importlib.machinery import ModuleSpec

refused = sys.argv[1].split(",")
sys.argv = ["cdiff", *sys.argv[2:]]

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused or name.startswith(("cdiff.train", "cdiff.export")):
            return ModuleSpec(name, self)

    def create_module(self, spec):
        raise ImportError(f"this must not import {spec.name}")

sys.meta_path.insert(0, Refuse())
from cdiff.cli import main
main()
"""


def without(refused: set[str], command: list[str]) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-c", WITHOUT, ",".join(refused), *command]
    return subprocess.run(given, capture_output=True, text=True, check=False)


def imported_by(path: Path) -> set[str]:
    """Every module that a file names in an import, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_arrows_point_down_only(layer: str) -> None:
    above = {f"cdiff.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]}
    files = sorted((REPOSITORY / layer).rglob("*.py"))
    assert files
    for path in files:
        upward = [name for name in imported_by(path) if ".".join(name.split(".")[:2]) in above]
        assert not upward, f"{path.relative_to(REPOSITORY)} imports {upward}"


def test_runtime_never_names_what_segmenting_does_without() -> None:
    for path in sorted((REPOSITORY / "runtime").rglob("*.py")):
        heavy = HEAVY & {name.split(".")[0] for name in imported_by(path)}
        assert not heavy, f"{path.relative_to(REPOSITORY)} imports {heavy}"


def test_segmenting_imports_no_torch(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    scan = tiny_data / "Validation" / "case01" / "image.nii.gz"
    arguments = ["segment", str(scan), "--model", str(tiny_bundle), "--fast", "--runs", "2", "-o", str(tmp_path)]
    done = without(HEAVY, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("*_soft.nii.gz"))


@pytest.mark.parametrize("command", ["--help", "--version", "doctor", "segment --help", "segment nowhere.nii.gz"])
def test_small_commands_import_neither_torch_nor_matplotlib(command: str) -> None:
    done = without(HEAVY | {"matplotlib"}, command.split())
    assert done.returncode == (2 if "nowhere" in command else 0), done.stdout + done.stderr
    assert "must not import" not in done.stderr


@pytest.mark.parametrize("chosen", ["tests", "files"])
def test_tests_that_need_a_gpu_need_little_else(chosen: str) -> None:
    """A machine with a GPU may have PyTorch and what comes with it, NumPy and ONNX, and no network to fetch more from."""
    files = [str(path) for path in marked_files(REPOSITORY)]
    assert len(files) >= 3
    missing = ("nibabel", "safetensors", "typer", "matplotlib", "onnxscript")
    collect = f"import sys, pytest; sys.modules.update(dict.fromkeys({missing})); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", *([] if chosen == "tests" else files)]
    done = subprocess.run(
        [sys.executable, "-c", collect, *options], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected <= {str(Path(file).relative_to(REPOSITORY)) for file in files}
    assert "tests/export/test_torch_engine.py" in collected
