"""`python -m cdiff.cli` is the `cdiff` command, for a clone on a machine where nothing can be installed."""

from __future__ import annotations

from cdiff.cli.app import app

if __name__ == "__main__":
    app(prog_name="cdiff")
