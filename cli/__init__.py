"""The `cdiff` command: one short file a command; each parses, calls the package below, and prints."""

from __future__ import annotations

import importlib.util
import sys

if importlib.util.find_spec("fcntl") is None:  # on Windows: the locks that keep two processes out of one folder
    print("error: cdiff needs Linux: this Python has no file locks (fcntl); on Windows use WSL", file=sys.stderr)
    sys.exit(2)

from cdiff.cli.app import main

__all__ = ["main"]
