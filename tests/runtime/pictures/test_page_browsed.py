"""The page in a browser: what is drawn, read and said there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from cdiff.runtime.pictures.page import write_page
from cdiff.runtime.stack import entropy
from tests.runtime.pictures.pages import contents, result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEADLESS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --virtual-time-budget=4000"
)


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
