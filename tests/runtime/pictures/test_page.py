"""The page: what it holds are the maps, at the voxels it names; one file that loads nothing; a browser reads what the arrays hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cdiff.runtime.pictures import drawing
from cdiff.runtime.pictures.page import MOST, write_page
from cdiff.runtime.report import expectation, volumes
from cdiff.runtime.variants import VARIANTS
from tests.runtime.pictures.pages import Script, contents, result


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAL", "PIR"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_pixel_is_the_voxel_that_the_page_names(codes: str, axis: int, tmp_path: Path) -> None:
    """However the array lies and is cut: the voxel under the pointer has the maps that are shown, and lies where the header says."""
    made = result(codes=codes, slice_axis=axis)
    write_page(made, tmp_path / "x.html", "x")
    data, slices = contents(tmp_path / "x.html")
    soft, levels, uncertainty = made.soft, made.levels, made.uncertainty
    rng, pictures = np.random.default_rng(1), []
    for _ in range(50):
        i = int(rng.integers(len(slices)))
        r, q = (int(rng.integers(size)) for size in data["size"])
        voxel = [start + down * r + across * q for start, down, across in data["voxel"]]
        voxel.insert(data["axis"], data["numbers"][i])
        picture, shown, spread, *outlines = slices[i][:, r, q] / 255
        assert shown == pytest.approx(soft[tuple(voxel)], abs=0.002)
        assert spread == pytest.approx(uncertainty[(*voxel, 1)], abs=0.002)
        assert outlines == pytest.approx(levels[tuple(voxel)], abs=0.002)
        pictures.append((float(np.moveaxis(made.image[:, 0], 0, axis)[tuple(voxel)]), picture))
        assert made.grid.header is not None
        assert np.array(data["affine"]) @ [*voxel, 1] == pytest.approx(
            (made.grid.header.get_best_affine() @ [*voxel, 1])[:3]
        )
    steps = [np.insert(np.array(data["voxel"])[:, k], data["axis"], 0) for k in (1, 2)]  # a row down, a column across
    down, across = (np.array(data["affine"])[:, :3] @ step for step in steps)
    assert data["aspect"] == pytest.approx(np.linalg.norm(down) / np.linalg.norm(across))
    towards = [
        nib.orientations.aff2axcodes(np.diag([*np.sign(way), 1]))[np.argmax(abs(way))]
        for way in (-across, across, -down, down)
    ]
    assert [edge[0] for edge in data["edges"]] == towards
    greys = [grey for _, grey in sorted(pictures)]
    assert greys == sorted(greys)
    assert len(set(greys)) > 20


def test_one_half_stays_one_half(tmp_path: Path) -> None:
    """Outlines are drawn at 128 of 255: where the mask of the files is 1, and nowhere else."""
    made = result((16, 16, 3))
    maps = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(0)), 0.498], np.float32)
    made.stack.maps[:] = np.resize(maps, made.stack.maps.shape)
    write_page(made, tmp_path / "x.html", "x")
    _, slices = contents(tmp_path / "x.html")
    assert np.array_equal(slices[0][3:] > 127, made.grid.view(made.stack.levels[0]) >= 0.5)
    assert np.array_equal(np.unique(slices[0][3:]), [127, 128])


def test_a_name_cannot_write_into_the_page(tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)><!--<script>"
    write_page(result(), tmp_path / "x.html", name)
    found = Script((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert len(found.scripts) == 2
    assert json.loads(found.scripts[0])["name"] == name
    assert found.addresses == []


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    write_page(result(), tmp_path / "x.html", "x")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|//[a-z]+\.[a-z]|fetch\(|XMLHttp|import\(", text)


def test_sizes_of_any_magnitude_are_read_without_an_exponent(tmp_path: Path) -> None:
    made = result()
    part = {"voxels": 1, "ml": 1520.4}
    made.report["volumes"] = {
        "levels": [{"level": c, "voxels": 1, "ml": ml} for c, ml in enumerate((98.765, 0.3, 0.000125), start=1)],
        "mask": part,
        "expected": part,
    }
    write_page(made, tmp_path / "x.html", "x")
    shown = [row[-1] for row in contents(tmp_path / "x.html")[0]["sizes"]]
    assert shown == ["98.8 ml", "0.300 ml", "0.000125 ml", "1,520 ml", "1,520 ml"]
    for told, row in (
        ({}, ["1,234 voxels", "1,520 ml"]),
        ({"unreliable": "ml: may be a placeholder"}, ["1,234 voxels"]),
    ):
        made.report["volumes"] |= {"mask": part | {"voxels": 1234}, "levels": []} | told
        write_page(made, tmp_path / "x.html", "x")
        assert contents(tmp_path / "x.html")[0]["sizes"][0] == ["mask, at least half", *row]
    flat = result((12, 9))
    flat.report["volumes"] = {"levels": [], "mask": {"voxels": 3, "mm2": 0.75}, "expected": {"voxels": 2.5, "mm2": 0.6}}
    write_page(flat, tmp_path / "x.html", "x")
    data, _ = contents(tmp_path / "x.html")
    assert data["size_title"] == "Areas"
    assert data["sizes"] == [["mask, at least half", "3 pixels", "0.750 mm²"], ["expected", "2 pixels", "0.600 mm²"]]


def test_each_slice_of_the_page_says_what_its_map_expects(tmp_path: Path) -> None:
    """Of the slices that the page holds; nothing where the mask is empty, or the report says nothing."""
    made = result((8, 8, 402))
    made.stack.maps[:] = 0
    made.stack.maps[50:60, 0] = 0.75
    made.stack.maps[50:60, 1:] = np.linspace(0.5, 0.95, 10, dtype=np.float32)[:, None, None, None]
    write_page(made, tmp_path / "x.html", "x")
    assert set(contents(tmp_path / "x.html")[0]["expected"]) == {""}
    made.report["expected_dice"] = expectation(made.stack, made.slices)
    made.report["volumes"] = volumes(made.stack, made.grid)
    write_page(made, tmp_path / "x.html", "x")
    data, _ = contents(tmp_path / "x.html")
    known = {one["slice"]: one["mask"] for one in made.report["expected_dice"]["slices"]}
    assert data["expected"] == [f", expected Dice {known[n]:.2f}" if known[n] else "" for n in data["numbers"]]
    assert len(set(data["expected"])) > 5
    assert data["sizes"][-1] == ["expected Dice", f"{made.report['expected_dice']['mask']:.2f}"]


def test_a_long_scan_keeps_what_is_found(tmp_path: Path) -> None:
    """Of more slices than it may hold: those around what was found; of more of these, evenly, first and last among them."""
    made = result((8, 8, 402))
    made.stack.maps[:] = 0
    made.stack.maps[50:60] = 1
    write_page(made, tmp_path / "x.html", "x")
    data, slices = contents(tmp_path / "x.html")
    assert data["numbers"] == list(range(49, 63))  # slices 51 to 60, and two on each side
    assert len(slices) == 14
    assert "holds 14" in data["some"]
    assert len(data["areas"]) == 400
    made.stack.maps[20:380] = 1
    write_page(made, tmp_path / "x.html", "x")
    data, slices = contents(tmp_path / "x.html")
    assert (len(slices), data["numbers"][0], data["numbers"][-1]) == (MOST, 19, 382)


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("consensus", ["at least 1", "at least 2", "at least 3"]),
        ("annotator", ["annotator 1", "annotator 2", "annotator 3"]),
        ("soft-label", ["at least 1", "at least 2", "at least 3"]),
        ("implicit-ensemble", ["mask"]),
    ],
)
def test_an_outline_is_named_after_what_it_outlines(variant: str, names: list[str], tmp_path: Path) -> None:
    write_page(result(variant=variant), tmp_path / "x.html", "x")
    data, _ = contents(tmp_path / "x.html")
    assert [one["name"] for one in data["outlines"]] == names


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("shape", "read"), [((12, 9), {}), ((2, 3, 1), {}), ((9, 12, 4), {}), ((9, 12, 3), {"channels": 3})]
)
def test_every_variant_and_shape(variant: str, shape: tuple[int, ...], read: dict[str, Any], tmp_path: Path) -> None:
    made = result(shape, variant=variant, **read)
    write_page(made, tmp_path / "x.html", "x")
    data, slices = contents(tmp_path / "x.html")
    assert len(slices) == len(made.slices)
    assert slices[0].shape[0] == data["channels"] + 2 + len(data["outlines"])
    assert len(data["areas"]) == len(made.slices)


def test_the_page_opens_where_most_is_found_and_tells_what_the_maps_hold(tmp_path: Path) -> None:
    made = result((16, 12, 7))
    made.stack.maps[3] += 2
    made.stack.maps[:3, 2] = 0.25
    write_page(made, tmp_path / "x.html", "x")
    data, slices = contents(tmp_path / "x.html")
    assert (data["first"], data["start"], data["of"], data["numbers"]) == (3, 1, 7, [1, 2, 3, 4, 5])
    assert data["areas"] == [[int((one >= 0.5).sum()) for one in levels] for levels in made.stack.levels]
    assert data["warnings"] == ["a <b>note</b>"]
    assert data["size_title"] == "Sizes"
    assert slices[0].shape == (6, *data["size"])


@pytest.mark.parametrize(
    ("variant", "name", "label", "spread", "top"),
    [
        ("consensus", "soft map", drawing.SOFT_LABEL, "std over runs", 0.5),
        ("implicit-ensemble", "mean", drawing.RUNS_LABEL, "variance over runs", 0.25),
    ],
)
def test_a_map_is_called_what_it_is(
    variant: str, name: str, label: str, spread: str, top: float, tmp_path: Path
) -> None:
    """And the colours of the runs' spread reach to the largest that it can have; there are none of a single run."""
    made = result(variant=variant)
    write_page(made, tmp_path / "x.html", "x")
    data, _ = contents(tmp_path / "x.html")
    assert data["names"] == {"soft": name, "spread": spread}
    assert (data["labels"]["soft"], data["labels"]["spread"]) == (label, spread)
    assert data["spread_top"] == top
    made.stack.held_std[:] = 0
    write_page(made, tmp_path / "x.html", "x")
    assert contents(tmp_path / "x.html")[0]["spread_top"] == 0
