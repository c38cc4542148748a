"""Several processes train as one does, and end together when one of them fails; Fabric does what it is told, and says nothing.

The processes are forked from a server that has imported PyTorch, and meet as torchrun's do: through its variables and a store that
outlives them. One test starts the real torchrun.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file

from cdiff.runtime.errors import CdiffError
from cdiff.train import run as training
from cdiff.train.checkpoint import checkpoint_folder
from cdiff.train.config import Config
from cdiff.train.fabric import fabric_on, find_device, joined, precision_of
from cdiff.train.learner import Learner
from cdiff.train.log import read_log
from cdiff.train.presets import preset
from cdiff.train.trainer import train
from tests.conftest import REPOSITORY

WORLD = 2
CPU = torch.device("cpu")


def member(rank: int, port: int, tell: Connection, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """A process's life: torchrun's variables, the work, and what came of it: ("", result) or the error's type and text."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(
        {name: str(value) for name, value in variables.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    )
    torch.set_num_threads(1)
    try:
        tell.send(("", work(*arguments)))
    except BaseException as error:
        tell.send((type(error).__name__, str(error)))


def together(work: Callable[..., object], *arguments: object) -> list[tuple[str, Any]]:
    """What came of `work(*arguments)` in each of the processes; ("killed", None) where nothing did."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cdiff.train.trainer"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, ends = [], []
    for rank in range(WORLD):
        end, tell = context.Pipe(duplex=False)
        process = context.Process(target=member, args=(rank, store.port, tell, work, arguments))
        process.start()
        tell.close()
        processes.append(process)
        ends.append(end)
    outcomes: list[tuple[str, Any]] = []
    for end in ends:
        try:
            outcomes.append(end.recv() if end.poll(300) else ("hung", None))
        except EOFError:
            outcomes.append(("killed", None))
    for process in processes:
        process.join(20)
        process.kill()
    return outcomes


def rank() -> int:
    return int(os.environ["RANK"])


def at_step(k: int, act: Callable[[], object]) -> None:
    """Have this process do `act` when it comes to step k."""
    step = Learner.step

    def patched(self: Learner, now: int, *rest: Any) -> tuple[float, float]:
        if now == k:
            act()
        return step(self, now, *rest)

    Learner.step = patched  # type: ignore[method-assign]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint_folder(run, "last")
    assert folder is not None
    return {f"{name}/{k}": v for name in ("model", "ema") for k, v in load_file(folder / f"{name}.safetensors").items()}


def rows(run: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "mfu")} for row in read_log(run / "log.csv")]


def short(**changes: object) -> Config:
    return preset("tiny").with_values({"steps": 4, "val_every": 4, "log_every": 1, "decay": "cosine"} | changes)


def train_and_resume(config: Config, data: Path, out: Path) -> tuple[int, bool]:
    train(config, data, out, max_steps=2, quiet=True)
    result = train(config, data, out, resume=True, quiet=True)
    return result.step, result.first


def test_two_processes_train_bit_for_bit_as_one(tiny_data: Path, tmp_path: Path) -> None:
    """Five images a step, so two and three each; dropout; stopped and resumed in the middle; validation in three calls, shared."""
    config = short(
        batch=5, dropout=0.2, val_runs=11, val_slices=5, threads=1
    )  # sums of several threads are in another order
    assert together(train_and_resume, config, tiny_data, tmp_path / "two") == [("", (4, True)), ("", (4, False))]
    train(config.with_values({"accumulate": 2}), tiny_data, tmp_path / "one", quiet=True)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert [row["step"] for row in rows(tmp_path / "two")] == ["1", "2", "3", "4"]
    assert not list(tmp_path.rglob(".part-*"))


def train_once(config: Config, data: Path, out: Path) -> int:
    return train(config, data, out, quiet=True).step


def test_two_processes_that_accumulate_have_the_loss_of_one(tiny_data: Path, tmp_path: Path) -> None:
    """Nine images a step in two parts a process, and whole in one: the same sums in another order."""
    config = short(batch=9, steps=2, val_every=2, warmup=0, lr=1e-3)
    parts = config.with_values({"accumulate": 2})
    assert together(train_once, parts, tiny_data, tmp_path / "two") == [("", 2), ("", 2)]
    train(config, tiny_data, tmp_path / "one", quiet=True)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    # As for parts within one process; later more, since AdamW's step has the length lr where the gradient is but rounding.
    for name, first, second in (("loss", 1e-5, 1e-3), ("grad_norm", 1e-4, 1e-3)):
        assert float(two[0][name]) == pytest.approx(float(one[0][name]), rel=first)
        assert float(two[1][name]) == pytest.approx(float(one[1][name]), rel=second)


def test_half_precision_is_scaled_for_two_processes_as_for_one(tiny_data: Path, tmp_path: Path) -> None:
    """The loss was doubled for two of them, so that a gradient that overflows in half precision did so a step sooner."""
    config = short(amp="fp16", steps=2, val_every=2, threads=1, rows_per_image=1)
    assert together(train_once, config, tiny_data, tmp_path / "two") == [("", 2), ("", 2)]
    train(config.with_values({"accumulate": 2}), tiny_data, tmp_path / "one", quiet=True)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


def train_on_own(config: Config, folders: list[Path], out: Path) -> None:
    train(config, folders[rank()], out, quiet=True)


def text_of(outcomes: list[tuple[str, Any]]) -> str:
    """What the one process says that says something."""
    assert sorted(kind for kind, _ in outcomes) == ["CdiffError", "FailedElsewhere"]
    return str(next(text for kind, text in outcomes if kind == "CdiffError"))


def test_data_that_one_process_cannot_read_ends_all(tiny_data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_data, broken)
    (broken / "Training" / "case01" / "image.nii.gz").write_bytes(b"not a scan")
    outcomes = together(train_on_own, short(), [tiny_data, broken], tmp_path / "run")
    assert re.search(r"process 1 of 2 on .*image\.nii\.gz", text_of(outcomes))
    assert not (tmp_path / "run").exists()


def test_processes_with_other_data_do_not_train(tiny_data: Path, tmp_path: Path) -> None:
    smaller = tmp_path / "smaller"
    shutil.copytree(tiny_data, smaller)
    shutil.rmtree(smaller / "Training" / "case01")
    outcomes = together(train_on_own, short(), [tiny_data, smaller], tmp_path / "run")
    assert re.search(
        r"^process 1 of 2 on .*have read different data .*cases to train on: case01 gone\)", text_of(outcomes)
    )


def test_processes_whose_masks_are_not_the_same_do_not_train(tiny_data: Path, tmp_path: Path) -> None:
    """As many cases, masks and slices in both: two machines of which one has an older copy."""
    older = tmp_path / "older"
    shutil.copytree(tiny_data, older)
    case = older / "Training" / "case02"
    shutil.copy(case / "task01_seg01.nii.gz", case / "task01_seg03.nii.gz")
    outcomes = together(train_on_own, short(), [tiny_data, older], tmp_path / "run")
    assert re.search(r"^process 1 of 2 on .*case02 has \d+ pixels marked and had \d+\)", text_of(outcomes))
    assert not (tmp_path / "run").exists()


def train_until_own(config: Config, data: Path, out: Path, ends: list[int]) -> None:
    train(config, data, out, max_steps=ends[rank()], quiet=True)


def test_processes_that_are_to_end_at_different_steps_do_not_begin(tiny_data: Path, tmp_path: Path) -> None:
    """The first to end left the other alone in its next step."""
    outcomes = together(train_until_own, short(), tiny_data, tmp_path / "run", [1, 3])
    assert "do not agree: --max-steps is 3 here and 1 in process 0" in text_of(outcomes)
    assert not (tmp_path / "run").exists()


def train_from_own(config: Config, data: Path, out: Path, starts: list[Path]) -> None:
    train(config, data, out, init=starts[rank()], quiet=True)


def test_processes_that_start_from_other_weights_do_not_train(tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    """One path on two machines may hold two runs; what is learned from there on would be neither's."""
    train(short(seed=1, steps=1), tiny_data, tmp_path / "other", quiet=True)
    outcomes = together(train_from_own, short(), tiny_data, tmp_path / "run", [tiny_run, tmp_path / "other"])
    assert "do not agree: the weights to start from is" in text_of(outcomes)
    assert not (tmp_path / "run").exists()


