"""What a MetaImage's header promises, and whether its files hold that: ITK passes over damaged packed voxels, and over missing files."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.detached import voxel_files
from cdiff.runtime.scans.sources import any_bytes
from cdiff.runtime.scans.stored import must_not_hold_more, unpacked_size

TEXT_ENDS = 2**16
"""Most bytes of a header, but for the names of its files."""
LAST = "ElementDataFile"
"""The field that ends a header."""
BYTES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "FLOAT": 4, "DOUBLE": 8, "LONG_LONG": 8, "ULONG_LONG": 8,
}  # fmt: skip
"""A value's bytes by ElementType, without its MET_; those of MET_LONG depend on who wrote it."""
WHOLE = re.compile(r"-?[0-9]{1,18}")
NEEDED = ("NDims", "DimSize", "ElementType")
BY_AXIS = {
    "CenterOfRotation", "DimSize", "ElementSize", "ElementSpacing", "Offset", "Orientation", "Origin", "Position", "Rotation",
    "TransformMatrix",
}  # fmt: skip
"""Fields with one value per axis, or, for those in MATRICES, one for each pair of axes."""
MATRICES = {"Orientation", "Rotation", "TransformMatrix"}
"""Those with a value for each pair of axes."""
MOST_AXES = 6
"""Most that SimpleITK reads, the components of a voxel counting as one; many more make it crash, in both formats."""
MOST_VOXELS = 2**31
"""Most along an axis; ITK takes any number as it stands."""


def header_of(data: bytes, path: Path) -> tuple[dict[str, str], str, int]:
    """The fields of the MetaImage in `data`, the value of the last one (`LAST`), and the byte at which its line has ended.

    Raises CdiffError where that field occurs twice, or beyond TEXT_ENDS: ITK might take another one than is looked at here.
    """
    mark = LAST.encode()
    head, found, rest = data[:TEXT_ENDS].partition(mark)
    if data.count(mark) > bool(found):
        raise CdiffError(f"{path} does not name its voxels exactly once, in a short header ({LAST}); save it again")
    fields = dict(_said(head))
    line = rest.partition(b"\n")[0]
    named = re.sub(r"^\s*[=:]", "", line.decode("utf-8", "replace")).strip()
    return fields, named, len(head) + len(found) + len(line) + 1


