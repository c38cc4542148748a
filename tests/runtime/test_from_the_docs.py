"""The shipped model's maps, computed anew from docs/maps.md alone: nothing of `cdiff` is used but its bundle's files and its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import cdiff
from cdiff.runtime.results import Result
from cdiff.runtime.segmenter import Segmenter

Array = NDArray[np.float64]
PACKAGE = Path(cdiff.__file__).parent
BUNDLE = PACKAGE / "models" / "lidc"
MANIFEST = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
T, C, H = MANIFEST["T"], MANIFEST["levels"], MANIFEST["image_size"][0]
FIELD = MANIFEST["training"]["data"]["slice_size"][0]
MIRRORED: list[tuple[int, ...]] = [(), (1,), (0,), (0, 1)]
FAST: dict[str, Any] = {"sampler": "ddim", "steps": 1, "runs": 8}


@pytest.fixture(scope="module")
def graphs() -> list[ort.InferenceSession]:
    alone = ort.SessionOptions()
    alone.intra_op_num_threads = 1
    return [
        ort.InferenceSession(str(BUNDLE / f"{name}.onnx"), alone, providers=["CPUExecutionProvider"])
        for name in ("encoder", "denoiser")
    ]


# --- 1. The slice


def part_around(n: int, size: int, at: int) -> slice:
    start = min(max(at - size // 2, 0), max(n - size, 0))
    return slice(start, start + min(n, size))


def resampled(maps: Array, shape: tuple[int, int]) -> Array:
    def weights(n: int, N: int) -> Array:
        s = n / N
        of = np.maximum(0, 1 - np.abs((np.arange(N) + 0.5)[:, None] * s - (np.arange(n) + 0.5)) / max(s, 1))
        return np.asarray(of / of.sum(axis=1, keepdims=True))

    h, w = maps.shape[-2:]
    return np.asarray(weights(h, shape[0]) @ maps @ weights(w, shape[1]).T)


def normalised(image: Array) -> Array:
    low, high = np.percentile(image, (MANIFEST["intensity"]["lower"], MANIFEST["intensity"]["upper"]))
    return np.asarray(np.clip((image - low) / (high - low) * 2 - 1, -1, 1))


# --- 3. The noise


def noise(seed: int, S: int, level: int, k: int, step: int, canvas: tuple[int, int]) -> Array:
    h, w = canvas
    half = -(-w // 2)
    counter = np.array([0, step + 1, level * 2**32 + k, S], np.uint64)
    words = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter).random_raw(h * half)
    u = (words & np.uint64(2**32 - 1)).astype(np.float64)
    v = (words >> np.uint64(32)).astype(np.uint32).view(np.int32)
    r, a = np.sqrt(-2 * np.log((u + 0.5) / 2**32)), 2 * np.pi * v / 2**32
    return np.stack([r * np.cos(a), r * np.sin(a)], axis=-1).reshape(h, 2 * half)[:, :w]


# --- 4. The chain


def chain(x: Array, predict: Any, z: Any, sampler: str, n: int) -> Array:
    beta = 1000 / T * np.linspace(MANIFEST["schedule"]["beta_start"], MANIFEST["schedule"]["beta_end"], T)
    abar = np.cumprod([1, *(1 - beta)])
    kept = [*(round(T - i * T / n) for i in range(n)), 0]
    before: Array | None = None
    h_before = 1.0
    for i in range(n - 1):
        t, s = kept[i : i + 2]
        a, b = abar[t], abar[s]
        x0 = predict(x, t)
        if sampler == "ddpm":
            x = np.sqrt(a / b) * (1 - b) / (1 - a) * x + np.sqrt(b) * (1 - a / b) / (1 - a) * x0
            x = x + np.sqrt((1 - a / b) * (1 - b) / (1 - a)) * z(i)
        elif sampler == "ddim":
            x = np.sqrt(b) * x0 + np.sqrt(1 - b) * (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
        else:
            h = (np.log(b / (1 - b)) - np.log(a / (1 - a))) / 2
            D = x0 if before is None else x0 + (x0 - before) * h / (2 * h_before)
            x = np.sqrt((1 - b) / (1 - a)) * x - np.sqrt(b) * np.expm1(-h) * D
            before, h_before = x0, h
    return np.asarray(predict(x, kept[n - 1]))


# --- 2 and 5. The window, and from runs to maps


def maps_of(
    graphs: list[ort.InferenceSession],
    image: Array,
    number: int,
    *,
    sampler: str,
    steps: int,
    runs: int,
    zooms: tuple[float, ...] = tuple(MANIFEST["zooms"]),
    mirror: bool = True,
    combine: str = "mean",
    seed: int = 0,
    corner: tuple[int, int] | None = None,
    shrunk: int = 1,
) -> dict[str, Array]:
    """The maps of a slice, or of the part of it that --at and --shrink take, as large as a window at least, on its grid times `shrunk`."""
    encoder, denoiser = graphs
    h, w = image.shape
    image = normalised(image)
    starts = corner or ((h - H) // 2, (w - H) // 2)
    total, total_of_squares = np.zeros((C, h * shrunk, w * shrunk)), np.zeros((h * shrunk, w * shrunk))
    count = np.zeros((h * shrunk, w * shrunk))
    for run in range(runs):
        zoom, k = zooms[run % len(zooms)], run // len(zooms)
        canvas = round(zoom * h), round(zoom * w)
        y, x = (
            min(max(round(zoom * (at + H / 2) - H / 2), 0), wide - H) for at, wide in zip(starts, canvas, strict=True)
        )
        flips = MIRRORED[k % 4] if mirror else ()
        ny, nx = canvas[0] - H - y if 0 in flips else y, canvas[1] - H - x if 1 in flips else x
        window = np.flip(resampled(image, canvas)[y : y + H, x : x + H], flips)
        features = encoder.run(None, {"image": np.ascontiguousarray(window[None, None], np.float32)})[0]
        S = number if zoom == 1 else number + round(1000 * zoom) * 2**40

        def z(step: int, S: int = S, k: int = k, canvas: tuple[int, int] = canvas, y: int = ny, x: int = nx) -> Array:
            return np.stack([noise(seed, S, c, k, step, canvas)[y : y + H, x : x + H] for c in range(1, C + 1)])

        def predict(x: Array, t: int, features: Any = features) -> Array:
            rows = {"row_slice": np.zeros(C, np.int64), "t": np.full(C, t), "level": np.arange(1, C + 1)}
            answer = denoiser.run(None, {"x": x[:, None].astype(np.float32), "features": features, **rows})[0]
            return np.asarray(answer[:, 0], np.float64)

        found, on_canvas = (chain(z(-1), predict, z, sampler, steps) + 1) / 2, np.zeros((C + 1, *canvas))
        on_canvas[:C, y : y + H, x : x + H] = np.flip(found, tuple(f + 1 for f in flips))
        on_canvas[C, y : y + H, x : x + H] = 1
        back = resampled(on_canvas, (h, w))
        seen = back[C] >= 0.5 - 1e-5
        back = np.where(seen, back / np.maximum(back[C], 1e-9), 0)
        if shrunk > 1:
            rows, columns = (slice(i[0], i[-1] + 1) for i in (np.flatnonzero(seen.any(axis)) for axis in (1, 0)))
            part = back[:, rows, columns]
            back = np.zeros((C + 1, h * shrunk, w * shrunk))
            box = (slice(of.start * shrunk, of.stop * shrunk) for of in (rows, columns))
            back[:, *box] = resampled(part, (part.shape[1] * shrunk, part.shape[2] * shrunk))
            seen = back[C] > 0.5
        total += seen * back[:C]
        total_of_squares += seen * back[:C].mean(axis=0) ** 2
        count += seen
    levels = total / np.maximum(count, 1)
    spread = np.sqrt(np.maximum(total_of_squares / np.maximum(count, 1) - levels.mean(axis=0) ** 2, 0))
    if combine == "vote":
        levels = (levels >= 0.5).astype(np.float64)
    p = levels.mean(axis=0)
    terms = [np.where(q > 0, -q * np.log2(np.maximum(q, 1e-300)), 0) for q in (p, 1 - p)]
    return {"levels": np.moveaxis(levels, 0, -1), "soft": p, "entropy": terms[0] + terms[1], "spread": spread}


def same(got: Result, number: int, want: dict[str, Array], box: tuple[slice, slice] = (slice(None),) * 2) -> None:
    """The result's slice is `want` in a box of it, and 0 elsewhere."""
    entropy, spread = np.moveaxis(got.uncertainty[:, :, number], -1, 0)
    answer = {"soft": got.soft[:, :, number], "levels": got.levels[:, :, number], "entropy": entropy, "spread": spread}
    for name, part in want.items():
        whole = np.zeros_like(answer[name], np.float64)
        whole[box] = part
        # Float32's rounding of the maps, which the entropy's slope near 0 magnifies some twentyfold.
        np.testing.assert_allclose(answer[name], whole, rtol=0, atol=1e-5, err_msg=name)
    assert np.array_equal(got.mask[:, :, number], answer["soft"] >= 0.5)


