"""What a capture is kept from; captures themselves are in test_device_chain.py."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import numpy as np
import pytest

from cdiff.runtime.device.chain import DeviceChain
from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.device.graph import nothing_collected
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.sampler import sampler_table
from tests.runtime.device.fake_cuda import Error, MemoryError_, Result
from tests.runtime.device.test_device_chain import same
from tests.runtime.sampling.test_batching import SCHEDULE, SIZE, FakeEngine, framed, run, scan

TABLE = sampler_table("ddim", SCHEDULE, 3)


def test_nothing_is_collected_within_a_capture_and_all_before_it() -> None:
    """What nobody holds but itself, such as an engine and its binding, which hold each other and a graph."""

    class Held:
        def __init__(self) -> None:
            self.itself = self

    older = weakref.ref(Held())
    with nothing_collected():
        assert older() is None
        newer = weakref.ref(Held())
        for _ in range(10_000):
            Held()
        assert newer() is not None
    assert gc.isenabled()
    gc.disable()
    try:
        with nothing_collected():
            pass
        assert not gc.isenabled(), "who had it off keeps it off"
    finally:
        gc.enable()


def test_ctrl_c_within_a_capture_ends_it_and_the_next_scan_has_one_of_its_own(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is left capturing takes nothing more: every later scan of the process would fail."""
    setup, windows, step = make(), framed(scan((1, SIZE, SIZE))), DeviceChain._step

    def interrupted(chain: DeviceChain) -> None:
        step(chain)
        if setup.world.capturing is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DeviceChain, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(setup.engine, windows, TABLE, batch=12)
    assert setup.world.capturing is None
    same(run(setup.engine, windows, TABLE, batch=12), run(FakeEngine(), windows, TABLE, batch=12))
    assert len(setup.world.named("graph launch")) == len(TABLE)
    assert len(setup.world.named("graph destroyed")) == 2


def test_a_graph_that_finds_no_room_is_want_of_memory_and_is_freed(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, windows = make(), framed(scan((1, SIZE, SIZE)))
    driver: Any = sys.modules["cuda.bindings.driver"]
    with monkeypatch.context() as patch:
        patch.setattr(driver, "cuGraphInstantiate", lambda graph, flags: (Result.CUDA_ERROR_OUT_OF_MEMORY, 0))
        with pytest.raises(OutOfMemory, match="cuGraphInstantiate: the GPU is out of memory; use a smaller batch"):
            run(setup.engine, windows, TABLE, batch=12)
    assert len(setup.world.named("graph destroyed")) == len(setup.world.named("end capture")) == 1
    same(run(setup.engine, windows, TABLE, batch=12), run(FakeEngine(), windows, TABLE, batch=12))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError_("cuMemHostAlloc failed: out of memory"), OutOfMemory),
        (Error("cuMemHostAlloc failed: unknown"), CdiffError),
    ],
)
def test_what_pycuda_raises_leaves_as_an_error_of_ours(
    make: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[CdiffError]
) -> None:
    """Want of memory as that, so that fewer rows are tried."""
    setup = make()
    driver: Any = sys.modules["pycuda.driver"]

    def refused(*_: Any) -> np.ndarray[Any, Any]:
        raise error

    monkeypatch.setattr(driver, "pagelocked_empty", refused)
    with pytest.raises(kind, match=r"^cuda:0 \(Double\).*cuMemHostAlloc failed") as told:
        setup.engine.bind(12, 2)
    assert type(told.value) is kind
    assert setup.world.contexts == []
    setup.engine.close()
    assert setup.world.used() == 0


def test_a_driver_that_does_not_start_is_told_in_a_line(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make().engine
    driver: Any = sys.modules["pycuda.driver"]

    def broken() -> None:
        raise Error("cuInit failed: system not yet initialized")

    monkeypatch.setattr(driver, "init", broken)
    with pytest.raises(
        CdiffError, match=r"^cuda:0 cannot be used: cuInit failed: system not yet initialized; see cdiff doctor$"
    ):
        type(engine.gpu)(0)
