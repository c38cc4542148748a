"""What a capture is kept from; captures themselves are in test_device_chain.py."""

from __future__ import annotations

import gc
import weakref

from cdiff.runtime.device.graph import nothing_collected


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
