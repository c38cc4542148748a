"""The wheel: what it carries, the one name it claims, and that it segments from outside the clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

PACKAGES = ("cdiff", "train", "export", "runtime", "cli", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that nothing is left in the clone."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", str(out), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would be ignored" not in done.stdout + done.stderr, (
        "setuptools warns of a folder that it may leave out one day"
    )
    (built,) = out.glob("cdiff-*.whl")
    return built


def members(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_claims_one_name(wheel: Path) -> None:
    top = {name.split("/")[0] for name in members(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cdiff"}


def test_wheel_carries_every_module(wheel: Path) -> None:
    expected = set()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            inside = path.relative_to(REPOSITORY)
            expected.add(inside.as_posix() if package == "cdiff" else f"cdiff/{inside.as_posix()}")
    assert not expected - members(wheel), "a folder is missing from [tool.setuptools] packages"


def test_wheel_carries_model_demo_licence_and_type_marker(wheel: Path) -> None:
    data = [p for folder in ("demo", "models") for p in (REPOSITORY / "cdiff" / folder).rglob("*") if p.is_file()]
    expected = {p.relative_to(REPOSITORY).as_posix() for p in data}
    inside = members(wheel)
    assert not expected - inside
    assert {"cdiff/demo/image.nii.gz", "cdiff/demo/CREDIT.txt", "cdiff/py.typed"} <= inside
    assert "cdiff/runtime/device/kernels.cu" in inside, "the kernels are compiled where they run"
    assert {"cdiff/models/lidc/manifest.json", "cdiff/models/lidc/denoiser.onnx"} <= inside
    assert any(re.fullmatch(r"cdiff-.*\.dist-info/licenses/LICENSE", name) for name in inside)


def test_shipped_bundle_is_at_most_30_mb() -> None:
    sizes = [p.stat().st_size for p in (REPOSITORY / "cdiff" / "models").rglob("*") if p.is_file()]
    assert sizes
    assert sum(sizes) <= 30_000_000


@pytest.mark.slow
def test_installed_wheel_segments_its_demo_scan(wheel: Path, tmp_path: Path) -> None:
    """Installed elsewhere, run from elsewhere: the code, the model and the scan are the wheel's own."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    program = (
        "import pathlib, cdiff, cdiff.runtime.segmenter as loop\n"
        "root = pathlib.Path(cdiff.__file__).parent\n"
        "assert pathlib.Path(loop.__file__).is_relative_to(root), loop.__file__\n"
        "print(root)\n"
        "result = cdiff.load().segment(root / 'demo' / 'image.nii.gz', fast=True, runs=1, slices=slice(2, 4))\n"
        "print(result.soft[..., 2:4].max())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    root, largest = done.stdout.split()
    assert Path(root).is_relative_to(site)
    assert 0.5 <= float(largest) <= 1.0, "the demo scan holds a nodule that most readers drew"


def test_python_started_in_the_clone_finds_every_package() -> None:
    """Also where cdiff was installed by copying: the clone's own folder of that name comes first on the path."""
    program = (
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'Editable' not in getattr(finder, '__name__', '')]\n"
        "import cdiff.runtime.sampling.schedule, cdiff.cli\n"
        "print(cdiff.runtime.sampling.schedule.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == REPOSITORY / "runtime" / "sampling" / "schedule.py"


def test_python_started_above_a_clone_named_cdiff_finds_the_package(tmp_path: Path) -> None:
    """`git clone ...; cd cdiff; make demo`, then Python from where one came: a folder without __init__.py, and of the package's name."""
    if not (Path(sysconfig.get_path("purelib")) / "cdiff-clone.pth").exists():
        pytest.skip("this environment was not made by the Makefile, which puts the clone on Python's path")
    (tmp_path / "cdiff").symlink_to(REPOSITORY)
    program = "import cdiff, cdiff.runtime.host as host; print(cdiff.load.__name__, host.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == ["load", f"{REPOSITORY / 'runtime' / 'host.py'}\n"]


# The `cdiff` command in a clone of which nothing was installed: no import hook of an editable install, no metadata.
NOT_INSTALLED = """
import importlib.metadata, runpy, sys

def from_name(name, real=importlib.metadata.Distribution.from_name):
    if name == "cdiff":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

importlib.metadata.Distribution.from_name = from_name
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
runpy.run_module("cdiff.cli", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("command", ["doctor", "segment"])
def test_the_clone_runs_where_nothing_was_installed(command: str, tmp_path: Path) -> None:
    """On a GPU machine without a network; the version that reports state must not come from an installation alone."""
    scan = ["cdiff/demo", "--fast", "--runs", "1", "--slices", "3:4", "-o", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED, command, *(scan if command == "segment" else [])],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if command == "segment":
        assert json.loads((tmp_path / "demo.json").read_text())["cdiff"] == "0+clone"


@pytest.mark.parametrize("start", ["from cdiff.cli import main; main()", "import runpy; runpy.run_module('cdiff.cli')"])
def test_a_system_without_locks_is_told_in_a_line(start: str) -> None:
    """As Windows is."""
    hidden = f"import sys; sys.modules['fcntl'] = None; {start}"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: cdiff needs Linux: this Python has no file locks (fcntl); on Windows use WSL\n"


def test_a_half_made_virtual_environment_is_made_anew(tmp_path: Path) -> None:
    """Debian's Python without python3-venv leaves one that has no pip, and says what to install: the next `make demo` must go on."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)

    def would_make_one() -> bool:
        dry = ["make", "--dry-run", "-C", str(tmp_path), "demo", "PYTHON=python3"]
        return "python3 -m venv .venv" in subprocess.run(dry, capture_output=True, text=True, check=True).stdout

    assert would_make_one()
    (programs / "pip").touch()
    assert not would_make_one()


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): pin for name, pin in pins.items()}
    assert not [pin for pin in pins.values() if "+" in pin], "a local version suffix resolves on one machine only"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [
        one for name in ("cpu", "gpu", "train", "bench", "rtx", "formats", "test") for one in extras[name]
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != "cdiff":  # an extra that names another one of this project
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), str(requirement)


def test_constraints_agree_with_the_cuda_build_of_torch() -> None:
    """It asks for NVRTC of its own CUDA version: with another one pinned, the tests install only where a CPU build is at hand."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    cuda = pins["cuda-toolkit"].split(".")[:2]
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-cupti"):
        assert pins[name].split(".")[:2] == cuda, name


@pytest.mark.parametrize(
    ("system", "machine", "named"),
    [("linux", "x86_64", True), ("linux", "aarch64", True), ("darwin", "arm64", False), ("darwin", "x86_64", False)],
)
def test_the_rtx_extra_installs_wherever_there_are_wheels(system: str, machine: str, named: bool) -> None:
    """What lacks TensorRT for RTX says to install this extra: on ARM it named nothing, and pip was content."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    place = {"sys_platform": system, "platform_machine": machine}
    markers = [Requirement(one).marker for one in project["optional-dependencies"]["rtx"]]
    assert [marker is None or marker.evaluate(place) for marker in markers] == [named, named]


def test_the_gpu_extra_brings_cudas_libraries() -> None:
    """onnxruntime-gpu alone asks for none of them: its CUDA provider would not start on a machine that has a driver alone."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (runtime,) = [one for one in project["optional-dependencies"]["gpu"] if one.startswith("onnxruntime-gpu")]
    assert set(re.findall(r"\w+", runtime.partition("[")[2].partition("]")[0])) == {"cuda", "cudnn"}
