"""The cases that evaluations with known maps are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdiff.runtime.cases import Case, find_cases
from tests.synthetic import write_synthetic_dataset


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    """Four cases, three annotators, four slices; in the last slice the third annotator marked nothing."""
    return find_cases(write_synthetic_dataset(tmp_path / "data", 4, raters=3, shape=(24, 20, 4)))["all"]
