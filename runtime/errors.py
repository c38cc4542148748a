"""The one exception that a user's mistake or a bad file raises: one line that says what, where and what to do."""

from __future__ import annotations


class CdiffError(Exception):
    """Something a user can mend. Its text is one line: what is wrong, where, and what to do about it."""