def _said(head: bytes) -> Iterator[tuple[str, str]]:
    """The name and the value of each field in a header's lines."""
    for line in head.decode("latin-1").splitlines():
        name, sign, value = re.match(r"([^=:]*)([=:]?)(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]  # it fits all text
        if sign:
            yield name.strip(), value.strip()


def must_be_whole(data: bytes, path: Path) -> None:
    """Raise CdiffError for a header that ITK cannot follow: it prints lines of its own about missing sizes, and many axes end the process."""
    head = data[:TEXT_ENDS].partition(LAST.encode())[0]
    names = [name for name, _ in _said(head)]
    fields, named, _ = header_of(data, path)
    axes, sizes = fields.get("NDims", ""), fields.get("DimSize", "").split()
    early = [name for name in names[: names.index("NDims")] if name in BY_AXIS] if "NDims" in names else []
    wrong = next((f"{name} does not occur exactly once" for name in NEEDED if names.count(name) != 1), "")
    if not wrong and (not axes.isdecimal() or not 0 < int(axes) <= MOST_AXES or len(sizes) != int(axes)):
        wrong = f"{axes[:50]} axes of {fields['DimSize'][:50]} voxels"
    elif not wrong and not all(size.isdecimal() and 0 < int(size) <= MOST_VOXELS for size in sizes):
        wrong = f"{fields['DimSize'][:50]} voxels"
    elif not wrong and early:
        wrong = f"{early[0]} stands before NDims, which says how long it is"
    elif not wrong and (odd := _not_by_axis(fields, int(axes))):
        wrong = f"{odd} = {fields[odd][:50]}"
    elif not wrong and not (named and named.isprintable()):
        wrong = f"the voxels are in {named[:50]!r}"
    if wrong:
        raise CdiffError(
            f"{path} is not a NRRD or MetaImage file that can be read (its header: {wrong}); copy or save it again"
        )


def _not_by_axis(fields: dict[str, str], axes: int) -> str | None:
    """The name of a field that has not one finite number for each axis, for which ITK would take 0; None where there is none."""
    for name in (BY_AXIS - {"DimSize"}) & fields.keys():
        words = fields[name].split()
        try:
            fits = all(math.isfinite(float(word)) for word in words)
        except ValueError:
            fits = False
        if not fits or len(words) != axes ** (2 if name in MATRICES else 1):
            return name
    return None


def _whole_number(fields: dict[str, str], name: str, default: int, path: Path) -> int:
    """A field's value. Raises CdiffError where it is no whole number: ITK would take what it can read of it."""
    value = fields.get(name, str(default))
    if not WHOLE.fullmatch(value):
        raise CdiffError(f"{path} has {value[:50]!r} as {name} in its header; it is damaged: copy or save it again")
    return int(value)


def files_of(data: bytes, path: Path) -> list[Path]:
    """The files that the MetaImage in `data` names for its voxels; [] where it holds them itself. Raises CdiffError as `voxel_files` does."""
    _, named, begins = header_of(data, path)
    if named.upper() in ("", "LOCAL"):
        return []
    return voxel_files(named, data[begins:].decode("utf-8", "replace").split("\n"), path)


def check_metaimage(data: bytes, path: Path) -> None:
    """Raise CdiffError where the file at `path` does not hold the voxels that its header promises, or gives lengths in another unit than mm.

    data: its bytes, which `must_be_whole` has passed. Where ElementType does not say how large a value is, the voxels are left to ITK.
    """
    fields, named, begins = header_of(data, path)
    unit = fields.get("DistanceUnits", "mm").lower()
    if unit not in ("mm", "", "?", "???"):
        raise CdiffError(f"{path} gives its lengths in {unit}; save it in millimetres")
    words = fields.get("BinaryData", "True").lower() in ("false", "0")
    channels, skipped, packed_size = (
        _whole_number(fields, name, default, path)
        for name, default in (("ElementNumberOfChannels", 1), ("HeaderSize", 0), ("CompressedDataSize", 0))
    )
    sizes, size = [int(n) for n in fields["DimSize"].split()], BYTES.get(fields["ElementType"].removeprefix("MET_"))
    if size is None:
        return
    values = math.prod(sizes) * channels
    # Values written as text have at least a digit and a space each; ITK looks for all that are promised, however soon the file ends.
    promised = 2 * values - 1 if words else values * size
    packed = fields.get("CompressedData", "False").lower() in ("true", "1") and not words
    files = files_of(data, path)
    if not files and named:
        if packed and not packed_size:  # which ITK then reads wrongly
            raise CdiffError(
                f"{path} does not say how many bytes its compressed voxels take (CompressedDataSize); save it again"
            )
        stored = memoryview(data)[begins:]
        _must_hold(promised, stored[:packed_size] if packed else stored, packed, path, path)
        if not packed and not words:
            must_not_hold_more(len(stored), promised, sizes, path)
    _must_be_as_many(files, named, sizes, path)
    for file in files:
        held = any_bytes(file)
        if not packed or len(files) == 1:  # nothing says how long each of several packed ones is
            _must_hold(promised // len(files) + max(skipped, 0) * (not packed), held, packed, file, path)
        if not packed and not words and len(files) == 1 and skipped >= 0:  # below 0: voxels at the file's end
            must_not_hold_more(len(held) - skipped, promised, sizes, file)


def _must_be_as_many(files: list[Path], named: str, sizes: list[int], path: Path) -> None:
    """Raise CdiffError where a list or a pattern names more or fewer files than the image has parts, about which ITK says nothing."""
    kind, *rest = named.split() or [""]
    axes = len(sizes) - 1
    if kind == "LIST" and rest and rest[0].rstrip("D").isdecimal():
        axes = int(rest[0].rstrip("D"))
    if (kind == "LIST" or "%" in named) and len(files) != math.prod(sizes[axes:]):
        raise CdiffError(
            f"{path} names {len(files)} files for its voxels, but its sizes need {math.prod(sizes[axes:])}; correct the list"
        )


def _must_hold(promised: int, stored: bytes | memoryview, packed: bool, file: Path, path: Path) -> None:
    """Raise CdiffError where `stored` has less than `promised` bytes, or, if packed, unpacks to more or less or fails its check sum."""
    try:
        held = unpacked_size(stored, promised) if packed else len(stored)
    except (zlib.error, EOFError) as error:
        raise CdiffError(f"{file} is truncated or damaged ({error}); copy it again") from None
    if held < promised or (packed and held > promised):
        raise CdiffError(
            f"{file} holds {'less' if held < promised else 'more'} than the header of {path.name} promises ({promised} bytes of voxels); "
            "it is truncated or damaged: copy it again"
        )
