"""On a real GPU, through PyCUDA: the noise agrees, a replayed graph computes what plain launches do, and so do the engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from cdiff.runtime.bundle import Bundle
from cdiff.runtime.device.cuda import INSTALL, missing_packages
from cdiff.runtime.device.gpu import Gpu
from cdiff.runtime.device.kernels import Kernels
from cdiff.runtime.device.layout import BatchBlock
from cdiff.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cdiff.runtime.engines.registry import engine_status
from cdiff.runtime.sampling.noise import INITIAL, normal
from cdiff.runtime.sampling.sampler import sampler_table
from tests.runtime.device.test_kernels import rows_of, ulps
from tests.runtime.graphs import write_pair
from tests.runtime.sampling.test_batching import SCHEDULE, SIZE, C, framed, run, scan

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    if lacking := missing_packages():
        pytest.skip(f"{' and '.join(lacking)} not installed: {INSTALL}")
    return Gpu(
        0
    )  # which loads PyCUDA as an engine does: imported plainly, it does not find a cuRAND that came as a wheel


@pytest.mark.parametrize("size", [(128, 128), (5, 31), (7, 2)])
def test_the_noise_is_noise_py_s(gpu: Gpu, size: tuple[int, int]) -> None:
    rows, table, count = rows_of(3, canvas=size), sampler_table("ddpm", SCHEDULE, 5), 3
    block = BatchBlock(count)
    staged, out = np.zeros(block.size, np.uint8), np.empty((count, *size), np.float32)
    block.fill(staged, rows, table, 11, 1)
    for step in (INITIAL, 0, 999):
        with gpu.current():
            stream = gpu.stream()
            batch, z = gpu.allocate(block.size), gpu.allocate(out.nbytes)
            gpu.upload(batch.address, staged, stream)
            Kernels(gpu, count, size).noise(stream, z.address, batch.address, batch.address + block.row, step)
            gpu.download(out, z.address, stream)
            stream.synchronize()
            gpu.release(batch)
            gpu.release(z)
        for i in range(count):
            want = normal(11, int(rows.slice_id[i]), int(rows.level[i]), int(rows.run[i]), step, size)
            np.testing.assert_allclose(out[i], want, rtol=0, atol=2e-6)
            assert ulps(out[i], want) <= 8


@pytest.mark.parametrize("learned", [False, True])
def test_onnx_runtime_gives_the_cpu_s_maps_captured_or_not(gpu: Gpu, tmp_path: Path, learned: bool) -> None:
    if "cuda" not in engine_status("onnxruntime").devices:
        pytest.skip("this ONNX Runtime has no CUDA provider")
    from cdiff.runtime.engines.onnxruntime_gpu import OnnxRuntimeGpuEngine

    encoder, denoiser = write_pair(tmp_path, size=SIZE, T=20, levels=C, learned=learned)
    manifest: Any = SimpleNamespace(precision="float32", variance="learned" if learned else "fixed")
    bundle = cast(Bundle, SimpleNamespace(encoder=encoder, denoiser=denoiser, manifest=manifest, path=tmp_path))
    windows, table = framed(scan((2, SIZE, SIZE))), sampler_table("ddpm", SCHEDULE, 10)
    want = run(OnnxRuntimeEngine(encoder, denoiser), windows, table, batch=12, mirror=True)
    found = []
    for capture in (True, False):
        engine = OnnxRuntimeGpuEngine(bundle)
        engine.capture = capture
        found.append(run(engine, windows, table, batch=12, mirror=True))
        engine.close()
    for graph, plain, cpu in zip(*found, want, strict=True):
        assert np.array_equal(graph.level_means, plain.level_means), "the same kernels, replayed"
        np.testing.assert_allclose(graph.level_means, cpu.level_means, rtol=0, atol=1e-3)
        np.testing.assert_allclose(graph.run_std, cpu.run_std, rtol=0, atol=1e-3)


def test_the_context_is_shared_and_memory_comes_back(gpu: Gpu) -> None:
    with gpu.current(), gpu.current():
        free, total = gpu.memory()
        held = gpu.allocate(64 * 2**20, zero=True)
        assert gpu.memory()[0] < free <= total
        gpu.release(held)
        gpu.trim()
        assert gpu.memory()[0] >= free
