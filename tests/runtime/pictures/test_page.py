"""The page: what it holds are the maps, at the voxels it names; one file that loads nothing; a browser reads what the arrays hold."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from cdiff.runtime.pictures.page import MOST, write_page
from cdiff.runtime.report import expectation, volumes
from cdiff.runtime.results import Result
from cdiff.runtime.scans.scan import read_scan
from cdiff.runtime.stack import Stack, entropy
from cdiff.runtime.variants import VARIANTS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEADLESS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --virtual-time-budget=4000"
)


def result(
    shape: tuple[int, ...] = (24, 18, 5), codes: str = "LPS", C: int = 3, variant: str = "consensus", **read: Any
) -> Result:
    """Maps of noise, so that every voxel's are its own, in a scan whose axes point to `codes`; slices 1 to the last but one."""
    rng = np.random.default_rng(0)
    where = nib.orientations.axcodes2ornt(tuple(codes))
    affine = np.zeros((4, 4))
    for axis, (to, sign) in enumerate(where):
        affine[int(to), axis] = sign * (0.5, 0.75, 2.0)[axis]
    affine[:, 3] = (10, -20, 30, 1)
    scan = read_scan(nib.Nifti1Image(rng.normal(size=shape).astype(np.float32), affine), **read)
    n, _, h, w = scan.slices.shape
    chosen = range(1, n - 1) if n > 2 else range(n)
    maps = rng.random((len(chosen), C if VARIANTS[variant].told else 1, h, w), dtype=np.float32)
    stack = Stack(maps, rng.random(maps[:, 0].shape, dtype=np.float32) / 2, None, VARIANTS[variant], C)
    return Result(scan.grid, scan.slices, chosen, stack, "x", {"warnings": ["a <b>note</b>"]})


class Script(HTMLParser):
    """Collects the script elements' text, as a browser's parser ends them, and every address that anything names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script"
        self.scripts += [""] if self.inside else []
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def contents(page: Path) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
    """What the page's script reads: all but the slices, and these [channels, rows, columns]."""
    data = json.loads(Script(page.read_text(encoding="utf-8")).scripts[0])
    slices = [
        np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(-1, *data["size"])
        for text in data["slices"]
    ]
    return data, slices


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


READ = """
at("close").checked = false; go(1);
setTimeout(() => {
  const place = view.getBoundingClientRect();
  const [x, y] = [place.left + place.width * (Q + 0.5) / columns, place.top + place.height * (R + 0.5) / rows];
  view.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y }));
  setTimeout(() => {
    const dots = view.getContext("2d").getImageData(0, 0, view.width, view.height).data;
    tell(at("where").textContent + "\\n" + at("readout").textContent + "\\ncolours " + new Set(new Uint32Array(dots.buffer)).size);
  }, 300);
}, 300);
"""


def browsed(page: Path, script: str) -> str:
    """What `script`, run in the page a little after it is opened, gives to `tell`."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH to open the page with")
    tell = 'const tell = (text) => { const said = document.createElement("pre"); said.textContent = text; document.body.replaceChildren(said); };'
    text = page.read_text(encoding="utf-8")
    asked = page.with_suffix(".asked.html")
    asked.write_text(
        text.replace("draw();\n</script>", f"draw();{tell}setTimeout(() => {{{script}}}, 300);</script>"), "utf-8"
    )
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, *HEADLESS.split(), profile, "--window-size=1280,800", "--dump-dom", str(asked)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return unescape(re.findall(r"<pre>(.*?)</pre>", shown, re.DOTALL)[0])


def test_a_browser_reads_what_the_arrays_hold(tmp_path: Path) -> None:
    """The pointer over a pixel of the second slice held: its voxel, its point as --at takes it, every map's value."""
    made = result(codes="LIP")
    write_page(made, tmp_path / "x.html", "x")
    said = browsed(tmp_path / "x.html", READ.replace("R +", "7 +").replace("Q +", "5 +"))
    where, voxel, point, soft, levels, colours = said.splitlines()
    assert where == "slice 2 of 0 to 4"
    i, j, k = (int(n) for n in voxel.removeprefix("voxel ").split(","))
    assert k == 2
    assert np.array_equal(made.grid.view(made.stack.soft[1])[7, 5], made.soft[i, j, k])
    fractions = [float(n) for n in re.findall(r"\d\.\d\d", soft)]
    expected = [made.soft[i, j, k], entropy(made.soft)[i, j, k], made.uncertainty[i, j, k, 1]]
    assert fractions == pytest.approx(expected, abs=0.012)
    assert [float(n) for n in re.findall(r"\d\.\d\d", levels)] == pytest.approx(made.levels[i, j, k], abs=0.008)
    assert made.grid.header is not None
    mm = made.grid.header.get_best_affine() @ [i, j, k, 1]
    said = re.findall(r"([RLAPSI])([\d.]+)", point.removeprefix("point "))
    assert [float(n) * (1 if letter in "RAS" else -1) for letter, n in said] == pytest.approx(mm[:3], abs=0.051)
    assert int(colours.split()[1]) > 20


