"""Checkpoints of a run: safetensors + JSON, and the optimiser's state in a file that loads with weights_only=True.

RUN/config.json            the configuration
RUN/data.json              the cases that it began with (train.seen)
RUN/checkpoints/step-N/    model.safetensors (weights), ema.safetensors (their average: what is exported), optimiser.pt, checkpoint.json
                           (how far training was, and the weights' SHA-256)
RUN/last.json, best.json   which of them is the last and the best; replaced in one rename, so a kill leaves the old or the new one
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import atomic_folder, sha256, write_json
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.scans.intensity import Intensity
from cdiff.runtime.scans.sources import is_there, must_be_text
from cdiff.runtime.words import first_line
from cdiff.train.archive import must_be_as_written
from cdiff.train.config import Config
from cdiff.train.network import ConsensusNet
from cdiff.train.told import must_tell

MODEL, EMA = "model.safetensors", "ema.safetensors"
ORIGIN = ("init", "imported")
"""The keys of `info` that say where weights that did not begin at random came from: another run, or published code."""


@dataclass(frozen=True)
class LoadedRun:
    """A run's network with its averaged weights, in evaluation mode, and what else an export needs.

    `info`: step, seconds of training, hardware, versions, data summary, validation scores, and where the weights came from.
    """

    config: Config
    network: ConsensusNet
    info: dict[str, Any]

    @property
    def schedule(self) -> NoiseSchedule:
        return self.config.schedule

    @property
    def intensity(self) -> Intensity:
        return self.config.data.intensity


def load_run(run: Path) -> LoadedRun:
    """The run's best checkpoint, or the last where none is validated yet. Raises CdiffError, naming the file, if it is missing or does not fit."""
    config = read_config(run)
    folder = checkpoint_folder(run, "best") or checkpoint_folder(run, "last")
    if folder is None:
        raise CdiffError(
            f"{run} holds no checkpoint yet; go on with its training (cdiff train --data DIR --out {run} --resume)"
        )
    info = read_json(folder / "checkpoint.json")
    must_tell(info, folder / "checkpoint.json")
    tensors = read_weights(folder, EMA)
    # Compared without taking memory first: the weights in the file, not a number in its configuration, decide how much is taken.
    with torch.device("meta"):
        check_weights(ConsensusNet(config.network), tensors, folder / EMA)
    network = ConsensusNet(config.network)
    network.load_state_dict(tensors)
    return LoadedRun(config, network.eval().requires_grad_(False), info)


def read_config(run: Path) -> Config:
    return Config.from_json(read_json(run / "config.json"))


def config_of_weights(path: Path) -> Config:
    """The configuration that a bundle's weights were trained with. Raises CdiffError if the file is damaged or does not say."""
    try:
        with safe_open(path, "pt") as file:
            config = (file.metadata() or {}).get("config")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    if config is None:
        raise CdiffError(f"{path} does not say which network it belongs to; export the bundle again")
    try:
        values = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(values, dict):
        raise CdiffError(f"{path} does not say which network it belongs to; export the bundle again")
    return Config.from_json(values)


def checkpoint_folder(run: Path, which: str) -> Path | None:
    """Where last.json or best.json points, or None when there is no such file. Raises CdiffError when it names no folder of the run."""
    pointer = run / f"{which}.json"
    if not is_there(pointer):
        return None
    name = read_json(pointer).get("checkpoint")
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise CdiffError(f"{pointer} names no checkpoint of the run; copy the run again")
    return run / "checkpoints" / name


def checkpoint_name(step: int) -> str:
    return f"step-{step:07d}"


def save_checkpoint(
    run: Path, *, network: dict[str, Tensor], ema: dict[str, Tensor], optimiser: dict[str, Any], info: dict[str, Any]
) -> None:
    """Write the checkpoint of info["step"] whole, then point last.json and (if info["is_best"]) best.json at it."""
    folder = run / "checkpoints" / checkpoint_name(info["step"])
    with atomic_folder(folder, replace=True) as stage:
        write_tensors(stage / MODEL, network)
        write_tensors(stage / EMA, ema)
        with _room(stage / "optimiser.pt"):
            torch.save(optimiser, stage / "optimiser.pt")
        write_json(stage / "checkpoint.json", info | {"sha256": {file: sha256(stage / file) for file in (MODEL, EMA)}})
    # best.json comes last: it must never name a step that a resumed run takes again, which on another machine may score lower and not be the best.
    write_json(run / "last.json", {"checkpoint": folder.name})
    point_at_best(run)
    kept = {checkpoint_folder(run, which) for which in ("last", "best")}
    for old in (run / "checkpoints").iterdir():
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def point_at_best(run: Path) -> None:
    """Point best.json at the last checkpoint if that is the best one; a resumed run calls it too, since a kill may have come before."""
    last = checkpoint_folder(run, "last")
    if last is not None and read_json(last / "checkpoint.json").get("is_best"):
        write_json(run / "best.json", {"checkpoint": last.name})


