"""The pictures: drawn for every kind of scan, nothing overlaps or runs out of the page, the right slice and close-up."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.pictures.drawing import close_up, grey, new_figure, outline, panel
from cdiff.runtime.pictures.preview import preview_figure, reader_figure, write_preview
from cdiff.runtime.report import expectation, volumes
from cdiff.runtime.results import Result
from cdiff.runtime.scans.grid import View
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.stack import Stack, entropy


def result(
    shape: tuple[int, ...], C: int = 4, *, channels: int = 1, found: bool = True, spacing: Any = (0.7, 0.7, 2.5)
) -> Result:
    """A blob in a scan of noise: its area is the largest in slice S // 3."""
    rng = np.random.default_rng(0)
    array = gaussian_filter(rng.normal(size=shape), 1).astype(np.float32)
    scan: Any = array
    if spacing is not None:
        scan = nib.Nifti1Image(array, np.diag([*spacing, 1]))
        scan.header.set_xyzt_units("mm")
    read = read_scan(scan, channels=channels)
    n, _, h, w = read.slices.shape
    z, y, x = np.indices((n, h, w))
    far = np.hypot((y - 0.4 * h) / (0.1 * h), (x - 0.6 * w) / (0.1 * w)) + 0.5 * abs(z - n // 3)
    levels = np.stack([(far < 1.5 - 0.1 * c) for c in range(C)], axis=1).astype(np.float32) * found
    stack = Stack(levels, 0 * levels[:, 0])
    report = {
        "bundle": "a model with quite a long name", "sampler": "dpm++2m", "steps": 1000, "runs": 100, "seed": 2**63,
        "engine": "onnxruntime", "device": "cuda:0", "volumes": volumes(stack, read.grid),
        "expected_dice": expectation(stack, range(n)),
    }  # fmt: skip
    return Result(read.grid, read.slices, range(n), stack, "x", report)


KINDS = {
    "volume": result((64, 64, 12)),
    "long volume": result((40, 40, 60)),
    "two slices": result((64, 64, 2)),
    "2-D": result((64, 96), 7),
    "one slice": result((64, 64, 1), 1),
    "no spacing": result((64, 64, 3), spacing=None),
    "colours": result((64, 64, 3), channels=3, spacing=None),
    "nothing found": result((64, 64, 5), found=False),
    "thick voxels": result((64, 20, 5), spacing=(0.5, 3.0, 1.0)),
    "tiny": result((2, 3, 1)),
    "long name": result((64, 64, 3)),
}


def drawn_texts(figure: Any) -> list[Any]:
    """Every text that is drawn: ticks' labels only of the colour bars, the other axes are off."""
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title]
        texts += [*axes.get_xticklabels(), axes.xaxis.label] if axes.axison else []
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_overlaps_or_leaves_the_page(kind: str, tmp_path: Path) -> None:
    name = "a_rather_long_but_possible_name_of_a_scan_2019-03-01" * 3 if kind == "long name" else "scan $1_a$"
    figure = preview_figure(KINDS[kind], name)
    figure.savefig(tmp_path / "x.png", dpi=60)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = {text: text.get_window_extent(renderer) for text in drawn_texts(figure) if text.get_text()}
    assert len(boxes) > 10
    page = figure.bbox
    for text, box in boxes.items():
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside, f"{text.get_text()!r} leaves the page"
    for (one, a), (two, b) in combinations(boxes.items(), 2):
        assert not a.overlaps(b), f"{one.get_text()!r} overlaps {two.get_text()!r}"


def test_the_expected_dice_stands_where_there_is_a_mask() -> None:
    def told(kind: str) -> list[str]:
        return [text.get_text() for text in preview_figure(KINDS[kind], "x").texts if "Dice" in text.get_text()]

    expected = KINDS["volume"].report["expected_dice"]["mask"]
    assert [text.rpartition("  ·  ")[2] for text in told("volume")] == [f"expected Dice {expected:.2f}"]
    assert told("nothing found") == []


def test_a_scale_bar_needs_a_spacing_that_can_be_trusted() -> None:
    def bars(spacing: Any) -> list[str]:
        texts = [text.get_text() for text in drawn_texts(preview_figure(result((64, 64, 3), spacing=spacing), "x"))]
        return [text for text in texts if text.endswith((" mm", " µm"))]

    assert bars((0.7, 0.7, 2.5))[0] == "10 mm"
    assert bars((0.00025, 0.00025, 1))[0] == "2 µm"
    assert len(bars((1e-10, 1e-10, 1))) == 2, "however small, it is drawn"
    assert bars((1, 1, 1)) == [], "a placeholder: the same picture counts voxels, not ml"


def test_the_slice_with_the_largest_area_is_shown() -> None:
    titles = [axes.get_title(loc="left") for axes in preview_figure(KINDS["volume"], "x").axes]
    assert "Slice 4 (of 0 to 11)" in titles