def crash() -> None:
    raise ZeroDivisionError("the cosmic ray")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def train_with_trouble(config: Config, data: Path, out: Path, act: Callable[[], object]) -> tuple[int, bool]:
    if rank() == 1:
        at_step(2, act)
    result = train(config, data, out, quiet=True)
    return result.step, result.interrupted


def test_a_crash_in_one_process_ends_all_and_is_told_once(tiny_data: Path, tmp_path: Path) -> None:
    outcomes = together(train_with_trouble, short(), tiny_data, tmp_path / "run", crash)
    assert outcomes == [("FailedElsewhere", ""), ("ZeroDivisionError", "the cosmic ray")]


def test_a_killed_process_ends_all_with_one_line(tiny_data: Path, tmp_path: Path) -> None:
    (kind, text), killed = together(train_with_trouble, short(), tiny_data, tmp_path / "run", kill)
    assert (kind, killed) == ("CdiffError", ("killed", None))
    assert re.fullmatch(r"process 0 of 2 on \S+ lost its connection to another process.*--resume.*", text)


def test_a_last_checkpoint_that_cannot_be_written_is_told_once(tiny_data: Path, tmp_path: Path) -> None:
    """The others have no step left to take and wait for its end."""
    outcomes = together(train_to_a_full_disk, short(), tiny_data, tmp_path / "run")
    assert outcomes == [("CdiffError", "no room"), ("FailedElsewhere", "")]


