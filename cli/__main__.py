"""`python -m cdiff.cli` is the `cdiff` command, for a clone on a machine where nothing can be installed."""

from __future__ import annotations

from cdiff.cli.app import main

if __name__ == "__main__":
    main("cdiff")
