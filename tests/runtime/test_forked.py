"""A process that is forked off from one with a loaded model: a line where it uses that, none where it loads its own, and it ends.

Each forked process is asked to end by itself; one that waits for threads that are not there is killed by the limit of its parent.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.test_segmenter import make_bundle

LIMIT = 120
"""Seconds until a process that waits forever is killed: only a failure takes as long."""

FORK = """
import os, sys
import numpy as np
import cdiff
from cdiff.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.segmenter import Segmenter

def opened(engine):
    if engine == "torch":
        import torch
        torch.set_num_threads(2)
        return cdiff.load(sys.argv[1], engine="torch")
    bundle = cdiff.load(sys.argv[1], engine="onnxruntime").bundle
    return Segmenter(bundle, OnnxRuntimeEngine(bundle.encoder, bundle.denoiser, threads=2))  # with one there is nothing to wait for

def maps():
    return model.segment(np.eye(64, dtype=np.float32), runs=2, steps=2).soft

def told(what):
    try:
        what()
    except CdiffError as error:
        print(str(error).replace(str(os.getppid()), "PARENT"))

model = opened(sys.argv[2])
before = maps()
if pid := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def forked(program: str, bundle: Path, engine: str = "onnxruntime") -> str:
    """What `program`, forked off from a process that has segmented with the model, prints until it has ended as Python ends."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", FORK + program, str(bundle), engine],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"the forked process waits forever, after {error.stdout!r}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def test_a_model_of_the_parent_is_refused_in_a_line(bundle: Path) -> None:
    lines = forked("told(maps)\ntold(lambda: model.segment_many([]))\n", bundle).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("this model was loaded in process PARENT, and process")
        assert "load the model in this process, with cdiff.load" in line


def test_one_that_is_loaded_anew_gives_the_same_maps(bundle: Path) -> None:
    """By the name of the parent's too, which is let go of then: ONNX Runtime would wait for its threads."""
    program = "model = opened('onnxruntime')\nprint(np.array_equal(maps(), before))\nmodel = None\nprint('let go of')\n"
    assert forked(program, bundle).split("\n") == ["True", "let go of", ""]


def test_the_process_ends_though_it_never_used_the_model(bundle: Path) -> None:
    assert forked("print('at its end', flush=True)\n", bundle) == "at its end\n"


@pytest.mark.slow
def test_nothing_of_pytorchs_is_begun_where_the_parent_has_computed_with_it(tiny_bundle: Path) -> None:
    """It would wait for the threads that it had in the parent. The process ends as those of multiprocessing do."""
    train = "from pathlib import Path\nfrom cdiff.train.presets import preset\nfrom cdiff.train.trainer import train\n"
    begun = ("maps", "lambda: opened('torch')", "lambda: train(preset('tiny'), Path('none'), Path('none'))")
    program = train + "".join(f"told({one})\n" for one in begun) + "sys.stdout.flush()\nos._exit(0)\n"
    said = forked(program, tiny_bundle, "torch").splitlines()
    assert len(said) == 3
    assert said[0].startswith("this model was loaded in process PARENT")
    for line in said[1:]:
        assert line.startswith("PyTorch has computed in the process that this one was forked from")
