"""A TensorRT engine over doubles of TensorRT and of the driver, for the tests of what runs on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.engines import tensorrt
from cdiff.runtime.engines.trt import EnginePair, Flavour, Profile
from tests.runtime.device import fake_tensorrt
from tests.runtime.device.fake_cuda import World, install
from tests.runtime.sampling.test_batching import SIZE, FakeEngine


class Setup:
    """A TensorRT engine over doubles, the world that it runs in, and the profiles that it asked for."""

    def __init__(self, world: World, engine: tensorrt.TensorRtEngine, asked: list[Profile]) -> None:
        self.world, self.engine, self.asked = world, engine, asked


def open_engine(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    trt: Any,
    number: int = 0,
    *,
    plan: bytes | None = None,
    host_code: bool = False,
    variance: str = "fixed",
) -> tuple[tensorrt.TensorRtEngine, list[Profile]]:
    """An engine of the double `trt` on GPU `number`, its files in `folder`; and the list of the profiles that it asks for."""
    asked: list[Profile] = []

    def open_or_build(bundle: Any, flavour: str, gpu: Any, profile: Profile, build: Any = None) -> EnginePair:
        assert (gpu.name, gpu.capability) == ("Double", "9.0")
        asked.append(profile)
        files = {name: folder / name / f"{name}.engine" for name in ("encoder", "denoiser")}
        for name, path in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(plan or name.encode() + b"+host code" * host_code)
        return EnginePair(**files, profile=profile, host_code=frozenset(files.values()) if host_code else frozenset())

    monkeypatch.setattr(tensorrt, "load_trt", lambda flavour: trt)
    monkeypatch.setattr(tensorrt, "open_or_build", open_or_build)
    flavour: Flavour = "tensorrt-rtx" if trt.__name__ == "tensorrt_rtx" else "tensorrt"
    bundle = SimpleNamespace(path=folder, manifest=SimpleNamespace(variance=variance))
    return tensorrt.TensorRtEngine(cast(Bundle, bundle), flavour, number), asked


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    def build(
        model: Any = None,
        *,
        dtype: Any = np.float32,
        rtx: bool = False,
        size: int = SIZE,
        max_rows: int = 10**6,
        plan: bytes | None = None,
        host_code: bool = False,
        variance: str | None = None,
        number: int = 0,
        **world: Any,
    ) -> Setup:
        model = model or FakeEngine()
        monkeypatch.setenv("CDIFF_CACHE", str(tmp_path / "user"))
        here = install(monkeypatch, **{"devices": number + 1, **world})
        network = fake_tensorrt.Network(model, (size, size), 2, dtype, model.learned)
        trt = fake_tensorrt.module(here, network, rtx=rtx, max_rows=max_rows)
        variance = variance or ("learned" if model.learned else "fixed")
        engine, asked = open_engine(
            monkeypatch, tmp_path, trt, number, plan=plan, host_code=host_code, variance=variance
        )
        made.add(engine)
        return Setup(here, engine, asked)

    made: weakref.WeakSet[tensorrt.TensorRtEngine] = weakref.WeakSet()
    yield build
    for engine in made:  # while the doubles are there
        engine.close()
