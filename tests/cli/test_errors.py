"""What a user's mistakes get: one line that says what to do, on stderr, and the right exit code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cdiff
from cdiff.cli.app import app
from cdiff.cli.extras import needs
from cdiff.runtime.errors import CdiffError
from tests.runtime.scan_files import PIXDIM, nifti, patched, voxels
from tests.synthetic import write_synthetic_dataset

CDIFF = Path(sys.executable).with_name("cdiff")
MODULE = [sys.executable, "-m", "cdiff.cli"]


def fails(code: int, *arguments: object) -> str:
    """Run the command in this process; it must end with `code`. Returns what it wrote to stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stderr


def one_line(*arguments: object) -> str:
    text = fails(2, *arguments)
    assert text.startswith("error: ")
    assert text.count("\n") == 1, text
    return text


def test_of_a_machines_processes_one_says_what_is_wrong_with_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun gives all of them the same; errors past these words are told among the processes (tests/train/test_fabric.py)."""
    wrong = ("train", "--data", "data", "--out", "run", "--steps", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "No such option" in fails(2, *wrong)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fails(2, *wrong) == ""


def test_no_scan() -> None:
    assert "cdiff segment SCAN" in one_line("segment")


def test_a_scan_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in one_line("segment", tmp_path / "a.nii.gz")
    assert "does not exist" in one_line("segment", "-i", tmp_path / "a.nii.gz")


@pytest.mark.parametrize(
    "command", [("info",), ("data", "check"), ("evaluate", "--data"), ("train", "--out", "run", "--data"), ("export",)]
)
def test_a_name_that_no_file_can_have(command: tuple[str, ...], tmp_path: Path) -> None:
    """A list of names or what a variable holds, where a path is meant."""
    assert "too long" in one_line(*command, tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("command", "before"),
    [
        (("segment", ""), "segment"),
        (("segment", "-q", "--", ""), "--"),
        (("segment", "scan.nii.gz", "-o", ""), "-o"),
        (("evaluate", "--data", "data", "--report="), "--report="),
        (("data", "check", "data", "--labels", ""), "--labels"),
        (("train", "--data", "data", "--out=", "--preset", "tiny"), "--out="),
    ],
)
def test_a_shell_s_variable_that_is_not_set(
    command: tuple[str, ...], before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty path is the current folder to Python: its scans were segmented, or results written there, and nobody had asked for that."""
    write_synthetic_dataset(tmp_path / "data", 1, raters=3, shape=(16, 16, 2))
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    said = f"error: what follows {before} is empty; give a value (is a variable of the shell not set?)\n"
    assert one_line(*command) == said
    assert sorted(tmp_path.rglob("*")) == there


def test_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bundle's `--fast` may have a million runs, and NumPy says how much it lacks."""

    def lacking(*_: object) -> None:
        raise MemoryError("Unable to allocate 7.63 GiB")

    monkeypatch.setattr("cdiff.runtime.bundle.open_bundle", lacking)
    assert "the memory is not enough (Unable to allocate 7.63 GiB)" in one_line("info", tmp_path)


def test_more_memory_than_pytorch_gets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a run's config.json with a batch of a thousand millions asks for; its error is of no kind of its own."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("cdiff.runtime.bundle.open_bundle", lambda *_, **__: torch.empty(10**15))
    assert "the memory is not enough ([enforce fail" in one_line("info", tmp_path)


