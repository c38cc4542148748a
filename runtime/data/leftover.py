"""What a walk over case folders passes over: nothing of a user's data is left out in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cdiff.runtime.data.case import Entry, is_output, listed
from cdiff.runtime.words import several

BESIDE = "files beside those of a case"


@dataclass
class Leftover:
    """Collected folder by folder; `told` reports it.

    masks: folders that hold masks and no image, and the names of the scans beside the masks. files: names of files beside a case's.
    folders: those with scans that form no case. below: folders of cases inside a case's. strays: images without masks above cases that
    have some. links: those to folders or files that are not there.
    """

    masks: dict[Path, list[str]] = field(default_factory=dict)
    files: Counter[str] = field(default_factory=Counter)
    folders: list[Path] = field(default_factory=list)
    below: list[Path] = field(default_factory=list)
    strays: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    _above: set[Path] = field(default_factory=set)

    def see(self, folder: Path, files: Sequence[Path], entries: Sequence[Entry], masks: Sequence[Path]) -> None:
        """Note one folder of the walk. files: its scans by name; entries: the cases in it; masks: those of `files` that are masks by their names."""
        if entries:
            self._above.update((folder, *folder.parents))
            used = {path for entry in entries for path in entry.files}
            self.files.update(path.name for path in files if path not in used and not is_output(path))
        elif masks:
            self.masks[folder] = [path.name for path in files if path not in masks]
        elif not all(map(is_output, files)):
            self.folders.append(folder)

    def lacking_image(self) -> str:
        """What keeps folders with masks from being cases, to end a message with: most likely their images have another name."""
        if not self.masks:
            return ""
        folder, others = next(iter(self.masks.items()))
        more = f" (nor have {several(len(self.masks) - 1, 'more folder')})" if len(self.masks) > 1 else ""
        remedy = "add the image under that name"
        if len(others) == 1:
            remedy = f"if {others[0]} is the image, rename it to that"
        elif others:
            remedy = f"rename the image among {listed(others, 4)} to that, or each modality to image_NAME"
        return f"; {folder} has masks but no image.nii.gz{more}: {remedy}"

    def told(self, root: Path) -> list[str]:
        """One line for each kind. Pictures in folders above the cases illustrate a data set and are not reported."""
        notes = [f"{folder} has masks but no image.nii.gz: left out" for folder in self.masks]
        if self.files:
            names = [name if n == 1 else f"{name} (in {n} folders)" for name, n in self.files.most_common()]
            notes.append(f"{BESIDE}, not used: {listed(names)}")
        for what, paths in (
            ("folders with scans that are not cases", [path for path in self.folders if path not in self._above]),
            ("folders of cases inside a case's folder", self.below),
            ("images without masks above folders of cases", self.strays),
            ("links to files that do not exist", self.links),
        ):
            if paths:
                notes.append(f"{what}, left out: {listed([path.relative_to(root).as_posix() for path in paths])}")
        return notes