def test_the_picture_keeps_to_its_place(tmp_path: Path) -> None:
    """Also as the page opens, when the line below it is still to come; a picture without a close-up offers none."""
    write_page(result(), tmp_path / "x.html", "x")
    ends = "((one) => [one.top, one.bottom])"
    said = browsed(
        tmp_path / "x.html",
        f"const ends = {ends}, of = (id) => ends(at(id).getBoundingClientRect());"
        'tell(JSON.stringify([of("stage"), of("view"), of("through"), data.box, at("close").parentElement.offsetHeight]))',
    )
    stage, view, through, box, offered = json.loads(said)
    assert stage[0] - 0.5 <= view[0] < view[1] <= stage[1] + 0.5 <= through[0]
    assert box is None
    assert offered == 0


def test_what_is_read_is_of_the_slice_that_is_named(tmp_path: Path) -> None:
    """A slice that is unpacked later than one that was asked for after it says nothing any more."""
    made = result()
    made.stack.maps[0], made.stack.maps[1], made.stack.maps[2] = 0, 0.25, 1
    write_page(made, tmp_path / "x.html", "x")
    said = browsed(
        tmp_path / "x.html",
        """
        const late = Response.prototype, unpack = late.arrayBuffer;
        kept.clear();
        let asked = 0;
        late.arrayBuffer = async function () {
          if (asked++ < 2) await new Promise((done) => setTimeout(done, 300));
          return unpack.call(this);
        };
        go(2);
        const place = view.getBoundingClientRect();
        view.dispatchEvent(new PointerEvent("pointermove", { clientX: place.left + 9, clientY: place.top + 9 }));
        setTimeout(() => go(0), 50);
        setTimeout(() => tell(at("readout").textContent), 700);
        """,
    )
    assert said.splitlines()[0].endswith(",1")
    assert "soft map 0.00" in said


def test_a_wheel_and_keys_turn_slices_one_by_one(tmp_path: Path) -> None:
    """A notch is a slice, and so are ten small events of a touchpad; the browser's zoom and shortcuts stay its own; a slider says the slice's number."""
    write_page(result((9, 9, 32)), tmp_path / "x.html", "x")
    said = browsed(
        tmp_path / "x.html",
        """
        const found = [], sent = (what) => found.push(!view.dispatchEvent(what), index - 15);
        const wheel = (deltaY, more) => new WheelEvent("wheel", { deltaY, cancelable: true, ...more });
        const key = (more) => new KeyboardEvent("keydown", { key: "ArrowUp", bubbles: true, cancelable: true, ...more });
        go(15);
        sent(wheel(100));
        for (let k = 0; k < 9; k++) view.dispatchEvent(wheel(4));
        sent(wheel(4));
        sent(wheel(-100));
        sent(wheel(3, { deltaMode: 1 }));
        sent(wheel(100, { ctrlKey: true }));
        sent(key());
        sent(key({ altKey: true }));
        setTimeout(() => tell(JSON.stringify([found, at("slice").getAttribute("aria-valuetext"), data.numbers[index]])), 300);
        """,
    )
    found, value, number = json.loads(said)
    assert found == [True, 1, True, 2, True, 1, True, 2, False, 2, True, 3, False, 3]
    assert value == f"slice {number}"
    write_page(result((9, 9)), tmp_path / "y.html", "y")
    one = 'new WheelEvent("wheel", { deltaY: 100, cancelable: true })'
    assert browsed(tmp_path / "y.html", f"tell(view.dispatchEvent({one}))") == "true"


