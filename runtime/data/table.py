"""Reader of a table (CSV) that names images and masks, one row per case or one per mask (docs/own-data.md)."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cdiff.runtime.data.case import SPLITS, Entry, listed, stem
from cdiff.runtime.data.layouts import OWN_TASK
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.scans.sources import any_bytes
from cdiff.runtime.words import several

SUFFIXES = (".csv", ".tsv")
IMAGE = re.compile(r"image(?:[_ -](?P<name>.+))?$")
MASK = re.compile(r"mask[_ -]?(?P<name>.*)$")
SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
PLAIN = ("case", "split", "patient", "task", "rater")
CONVENTION = "the columns image (or image_t1, image_t2 ...) and mask1, mask2 ... (or rater and mask) are needed"


@dataclass(frozen=True)
class Columns:
    """Which columns hold what: the images by modality ("" when there is one column), the masks by annotator, the `PLAIN` ones by name.

    doubled: columns that say the same as an earlier one, such as a second `mask`, or `mask_1` beside `mask1`.
    """

    images: dict[str, str]
    masks: dict[str, str]
    plain: dict[str, str]
    ignored: tuple[str, ...]
    doubled: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        return bool(self.images and self.masks)


def columns(header: list[str]) -> Columns:
    """Sort a header's columns, whatever their case."""
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    plain: dict[str, str] = {}
    ignored, doubled = [], []
    for column in header:
        name = column.strip().lower()
        if name in PLAIN:
            kind, key = plain, name
        elif match := IMAGE.match(name):
            kind, key = images, match["name"] or ""
        elif match := MASK.match(name):
            kind, key = masks, match["name"] or ""
        else:
            ignored += [column] if name else []
            continue
        if key in kind:
            doubled.append(column)
        kind.setdefault(key, column)
    return Columns(images, masks, plain, tuple(ignored), tuple(doubled))


def is_table(path: Path) -> bool:
    """Whether a file is a table of cases, by its first line."""
    try:
        return path.suffix.lower() in SUFFIXES and columns(next(_rows(path))[1]).usable
    except CdiffError:
        return False


def names_scans(path: Path) -> bool:
    """Whether an image column of a table names a file that could be read here, in any row: a column such as `image_date` does not.

    Also true of a table that cannot be read to its end.
    """
    rows = _rows(path)
    try:
        _, header = next(rows)
        places = [header.index(column) for column in columns(header).images.values()]
        return any(stem(Path(cells[i].strip())) is not None for _, cells in rows for i in places if i < len(cells))
    except CdiffError:
        return True


def read_table(path: Path, notes: list[str], *, masks: bool = True) -> list[Entry]:
    """The cases of a table, in the order of its rows. Paths are relative to the table's folder; an empty cell is a mask that
    nobody drew. masks: whether a table without masks is refused (segmenting needs none).

    Raises CdiffError naming the row for a table that contradicts itself; files are not looked at here.
    """
    rows = _rows(path)
    _, header = next(rows)
    known = columns(header)
    if not known.images or (masks and not known.masks):
        raise CdiffError(f"{path} has the columns {', '.join(header)}; {CONVENTION}")
    if len(known.images) > 1 and "" in known.images:
        raise CdiffError(
            f"{path} has a column image beside {known.images[max(known.images)]}; name every modality, as in image_t1"
        )
    if known.doubled:
        raise CdiffError(
            f"{path} has a second column {known.doubled[0]}; give each a name of its own, as in mask1, mask2 or mask_anna"
        )
    if known.ignored:
        notes.append(f"{path.name}: columns not used: {', '.join(known.ignored)}")
    entries: dict[str, Entry] = {}
    for number, cells in rows:
        _check_width(header, cells, f"{path}, row {number}")
        row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        if any(row.values()):
            _add(entries, row, known, path, f"{path}, row {number}")
    if not entries:
        raise CdiffError(f"{path} names no case; put a row for each below its header")
    uses = Counter(file for entry in entries.values() for file in entry.files)
    if twice := [str(file) for file, count in uses.items() if count > 1]:
        notes.append(
            f"{path.name} names more than once: {listed(twice)}; an image is of one case, a mask of one of its annotators"
        )
    _shorten(entries)
    if len({bool(entry.split) for entry in entries.values()}) > 1:
        without = [entry.name for entry in entries.values() if not entry.split]
        raise CdiffError(
            f"{path} gives a split for some cases only (none for {listed(without)}); fill the column or drop it"
        )
    return list(entries.values())