def test_more_threads_than_the_system_allows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a login node, or in a container with a limit of tasks."""
    said = "can't start new thread"
    monkeypatch.setattr("cdiff.runtime.bundle.open_bundle", lambda _: (_ for _ in ()).throw(RuntimeError(said)))
    assert "no more threads can be started" in one_line("info", tmp_path)
    said = "another"
    result = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert isinstance(result.exception, RuntimeError), "a fault of ours is not taken for that"


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    assert "manifest.json" in one_line("info", tmp_path)


def test_data_that_is_not_there(tmp_path: Path) -> None:
    for command in (("evaluate",), ("train", "--preset", "tiny", "--out", tmp_path / "run")):
        assert str(tmp_path) in one_line(*command, "--data", tmp_path)
    assert not (tmp_path / "run/checkpoints").exists()


def test_settings_that_do_not_exist(tmp_path: Path) -> None:
    train = ("train", "--data", tmp_path, "--out", tmp_path / "run")
    assert "tiny" in one_line(*train, "--preset", "huge")
    assert "levels" in one_line(*train, "--set", "nonsense=1")
    assert "key=value" in one_line(*train, "--set", "levels")


def test_export_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert str(tmp_path) in one_line("export", tmp_path, "--out", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_usage_errors_name_the_option() -> None:
    assert "--runs" in fails(2, "segment", "scan.nii.gz", "--runs", "0")
    assert "--json" in fails(2, "evaluate", "--data", "x", "--jsn", "y")


def test_a_bad_slice_range_an_engine_and_a_device(tiny_bundle: Path, tiny_data: Path) -> None:
    scan = tiny_data / "Validation/case01/image.nii.gz"
    chain = ("--model", tiny_bundle, "--runs", 1, "--steps", 2)
    assert "0 <= A < B <= 4" in one_line("segment", scan, *chain, "-q", "--slices", "3:9")
    assert "A:B" in one_line("segment", scan, *chain, "-q", "--slices", "three")
    assert "onnxruntime" in one_line("segment", scan, *chain, "--engine", "abacus")
    assert "cuda:7" in one_line("segment", scan, *chain, "--device", "cuda:7")


def test_a_place_that_cannot_be(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    scan = tiny_data / "Validation/case01/image.nii.gz"
    assert "framing 'resize' looks at the whole" in one_line(
        "segment", scan, "--model", tiny_bundle, "-q", "--at", "1,1,1"
    )
    several = one_line("segment", tiny_data / "Validation", "-q", "--at", "1,1,1")
    assert f"--at names a place in one scan, but {tiny_data / 'Validation'} holds 2" in several
    out = ("-o", tmp_path / "maps", "-q", "--fast")
    assert "0 to 31" in one_line("segment", scan, *out, "--at", "32,1,1")
    assert "give a voxel in whole numbers" in one_line("segment", scan, *out, "--at", "1;1;1")
    assert "leave out" in one_line("segment", scan, *out, "--at", "1,1,1", "--slices", "2:4")
    assert not (tmp_path / "maps").exists()


def test_one_bad_scan_does_not_stop_a_folder(tiny_bundle: Path, tiny_data: Path, tmp_path: Path) -> None:
    scans, maps = tmp_path / "scans", tmp_path / "maps"
    scans.mkdir()
    source = (tiny_data / "Validation/case01/image.nii.gz").read_bytes()
    (scans / "a_truncated.nii.gz").write_bytes(source[: len(source) // 2])
    (scans / "b_good.nii.gz").write_bytes(source)
    (scans / "c_text.nii").write_text("not a scan")
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(scans / "d_flat.png")
    error = fails(3, "segment", scans, "--model", tiny_bundle, "-o", maps, "--runs", 1, "--steps", 2, "-q")
    assert {path.name for path in maps.glob("*.json")} == {"b_good.json", "d_flat.json"}
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert [line.split(":")[1].strip() for line in lines[:2]] == ["a_truncated", "c_text"]
    assert "2 of 4 scans failed" in lines[-1]
    assert len(lines) == 3


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(b"read later")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("cdiff.load", None)
    for out in ("file", "file/below"):
        assert "is not a folder" in one_line("segment", tmp_path / "scan.nii.gz", "-o", tmp_path / out)
    monkeypatch.setattr("os.access", lambda path, mode: mode == os.R_OK)  # root may write anywhere
    assert "permission denied" in one_line("segment", tmp_path / "scan.nii.gz", "-o", tmp_path / "new/maps")
    assert not (tmp_path / "new").exists()


def test_files_that_are_not_ours_are_not_replaced(
    tiny_bundle: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the engine works on the scan, and the other scans of the folder are done."""
    source = (tiny_data / "Validation/case01/image.nii.gz").read_bytes()
    for name in ("a.nii.gz", "b.nii.gz", "b_mask.nii.gz"):
        (tmp_path / name).write_bytes(source)
    (tmp_path / "a.json").write_text('{"Modality": "CT"}')
    chain = ("--model", tiny_bundle, "-o", tmp_path, "--runs", 1, "--steps", 1, "--no-preview", "-q")
    error = fails(3, "segment", tmp_path, *chain)
    assert "a.json exists" in error
    assert "b_mask.nii.gz exists" in error
    assert (tmp_path / "b_mask.nii.gz").read_bytes() == source
    assert (tmp_path / "b_mask.json").is_file()
    monkeypatch.setattr("cdiff.runtime.segmenter.Segmenter.segment", None)
    assert "a.json exists" in one_line("segment", tmp_path / "a.nii.gz", *chain)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(tiny_bundle: Path, tmp_path: Path) -> None:
    data = write_synthetic_dataset(tmp_path / "data", 1, raters=1, shape=(64, 64, 40))
    maps = tmp_path / "maps"
    process = subprocess.Popen(
        [CDIFF, "segment", data / "case01", "--model", tiny_bundle, "-o", maps, "--runs", "50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert "onnxruntime" in process.stderr.readline()  # loaded; segmenting takes far longer than what follows
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.strip().endswith("error: interrupted")
    assert not maps.exists() or list(maps.iterdir()) == []


def test_a_disk_that_is_full_where_stdout_goes_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MODULE, "info", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: stdout or a temporary file: no space left on device; ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which nothing may be seen, by the superuser either."""
    folder = tmp_path / "closed"
    see = os.stat

    def look(path: object, **how: bool) -> os.stat_result:
        if isinstance(path, str | Path) and folder in Path(path).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return see(path, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", look)
    return folder


def test_what_lies_in_a_closed_folder_is_one_line(closed: Path, tiny_data: Path, tmp_path: Path) -> None:
    scan = tiny_data / "Validation/case01/image.nii.gz"
    for command in (
        ("segment", closed / "a.nii.gz"),
        ("segment", scan, "--model", closed / "bundle"),
        ("info", closed / "bundle"),
        ("train", "--data", tiny_data, "--preset", "tiny", "--out", closed / "run"),
        ("train", "--data", tiny_data, "--preset", "tiny", "--out", tmp_path / "run", "--init", closed / "run"),
        ("evaluate", "--data", closed / "data"),
        ("data", "check", closed / "data"),
        ("export", closed / "run"),
        ("import", closed / "a.pt", "--out", tmp_path / "run"),
    ):
        line = one_line(*command).lower()
        assert str(closed).lower() in line
        assert "permission denied" in line


def test_a_scan_in_a_closed_folder_does_not_stop_the_others(closed: Path, tiny_bundle: Path, tiny_data: Path) -> None:
    scan = tiny_data / "Validation/case01/image.nii.gz"
    model = cdiff.load(tiny_bundle)
    first, second = model.segment_many([closed / "a.nii.gz", scan], runs=1, steps=1)
    assert "cannot be reached: permission denied" in str(first.error)
    assert second.error is None


def test_what_a_library_mends_in_a_header_is_not_the_users_business(tiny_bundle: Path, tmp_path: Path) -> None:
    """nibabel said so in a line without the file's name, and of a 2-D image without a third spacing nothing is wrong."""
    path = patched(nifti(tmp_path / "flat.nii", voxels(20, 20)), PIXDIM + 12, "<f", 0)
    command = [*MODULE, "segment", str(path), "-o", str(tmp_path / "maps"), "--model", str(tiny_bundle), "--fast", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    notes = json.loads((tmp_path / "maps/flat.json").read_text())["warnings"]
    assert (done.returncode, done.stderr.splitlines()) == (0, [f"note: flat: {note}" for note in notes])


def test_a_current_folder_that_was_deleted_is_told(tmp_path: Path, tiny_data: Path) -> None:
    """Intel's library ended the process as PyTorch was imported: it could not load itself, it said."""
    (gone := tmp_path / "gone").mkdir()
    command = [*MODULE, "train", "--data", tiny_data, "--preset", "tiny", "--out", tmp_path / "run"]
    delete = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.argv[1], sys.argv[1:])"
    start = {"PYTHONPATH": str(Path(cdiff.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", delete, *command],
        cwd=gone, env=os.environ | start, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: training cannot start in a folder that was deleted; change to one that exists (cd)\n"


def test_a_device_is_not_replaced_by_results(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the work."""
    os.mkfifo(pipe := tmp_path / "pipe")
    for work in ("cdiff.load", "cdiff.runtime.data.datacheck.check_data", "cdiff.benchmarks.benchmark.benchmark"):
        monkeypatch.setattr(work, None)
    check, evaluate = ("data", "check", tiny_data), ("evaluate", "--data", tiny_data)
    for command in ((*check, "--json"), (*check, "--sheet"), (*evaluate, "--json"), ("benchmark", "--json")):
        assert "pipe is a device or a pipe" in one_line(*command, pipe)
        assert f"{tmp_path} is a folder; name a file to write to" in one_line(*command, tmp_path)


def test_no_result_replaces_what_is_read(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table that names the cases, or a scan of theirs, was gone."""
    monkeypatch.chdir(tmp_path)
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    case = next(path.parent for path in data.rglob("image.nii.gz"))
    images = sorted(f"data/{path.relative_to(data)}" for path in case.iterdir())
    pictures = [data / f"{name}.png" for name in ("slice", "anna", "ben", "carl")]
    for path in pictures:
        Image.fromarray(np.eye(32, dtype=np.uint8)).save(path)
    rows = "one," + ",".join(images), "two," + ",".join(f"data/{path.name}" for path in pictures)
    (table := tmp_path / "table.csv").write_text("\n".join(("case,image,mask1,mask2,mask3", *rows, "")))
    before = {path: path.read_bytes() for path in (table, *case.iterdir(), *pictures)}
    monkeypatch.setattr("cdiff.benchmarks.benchmark.benchmark", None)
    for command in (
        ("data", "check", table, "--json"),
        ("data", "check", table, "--sheet"),
        ("evaluate", "--data", table, "--json"),
    ):
        for path in (table, pictures[0], pictures[2]):
            assert f"{path} is one of the files that are read, and would be replaced" in fails(2, *command, path)
    # A table that the folder holds, too, here with the name that a report's own has; and numbers to be shown beside.
    (alone := tmp_path / "study").mkdir()
    (there := alone / "cases.csv").write_text(table.read_text().replace("data/", f"{data}/"))
    (numbers := alone / "scores.csv").write_text("table,whose,data,percent,source\n2,they,kidney,87.65,theirs\n")
    before |= {path: path.read_bytes() for path in (there, numbers)}
    for place, command in (
        (there, ("evaluate", "--data", there, "--report", alone)),
        (there, ("evaluate", "--data", alone, "--report", alone)),
        (there, ("evaluate", "--data", alone, "--json", there)),
        (numbers, ("evaluate", "--data", table, "--report", alone, "--paper-table", "--beside", numbers)),
        (there, ("data", "check", alone, "--json", there)),
    ):
        assert f"{place} is one of the files that are read, and would be replaced" in fails(2, *command)
    pictures[0].rename(sheet := tmp_path / "table_sheet.png")
    table.write_text(table.read_text().replace("data/slice.png", sheet.name))
    assert f"{sheet.name} is one of the files that are read" in fails(2, "data", "check", table)
    sheet.rename(pictures[0])
    table.write_bytes(before[table])
    scan = case / "image.nii.gz"
    assert "is one of the files that are read, and would be replaced" in one_line(
        "benchmark", "--scan", scan, "--json", scan
    )
    assert {path: path.read_bytes() for path in before} == before


def test_a_package_that_is_not_installed_is_named_with_what_brings_it() -> None:
    says = r"^export needs nowhere, which is not installed; try: pip install '\.\[train\]'"
    with pytest.raises(CdiffError, match=says), needs("export"):
        raise ModuleNotFoundError("No module named 'nowhere.inner'", name="nowhere.inner")
    for name in ("cdiff.train.gone", None):  # a fault of ours is not taken for that
        with pytest.raises(ModuleNotFoundError), needs("export"):
            raise ModuleNotFoundError("gone", name=name)
