"""The contact sheet of a data set: what each panel holds is of the case and the slice that stand above it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from cdiff.runtime.data.datacheck import check_data
from cdiff.runtime.pictures.drawing import READER_COLOURS
from cdiff.runtime.pictures.sheet import _mosaic, sheet_figure
from cdiff.runtime.scans.scan import read_scan


def test_every_panel_is_of_the_slice_with_the_most_votes(tmp_path: Path) -> None:
    """The header turns it, and the annotators' marks differ in size, which tells their outlines apart."""
    folder, affine = tmp_path / "data" / "Training" / "case01", np.diag([-0.5, 0.5, 2, 1])
    folder.mkdir(parents=True)
    image = np.random.default_rng(0).random((40, 32, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, affine), folder / "image.nii.gz")
    ends = {"anna": 9, "ben": 10, "clara": 12}
    masks = np.zeros((3, 40, 32, 4), np.uint8)
    for mask, (name, end) in zip(masks, ends.items(), strict=True):
        mask[4:end, 5:8, 2] = 1
        mask[6, 5:8, 1] = 1
        nib.save(nib.Nifti1Image(mask, affine), folder / f"mask_{name}.nii.gz")
    check = check_data(tmp_path / "data")
    figure = sheet_figure(check.looks, check.channels, 2, "a title", "a note")
    assert "case01 · train · slice 2 of 0 to 3 · 3 masks" in [text.get_text() for text in figure.texts]

    view = read_scan(folder / "image.nii.gz").grid.view
    turned, soft = view(image[..., 2]), view(masks.mean(axis=0, dtype=np.float32)[..., 2])
    whole, outlined, labelled = (axes for axes in figure.axes if axes.get_images())
    (frame,) = whole.patches
    left, top = np.array(frame.get_xy()) + 0.5  # type: ignore[attr-defined]
    rows, columns = frame.get_height(), frame.get_width()  # type: ignore[attr-defined]
    near = (slice(int(top), int(top + rows)), slice(int(left), int(left + columns)))

    def grey(part: Any, light: float = 1) -> Any:
        low, high = np.percentile(part, (0.5, 99.8))
        return light * np.clip((part - low) / (high - low), 0, 1)

    shown = [[np.asarray(one.get_array()) for one in axes.get_images()] for axes in (whole, outlined, labelled)]
    wanted = [[grey(turned)], [grey(turned[near])], [grey(turned[near], 0.6), soft[near]]]
    for found, meant in zip(shown, wanted, strict=True):
        for one, other in zip(found, meant, strict=True):
            np.testing.assert_allclose(one, other, 0, 1e-6)
    lines = {tuple(line.get_edgecolor()[0][:3]): line for line in outlined.collections}  # type: ignore[index]
    assert list(lines) == [to_rgb(colour) for colour in READER_COLOURS[:3]]
    lengths = [np.ptp(line.get_paths()[0].vertices[:, 0]) for line in lines.values()]  # type: ignore[index]
    assert lengths == pytest.approx([end - 4 for end in ends.values()]), "the array's first axis lies across"


def test_the_channels_of_an_image_are_tiles_in_their_order() -> None:
    """Each in its own grey window."""
    channels = np.stack(
        [scale * np.arange(6, dtype=np.float32).reshape(2, 3)[::turn] for scale, turn in ((1, 1), (50, -1), (3, 1))]
    )
    found = _mosaic(channels)
    assert found.shape == (4, 6)
    np.testing.assert_allclose(found[:2, :3], found[2:, :3])
    np.testing.assert_allclose(found[:2, 3:], found[:2, :3][::-1])
    assert found[:2, :3].max() == 1
    assert not found[2:, 3:].any()
