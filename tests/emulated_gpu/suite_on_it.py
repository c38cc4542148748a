"""The GPU suite's checks of PyTorch on the emulated GPU: what they measure is worth nothing, and that they end with a result is."""

from __future__ import annotations

import pytest

from cdiff.benchmarks.gpu_checks import Settings, run_check
from cdiff.benchmarks.gpu_plan import plan

CHECKS = [
    "published:published:shipped", "parity:graph-plain:shipped", "noise:graph-plain:shipped", "protocol:graph-plain:paper",
    "protocol:launched-plain:paper", "protocol:eager16:paper",
]  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_of_the_suite_ends_with_a_result(name: str) -> None:
    assert name in [check.name for check in plan("cuda:0", True)]
    found = run_check(name, Settings("cuda:0", small=True))
    assert found["status"] == "done", found
    assert found["result"]