@pytest.fixture(scope="module")
def model() -> Segmenter:
    return cdiff.load()


@pytest.fixture(scope="module")
def scan() -> Array:
    return np.asarray(nib.load(PACKAGE / "demo" / "image.nii.gz").dataobj, np.float64)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"fast": True}, FAST),
        ({"fast": True, "combine": "vote"}, FAST),
        ({"fast": True, "mirror": False, "runs": 2}, FAST | {"runs": 2}),
        ({"fast": True, "zooms": (1.0,), "runs": 5, "seed": 2**40 + 1}, FAST | {"runs": 5}),
        ({"sampler": "ddpm", "steps": 6, "runs": 3}, {}),
        ({"sampler": "ddim", "steps": 7, "runs": 2}, {}),
        ({"sampler": "dpm++2m", "steps": 6, "runs": 2}, {}),
    ],
)
def test_the_demos_maps(
    model: Segmenter,
    graphs: list[ort.InferenceSession],
    scan: Array,
    given: dict[str, Any],
    meant: dict[str, Any],
) -> None:
    got = model.segment(scan.astype(np.float32), slices="3:4", **given)
    same(got, 3, maps_of(graphs, scan[:, :, 3], 3, **{key: one for key, one in given.items() if key != "fast"} | meant))


def test_a_slice_of_odd_size(model: Segmenter, graphs: list[ort.InferenceSession], scan: Array) -> None:
    image = scan[5:106, 20:111, 3]
    same(model.segment(image.astype(np.float32)[..., None], fast=True), 0, maps_of(graphs, image, 0, **FAST))


