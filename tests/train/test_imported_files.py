"""Files that are no checkpoint of the published codes: refused in one line, and nothing in them is run."""

from __future__ import annotations

import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import load_run
from cdiff.train.imported.importer import import_checkpoint
from cdiff.train.imported.weights import read_state_dict
from tests.strict import every_warning_is_an_error
from tests.train.published import recorded


class Trap:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("trap", "holds more than tensors"),
        ("optimiser", "is an optimiser's state"),
        ("nested", "state_dict, step are not tensors"),
        ("jagged", "holds more than tensors"),
        ("sparse", "holds more than tensors"),
        ("empty", "holds a dict, not named tensors"),
        ("list", "holds a list"),
        ("other", "from neither published code"),
        ("protocol", "with a pickle_protocol above 3"),
        ("script", "is a TorchScript archive, or was saved by a PyTorch before 0.4"),
        ("tar", "is a TorchScript archive, or was saved by a PyTorch before 0.4"),
        ("text", "is not a PyTorch checkpoint"),
        ("words", "is not a PyTorch checkpoint"),
        ("zip", "is not a PyTorch checkpoint"),
        ("truncated", "is damaged"),
        ("nothing", "does not exist"),
        ("folder", "is a folder; give the .pt file in it"),
    ],
)
@every_warning_is_an_error
def test_files_that_are_no_checkpoint_are_refused_in_one_line(content: str, says: str, tmp_path: Path) -> None:
    path, witness = tmp_path / "ema_0.9999_000100.pt", tmp_path / "touched"
    layer = torch.nn.Linear(2, 2)
    objects: dict[str, Any] = {
        "trap": {"weight": torch.zeros(2), "trap": Trap(witness)},
        "optimiser": torch.optim.AdamW(layer.parameters()).state_dict(),
        "nested": {"state_dict": layer.state_dict(), "step": 3},
        "jagged": {"weight": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)},
        "sparse": {"weight": torch.eye(2).to_sparse()},
        "empty": {},
        "list": [torch.zeros(2)],
        "other": layer.state_dict(),
    }
    if content in objects:
        torch.save(objects[content], path)
    elif content == "protocol":
        torch.save({f"rrdb.{i}": torch.zeros(3) for i in range(4)}, path, pickle_protocol=5)
    elif content == "script":
        with warnings.catch_warnings(action="ignore"):  # PyTorch's own, of Pythons that TorchScript does not know
            torch.jit.save(torch.jit.trace(layer, torch.zeros(1, 2)), path)
    elif content == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "storages")
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(__file__, "logs/log.txt")
    elif content == "folder":
        path.mkdir()
    elif content == "text":
        path.write_text("<html>not found</html>")
    elif content == "words":  # a pickle's steps, of a memo and a stack that hold nothing
        path.write_text("hello, this is no checkpoint")
    elif content == "truncated":
        torch.save({f"rrdb.{i}": torch.zeros(1000) for i in range(4)}, path)
        path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(CdiffError) as caught:
        import_checkpoint(path, tmp_path / "run")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not witness.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_checkpoint_that_was_saved_on_a_gpu_is_read_without_one(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the published trainings save theirs: on a device that this machine does not have, in the format of either age of PyTorch."""
    tensors = {f"rrdb.{place}": torch.full((2, 3), float(place)) for place in range(3)}
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:1")
        torch.save(tensors, path := tmp_path / "ema.pt", _use_new_zipfile_serialization=new)
    assert b"cuda:1" in path.read_bytes()
    if not torch.cuda.device_count() > 1:
        with pytest.raises(RuntimeError, match=r"cuda|CUDA"):
            torch.load(path, weights_only=True)
    read = read_state_dict(path)
    assert {name: (str(value.device), value.tolist()) for name, value in read.items()} == {
        name: ("cpu", value.tolist()) for name, value in tensors.items()
    }


@pytest.mark.parametrize(
    ("name", "step"), [("ema_0.9999_035000", 35_000), ("model_600", 600), ("savedmodel050000", 50_000), ("ema", 0)]
)
def test_the_iteration_is_in_the_name(name: str, step: int, tmp_path: Path) -> None:
    case = recorded("consensus")
    assert import_checkpoint(case.save(tmp_path, f"{name}.pt"), tmp_path / "run").step == step


def test_a_date_with_its_time_is_no_iteration(tmp_path: Path) -> None:
    """The run had more steps than a configuration may state, so that nothing could read it."""
    done = import_checkpoint(recorded("consensus").save(tmp_path, "ema_20230110221618.pt"), tmp_path / "run")
    assert done.step == 0
    assert load_run(done.path).config == done.config


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_before_every_name_is_dropped(before: str, tmp_path: Path) -> None:
    """DistributedDataParallel, torch.compile, and one in the other."""
    tensors = {name: torch.full((2,), float(place)) for place, name in enumerate(("rrdb.a", "module.b", "out.c"))}
    torch.save({before + name: value for name, value in tensors.items()}, path := tmp_path / "ema.pt")
    read = read_state_dict(path)
    assert {name: value.tolist() for name, value in read.items()} == {n: v.tolist() for n, v in tensors.items()}


@pytest.mark.parametrize("code", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_an_args_json_that_another_program_has_saved(code: str, tmp_path: Path) -> None:
    """An editor puts a mark before UTF-8; a shell's redirection wrote UTF-16, with a mark or without, which had a decoder's words for an error."""
    case = recorded("consensus")
    path = case.save(tmp_path / "given")
    plain = import_checkpoint(path, tmp_path / "plain")
    args = path.with_name("args.json")
    args.write_text(args.read_text(), encoding=code)
    if code == "utf-8-sig":
        assert load_run(import_checkpoint(path, tmp_path / "run").path).config == load_run(plain.path).config
        return
    with pytest.raises(
        CdiffError, match=r"args\.json is not text in UTF-8: .*save it as UTF-8; it must be an args\.json"
    ):
        import_checkpoint(path, tmp_path / "run")
