"""What TensorRT refuses is one line with its own words, and want of memory is told apart."""

from __future__ import annotations

from typing import Any

import pytest

from cdiff.runtime.device.cuda import OutOfMemory
from cdiff.runtime.errors import CdiffError


def test_what_tensorrt_says_is_in_the_error(make: Any) -> None:
    with pytest.raises(
        CdiffError, match=r"tensorrt 10.16.1.11 on cuda:0: the denoiser does not take x \[12, 1, 16, 16\]: INVALID_ARG"
    ):
        make(max_rows=8).engine.bind(12, 2)
    with pytest.raises(CdiffError, match=r"cannot be loaded; remove its folder.*: the plan is damaged and more$"):
        make(plan=b"nonsense").engine.bind(12, 2)
    with pytest.raises(CdiffError, match="cuda:0 is not there: the driver shows no GPU at all"):
        make(devices=0)


@pytest.mark.parametrize("method", ["set_optimization_profile_async", "infer_shapes"])
def test_what_the_bindings_raise_is_tensorrt_s_refusal_too(make: Any, method: str) -> None:
    """They return no false here. Want of memory is told as that, so that fewer rows are tried."""
    setup = make()
    setup.engine._trt.refused = method
    with pytest.raises(OutOfMemory, match=rf"tensorrt 10.16.1.11 on cuda:0: the encoder's .*: no room in {method}"):
        setup.engine.bind(12, 2)