@pytest.mark.parametrize(("at", "shrink"), [((98, 140, 2), 1), ((9, 190, 2), 1), ((101, 121, 2), 2), ((7, 215, 2), 3)])
def test_a_place_in_a_larger_scan(
    model: Segmenter, graphs: list[ort.InferenceSession], scan: Array, at: tuple[int, int, int], shrink: int
) -> None:
    h, w = 230, 217
    large = np.random.default_rng(0).normal(20, 5, (h, w, 3))
    large[40:168, 60:188] = scan[:, :, 2:5]
    large = large.astype(np.float32)
    rows, columns = (
        part_around(n, min(shrink * FIELD, n) // shrink * shrink, i) for n, i in zip((h, w), at, strict=False)
    )
    part = large[rows, columns, 2].astype(np.float64)
    part = resampled(part, (part.shape[0] // shrink, part.shape[1] // shrink))
    inside = [min((i - of.start) // shrink, n - 1) for i, of, n in zip(at, (rows, columns), part.shape, strict=False)]
    y, x = (part_around(n, H, i).start for n, i in zip(part.shape, inside, strict=True))
    want = maps_of(graphs, part, 2, **FAST, corner=(y, x), shrunk=shrink)
    same(model.segment(large, fast=True, at=at, shrink=shrink), 2, want, (rows, columns))
