"""What TensorRT refuses is one line with its own words, and want of memory is told apart."""

from __future__ import annotations

from typing import Any

import pytest

from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.errors import CdiffError
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
