"""Bundles on disk: opened with every hash checked, written whole or not at all."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cdiff.runtime import manifest as names
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import atomic_folder, sha256, write_json
from cdiff.runtime.manifest import FileEntry, Manifest
from cdiff.runtime.scans.sources import is_there, must_be_text

ENGINES = "engines"
"""The folder inside a bundle that caches built engines. The manifest does not list it: its entries carry their own keys."""

ELSEWHERE = b"location"
"""The key that a tensor of an ONNX file must have to refer to another file (onnx.proto, external_data). No graph that export writes holds
these bytes."""

Stamp = tuple[int, int]
"""A file's size in bytes and the time of its last change in ns."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its manifest, and the stamps of its files, taken before each was checked against the manifest."""

    path: Path
    manifest: Manifest
    stamps: Mapping[str, Stamp] = field(default_factory=dict, compare=False, repr=False)

    @property
    def encoder(self) -> Path:
        return self.file(names.ENCODER)

    @property
    def denoiser(self) -> Path:
        return self.file(names.DENOISER)

    @property
    def engines(self) -> Path:
        """Where engines built for a GPU are cached; it need not exist."""
        return self.path / ENGINES

    def file(self, name: str) -> Path:
        """The path of a listed file. Raises CdiffError for any other name, because a file that is not listed was not checked."""
        if name not in self.manifest.files:
            raise CdiffError(f"{self.path}: the manifest lists no file {name!r}; export the model again")
        return self.path / name

    def must_be_unchanged(self) -> None:
        """Raise CdiffError where a file has changed since the bundle was opened.

        Call it after reading a file again: what was checked on opening may not be what was read.
        """
        for name, stamp in self.stamps.items():
            try:
                same = _stamp(self.path / name) == stamp
            except OSError:
                same = False
            if not same:
                raise CdiffError(f"{self.path / name} has changed since the bundle was opened; open it again")


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle in a folder: read the manifest and compare every listed file's size and SHA-256 with it.

    Nothing is unpickled or run. Raises CdiffError, naming the file, when the folder is no bundle, a file is missing or differs, a graph
    may refer to another file, or the folder's path is not valid text, which ONNX Runtime cannot open.
    """
    folder = Path(path)
    must_be_text(folder)
    there = is_there(folder)
    if not folder.is_dir():
        what = "is a file" if there else "does not exist"
        raise CdiffError(f"{folder} {what}; a bundle is the folder that `cdiff export` wrote")
    if not (folder / names.NAME).is_file():
        raise CdiffError(
            f"{folder} is not a bundle: it has no {names.NAME}; `cdiff export RUN --out BUNDLE` writes one"
        )
    stamps = {names.NAME: _stamp(folder / names.NAME)}
    manifest = Manifest.read(folder / names.NAME)
    for name, entry in manifest.files.items():
        stamps[name] = _check_file(folder / name, entry)
    return Bundle(folder, manifest, stamps)


def _stamp(path: Path) -> Stamp:
    now = path.stat()
    return now.st_size, now.st_mtime_ns


def _check_file(path: Path, entry: FileEntry) -> Stamp:
    remedy = "copy the bundle again or export it again"
    try:
        if not path.is_file():
            raise CdiffError(f"{path} is missing, though the bundle's manifest lists it; {remedy}")
        stamp = _stamp(path)
        if stamp[0] != entry["bytes"]:
            raise CdiffError(f"{path} has {stamp[0]} bytes where the manifest lists {entry['bytes']}; {remedy}")
        if sha256(path) != entry["sha256"]:
            raise CdiffError(f"{path} has changed: its SHA-256 is not the one in the manifest; {remedy}")
        if path.suffix == ".onnx" and _holds(path, ELSEWHERE):
            raise CdiffError(
                f"{path} keeps weights in another file, which would be read unchecked; export the model again"
            )
        return stamp
    except OSError as error:
        raise CdiffError(f"cannot read {path}: {error.strerror}; {remedy}") from None


def _holds(path: Path, word: bytes) -> bool:
    """Whether a file contains these bytes; reads 1 MiB at a time."""
    end = b""
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            if word in end + part:
                return True
            end = part[1 - len(word) :]
    return False


def shipped_bundle() -> Path:
    """The folder of the model that comes with the package. Raises CdiffError when this installation has none."""
    folder = Path(str(importlib.resources.files("cdiff") / "models" / "lidc"))
    if not (folder / names.NAME).is_file():
        raise CdiffError(
            f"this installation has no model in {folder}; give one with --model BUNDLE, or install cdiff again"
        )
    return folder


def write_bundle(path: Path, build: Callable[[Path], Manifest], *, replace: bool = False) -> Bundle:
    """Write a bundle to the folder `path`, whole or not at all.

    build: fills the temporary folder that it is given and returns the manifest; its `files` are then set to what the folder holds.
    replace: replace an older bundle at `path` once the new one is complete. Raises CdiffError when `path` exists and is
    not to be replaced, or holds something other than a bundle; if `build` raises, nothing is left on the disk.
    """
    if replace and path.exists() and not (path / names.NAME).is_file() and (path.is_file() or any(path.iterdir())):
        raise CdiffError(f"{path} exists and is not a bundle; give another name for the bundle")
    with atomic_folder(path, replace=replace) as folder:
        manifest = build(folder)
        files: dict[str, FileEntry] = {
            file.name: {"sha256": sha256(file), "bytes": file.stat().st_size} for file in sorted(folder.iterdir())
        }
        manifest = dataclasses.replace(manifest, files=files)
        # Parsed as the runtime will parse it, so that a manifest that it would refuse is never written.
        manifest = Manifest.from_json(manifest.to_json(), str(path / names.NAME))
        write_json(folder / names.NAME, manifest.to_json())
    return Bundle(path, manifest)