def test_slices_keep_the_numbers_of_the_scan() -> None:
    whole = KINDS["volume"]
    part = Stack(whole.stack.levels[3:6], whole.stack.run_std[3:6])
    shown = preview_figure(Result(whole.grid, whole.image, range(3, 6), part, "x", whole.report), "x")
    assert [axes.get_title() for axes in shown.axes if axes.get_title()] == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("kind", "best", "strip"),
    [
        ("long volume", 20, [16, 17, 18, 20, 21, 22, 23, 24]),  # the fullest is always there
        ("thick voxels", 1, [0, 1, 2, 3, 4]),
        ("two slices", 0, [0, 1]),
    ],
)
def test_every_panel_shows_its_own_map_of_the_slice_that_it_names(kind: str, best: int, strip: list[int]) -> None:
    shown = KINDS[kind]
    figure = preview_figure(shown, "x")
    panels = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}
    assert [int(title) for title in panels if title.isdigit()] == strip
    (frame,) = panels[f"Slice {best} (of 0 to {len(shown.image) - 1})"].patches
    left, top = np.array(frame.get_xy()) + 0.5  # type: ignore[attr-defined]
    rows, columns = frame.get_height(), frame.get_width()  # type: ignore[attr-defined]
    box = (slice(int(top), int(top + rows)), slice(int(left), int(left + columns)))

    def near(maps: Any, number: int) -> Any:
        return shown.grid.view(np.asarray(maps[number]))[box]

    def drawn(title: str) -> list[Any]:
        return [np.asarray(image.get_array()) for image in panels[title].get_images()]

    soft = shown.stack.soft
    for title, number in [("Outline of each level", best), ("Agreement", best), *((str(n), n) for n in strip)]:
        picture, *overlay = drawn(title)
        low, high = np.percentile(near(shown.image[:, 0], number), (0.5, 99.8))
        np.testing.assert_allclose(
            picture, np.clip((near(shown.image[:, 0], number) - low) / (high - low), 0, 1), 0, 1e-6
        )
        assert all(np.array_equal(one, near(soft, number)) for one in overlay)
        assert len(overlay) == (title != "Outline of each level")
    np.testing.assert_allclose(drawn("Uncertainty")[1], near(entropy(soft), best), 0, 1e-6)
    alpha = np.asarray(panels["Agreement"].get_images()[1].get_alpha())
    assert np.array_equal(alpha > 0, near(soft, best) > 0), "the anatomy stays readable"


def test_an_image_of_one_value_is_black_and_not_undefined() -> None:
    flat = np.full((3, 4), 7, np.float32)
    np.testing.assert_array_equal(grey(flat, (7, 7)), 0 * flat)


def test_a_line_stands_where_a_map_reaches_one_half_and_nowhere_else() -> None:
    """One half itself is inside, as it is in the mask."""
    box, drawn = (slice(0, 8), slice(0, 8)), []
    for value in (0.5, 0.49):
        soft = np.zeros((8, 8), np.float32)
        soft[2:5, 3:6] = value
        axes = panel(new_figure(2, 2), (0, 0, 2, 2))
        outline(axes, soft, box, "white")
        drawn.append([np.shape(path.vertices)[0] for line in axes.collections for path in line.get_paths()])
    assert sum(drawn[0]) > 4
    assert sum(drawn[1]) == 0


def test_every_level_has_its_outline() -> None:
    axes = next(a for a in preview_figure(KINDS["2-D"], "x").axes if a.get_title(loc="left") == "Outline of each level")
    assert len({tuple(line.get_edgecolor()[0]) for line in axes.collections}) == 7


def test_the_close_up_holds_the_object_and_is_square_in_millimetres() -> None:
    soft = np.zeros((200, 100), np.float32)
    soft[60:80, 85:99] = 1
    rows, columns = close_up([soft], View(spacing=(0.5, 1.0)))
    assert rows.start <= 60
    assert rows.stop >= 80
    assert columns.start <= 85
    assert columns.stop >= 99
    assert (rows.stop - rows.start) * 0.5 == pytest.approx(columns.stop - columns.start, abs=1)
    assert close_up([0 * soft], View()) == (slice(0, 200), slice(0, 100))
    assert close_up([np.ones((20, 30), np.float32)], View()) == (slice(0, 20), slice(0, 30))


def test_where_a_model_saw_a_part_the_close_up_is_of_that_part() -> None:
    seen = (slice(300, 364), slice(40, 104))
    assert close_up([np.zeros((512, 512), np.float32)], View(), within=seen) == seen
    soft = np.zeros((512, 512), np.float32)
    soft[330:334, 70:75] = 1
    rows, columns = close_up([soft], View(), least=0.5, within=seen)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (32, 32)
    soft[300:364, 40:104] = 1  # all of it: some of what is around is shown too
    rows, columns = close_up([soft], View(), within=seen)
    assert rows.start < 300
    assert rows.stop > 364