def load_weights(
    network: torch.nn.Module, tensors: dict[str, Tensor], path: Path, what: str = "its configuration"
) -> None:
    """Fill the network. Raises CdiffError as check_weights does."""
    check_weights(network, tensors, path, what)
    network.load_state_dict(tensors)


def check_weights(
    network: torch.nn.Module, tensors: dict[str, Tensor], path: Path, what: str = "its configuration"
) -> None:
    """Raise CdiffError, naming the first that are wrong, unless the tensors of `path` have the network's names and shapes. what: whose
    network it is, for the message."""
    wanted = network.state_dict()
    wrong = [f"missing {name}" for name in wanted if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in wanted]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if wrong:
        raise CdiffError(f"{path} does not fit {what}: {', '.join(wrong[:5])} ({len(wrong)} in all)")


def origin(info: dict[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint's `info`, or of a bundle's `training`, on where the weights came from; empty where they began here."""
    return {key: info[key] for key in ORIGIN if key in info}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, readable by whomever the umask allows. Raises CdiffError where it cannot be written."""
    with _room(path):
        path.write_bytes(save(tensors, metadata))  # safetensors' own files are private, and runs and bundles are shared


@contextmanager
def _room(path: Path) -> Iterator[None]:
    """Within the block, failure to write a file, as on a full disk, is raised as a CdiffError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is PyTorch's
        raise CdiffError(
            f"cannot write {path.name} into {path.parent.parent} ({first_line(error)}); check the space there"
        ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CdiffError if it is missing or damaged, or its path is not text: safetensors cannot open it."""
    must_be_text(path)
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own SafetensorError, OSError or ValueError
        raise _damaged(path, error) from error


def read_weights(folder: Path, file: str) -> dict[str, Tensor]:
    """The tensors of MODEL or EMA in a checkpoint's folder. Raises CdiffError if the file is missing, damaged, or not what was written.

    Checkpoints of older versions hold no hashes; their files are taken as they are.
    """
    tensors, path = read_tensors(folder / file), folder / file
    written = read_json(folder / "checkpoint.json").get("sha256")
    if isinstance(written, dict) and written.get(file) not in (None, sha256(path)):
        raise CdiffError(
            f"{path} has changed since it was written (its SHA-256 is not the one in checkpoint.json); copy the run again, or, if you "
            'changed the weights yourself, remove "sha256" there'
        )
    return tensors


def read_state(path: Path) -> dict[str, Any]:
    """The content of an optimiser.pt, of which only tensors and plain values are unpickled. Raises CdiffError if it is missing or damaged.

    Tensors are on the CPU; the optimiser moves what it needs to its weights' device. Its step counts belong on the CPU: on a GPU every
    step would wait for each of them.
    """
    try:
        must_be_as_written(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {part: state[part] for part in ("optimiser", "scaler")}
    except Exception as error:  # a damaged file fails in the archive, the pickle or the storages, each in its own way
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CdiffError:
    return CdiffError(f"{path} cannot be read ({first_line(error)}); it is damaged: copy the run or the bundle again")


def read_json(path: Path, advice: str = "is this the folder of a training run?") -> dict[str, Any]:
    """The JSON object in a UTF-8 file, with or without a byte order mark. Raises CdiffError, ending in `advice`, if missing or not one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:  # UTF-16 without a byte order mark
            raise UnicodeError
        value = json.loads(text)
    except FileNotFoundError:
        raise CdiffError(f"{path} does not exist; {advice}") from None
    except UnicodeError:
        raise CdiffError(
            f"{path} is not text in UTF-8: where another program has written it, save it as UTF-8; {advice}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CdiffError(f"{path} cannot be read ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise CdiffError(f"{path} does not hold a JSON object; {advice}")
    return value
