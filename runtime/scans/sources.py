"""Which kinds of files hold scans and masks, and a file's bytes, or one line that says why not."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from cdiff.runtime.errors import CdiffError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
"""NRRD and MetaImage; the second of each pair is a header that names the file with the voxels."""
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")
POINTERS = {b"version https://git-lfs.github.com/": "git lfs pull", b"/annex/objects/": "git annex get ."}
"""How a file begins that stands for one which Git LFS or git-annex keeps elsewhere, and what fetches that one."""


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises CdiffError when its suffix is not one that is read here, or it cannot be read or is empty.

    Also where its path is not text, such as a name that was written in another encoding than UTF-8: no report could name it.
    """
    must_be_text(path)
    if not path.name.lower().endswith(VOLUME_SUFFIXES + PICTURE_SUFFIXES) and is_there(path) and path.is_file():
        kinds = ", ".join((*VOLUME_SUFFIXES, *PICTURE_SUFFIXES))
        raise CdiffError(f"{path} is not a kind of file that is read here ({kinds}, or DICOM); convert it")
    return any_bytes(path)


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder. Raises CdiffError where a folder above it does not let this user see that: `is_file` and the
    like then return False from Python 3.14 on, and raise before."""
    try:
        path.stat()
    except PermissionError:
        raise CdiffError(
            f"{path} cannot be reached: permission denied; check the permissions of the folders that it lies in"
        ) from None
    except (OSError, ValueError):  # nothing, a link to nothing, a loop of links; a name that cannot be one
        return False
    return True


def must_be_text(path: Path) -> None:
    """Raise CdiffError where the path is not text that a report could hold."""
    named = os.fsencode(path).decode("utf-8", "backslashreplace")
    if named != str(path):
        if os.fsencode(path) == named.encode():  # it is UTF-8, but the locale has Python read it in another encoding
            raise CdiffError(
                f"{named} has characters that this locale ({sys.getfilesystemencoding()}) cannot read; set PYTHONUTF8=1"
            )
        raise CdiffError(f"{named} has a name that is not UTF-8; rename the file, or the folder that has such a name")


def any_bytes(path: Path) -> bytes:
    """The bytes of a file of any kind. Raises CdiffError when it cannot be read or is empty."""
    try:
        # /dev/zero never ends, and a pipe may never begin.
        if is_there(path) and not path.is_file() and not path.is_dir():
            raise CdiffError(f"{path} is a device or a pipe, not a file; copy its contents into a file")
        data = path.read_bytes()
    except FileNotFoundError:
        if path.is_symlink():
            raise CdiffError(f"{path} is a link to {path.readlink()}, which does not exist; fetch that file") from None
        foreign = ": here / separates folders" if "\\" in path.name else ""  # as in a table from Windows
        raise CdiffError(f"{path} does not exist; check the path{foreign}") from None
    except OSError as error:
        raise CdiffError(
            f"{path} cannot be read: {error.strerror or error}; check the file and its permissions"
        ) from None
    if not data:
        raise CdiffError(f"{path} is empty (0 bytes); copy it again")
    for beginning, command in POINTERS.items():
        if data.startswith(beginning):
            raise CdiffError(
                f"{path} is a placeholder for a file that its repository keeps elsewhere; fetch it with: {command}"
            )
    return data


def optional(module: str, package: str, path: Path, kind: str) -> Any:
    """The module of a package that reads one kind of file and is not always installed. Raises CdiffError where it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise CdiffError(
            f"{path} is {kind}, and {package}, which reads it, is not installed; try: pip install '.[formats]' in cdiff's clone, or "
            "convert it to NIfTI"
        ) from None
