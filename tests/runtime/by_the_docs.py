"""A model's maps computed from docs/maps.md alone, in float64: nothing of `cdiff` is used but a bundle's manifest and two graphs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Array = NDArray[np.float64]
MIRRORED: list[tuple[int, ...]] = [(), (1,), (0,), (0, 1)]


class ByTheDocs:
    """What the page says of the bundle in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        alone = ort.SessionOptions()
        alone.intra_op_num_threads = 1
        self.encoder, self.denoiser = (
            ort.InferenceSession(str(folder / f"{name}.onnx"), alone, providers=["CPUExecutionProvider"])
            for name in ("encoder", "denoiser")
        )
        self.size: tuple[int, int] = tuple(self.manifest["image_size"])
        self.variant, self.C = self.manifest["variant"], self.manifest["levels"]
        self.K = self.C if self.variant in ("consensus", "annotator") else 1
        self.outside = self.manifest.get("outside", -1)
        self.abar = abar_of(self.manifest["schedule"])

    # --- 1. The slice

    def normalised(self, scan: Array) -> Array:
        """Slices or parts of them, [S, channels, h, w]."""
        how = self.manifest["intensity"]
        axes = (2, 3) if how["scope"] == "slice" else (0, 2, 3)
        if how.get("method") == "standard":
            mean, std = (of(axis=axes, keepdims=True) for of in (scan.mean, scan.std))
            if how["mean"]:
                mean, std = (np.reshape(how[key], (-1, 1, 1)) for key in ("mean", "std"))
            return np.asarray(np.where(std > 0, (scan - mean) / np.where(std > 0, std, 1), 0))
        low, high = np.percentile(scan, (how["lower"], how["upper"]), axis=axes, keepdims=True)
        flat = high == low
        return np.where(flat, 0, np.clip((scan - low) / np.where(flat, 1, high - low) * 2 - 1, -1, 1))

    # --- 2. The window

    def run(
        self, image: Array, S: int, zoom: float, k: int, chain: dict[str, Any], corner: tuple[int, ...] | None
    ) -> tuple[Array, NDArray[np.bool_]]:
        """A run's maps of a normalised slice [channels, h, w], whose window lies at `corner` where --at says so: [2 K, h, w], the second half those
        of 8 bits; and the pixels that it sees."""
        (H, W), (h, w) = self.size, image.shape[-2:]
        framing = self.manifest["framing"]
        if framing == "resize":
            maps = self.window(resampled(image, self.size), S, k, (0, 0), self.size, **chain)
            return resampled(maps, (h, w)), np.ones((h, w), np.bool_)
        if framing == "tile":
            canvas, own = padded(image, self.size)
            height, width = canvas.shape[-2:]
            ramps = (np.minimum(np.arange(n) + 1, n - np.arange(n)) for n in self.size)
            weight = np.multiply.outer(*ramps)
            total, weights = np.zeros((2 * self.K, height, width)), np.zeros((height, width))
            for y in self.tiles(height, H):
                for x in self.tiles(width, W):
                    box = slice(y, y + H), slice(x, x + W)
                    maps = self.window(canvas[:, *box], S, k, (y, x), (height, width), **chain)
                    total[:, *box] += weight * maps
                    weights[box] += weight
            return (total / weights)[:, *own], np.ones((h, w), np.bool_)
        canvas, own = padded(image, self.size)
        corner = corner or tuple((n - side) // 2 for n, side in zip(canvas.shape[1:], self.size, strict=True))
        if zoom != 1:
            middles = [at - part.start + side / 2 for at, part, side in zip(corner, own, self.size, strict=True)]
            canvas, own = padded(resampled(image, (round(zoom * h), round(zoom * w))), self.size)
            around = zip(middles, self.size, own, canvas.shape[1:], strict=True)
            corner = tuple(min(max(round(zoom * m - n / 2) + part.start, 0), wide - n) for m, n, part, wide in around)
            S += round(1000 * zoom) * 2**40
        y, x = corner
        back = np.zeros((2 * self.K + 1, *canvas.shape[1:]))
        back[:, y : y + H, x : x + W] = 1
        back[:-1, y : y + H, x : x + W] = self.window(
            canvas[:, y : y + H, x : x + W], S, k, corner, canvas.shape[1:], **chain
        )
        back = resampled(back[:, *own], (h, w))
        seen = back[-1] >= 0.5 - 1e-5
        return np.where(seen, back[:-1] / np.where(seen, back[-1], 1), 0), seen

    def tiles(self, n: int, side: int) -> list[int]:
        k = math.ceil((n - side) / math.floor(side * (1 - self.manifest["tile_overlap"])))
        return [round(i * (n - side) / k) for i in range(k + 1)] if k else [0]

    def window(
        self,
        seen: Array,
        S: int,
        k: int,
        corner: tuple[int, ...],
        canvas: tuple[int, ...],
        *,
        sampler: str,
        steps: int,
        mirror: bool,
        seed: int,
    ) -> Array:
        """The final maps of a window that lies at `corner` of a canvas: [2 K, H, W], the second half rounded to 8 bits."""
        (H, W), K = self.size, self.K
        flips = MIRRORED[k % 4] if mirror else ()
        axes = tuple(f + 1 for f in flips)
        y, x = (
            wide - n - at if f in flips else at
            for f, (at, wide, n) in enumerate(zip(corner, canvas, self.size, strict=True))
        )
        image = np.ascontiguousarray(np.flip(seen, axes)[None], np.float32)
        features = self.encoder.run(None, {"image": image})[0]
        rows = {"row_slice": np.zeros(K, np.int64), "level": np.arange(1, K + 1)}

        def z(step: int) -> Array:
            return np.stack([noise(seed, S, c, k, step, canvas)[y : y + H, x : x + W] for c in range(1, K + 1)])

        def predict(x: Array, t: int) -> list[Array]:
            given = {"x": x[:, None].astype(np.float32), "features": features, "t": np.full(K, t), **rows}
            return [np.asarray(one[:, 0], np.float64) for one in self.denoiser.run(None, given)]

        last = self.chain(z(-1), predict, z, sampler, steps)
        maps = np.concatenate([last if self.outside == 0 else (last + 1) / 2, np.rint(255 * (last + 1) / 2)])
        return np.flip(maps, axes)

    # --- 4. The chain

    def chain(self, x: Array, predict: Any, z: Any, sampler: str, n: int) -> Array:
        T = self.manifest["T"]
        kept = [*(round(T - i * T / n) for i in range(n)), 0]
        before: Array | None = None
        h_before = 1.0
        for i in range(n - 1):
            t, s = kept[i : i + 2]
            a, b = self.abar[t], self.abar[s]
            x0, *mix = predict(x, t)
            if sampler == "ddpm":
                beta = 1 - a / b
                v = beta * (1 - b) / (1 - a)
                if mix:
                    v = np.exp(mix[0] * np.log(beta) + (1 - mix[0]) * np.log(v))
                x = np.sqrt(a / b) * (1 - b) / (1 - a) * x + np.sqrt(b) * beta / (1 - a) * x0 + np.sqrt(v) * z(i)
            elif sampler == "ddim":
                x = np.sqrt(b) * x0 + np.sqrt(1 - b) * (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
            else:
                h = (np.log(b / (1 - b)) - np.log(a / (1 - a))) / 2
                D = x0 if before is None else x0 + (x0 - before) * h / (2 * h_before)
                x = np.sqrt((1 - b) / (1 - a)) * x - np.sqrt(b) * np.expm1(-h) * D
                before, h_before = x0, h
        return np.asarray(predict(x, kept[n - 1])[0])

    # --- 5. From runs to the files

    def maps(
        self,
        image: Array,
        number: int,
        *,
        sampler: str,
        steps: int,
        runs: int,
        zooms: tuple[float, ...] | None = None,
        mirror: bool | None = None,
        combine: str = "mean",
        seed: int = 0,
        corner: tuple[int, int] | None = None,
        shrunk: int = 1,
    ) -> dict[str, Array]:
        """The maps of a normalised slice [channels, h, w], or of the part of it that --at and --shrink take, which is as large as a window
        at least, on its grid times `shrunk`. `runs` are those of 8 bits, [K, R, h, w], 255 = 1, before they are
        rounded once more."""
        zooms = zooms or tuple(self.manifest.get("zooms", (1.0,)))
        chain = {"sampler": sampler, "steps": steps, "seed": seed}
        chain["mirror"] = self.manifest["mirror"] if mirror is None else mirror
        found, sees = [], []
        for run in range(runs):
            maps, seen = self.run(image, number, zooms[run % len(zooms)], run // len(zooms), chain, corner)
            if shrunk > 1:
                maps, seen = enlarged(maps, seen, shrunk)
            found.append(maps)
            sees.append(seen if len(zooms) > 1 or shrunk > 1 else np.ones_like(seen))
        return self._joined(np.stack(found), np.stack(sees), len(zooms), combine)

    def _joined(self, maps: Array, sees: NDArray[np.bool_], zooms: int, combine: str) -> dict[str, Array]:
        """`maps` [R, 2 K, h, w] of all runs and where each sees [R, h, w], to what is written."""
        count = np.maximum(sees.sum(axis=0), 1)
        drawn, kept = maps[:, : self.K], maps[:, self.K :]
        own = drawn.mean(axis=1)
        deviation = np.where(sees, own - (sees * own).sum(axis=0) / count, 0)
        variance = (deviation**2).sum(axis=0) / count
        network = (sees[:, None] * drawn).sum(axis=0) / count
        if self.outside == 0:
            network, kept = np.maximum(network, 0), np.maximum(2 * kept - 255, 0)
        if combine == "vote":
            network = (network >= 0.5).astype(np.float64)
        first = np.repeat(kept[::zooms], zooms, axis=0)[: len(kept)]
        p = network.mean(axis=0)
        terms = [np.where(q > 0, -q * np.log2(np.maximum(q, 1e-300)), 0) for q in (p, 1 - p)]
        return {
            "maps": network,
            "levels": self.levels(network, p),
            "soft": p,
            "entropy": terms[0] + terms[1],
            "spread": variance if self.variant == "implicit-ensemble" else np.sqrt(variance),
            "runs": np.swapaxes(np.where(sees[:, None], kept, first), 0, 1),
        }

    def levels(self, network: Array, p: Array) -> Array:
        """docs/variants.md: what comes out. What misses a threshold by 5e-7 or less reaches it."""
        levels = np.arange(1, self.C + 1)[:, None, None]
        if self.variant == "consensus":
            return network
        if self.variant == "annotator":
            return np.asarray((network >= 0.5 - 5e-7).sum(axis=0) >= levels, np.float64)
        return np.asarray(p >= (levels - 0.5) / self.C - 5e-7, np.float64)


def abar_of(schedule: dict[str, Any]) -> Array:
    """abar_t for t = 0 ... T."""
    T = schedule["T"]
    if schedule["kind"] == "cosine":
        g = np.cos(np.pi / 2 * (np.arange(T + 1) / T + 0.008) / 1.008) ** 2
        beta = np.minimum(1 - g[1:] / g[:-1], 0.999)
    else:
        scale = 1000 / T if schedule["scaled"] else 1
        beta = np.linspace(scale * schedule["beta_start"], scale * schedule["beta_end"], T)
    return np.cumprod([1, *(1 - beta)])


def resampled(maps: Array, shape: tuple[int, int]) -> Array:
    def weights(n: int, N: int) -> Array:
        s = n / N
        of = np.maximum(0, 1 - np.abs((np.arange(N) + 0.5)[:, None] * s - (np.arange(n) + 0.5)) / max(s, 1))
        return np.asarray(of / of.sum(axis=1, keepdims=True))

    h, w = maps.shape[-2:]
    return np.asarray(weights(h, shape[0]) @ maps @ weights(w, shape[1]).T)


def padded(image: Array, size: tuple[int, int]) -> tuple[Array, tuple[slice, slice]]:
    """The canvas, and where on it the slice lies."""
    missing = [max(side - n, 0) for side, n in zip(size, image.shape[1:], strict=True)]
    canvas = np.pad(image, [(0, 0), *((gap // 2, gap - gap // 2) for gap in missing)], mode="edge")
    y, x = (slice(gap // 2, gap // 2 + n) for gap, n in zip(missing, image.shape[1:], strict=True))
    return canvas, (y, x)


def enlarged(maps: Array, seen: NDArray[np.bool_], F: int) -> tuple[Array, NDArray[np.bool_]]:
    """What a shrunk slice's run saw, at F times its size."""
    rows, columns = (slice(i[0], i[-1] + 1) for i in (np.flatnonzero(seen.any(axis)) for axis in (1, 0)))
    part = np.concatenate([maps, seen[None]])[:, rows, columns]
    whole = np.zeros((len(part), seen.shape[0] * F, seen.shape[1] * F))
    box = (slice(of.start * F, of.stop * F) for of in (rows, columns))
    whole[:, *box] = resampled(part, (part.shape[1] * F, part.shape[2] * F))
    return whole[:-1], whole[-1] > 0.5


def noise(seed: int, S: int, level: int, k: int, step: int, canvas: tuple[int, ...]) -> Array:
    """3. The noise."""
    h, w = canvas
    half = -(-w // 2)
    counter = np.array([0, step + 1, level * 2**32 + k, S], np.uint64)
    words = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter).random_raw(h * half)
    u = (words & np.uint64(2**32 - 1)).astype(np.float64)
    v = (words >> np.uint64(32)).astype(np.uint32).view(np.int32)
    r, a = np.sqrt(-2 * np.log((u + 0.5) / 2**32)), 2 * np.pi * v / 2**32
    return np.stack([r * np.cos(a), r * np.sin(a)], axis=-1).reshape(h, 2 * half)[:, :w]