def _check_width(header: list[str], cells: list[str], where: str) -> None:
    """Raise CdiffError for a row that ends early, so that masks may be lost, and for a file in a column without a name, such as one more
    annotator's mask. Other text may stand there (a note with commas), and anything in a first column without a name (a data frame's index)."""
    if any(cell.strip() for cell in cells) and len(cells) < len(header):
        raise CdiffError(
            f"{where} has {several(len(cells), 'cell')} for {several(len(header), 'column')}; a mask that nobody drew is an empty cell, so end "
            "the row with commas, or copy the table again if it was cut off"
        )
    for i, cell in enumerate(cells):
        if i and (i >= len(header) or not header[i].strip()) and stem(Path(cell.strip())) is not None:
            raise CdiffError(
                f"{where} has {cell.strip()} in column {i + 1}, which has no name in the first line; name it, such as mask_ben"
            )


def _add(entries: dict[str, Entry], row: dict[str, str], known: Columns, path: Path, where: str) -> None:
    def cell(name: str) -> str:
        return row.get(known.plain[name], "") if name in known.plain else ""

    images = {name: path.parent / row[column] for name, column in known.images.items() if row.get(column)}
    case = cell("case") or (row.get(next(iter(known.images.values())), ""))
    if not case:
        raise CdiffError(f"{where} names neither a case nor an image; give one")
    split = cell("split").lower()
    if split and split not in SPLITS:
        raise CdiffError(f"{where} has the split {split!r}; use train, val or test")
    entry = entries.get(case)
    if entry is None:
        if len(images) < len(known.images):
            lacking = [column for name, column in known.images.items() if name not in images]
            raise CdiffError(f"{where}, case {case}: {', '.join(lacking)} is empty; every case needs its images")
        entry = entries[case] = Entry(case, images, split=SPLITS.get(split, ""), patient=cell("patient"))
    elif "rater" not in known.plain and "task" not in known.plain:
        raise CdiffError(
            f"{where} names the case {case} again; give each case one row, or add a column rater and give each mask one row"
        )
    elif any(entry.images[name] != image for name, image in images.items()) or (split and SPLITS[split] != entry.split):
        raise CdiffError(f"{where} gives the case {case} another image or split than the first row of that case does")
    masks = entry.tasks.setdefault(cell("task") or OWN_TASK, {})
    for name, column in known.masks.items():
        rater = "_".join(word for word in (cell("rater"), name) if word) or "1"
        if row.get(column):
            if rater in masks:
                raise CdiffError(f"{where} gives a second mask of rater {rater} to the case {case}; keep one")
            masks[rater] = path.parent / row[column]


def _shorten(entries: dict[str, Entry]) -> None:
    """Call cases that go by their image's path by the file's name alone, where no two are then the same."""
    short = {key: stem(Path(key)) for key in entries}
    if all(short.values()) and len(set(short.values())) == len(entries):
        for key, name in short.items():
            entries[key].name = name or key


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The table's rows with their numbers, the header first; comma, semicolon or tab, UTF-8 with or without a byte order mark.

    A first line such as `sep=;` tells spreadsheets the separator, and is no row of the table. Rows are read one by one: a file
    that is no table of cases is recognised by its header, whatever lies below.
    """
    try:
        text = io.TextIOWrapper(io.BytesIO(any_bytes(path)), "utf-8-sig").read()  # all line ends become one
    except UnicodeDecodeError:
        raise CdiffError(f"{path} is not UTF-8 text; save it as CSV UTF-8") from None
    if "\0" in text:  # UTF-16 without its mark is such text, and no file's name holds that character
        raise CdiffError(f"{path} is not UTF-8 text; save it as CSV UTF-8")
    first = text.lstrip("\r\n").partition("\n")[0]
    told = SEPARATOR.fullmatch(first.strip("\r"))
    delimiter = told[1] if told else max(",;\t", key=first.count)
    rows = ((number, cells) for number, cells in _parsed(text, delimiter, path) if any(cells))
    if told:
        next(rows)
    header = next(rows, None)
    if header is None:
        raise CdiffError(f"{path} is empty; {CONVENTION}")
    yield header
    yield from rows


def _parsed(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV, numbered. Raises CdiffError where a quotation mark that nothing closes would swallow those below it."""
    lines = list(io.StringIO(text, newline=""))
    rows, start = csv.reader(lines, delimiter=delimiter), 0
    number = 0
    try:
        for number, cells in enumerate(rows, start=1):
            if rows.line_num > start + 1:  # a cell of several lines is one only if its quotation marks are in order
                next(csv.reader(lines[start : rows.line_num], delimiter=delimiter, strict=True))
            start = rows.line_num
            yield number, cells
    except csv.Error as error:
        raise CdiffError(
            f"{path} cannot be read as a table from line {start + 1} on ({error}); look for a quotation mark that is not closed, "
            "and remove columns of very long text"
        ) from None
