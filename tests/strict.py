"""Tests during which a warning is an error."""

from __future__ import annotations

import pytest

every_warning_is_an_error = pytest.mark.filterwarnings("error", "ignore:unclosed database:ResourceWarning")
"""But the one that Python 3.13 gives when the garbage collector meets an image of highdicom's that another test made: each holds a database."""