@pytest.mark.parametrize("found", [True, False])
def test_a_structure_in_a_large_scan_is_shown_large(found: bool) -> None:
    """The header turns the slice: what is shown lies where the window does in the picture."""
    scan = nib.Nifti1Image(np.random.default_rng(0).random((300, 200, 3), np.float32), np.diag([-0.7, 0.7, 2.5, 1]))
    read = read_scan(scan)
    window = (slice(20, 52), slice(150, 182))
    levels = np.zeros((3, 4, 300, 200), np.float32)
    levels[:, :, 32:40, 160:170] = found
    report = {"bundle": "x", "sampler": "ddim", "steps": 1, "runs": 1, "seed": 0, "engine": "x", "device": "cpu"}
    shown = Result(read.grid, read.slices, range(3), Stack(levels, 0 * levels[:, 0]), "x", report, window)
    figure = preview_figure(shown, "x")
    whole, close = (axes.get_images()[0].get_array() for axes in figure.axes[:2])
    assert whole is not None
    assert close is not None
    assert whole.shape == (200, 300)
    side = 22 if found else 32
    assert close.shape == (side, side)
    (frame,) = figure.axes[0].patches
    left, top = frame.get_xy()  # type: ignore[attr-defined]
    # Across is the first axis, and down the second turned round: its end is the front, which is on top.
    assert 20 <= left + 0.5 <= 52 - side
    assert 200 - 182 <= top + 0.5 <= 200 - 150 - side
    bars = [text.get_text() for text in drawn_texts(figure) if text.get_text().endswith(" mm")]
    assert len(bars) == 2
    assert float(bars[1].split()[0]) < float(bars[0].split()[0])


def test_the_picture_of_a_case_with_its_readers(tmp_path: Path) -> None:
    image, readers = np.random.default_rng(0).random((40, 40)).astype(np.float32), np.zeros((4, 40, 40), bool)
    for k in range(3):  # the fourth reader drew nothing
        readers[k, 10 + k : 25, 12 : 26 + k] = True
    soft = readers.mean(axis=0).astype(np.float32)
    reader_figure(tmp_path / "a" / "r.png", image, readers, soft, entropy(soft), note="A credit")
    with Image.open(tmp_path / "a" / "r.png") as picture:
        assert picture.width > 3 * picture.height / 2
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["r.png"]
    (tmp_path / "file").touch()
    with pytest.raises(CdiffError):
        reader_figure(tmp_path / "file" / "r.png", image, readers, soft, entropy(soft))


def test_the_preview_is_a_picture_in_colour(tmp_path: Path) -> None:
    write_preview(KINDS["volume"], tmp_path / "x.png", "x")
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    assert picture.format == "PNG"
    assert np.ptp(pixels, axis=2).max() > 150


def test_a_user_who_has_latex_set_texts_gets_the_same_picture(tmp_path: Path) -> None:
    """A scan's maps were lost after the work: LaTeX fails at the underscore in a file's name, or is not there."""
    import matplotlib

    one = KINDS["one slice"]
    write_preview(one, tmp_path / "plain.png", "a_b%")
    with matplotlib.rc_context({"text.usetex": True}):
        with ThreadPoolExecutor() as pool:
            for k in range(3):
                pool.submit(write_preview, one, tmp_path / f"{k}.png", "a_b%")
        assert matplotlib.rcParams["text.usetex"]
    plain = (tmp_path / "plain.png").read_bytes()
    assert [(tmp_path / f"{k}.png").read_bytes() == plain for k in range(3)] == [True] * 3


def test_three_modalities_are_not_taken_for_colours() -> None:
    """Of a medical image the first channel is drawn, however many there are; a picture's three are its colours."""
    for shown, deep in ((result((64, 64, 1, 3), channels=3), False), (KINDS["colours"], True)):
        (image,) = preview_figure(shown, "x").axes[0].get_images()
        drawn = np.asarray(image.get_array())
        assert (drawn.ndim == 3) == deep


def test_importing_the_runtime_draws_in_nothing_heavy() -> None:
    code = (
        "import sys, cdiff, cdiff.runtime.segmenter, cdiff.runtime.results, cdiff.runtime.pictures.preview\n"
        "print([name for name in ('torch', 'matplotlib', 'onnxruntime', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("steps", "runs", "told"), [(1, 4, "1 step × 4 runs"), (2, 1, "2 steps × 1 run,")])
def test_the_chain_is_told_in_words_that_count(steps: int, runs: int, told: str) -> None:
    shown = replace(KINDS["tiny"], report=KINDS["tiny"].report | {"steps": steps, "runs": runs})
    assert any(told in text.get_text() for text in drawn_texts(preview_figure(shown, "x")))
