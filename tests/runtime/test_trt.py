"""Engine keys, profiles and the cache: an engine is used only where it fits, and never when it is stale or damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cdiff.runtime.bundle import Bundle, write_bundle
from cdiff.runtime.engines.trt import (
    NO_HOME,
    RECORD,
    RECORD_FORMAT,
    EngineKey,
    Gpu,
    Graph,
    Profile,
    cached_engine,
    cached_rows,
    engine_key,
    load_trt,
    open_or_build,
    profile_for,
    user_cache,
    writable_cache,
)
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import sha256, write_json
from cdiff.runtime.manifest import Manifest
from cdiff.runtime.sampling.batching import most_rows, rows_per_batch
from cdiff.runtime.sampling.mirror import VIEWS
from tests.runtime.test_manifest import example

GPU = Gpu("NVIDIA RTX A6000", "8.6", 48 << 30)
PROFILE = Profile(1, 50, 100, 8)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("CDIFF_CACHE", str(tmp_path / "cache"))

    def fill(folder: Path) -> Manifest:
        for name in ("encoder", "denoiser"):
            (folder / f"{name}.onnx").write_bytes(name.encode())
        return example(precision="float16", files={})

    return write_bundle(tmp_path / "bundle", fill)


def key(bundle: Bundle, graph: Graph = "denoiser", **changes: Any) -> EngineKey:
    return dataclasses.replace(engine_key(bundle, graph, "tensorrt", "10.16.1.11", GPU, PROFILE), **changes)


def put(bundle: Bundle, made: EngineKey, cache: Path | None = None, content: bytes = b"plan") -> Path:
    """An engine in the cache, as the builder leaves it."""
    folder = (cache or bundle.engines) / made.folder_name()
    folder.mkdir(parents=True)
    engine = folder / f"{made.graph}.engine"
    engine.write_bytes(content)
    write_json(folder / RECORD, {"format": RECORD_FORMAT, "key": made.to_json(), "sha256": sha256(engine), "bytes": 4})
    return engine


# Rows


@pytest.mark.parametrize(
    ("levels", "runs", "gib", "rows"),
    [
        (
            7,
            25,
            139,
            59,
        ),  # the paper's protocol on an H200: three equal batches, where indices of 32 bits end at 63 rows
        (7, 25, 24, 25),  # seven
        (7, 25, 8, 8),
        (7, 5, 139, 35),
        (4, 25, 139, 50),
        (4, 1, 139, 4),
        (7, 25, 0, 1),
    ],
)
def test_rows_fit_the_memory_and_waste_few(levels: int, runs: int, gib: int, rows: int) -> None:
    manifest = example(levels=levels, image_size=(256, 256), features_channels=128)
    profile = profile_for(manifest, runs, gib << 30)
    assert (profile.min_rows, profile.opt_rows, profile.max_rows) == (1, rows, rows)
    batches = -(-levels * runs // profile.max_rows)
    assert 0 <= batches * profile.max_rows - levels * runs < batches, "padding of less than one row a batch"
    assert 4 * profile.max_rows * 128 * 256 * 256 < 2**31


def test_more_memory_never_means_fewer_rows() -> None:
    manifest = example(levels=7, image_size=(256, 256), features_channels=128)
    rows = [profile_for(manifest, 25, gib << 30).max_rows for gib in range(0, 200, 4)]
    assert rows == sorted(rows)
    assert rows[0] == 1
    assert rows[-1] == profile_for(manifest, 25).max_rows, "without a GPU memory sets no limit"
    assert profile_for(manifest, 25, 139 << 30, max_rows=20).max_rows <= 20


def test_a_model_that_draws_one_map_of_a_slice_has_an_engine_for_its_runs() -> None:
    """Its levels follow from that map: rows for each of them would be memory and speed for nothing."""
    for variant, maps in (("consensus", 4), ("annotator", 4), ("no-annotator", 1), ("soft-label", 1)):
        profile = profile_for(example(variant=variant, levels=4, image_size=(64, 64)), 25)
        rows = rows_per_batch(10 * maps * 25, "cuda:0", maps * 25)
        assert (profile.opt_rows, profile.max_rows) == (rows, rows)
        assert profile.slots >= VIEWS * ((rows - 2) // (maps * 25) + 2)


def test_places_are_enough_for_every_batch_of_five_runs_or_more_and_no_more() -> None:
    """As many windows, in every view, as a batch can touch; the runtime's own plan is the oracle. Each takes memory for its features."""
    for levels, runs in ((1, 5), (3, 5), (4, 25), (7, 25), (7, 7)):
        profile = profile_for(example(levels=levels, image_size=(64, 64)), runs)
        touched = [min(VIEWS, used) * ((profile.max_rows - 2) // (levels * used) + 2) for used in range(5, runs + 1)]
        assert profile.slots == max(touched)


@pytest.mark.parametrize("views", [1, VIEWS])
@pytest.mark.parametrize("gib", [8, 24, 139])
def test_an_engine_built_ahead_serves_what_a_run_asks_for(gib: int, views: int) -> None:
    """Half of the paper's network and all of it, with some of the memory taken since the build."""
    for channels in (64, 128):
        manifest = example(levels=7, image_size=(256, 256), features_channels=channels)
        built = profile_for(manifest, 25, gib << 30)
        most = most_rows(channels, (256, 256), int(0.9 * (gib << 30)))
        for runs in (4, 5, 25):
            rows = rows_per_batch(10 * 7 * runs, "cuda:0", 7 * runs, most)
            assert built.covers(Profile(rows, rows, rows, views * ((rows - 2) // (7 * runs) + 2)))


def test_a_run_asks_for_the_rows_of_the_engines_that_are_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdiff.runtime.engines.trt.trt_version", lambda flavour: "10.16.1.11")
    assert cached_rows(bundle, "tensorrt", GPU) is None
    put(bundle, key(bundle, version="10.15.0.1", profile=Profile(1, 300, 300, 8)))
    assert cached_rows(bundle, "tensorrt", GPU) is None, "another version's"
    for rows in (20, 100, 40):
        put(bundle, key(bundle, profile=Profile(1, rows, rows, 8)))
    assert cached_rows(bundle, "tensorrt", GPU) == 100


@pytest.mark.parametrize(("runs", "most"), [(0, None), (-1, 8), (4, 0)])
def test_no_runs_or_rows_make_no_engine(runs: int, most: int | None) -> None:
    with pytest.raises(CdiffError, match="give at least one of each"):
        profile_for(example(), runs, max_rows=most)


@pytest.mark.parametrize("rows", [(0, 1, 1, 1), (2, 1, 3, 1), (1, 4, 3, 1), (1, 1, 1, 0)])
def test_a_profile_that_makes_no_sense(rows: tuple[int, int, int, int]) -> None:
    with pytest.raises(CdiffError, match="make no sense"):
        Profile(*rows)


# Keys


def test_keys_survive_json(bundle: Bundle) -> None:
    made = key(bundle, options=("refit", "level-5"))
    assert EngineKey.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    "change",
    [
        {"version": None}, {"version": 10}, {"gpu": []}, {"capabilities": "8.9"}, {"capabilities": [8.9]}, {"options": None},
        {"profile": []}, {"profile": {"min_rows": 1, "opt_rows": 2, "max_rows": 1e308, "slots": 1}},
    ],
)  # fmt: skip
def test_a_key_with_a_value_of_another_type_is_none(bundle: Bundle, change: dict[str, Any]) -> None:
    """And its engine is not used, where one day it would be compared with what is wanted."""
    with pytest.raises(CdiffError, match="not the key of an engine"):
        EngineKey.from_json(key(bundle).to_json() | change)


def test_every_field_makes_another_folder(bundle: Bundle) -> None:
    others = {
        "graph": "encoder",
        "flavour": "tensorrt-rtx",
        "version": "11.4.0.106",
        "gpu": "NVIDIA H200",
        "capabilities": ("9.0",),
        "precision": "float32",
        "profile": Profile(1, 50, 101, 8),
        "graph_sha256": "f" * 64,
        "options": ("refit",),
    }
    assert set(others) == {field.name for field in dataclasses.fields(EngineKey)}
    names = {key(bundle, **{name: value}).folder_name() for name, value in others.items()} | {key(bundle).folder_name()}
    assert len(names) == len(others) + 1
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-") for name in names)


@pytest.mark.parametrize(
    ("engine", "serves"),
    [
        ({}, True),
        ({"gpu": ""}, True),  # portable, and built for this capability
        ({"gpu": "", "capabilities": ("7.5", "8.6", "8.9")}, True),
        ({"gpu": "", "capabilities": ("7.5", "8.9")}, False),
        ({"gpu": "", "capabilities": ("8.0+",)}, True),
        ({"gpu": "NVIDIA H200"}, False),
        ({"version": "10.15.0.1"}, False),
        ({"version": "10.15.0.1", "options": ("version-compatible",)}, True),
        ({"version": "10.17.0.1", "options": ("version-compatible",)}, False),
        ({"version": "9.9.0.1", "options": ("version-compatible",)}, False),
        ({"profile": Profile(1, 100, 200, 8)}, True),
        ({"profile": Profile(1, 50, 99, 8)}, False),
        ({"profile": Profile(2, 50, 100, 8)}, False),
        ({"profile": Profile(1, 50, 100, 7)}, False),
        ({"precision": "float32"}, False),
        ({"graph_sha256": "f" * 64}, False),
        ({"flavour": "tensorrt-rtx"}, False),
        ({"options": ("refit",)}, True),
    ],
)
def test_which_engine_serves(bundle: Bundle, engine: dict[str, Any], serves: bool) -> None:
    assert key(bundle, **engine).serves(key(bundle)) is serves
    wanted = key(bundle, gpu="NVIDIA RTX 5090", capabilities=("12.0",))  # a number of two digits is larger than 8
    assert key(bundle, gpu="", capabilities=("8.0+",)).serves(wanted)
    assert not key(bundle).serves(key(bundle, options=("refit",)))


# The cache


def test_found_whole_in_the_bundle_or_the_user_s_cache(bundle: Bundle) -> None:
    assert cached_engine(bundle, "denoiser", key(bundle)) is None
    assert user_cache() == Path(os.environ["CDIFF_CACHE"]) / "engines", "where those built by an earlier cdiff lie"
    theirs = put(bundle, key(bundle), user_cache())
    assert cached_engine(bundle, "denoiser", key(bundle)) == theirs
    assert cached_engine(bundle, "encoder", key(bundle, "encoder")) is None
    ours = put(bundle, key(bundle))
    assert cached_engine(bundle, "denoiser", key(bundle)) == ours


def test_the_nearest_engine_wins(bundle: Bundle) -> None:
    put(bundle, key(bundle, gpu="", capabilities=("8.0", "8.6")))
    put(bundle, key(bundle, options=("refit",)))
    put(bundle, key(bundle, profile=Profile(1, 400, 400, 40)))
    near = put(bundle, key(bundle, profile=Profile(1, 60, 200, 10)))
    assert cached_engine(bundle, "denoiser", key(bundle)) == near
    assert cached_engine(bundle, "denoiser", key(bundle), exact=True) is None


@pytest.mark.parametrize("harm", ["changed", "shorter", "gone"])
def test_a_damaged_engine_is_said_and_not_returned(bundle: Bundle, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = put(bundle, key(bundle))
    engine.write_bytes({"changed": b"plaN", "shorter": b"pla", "gone": b""}[harm])
    if harm == "gone":
        engine.unlink()
    said: list[str] = []
    assert cached_engine(bundle, "denoiser", key(bundle), said.append) is None
    assert len(said) == 1
    assert str(engine) in said[0]
    for _ in range(2):
        cached_engine(bundle, "denoiser", key(bundle))
    assert caplog.messages == said, "once, and the same"
    other = put(bundle, key(bundle, options=("refit",)))
    assert cached_engine(bundle, "denoiser", key(bundle), said.append) == other, "a whole one beside it serves"


@pytest.mark.parametrize(
    ("change", "word"), [({"version": "10.15.0.1"}, "10.15.0.1"), ({"graph_sha256": "f" * 64}, "another graph")]
)
def test_a_stale_engine_is_said_and_not_returned(bundle: Bundle, change: dict[str, Any], word: str) -> None:
    put(bundle, key(bundle, **change))
    said: list[str] = []
    assert cached_engine(bundle, "denoiser", key(bundle), said.append) is None
    assert len(said) == 1
    assert word in said[0]


def test_another_model_s_engine_in_the_user_s_cache_is_nobody_s_business(bundle: Bundle) -> None:
    put(bundle, key(bundle, graph_sha256="f" * 64), user_cache())
    said: list[str] = []
    assert cached_engine(bundle, "denoiser", key(bundle), said.append) is None
    assert not said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"format": 1}',
        '{"format": 1, "sha256": "0", "key": {"graph": "denoiser"}}',
        '{"format": 1, "sha256": "0", "key": 3}',
    ],
)
def test_a_record_that_cannot_be_read(bundle: Bundle, text: str) -> None:
    engine = put(bundle, key(bundle))
    (engine.parent / RECORD).write_text(text)
    said: list[str] = []
    assert cached_engine(bundle, "denoiser", key(bundle), said.append) is None
    assert len(said) == 1
    assert str(engine.parent / RECORD) in said[0]


def test_a_record_of_another_format_is_passed_over(bundle: Bundle) -> None:
    engine = put(bundle, key(bundle))
    write_json(engine.parent / RECORD, {"format": RECORD_FORMAT + 1})
    said: list[str] = []
    assert cached_engine(bundle, "denoiser", key(bundle), said.append) is None
    assert not said


def test_a_read_only_bundle_uses_the_user_s_cache(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert writable_cache(bundle) == bundle.engines
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert writable_cache(bundle) == user_cache()


# The library


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CdiffError, match=r"tensorrt is not installed: .*'\.\[gpu\]"):
        load_trt("tensorrt")
    with pytest.raises(CdiffError, match=r"tensorrt-rtx is not installed: .*'\.\[rtx\]"):
        load_trt("tensorrt-rtx")
    with pytest.raises(CdiffError, match="not installed"):
        open_or_build(bundle, "tensorrt", GPU, PROFILE)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "raise OSError('libnvinfer.so.10: cannot open\\n shared object file')",
            "libnvinfer.so.10: cannot open shared",
        ),
        ("raise RuntimeError('this wheel stands in for one from the vendor')", "stands in for"),
        ("import a_module_that_is_not_there", "lacks a_module_that_is_not_there"),
    ],
)
def test_a_broken_installation_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(CdiffError, match=reason):
        load_trt("tensorrt")


def test_a_user_without_a_home_has_a_cache_in_which_nothing_is_found(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs as a number which its passwd does not have: looking for engines ended in a traceback."""
    for name in ("HOME", "CDIFF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 2)
    assert user_cache() == NO_HOME / ".cache/cdiff/engines"
    assert cached_engine(bundle, "denoiser", key(bundle)) is None