def train_to_a_full_disk(config: Config, data: Path, out: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise CdiffError("no room")

    training.save_checkpoint = full
    train(config, data, out, quiet=True)


def test_an_interrupt_of_all_is_told_once(tiny_data: Path, tmp_path: Path) -> None:
    """Ctrl-C before a run can save, or twice: torchrun hands it on to every process."""
    outcomes = together(train_interrupted, short(), tiny_data, tmp_path / "run")
    assert sorted(outcomes) == [("FailedElsewhere", ""), ("KeyboardInterrupt", "")]


def train_interrupted(config: Config, data: Path, out: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    at_step(0, interrupted)
    train(config, data, out, quiet=True)


def test_asking_one_process_to_stop_stops_all_after_the_same_step(tiny_data: Path, tmp_path: Path) -> None:
    outcomes = together(train_with_trouble, short(), tiny_data, tmp_path / "run", ask)
    assert outcomes == [("", (3, True)), ("", (3, True))]
    assert rows(tmp_path / "run")[-1]["step"] == "3"
    assert tensors(tmp_path / "run")


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 is set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ],
)
def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CdiffError, match=says), joined(cuda=False):
        pass


@pytest.mark.parametrize(("amp", "precision"), [("off", "float32"), ("bf16", "mixed bf16"), ("fp16", "mixed fp16")])
def test_a_precision_is_the_one_that_was_asked_for(
    amp: str, precision: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a CPU too, where Fabric alone makes bf16 of fp16; inside a cluster's job too, whose variables Fabric alone follows."""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    fabric = fabric_on(CPU, amp)
    fabric.launch()
    assert (fabric.device, fabric.world_size, precision_of(fabric)) == (CPU, 1, precision)
    assert capfd.readouterr() == ("", "")


def test_variables_that_would_override_what_was_asked_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_PRECISION", "bf16-mixed")
    with pytest.raises(CdiffError, match="LT_PRECISION would override --device and amp"):
        fabric_on(CPU)


@pytest.mark.parametrize(
    ("device", "gpus", "says"),
    [
        ("gpu", 1, "device 'gpu' is not known; use cpu, cuda or cuda:N"),
        ("cuda", 0, "--device cuda: PyTorch sees no CUDA device here"),
        ("cuda:1", 1, "--device cuda:1: PyTorch sees only cuda:0"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    device: str, gpus: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(CdiffError, match=says) as caught:
        find_device(device, fabric_on(CPU))
    assert "\n" not in str(caught.value)


def test_a_run_says_nothing_but_its_own_lines(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    said = io.StringIO()
    console = Console(file=said, width=200)
    train(short(amp="bf16", steps=1, val_every=1), tiny_data, tmp_path / "run", console=console)
    lines = [line for line in said.getvalue().splitlines() if line]  # rich 13 ends a bar with an empty one
    assert [line.split()[0] for line in lines] == ["training", "step"]
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in recwarn if "lightning" in w.filename] == []


@pytest.mark.slow
def test_torchrun_starts_the_command(tiny_data: Path, tmp_path: Path) -> None:
    """What the pages say to type: one run folder, one path printed."""
    script = tmp_path / "command.py"  # the clone's cdiff, whatever the installed command belongs to
    script.write_text(
        "import atexit, glob, os\nfrom pathlib import Path\n"
        "def ended():  # a thread of the group that outlives Python may abort the process\n"
        "    if any('gloo' in Path(name).read_text() for name in glob.glob('/proc/self/task/*/comm')): os._exit(9)\n"
        "atexit.register(ended)\nfrom cdiff.cli import main\nmain()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    start = [*torchrun, "--nproc-per-node", str(WORLD), str(script)]
    command = [*start, "train", "--data", str(tiny_data), "--preset", "tiny", "--out", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [*command, "--max-steps", "2"], capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "run")]
    assert done.stderr.count("training on") == 1
    assert "2 processes" in done.stderr
    assert not re.search("distributed_backend|deprecated|lightning", done.stderr)


def commanded(arguments: list[str], said: Path) -> int:
    """The command as its script starts it; its exit code, and what it writes to stderr in a file of this process's."""
    from cdiff.cli import main

    file = os.open(said.with_suffix(f".{rank()}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    sys.argv = ["cdiff", *arguments]
    try:
        main()
    except SystemExit as end:
        sys.stderr.flush()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def test_settings_that_cannot_work_get_one_line(tiny_data: Path, tmp_path: Path) -> None:
    """Of the command, in whatever number of processes."""
    train = ["train", "--data", str(tiny_data), "--preset", "tiny", "--out", str(tmp_path / "run")]
    outcomes = together(commanded, [*train, "--set", "accumulate=3"], tmp_path / "said")
    assert [kind for kind, _ in outcomes] == ["", ""]
    assert all(code for _, code in outcomes)
    said = "".join(path.read_text() for path in tmp_path.glob("said.*"))
    assert said.count("error: a step of 4 images cannot be shared by 2 processes") == 1
