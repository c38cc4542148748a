"""Fixtures that every test folder shares: the real data when it is there, a tiny trained run, its bundle."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import cdiff  # noqa: F401  before a test imports ONNX Runtime, whose telemetry is off from here on
from cdiff.benchmarks.gpu_tests import MARK
from tests.synthetic import write_synthetic_dataset

REPOSITORY = Path(__file__).resolve().parents[1]
Made = Callable[[str, Callable[[Path], object]], Path]

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every program that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def real_data() -> Path:
    """Where the real data lies when it is there."""
    named = os.environ.get("CDIFF_DATA")
    return Path(named) if named else REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def brats_slices() -> Path:
    """The folder with training and testing of the BraTS slices in the implicit-ensemble layout."""
    for folder in (real_data() / "brats_slices", real_data().parent / "brats_slices"):
        if (folder / "training").is_dir():
            return folder
    pytest.skip(f"real data not found: set CDIFF_DATA to a folder that holds brats_slices ({real_data()} does not)")


@pytest.fixture(scope="session")
def lidc() -> Path:
    """The folder with Training, Validation and Testing of the four-reader LIDC nodules."""
    root = real_data()
    for folder in (root, root / "lidc4"):
        if (folder / "Testing").is_dir():
            return folder
    pytest.skip(f"real data not found in {root}: set CDIFF_DATA to a folder that holds lidc4/Testing")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of a name and what makes a folder, a copy of that folder, which only the first of the processes that share the tests has made."""
    from filelock import FileLock  # PyTorch brings it

    mine = tmp_path_factory.getbasetemp()
    shared = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "tiny"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.made").exists():
                (shared / name).mkdir(exist_ok=True)
                make(shared / name / "tiny")  # a bundle has its folder's name
                (shared / f"{name}.made").touch()
        return Path(shutil.copytree(shared / name / "tiny", tmp_path_factory.mktemp(name) / "tiny"))

    return made


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few synthetic 32 x 32 x 4 cases, three raters, with Training and Validation folders."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    return write_synthetic_dataset(root, {"Training": 4, "Validation": 2}, raters=3, shape=(32, 32, 4))


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tiny: Made) -> Path:
    """A run folder: a few steps of the preset ``tiny``; its weights are real but barely trained."""

    def make(run: Path) -> None:
        from cdiff.train.presets import preset
        from cdiff.train.trainer import train

        train(preset("tiny"), tiny_data, run, max_steps=4)

    return tiny("run", make)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, tiny: Made) -> Path:
    """The bundle folder exported from ``tiny_run``."""

    def make(bundle: Path) -> None:
        from cdiff.export.exporter import export_run

        export_run(tiny_run, bundle)

    return tiny("bundle", make)


@pytest.fixture(autouse=True)
def _one_registry() -> None:
    """PyTorch makes its registry of ONNX functions anew for each graph, in a second of the five that a graph takes: the tests of a process share one."""
    kind = getattr(sys.modules.get("torch.onnx._internal.exporter._registration"), "ONNXRegistry", None)
    if kind is not None and not hasattr(kind.from_torchlib, "cache_info"):
        kind.from_torchlib = staticmethod(functools.cache(kind.from_torchlib))


def pytest_configure() -> None:
    """Each of several processes that share the tests keeps to a core of its own, and so does all that it starts.

    ONNX Runtime would start a thread a core in each, and these wait for one another in a loop: with two processes on two cores the same
    calls took more than twice the processor's time.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` a file without such a test is not even imported: a machine with a GPU may lack what it needs."""
    unwanted = config.option.markexpr == "gpu" and collection_path.suffix == ".py"
    return True if unwanted and not MARK.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu``, with the reason, where no NVIDIA GPU is to be seen; and order the files, those with long tests first.

    Files are shared out whole among processes, and a long one left for the end would keep the others waiting: those of few tests come last.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists():
        return
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: none on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def tables() -> ModuleType:
    """The script that fills the pages' tables, which is in no package, with what lies beside it on the path as where it is run."""
    spec = importlib.util.spec_from_file_location("make_tables", REPOSITORY / "docs" / "make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "docs"))
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def peer_tables(tables: ModuleType) -> ModuleType:
    """What `tables` has the rivals' tables from."""
    return sys.modules["peer_tables"]
