"""The one exception that a user's mistake or a bad file raises."""

from __future__ import annotations


class CdiffError(Exception):
    """Something that the user can fix. Its text is one line: what is wrong, where, and what to do about it."""
