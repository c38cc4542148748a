"""The `cdiff` command: one short file a command; each parses, calls the package below, and prints."""

from __future__ import annotations

from cdiff.cli.app import main

__all__ = ["main"]