def test_keys_go_from_pixel_to_pixel(tmp_path: Path) -> None:
    """For who has no pointer: the first key begins in the middle, none leaves the picture, and what is read is said aloud."""
    made = result((9, 7, 4))
    write_page(made, tmp_path / "x.html", "x")
    said = browsed(
        tmp_path / "x.html",
        """
        const found = [], sent = (key, times, more) => {
          for (let k = 0; k < times; k++) view.dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey: true, bubbles: true, ...more }));
          found.push(pointer && [...pointer]);
        };
        const of = (held) => [index, keyed, at("readout").getAttribute("aria-live"), held];
        sent("ArrowUp", 1, { ctrlKey: true });
        sent("ArrowUp", 1); sent("ArrowUp", 2); sent("ArrowLeft", 9); sent("ArrowDown", 99); sent("ArrowRight", 1);
        view.dispatchEvent(new PointerEvent("pointerleave"));
        setTimeout(() => {
          found.push(of(at("readout").textContent));
          view.dispatchEvent(new PointerEvent("pointermove", { clientX: -99, clientY: -99 }));
          setTimeout(() => { found.push(of(pointer)); tell(JSON.stringify(found)); }, 100);
        }, 300);
        """,
    )
    rows, columns = made.grid.view(made.stack.soft[0]).shape
    *moved, read, left = json.loads(said)
    middle = [rows // 2, columns // 2]
    assert moved == [None, middle, [middle[0] - 2, middle[1]], [middle[0] - 2, 0], [rows - 1, 0], [rows - 1, 1]]
    assert read[1:3] == [True, "polite"]
    soft = made.grid.view(made.stack.soft[read[0]])[rows - 1, 1]
    assert float(re.findall(r"soft map (\d\.\d\d)", read[3])[0]) == pytest.approx(soft, abs=0.008)
    assert left[1:] == [False, "off", None]


def test_a_browser_that_cannot_draw_says_so(tmp_path: Path) -> None:
    """The page of one that cannot unpack the slices, or of a picture too large for it, was empty without a word."""
    write_page(result(), tmp_path / "x.html", "x")
    script = 'window.DecompressionStream = undefined; kept.clear(); draw(); setTimeout(() => tell(at("failed").textContent), 200);'
    assert "This browser cannot draw it: TypeError" in browsed(tmp_path / "x.html", script)
    assert browsed(tmp_path / "x.html", 'tell(at("failed").textContent + "nothing")') == "nothing"


def test_a_close_up_is_drawn_from_its_own_pixels_alone(tmp_path: Path) -> None:
    """Of a large picture all were coloured, and a canvas of its size was wanted, for the few to be seen."""
    made = result((60, 50, 3))
    made.stack.maps[:] = 0
    made.stack.maps[:, :, 20:26, 30:35] = 1
    write_page(made, tmp_path / "x.html", "x")
    data, slices = contents(tmp_path / "x.html")
    script = """
        at("none").checked = true;
        await draw();
        const shown = raster.getContext("2d").getImageData(0, 0, raster.width, raster.height).data;
        tell(JSON.stringify([raster.height, raster.width, Array.from(shown).filter((_, k) => k % 4 === 0)]));
    """
    rows, columns, shown = json.loads(browsed(tmp_path / "x.html", f"(async () => {{{script}}})()"))
    top, bottom, left, right = data["box"]
    assert (rows, columns) == (bottom - top, right - left)
    assert np.array_equal(np.reshape(shown, (rows, columns)), slices[0][0, top:bottom, left:right])
