"""What TensorRT refuses is one line with its own words, and want of memory is told apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.engines import tensorrt
from cdiff.runtime.engines.trt import Gpu
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import most_rows
from cdiff.runtime.sampling.sampler import sampler_table
from tests.runtime.device import fake_tensorrt
from tests.runtime.device.test_device_chain import same
from tests.runtime.sampling.test_batching import SCHEDULE, SIZE, FakeEngine, framed, run, scan


def test_what_tensorrt_says_is_in_the_error(make: Any) -> None:
    with pytest.raises(
        CdiffError, match=r"tensorrt 10.16.1.11 on cuda:0: the denoiser does not take x \[12, 1, 16, 16\]: INVALID_ARG"
    ):
        make(max_rows=8).engine.bind(12, 2)
    with pytest.raises(CdiffError, match=r"cannot be loaded; remove its folder.*: the plan is damaged and more$"):
        make(plan=b"nonsense").engine.bind(12, 2)
    with pytest.raises(CdiffError, match="cuda:0 is not there: the driver shows no GPU at all"):
        make(devices=0)


@pytest.mark.parametrize(("learned", "listed"), [(True, "fixed"), (False, "learned")])
def test_an_engine_whose_variance_is_not_the_manifests_is_refused(make: Any, learned: bool, listed: str) -> None:
    with pytest.raises(CdiffError, match=f"the manifest says variance {listed}, but the denoiser gives"):
        make(FakeEngine(learned=learned), variance=listed).engine.bind(12, 2)


@pytest.mark.parametrize("method", ["set_optimization_profile_async", "infer_shapes"])
def test_what_the_bindings_raise_is_tensorrt_s_refusal_too(make: Any, method: str) -> None:
    """They return no false here. Want of memory is told as that, so that fewer rows are tried."""
    setup = make()
    setup.engine._trt.refused = method
    with pytest.raises(OutOfMemory, match=rf"tensorrt 10.16.1.11 on cuda:0: the encoder's .*: no room in {method}"):
        setup.engine.bind(12, 2)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("create_execution_context", "no execution context for the encoder: it gave no reason"),
        ("set_tensor_address", "the encoder does not take an address for image"),
        ("one shape", "the encoder lacks the shape of level"),
        ("get_tensor_shape", r"the encoder's image is \[1, 1, 16, 16, 1\], not \[1, 1, 16, 16\]"),
    ],
)
def test_what_tensorrt_answers_with_a_no_is_an_error_and_leaves_nothing(make: Any, refused: str, words: str) -> None:
    """A graph that is connected to other places, or to none, would compute a wrong map in silence."""
    setup = make()
    setup.engine._trt.refused = refused
    with pytest.raises(CdiffError, match=f"tensorrt 10.16.1.11 on cuda:0: {words}"):
        setup.engine.bind(12, 2)
    setup.engine.close()
    assert setup.world.used() == 0


def test_a_graph_that_did_not_run_is_an_error(make: Any) -> None:
    """The buffers then hold what the run before left there."""
    setup, windows, table = make(), framed(scan((1, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 2)
    setup.engine.bind(12, 2)
    setup.engine._trt.refused = "execute_async_v3"
    with pytest.raises(CdiffError, match="the encoder did not run: FAILED_EXECUTION: launch failure"):
        run(setup.engine, windows, table, batch=12)
    setup.engine._trt.refused = ""
    same(run(setup.engine, windows, table, batch=12), run(FakeEngine(), windows, table, batch=12))


def test_an_engine_of_other_tensors_or_types_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An int32 level, say, would be read from every second half of ours."""
    setup = make()
    kinds = {np.dtype(np.int64): np.int32}
    setup.engine._trt.nptype = lambda dtype: kinds.get(dtype, dtype.type)
    with pytest.raises(CdiffError, match="the denoiser's engine has row_slice as int32, not int64: build it again"):
        setup.engine.bind(12, 2)
    names = tensorrt.tensor_names
    monkeypatch.setattr(tensorrt, "tensor_names", lambda engine: names(engine) | {"spacing"})
    with pytest.raises(
        CdiffError, match=r"the encoder's engine has the tensors .*'spacing'\], not \['features', 'image'"
    ):
        setup.engine.bind(12, 2)


@pytest.mark.parametrize("built", [None, 40])
def test_a_scan_asks_for_the_rows_of_the_engine_that_is_there_or_that_the_free_memory_takes(
    make: Any, monkeypatch: pytest.MonkeyPatch, built: int | None
) -> None:
    setup = make(memory=2**24)
    manifest = SimpleNamespace(features_channels=8, image_size=(64, 64))
    setup.engine._bundle = SimpleNamespace(manifest=manifest)
    asked: list[Any] = []
    monkeypatch.setattr(tensorrt, "cached_rows", lambda *given: asked.append(given) or built)
    with setup.engine.gpu.current():
        taken = setup.engine.gpu.allocate(2**22)
    assert setup.engine.most_rows == (built or most_rows(8, (64, 64), 2**24 - 2**22))
    assert most_rows(8, (64, 64), 2**24 - 2**22) < most_rows(8, (64, 64), 2**24), "the memory must count"
    assert asked == [(setup.engine._bundle, "tensorrt", Gpu("Double", "9.0", 2**24 - 2**22))]
    setup.engine.gpu.release(taken)


def test_errors_are_kept_as_tensorrt_s_own_recorder_keeps_them(make: Any) -> None:
    """TensorRT asks its recorder how many there are and what they say, and clears it, through these methods."""
    setup = make()
    messages, logger, recorder = tensorrt.listeners(setup.engine._trt)
    assert recorder.report_error("CODE", "first") is False, "true would ask TensorRT to stop"
    logger.log(setup.engine._trt.ILogger.Severity.WARNING, "a warning is no error")
    assert (recorder.get_num_errors(), recorder.get_error_code(0), recorder.get_error_desc(0)) == (1, "CODE", "first")
    assert messages == ["CODE: first"]
    for number in range(tensorrt.KEPT_ERRORS + 5):
        assert recorder.has_overflowed() is (number + 1 >= tensorrt.KEPT_ERRORS)
        recorder.report_error("CODE", f"error {number}")
    assert recorder.get_num_errors() == len(messages) == tensorrt.KEPT_ERRORS
    recorder.clear()
    assert (recorder.get_num_errors(), recorder.has_overflowed()) == (0, False)


def test_fewer_rows_need_less_memory_of_an_engine_for_many(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's own number is for the most rows that it takes: by that alone a batch that was halved would fit no better."""
    monkeypatch.setitem(fake_tensorrt.SIZE, "denoiser", 10**6)
    setup = make(memory=200_000)
    windows, table = framed(scan((2, SIZE, SIZE))), sampler_table("ddim", SCHEDULE, 2)
    same(run(setup.engine, windows, table, batch=2), run(FakeEngine(), windows, table, batch=2))
    setup.engine._trt.refused = "update_device_memory_size_for_shapes"
    with pytest.raises(OutOfMemory, match="use a smaller batch"):
        setup.engine.bind(3, 2)
    setup.engine.close()
    assert setup.world.used() == 0
