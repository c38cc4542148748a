"""The maps of the shipped model, and of small ones of the other kinds, are those that docs/maps.md has computed anew (`by_the_docs`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pytest

import cdiff
from cdiff.runtime.bundle import write_bundle
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.results import Result
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.segmenter import Segmenter
from cdiff.runtime.variants import VARIANTS
from tests.runtime.by_the_docs import Array, ByTheDocs, resampled
from tests.runtime.graphs import write_pair
from tests.runtime.test_manifest import example

PACKAGE = Path(cdiff.__file__).parent
FAST: dict[str, Any] = {"sampler": "ddim", "steps": 1, "runs": 8}


@pytest.fixture(scope="module")
def page() -> ByTheDocs:
    return ByTheDocs(PACKAGE / "models" / "lidc")


def part_around(n: int, size: int, at: int) -> slice:
    start = min(max(at - size // 2, 0), max(n - size, 0))
    return slice(start, start + min(n, size))


def same(got: Result, number: int, want: dict[str, Array], box: tuple[slice, slice] = (slice(None),) * 2) -> None:
    """The result's slice is `want` in a box of it, and 0 elsewhere."""
    answer = {name: np.moveaxis(getattr(got, name)[:, :, number], -1, 0) for name in ("maps", "levels", "uncertainty")}
    answer["soft"] = got.soft[:, :, number]
    answer["entropy"], answer["spread"] = answer.pop("uncertainty")
    for name, found in answer.items():
        whole = np.zeros_like(found, np.float64)
        whole[..., *box] = want[name]
        # Float32's rounding of the maps, which the entropy's slope near 0 magnifies some twentyfold.
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5, err_msg=name)
    mask = got.mask[:, :, number] > 0
    assert np.array_equal(mask, answer["soft"] >= 0.5)
    (expected,) = (one["mask"] for one in got.report["expected_dice"]["slices"] if one["slice"] == number)
    sums = 2 * answer["soft"][mask].sum(dtype=np.float64), mask.sum() + answer["soft"].sum(dtype=np.float64)
    assert expected is None if not mask.any() else expected == pytest.approx(sums[0] / sums[1], abs=1e-4)


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
    page: ByTheDocs,
    scan: Array,
    given: dict[str, Any],
    meant: dict[str, Any],
) -> None:
    got = model.segment(scan.astype(np.float32), slices="3:4", **given)
    chain = {key: one for key, one in given.items() if key != "fast"} | meant
    same(got, 3, page.maps(page.normalised(scan[None, None, :, :, 3])[0], 3, **chain))


def test_a_slice_of_odd_size(model: Segmenter, page: ByTheDocs, scan: Array) -> None:
    image = scan[5:106, 20:111, 3]
    want = page.maps(page.normalised(image[None, None])[0], 0, **FAST)
    same(model.segment(image.astype(np.float32)[..., None], fast=True), 0, want)


