"""The cases that evaluations with known maps are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.synthetic import write_synthetic_dataset

if TYPE_CHECKING:
    from cdiff.runtime.data.cases import Case


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    """Four cases, three annotators, four slices; in the last slice the third annotator marked nothing."""
    from cdiff.runtime.data.cases import find_cases  # only here: it needs nibabel, and the tests of the GPU do not

    return find_cases(write_synthetic_dataset(tmp_path / "data", 4, raters=3, shape=(24, 20, 4)))["all"]
