"""The GPU suite's check `tests`: the project's tests that are marked `gpu`, in one run of pytest."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cdiff
from cdiff.benchmarks.processes import end_with_parent
from cdiff.runtime.errors import CdiffError

MARK = re.compile(r"^\s*(@|pytestmark = )pytest\.mark\.gpu\b", re.MULTILINE)


def marked_files(root: Path) -> list[Path]:
    """The test files below `root`/tests that have a test marked `gpu`; unlike others, these can be collected without nibabel and typer."""
    return sorted(p for p in (root / "tests").rglob("test_*.py") if MARK.search(p.read_text(encoding="utf-8")))


def run_marked_tests() -> dict[str, Any]:
    """How many tests passed, and why others were skipped. Raises CdiffError where there are no tests, RuntimeError when one fails."""
    root = Path(cdiff.__file__).resolve().parents[1]
    files = marked_files(root)
    if not files:
        raise CdiffError("the tests are in cdiff's clone, not in an installed package: run the suite there")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tests.xml"
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--junitxml", str(out)]
        command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
        done = subprocess.run(command, cwd=root, check=False, preexec_fn=end_with_parent, stderr=subprocess.PIPE)
        said = done.stderr.decode(errors="replace")
        print(said, end="", file=sys.stderr)
        if not out.exists():  # no pytest, or a package is missing that all tests need
            last = (said.strip().splitlines() or [f"it ended with {done.returncode}"])[-1].removeprefix("E").strip()
            raise CdiffError(f"pytest could not be run ({last}): pip install '.[cpu,test]' in cdiff's clone")
        cases = list(ElementTree.parse(out).iter("testcase"))
    broken = [case.get("name", "?") for case in cases if any(part.tag in ("failure", "error") for part in case)]
    if broken or not cases:
        raise RuntimeError(f"{len(broken)} of {len(cases)} tests failed: {', '.join(broken)}")
    reasons = [part.get("message", "") for case in cases for part in case if part.tag == "skipped"]
    return {"passed": len(cases) - len(reasons), "skipped": len(reasons), "reasons": sorted(set(reasons))}