@pytest.mark.parametrize(("at", "shrink"), [((98, 140, 2), 1), ((9, 190, 2), 1), ((101, 121, 2), 2), ((7, 215, 2), 3)])
def test_a_place_in_a_larger_scan(
    model: Segmenter, page: ByTheDocs, scan: Array, at: tuple[int, int, int], shrink: int
) -> None:
    h, w = 230, 217
    large = np.random.default_rng(0).normal(20, 5, (h, w, 3))
    large[40:168, 60:188] = scan[:, :, 2:5]
    large = large.astype(np.float32)
    field, side = page.manifest["training"]["data"]["slice_size"][0], page.size[0]
    rows, columns = (
        part_around(n, min(shrink * field, n) // shrink * shrink, i) for n, i in zip((h, w), at, strict=False)
    )
    part = large[rows, columns, 2].astype(np.float64)
    part = resampled(part, (part.shape[0] // shrink, part.shape[1] // shrink))
    inside = [min((i - of.start) // shrink, n - 1) for i, of, n in zip(at, (rows, columns), part.shape, strict=False)]
    y, x = (part_around(n, side, i).start for n, i in zip(part.shape, inside, strict=True))
    want = page.maps(page.normalised(part[None, None])[0], 2, **FAST, corner=(y, x), shrunk=shrink)
    same(model.segment(large, fast=True, at=at, shrink=shrink), 2, want, (rows, columns))


KINDS: dict[str, dict[str, Any]] = {
    "consensus": {
        "variance": "learned",
        "schedule": NoiseSchedule(24, kind="cosine"),
        "framing": "resize",
        "outside": 0,
    },
    "annotator": {
        "variance": "learned",
        "schedule": NoiseSchedule(24, 0.01, 0.3, scaled=False),
        "framing": "tile",
        "mirror": True,
    },
    "no-annotator": {"variance": "learned", "framing": "centre", "outside": 0, "zooms": (1.0, 1.25)},
    "soft-label": {"framing": "resize", "schedule": NoiseSchedule(24, kind="cosine"), "mirror": True},
    "implicit-ensemble": {"variance": "learned", "framing": "centre", "outside": 0, "mirror": True},
}
INTENSITIES: dict[str, dict[str, Any]] = {
    "consensus": {"scope": "volume", "lower": 2.0, "upper": 98.0},
    "annotator": {"scope": "slice", "lower": 0.5, "upper": 99.5, "method": "standard", "mean": [40.0], "std": [30.0]},
    "soft-label": {"scope": "slice", "lower": 0.5, "upper": 99.5, "method": "standard", "mean": [], "std": []},
}
CHAINS: list[dict[str, Any]] = [
    {"sampler": "ddpm", "steps": 24, "runs": 3},
    {"sampler": "ddpm", "steps": 6, "runs": 5, "seed": 3},
    {"sampler": "ddpm", "steps": 1, "runs": 4},
    {"sampler": "ddim", "steps": 7, "runs": 6},
    {"sampler": "dpm++2m", "steps": 6, "runs": 3},
    {"sampler": "ddim", "steps": 4, "runs": 5, "combine": "vote"},
]


@pytest.fixture(scope="module", params=VARIANTS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Segmenter, ByTheDocs]:
    """A small model of a variant, with weights drawn at random, and what the page says of it."""
    name, T, C = request.param, 24, 3

    def build(folder: Path) -> Manifest:
        changes: dict[str, Any] = {"T": T, "features_channels": 4, "image_size": (16, 16)} | KINDS[name]
        changes["schedule"] = changes.get("schedule", NoiseSchedule(T)).to_json()
        intensity = INTENSITIES.get(name, {"scope": "slice", "lower": 0.5, "upper": 99.5})
        manifest = example(variant=name, levels=C, files={}, intensity=intensity, **changes)
        write_pair(folder, size=16, T=T, levels=manifest.conditions, learned=manifest.variance == "learned")
        graph = onnx.load(folder / "denoiser.onnx")
        for node in graph.graph.node:
            if node.op_type == "Sigmoid":  # a network's `mix` is not held to 0 ... 1
                node.op_type = "Identity"
        onnx.save(graph, folder / "denoiser.onnx")
        return manifest

    bundle = write_bundle(tmp_path_factory.mktemp("kinds") / name, build).path
    return cdiff.load(bundle), ByTheDocs(bundle)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(map(str, chain.values())))
@pytest.mark.parametrize("shape", [(23, 30), (12, 21)])
def test_other_kinds_of_model(kind: tuple[Segmenter, ByTheDocs], shape: tuple[int, int], chain: dict[str, Any]) -> None:
    model, page = kind
    if page.K == 1:  # with one map of a slice a vote is refused
        chain = chain | {"combine": "mean"}
    y, x = np.indices(shape)
    scan = np.random.default_rng(0).normal(20, 9, (*shape, 3)) + 80 * (np.hypot(y - 9, x - 11) < 6)[..., None]
    scan = scan.astype(np.float32)
    scan[..., 2] = 7.0  # as many slices of a scan's ends are
    slices = page.normalised(np.moveaxis(scan.astype(np.float64), 2, 0)[:, None])
    got = model.segment(scan, keep_runs=True, **chain)
    assert got.stack.runs is not None
    for number, image in enumerate(slices):
        want = page.maps(image, number, **chain)
        same(got, number, want)
        # Rounding moves a value by half a step; where one on the window was rounded the other way, by as much as a step more.
        step = 2 if page.outside == 0 else 1
        off = np.abs(got.stack.runs[number] - want["runs"]) / step
        assert off.max() < 1.5 + 1e-3
        assert (off > 0.5 + 1e-3).mean() < 1e-3
    assert want["spread"].max() > 0.02, "the runs must differ for this test to mean anything"
