"""When contexts, memory and graphs are given back: with their engine, in any thread, never within a capture; over doubles."""

from __future__ import annotations

import atexit
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cdiff.runtime.device.chain import DeviceChain
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.sampler import sampler_table
from tests.runtime.device.fake_cuda import World
from tests.runtime.device.test_device_chain import same
from tests.runtime.sampling.test_batching import SCHEDULE, SIZE, C, FakeEngine, R, framed, run, scan

TABLE = sampler_table("ddim", SCHEDULE, 3)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage but what its last reference takes along."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("rtx", [False, True])
def test_an_engine_s_memory_goes_when_the_engine_is_let_go_of(make: Any, rtx: bool) -> None:
    """At once, and in any thread: PyCUDA leaves it taken where it is freed in another one without a context."""
    setup = make(rtx=rtx)
    world = setup.world
    run(setup.engine, framed(scan((2, SIZE, SIZE))), TABLE, batch=12)
    assert world.used() > 0
    thread = threading.Thread(target=lambda: delattr(setup, "engine"))
    thread.start()
    thread.join()
    assert world.used() == 0
    assert len(world.named("executable destroyed")) == 1
    assert len(world.named("unpinned")) == len(world.pinned)
    assert all(current for _, current in world.named("unpinned"))
    assert world.contexts == []


def test_a_scan_that_is_under_way_keeps_its_engine(make: Any) -> None:
    setup, windows = make(), framed(scan((2, SIZE, SIZE)))
    results = segment_windows(setup.engine, windows, TABLE, levels=C, runs=R, seed=9, batch=12)
    del setup.engine
    same(list(results), run(FakeEngine(), windows, TABLE, batch=12))
    del results
    assert setup.world.used() == 0


@pytest.mark.parametrize("number", [0, 2])
def test_an_engine_works_on_the_gpu_that_was_named(make: Any, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """All that is done for a scan, with that GPU's context and no other."""
    setup, used = make(number=number), set[tuple[int, ...]]()
    monkeypatch.setattr(setup.world, "current", lambda: used.add(tuple(setup.world.contexts)))
    windows = framed(scan((1, SIZE, SIZE)))
    same(run(setup.engine, windows, TABLE, batch=12), run(FakeEngine(), windows, TABLE, batch=12))
    assert {number for contexts in used for number in contexts} == {number}
    assert () not in used
    assert setup.engine.device == f"cuda:{number}"


def test_an_engine_that_did_not_open_goes_in_silence(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(CdiffError, match="no GPU at all"):
        make(devices=0)
    gc.collect()
    assert said == []


class Garbage:
    """Something of PyCUDA's in a cycle, which frees memory when it is collected."""

    def __init__(self, world: World) -> None:
        self.world, self.me = world, self

    def __del__(self) -> None:
        if self.world.capturing is not None:
            self.world.capturing.spoiled = True


def test_nothing_is_collected_within_a_capture(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, step, usual = make(), DeviceChain._step, gc.get_threshold()
    Garbage(setup.world)

    def eager(chain: DeviceChain) -> None:
        if setup.world.capturing is not None:
            gc.set_threshold(1)
        step(chain)

    monkeypatch.setattr(DeviceChain, "_step", eager)
    gc.set_threshold(10**9)
    try:
        run(setup.engine, framed(scan((1, SIZE, SIZE))), TABLE, batch=12)
    finally:
        gc.set_threshold(*usual)
    assert setup.engine.bind(12, 1).captured
    assert gc.isenabled()


def test_the_context_is_released_when_the_process_ends_and_not_dropped_before(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that PyCUDA drops by itself is given to cuCtxDetach, which a primary context must not be."""
    at_exit: list[Callable[..., Any]] = []
    register = atexit.register

    def kept(function: Callable[..., Any], *arguments: Any) -> Any:
        at_exit.append(function)
        return register(function, *arguments)

    monkeypatch.setattr(atexit, "register", kept)
    setup = make()
    del setup.engine
    gc.collect()
    assert setup.world.named("context dropped") == []
    (release,) = (one for one in at_exit if one.__name__ == "detach")
    release()
    atexit.unregister(release)
    at_exit.clear()
    del release
    gc.collect()
    assert setup.world.named("context dropped") == [("context dropped", False)]


def test_a_process_that_was_forked_off_is_told_so_in_a_line(make: Any) -> None:
    setup = make()
    setup.world.forked = True
    with pytest.raises(CdiffError, match=r"^cuda:0 \(Double\): cuCtxPushCurrent failed: initialization error$"):
        setup.engine.bind(12, 2)
    setup.world.forked = False
