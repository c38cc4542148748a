"""A model repository for Triton Inference Server that serves the whole loop: one request is one slice, not one step."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.engines.registry import NAMES
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import PART, atomic_folder, must_be_new
from cdiff.runtime.manifest import NAME
from cdiff.runtime.serving import BUNDLE

VERSION = "1"

MODEL = '''"""Served by cdiff: one request is one slice; config.pbtxt has the inputs and outputs."""

from cdiff.runtime.serving import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(bundle: Bundle, folder: Path) -> Path:
    """Write FOLDER/NAME/config.pbtxt, 1/model.py and 1/bundle, whole or not at all; returns FOLDER/NAME. NAME is the bundle's own.

    The server makes an instance on every GPU that it sees, unless config.pbtxt is changed (docs/gpu.md).
    Raises CdiffError for a name that Triton or a folder cannot have, for an existing model of that name, a folder that cannot be
    written, or a bundle that is replaced meanwhile.
    """
    model = new_model(bundle, folder)
    with atomic_folder(model) as stage:
        version = stage / VERSION
        try:
            _copy(bundle, version / BUNDLE)
        except FileNotFoundError as error:
            bundle.must_be_unchanged()
            if not stage.exists():
                raise
            raise CdiffError(f"{error.filename} was removed while it was copied; run the same command again") from None
        bundle.must_be_unchanged()
        (version / "model.py").write_text(MODEL, encoding="utf-8")
        (stage / "config.pbtxt").write_text(config(bundle, model.name), encoding="utf-8")
    return model


def new_model(bundle: Bundle, folder: Path) -> Path:
    """FOLDER/NAME, where `write_repository` would write the bundle. Raises CdiffError for a name that Triton or a folder cannot have, and for
    an existing model of that name, which is worth knowing before engines are built."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", bundle.manifest.name)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise CdiffError(f"the model's name {name!r} must be letters, digits, '_', '-' and '.', such as lidc")
    must_be_new(folder / name)
    return folder / name


def _copy(bundle: Bundle, folder: Path) -> None:
    """Copy the manifest, the files it lists, and the engine cache without its links and unfinished engines; nothing else of the folder."""
    folder.mkdir(parents=True)
    for name in (NAME, *bundle.manifest.files):
        shutil.copy2(bundle.path / name, folder / name)
    for inside, folders, files in os.walk(bundle.engines):  # follows no links
        folders[:] = [name for name in folders if not name.startswith(PART)]
        to = folder / Path(inside).relative_to(bundle.path)
        to.mkdir()
        for file in map(Path(inside).joinpath, files):
            if file.is_file() and not file.is_symlink() and not file.name.startswith(PART):
                shutil.copy2(file, to / file.name)


def config(bundle: Bundle, name: str) -> str:
    """config.pbtxt: a ModelConfig in protobuf's text form. No batching by the server: the rows of one slice fill the device."""
    manifest, draws = bundle.manifest, bundle.manifest.draws
    inputs = [
        _tensor("image", "TYPE_FP32", (manifest.image_channels, -1, -1)),
        _tensor("seed", "TYPE_UINT64", (1,), optional=True),
        _tensor("runs", "TYPE_INT32", (1,), optional=True),
        _tensor("steps", "TYPE_INT32", (1,), optional=True),
    ]
    outputs = [
        _tensor("soft", "TYPE_FP32", (-1, -1)),
        _tensor("levels", "TYPE_FP32", (manifest.levels, -1, -1)),
        _tensor("uncertainty", "TYPE_FP32", (2, -1, -1)),
    ]
    return f'''# Written by cdiff. One request is one slice: the whole loop of levels, runs and steps.
name: "{name}"
backend: "python"
max_batch_size: 0

# image: one slice as it was acquired, [channels, H, W]; seed, runs and steps may be left out (0; 25 runs; all T steps).
input [
{_joined(inputs)}
]

# soft: {draws.soft}; levels: {draws.levels}, c = 1 .. {manifest.levels}; uncertainty: {draws.uncertainty}.
output [
{_joined(outputs)}
]

instance_group [ {{ kind: KIND_GPU count: 1 }} ]

# engine: auto, {", ".join(NAMES)}. sampler: ddpm unless named (ddim, dpm++2m). fast: the bundle's quick choice. batch: rows at once.
parameters {{ key: "engine" value {{ string_value: "auto" }} }}
parameters {{ key: "sampler" value {{ string_value: "" }} }}
parameters {{ key: "fast" value {{ string_value: "false" }} }}
parameters {{ key: "batch" value {{ string_value: "" }} }}
'''


def _tensor(name: str, kind: str, dims: tuple[int, ...], *, optional: bool = False) -> str:
    shape = ", ".join(map(str, dims))
    return f'  {{ name: "{name}" data_type: {kind} dims: [ {shape} ]{" optional: true" if optional else ""} }}'


def _joined(items: list[str]) -> str:
    return ",\n".join(items)
