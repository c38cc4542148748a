"""The model repository in a real Triton Inference Server, where one is on the PATH and its backend's Python has cdiff."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cdiff
from tests.export.test_triton import for_the_processor

SERVER = shutil.which("tritonserver")
pytestmark = pytest.mark.skipif(SERVER is None, reason="no tritonserver on the PATH")
READY_IN = 120.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that has loaded the tiny bundle as `tiny`."""
    folder = tmp_path_factory.mktemp("models")
    for_the_processor(tiny_bundle, folder)
    port, log = free_port(), folder.parent / f"{folder.name}.log"
    command = [str(SERVER), "--model-repository", str(folder), "--http-port", str(port)]
    with log.open("wb") as told:
        process = subprocess.Popen(
            [*command, "--allow-grpc", "false", "--allow-metrics", "false"], stdout=told, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{port}/v2"
        until = time.monotonic() + READY_IN
        while not ready(address):
            said = log.read_text(errors="replace")
            assert process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    kinds = {"float32": "FP32", "uint64": "UINT64", "int32": "INT32"}
    tensors = [
        {"name": name, "shape": values.shape, "datatype": kinds[values.dtype.name], "data": values.ravel().tolist()}
        for name, values in inputs.items()
    ]
    body = json.dumps({"inputs": tensors}).encode()
    with urllib.request.urlopen(f"{address}/models/tiny/infer", body, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return {one["name"]: np.array(one["data"], np.float32).reshape(one["shape"]) for one in found["outputs"]}


def test_a_served_slice_equals_one_segmented_here(server: str, tiny_bundle: Path) -> None:
    image = np.random.default_rng(3).uniform(0, 200, (1, 40, 30)).astype(np.float32)
    found = ask(
        server,
        image=image,
        seed=np.array([2**64 - 1], np.uint64),
        runs=np.array([2], np.int32),
        steps=np.array([5], np.int32),
    )
    expected = cdiff.load(tiny_bundle).segment(image[0], runs=2, steps=5, seed=2**64 - 1)
    np.testing.assert_array_equal(found["soft"], expected.soft)
    np.testing.assert_array_equal(found["levels"], np.moveaxis(expected.levels, -1, 0))
    assert found["uncertainty"].shape == (2, 40, 30)


def test_optional_inputs_may_be_left_out(server: str, tiny_bundle: Path) -> None:
    image = np.random.default_rng(4).uniform(0, 200, (1, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(ask(server, image=image)["soft"], cdiff.load(tiny_bundle).segment(image[0]).soft)


def test_a_wrong_request_is_the_clients_fault_and_costs_no_other(server: str) -> None:
    image = np.ones((1, 16, 16), np.float32)
    one = np.array([1], np.int32)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, image=image, runs=np.array([0], np.int32), steps=one)
    assert refused.value.code == 400
    assert "runs 0 is out of range" in refused.value.read().decode()
    assert ask(server, image=image, runs=one, steps=one)["soft"].shape == (16, 16)
