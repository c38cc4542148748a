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
"""Folder of the cache of built engines inside a bundle; not listed in the manifest, its entries carry their own keys."""

ELSEWHERE = b"location"
"""The key without which no tensor of an ONNX file names another file (onnx.proto, external_data); none of our graphs holds these bytes."""

Stamp = tuple[int, int]
"""A file's size in bytes and the time of its last change in ns."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, and the manifest whose files were all found to be as listed, with their stamps from before that."""

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
        """The path of a listed file. Raises CdiffError for any other name: what is not listed was not checked."""
        if name not in self.manifest.files:
            raise CdiffError(f"{self.path}: the manifest lists no file {name!r}; export the model again")
        return self.path / name

    def must_be_unchanged(self) -> None:
        """For who has read a file since the bundle was opened, which was then read a second time: CdiffError where one is another now."""
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
    may name a file that is not listed, or the folder's path is no text, which ONNX Runtime does not open.
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
                f"{path} keeps weights in another file, which no engine checks before it reads it; export the model again"
            )
        return stamp
    except OSError as error:
        raise CdiffError(f"cannot read {path}: {error.strerror}; {remedy}") from None


def _holds(path: Path, word: bytes) -> bool:
    """Whether these bytes stand in the file, in little memory."""
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

    build: fills the temporary folder that it is given and returns the manifest, whose `files` are then set to what lies there.
    replace: an older bundle at `path` gives way once the new one is complete. Raises CdiffError when `path` exists and is
    not to be replaced, or holds something other than a bundle; whatever `build` raises leaves no trace on the disk.
    """
    if replace and path.exists() and not (path / names.NAME).is_file() and (path.is_file() or any(path.iterdir())):
        raise CdiffError(f"{path} exists and is not a bundle; give another name for the bundle")
    with atomic_folder(path, replace=replace) as folder:
        manifest = build(folder)
        files: dict[str, FileEntry] = {
            file.name: {"sha256": sha256(file), "bytes": file.stat().st_size} for file in sorted(folder.iterdir())
        }
        manifest = dataclasses.replace(manifest, files=files)
        # Read back as the runtime will: a manifest that it would refuse is never written.
        manifest = Manifest.from_json(manifest.to_json(), str(path / names.NAME))
        write_json(folder / names.NAME, manifest.to_json())
    return Bundle(path, manifest)
