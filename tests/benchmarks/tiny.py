"""What the GPU suite's tests measure where there is no GPU: a tiny network, on the CPU."""

from __future__ import annotations

from cdiff.benchmarks.gpu_checks import Settings
from cdiff.benchmarks.gpu_subjects import SHIPPED, subject

TINY = subject(SHIPPED, small=True)
CPU = Settings("cpu", small=True, seconds=0.1)
