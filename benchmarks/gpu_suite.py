"""The GPU suite: parity, speed and targets of every engine that this machine has, in one command (docs/gpu.md).

    python -m cdiff.benchmarks.gpu_suite --out gpu_suite

Each check runs in a process of its own with a time limit; gpu_suite.json and gpu_suite.md are written anew after each, and the same
command goes on where it stopped, and tries again what was refused. It needs PyTorch and NumPy; what else is missing is said
in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cdiff
from cdiff.benchmarks.gpu_checks import DONE, FAILED, REFUSED, Settings, settings_json
from cdiff.benchmarks.gpu_report import markdown
from cdiff.benchmarks.gpu_subjects import PAPER, SHIPPED
from cdiff.benchmarks.gpu_targets import targets
from cdiff.benchmarks.script import parser_of
from cdiff.runtime.engines.registry import available_engines
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder, must_take_files, write_bytes, write_json

FORMAT = 1
MINUTES = 7.8
SKIPPED = "not measured"


@dataclass(frozen=True)
class Check:
    """One line of the plan: `seconds` is its limit, `expected` what it should take on an H200, guessed and not measured."""

    name: str
    what: str
    seconds: int
    expected: int


def plan(device: str, small: bool) -> list[Check]:
    """Every check for this machine, the most telling first. Engines that cannot run on the device are told by `machine` alone."""
    kind = device.split(":")[0]
    engines = [state.name for state in available_engines() if kind in state.devices]
    checks = [Check("machine", "versions, the GPU, measured rates, the state of every engine", 60, 12)]

    def add(kind: str, path: str, model: str, what: str, seconds: int, expected: int) -> None:
        checks.append(Check(f"{kind}:{path}:{model}", what, seconds, expected))

    calls_and_maps = "against PyTorch float32: calls and final maps"
    parts = "sweep, whole protocol, parts"
    one_by_one = "float32, one chain after another, encoder for each: a share of it"
    add("noise", "graph", SHIPPED, "noise drawn on the device against the NumPy form", 120, 40)
    add("published", "published", PAPER, f"baseline: {one_by_one}", 90, 25)
    add("protocol", "graph", PAPER, f"our captured half-precision chain: {parts}", 150, 60)
    add("parity", "graph", SHIPPED, calls_and_maps, 90, 20)
    add("scaling", "graph", SHIPPED, "1, 2 and 4 slices", 90, 30)
    for engine in engines:
        add("parity", engine, SHIPPED, calls_and_maps, 120, 30)
        add("protocol", engine, SHIPPED, parts, 90, 20)
        add("protocol", engine, PAPER, f"{parts}; exports the graphs first", 200, 110)
    add("replay", "graph", SHIPPED, "graph replay against plain launches", 60, 15)
    add("protocol", "graph", SHIPPED, parts, 60, 15)
    add("published", "published", SHIPPED, f"baseline: {one_by_one}", 60, 15)
    add("parity", "graph", PAPER, "calls against PyTorch float32", 60, 15)
    add("protocol", "eager16", PAPER, f"baseline: float16 eager, encoder once: {parts}", 120, 40)
    if kind != "cpu":  # compiling for a CPU takes minutes, and is no baseline for a GPU
        add("protocol", "compiled", PAPER, f"baseline: torch.compile with CUDA graphs, encoder once: {parts}", 220, 100)
    add("protocol", "graph-tuned", PAPER, f"our captured chain, cuDNN's algorithms timed: {parts}", 150, 60)
    # Where Triton has no C compiler `graph` is refused, and this is the engine that users get.
    add("protocol", "graph-plain", PAPER, f"the captured chain with PyTorch's own GroupNorm: {parts}", 120, 45)
    add("parity", "graph-plain", SHIPPED, calls_and_maps, 90, 20)
    if kind != "cpu":
        add(
            "protocol",
            "graph-compiled",
            PAPER,
            f"the chain through torch.compile, cuDNN's algorithms timed, captured by us: {parts}",
            220,
            120,
        )
        for engine in engines:
            add("noise", engine, SHIPPED, "noise drawn by that engine against the NumPy form", 60, 12)
            add("replay", engine, SHIPPED, "graph replay against plain launches", 60, 15)
            add("scaling", engine, SHIPPED, "1, 2 and 4 slices", 90, 30)
            add("parity", engine, PAPER, "calls against PyTorch float32", 120, 30)
        add(
            "parity",
            "onnxruntime-cpu",
            SHIPPED,
            "ONNX Runtime on the host's processor, against PyTorch float32",
            90,
            40,
        )
        add("noise", "graph-plain", SHIPPED, "the noise of PyTorch's own operators against the NumPy form", 60, 12)
        add("scaling", "graph-plain", SHIPPED, "1, 2 and 4 slices", 90, 30)
    checks.append(Check("tests", "the tests marked gpu", 180, 60))
    if kind != "cpu":  # compiled twice, for a call's rows and for a batch's: last, since it takes longest for one line
        add("parity", "graph-compiled", SHIPPED, calls_and_maps, 220, 100)
    return [dataclasses.replace(c, expected=2, seconds=600) if small else c for c in checks]


def chosen(checks: list[Check], wanted: str | None) -> list[Check]:
    """Those whose name is one of `wanted`, or begins with one of them at a colon. Raises CdiffError for a word that fits none."""
    if wanted is None:
        return checks
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    for word in words:
        if not any(fits(check.name, word) for check in checks):
            raise CdiffError(f"--checks {word}: no check of that name; --dry-run lists them")
    return [check for check in checks if any(fits(check.name, word) for word in words)]


def fits(name: str, word: str) -> bool:
    return name == word or name.startswith(f"{word}:")


def gpu_missing(device: str) -> str | None:
    """Why the suite cannot measure on that device, or None."""
    try:
        import torch
    except ModuleNotFoundError:
        return (
            "PyTorch is not installed; the suite compares everything with it: pip install '.[train]' in cdiff's clone"
        )
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no NVIDIA GPU here"
    number = torch.device(device).index or 0
    return (
        None
        if number < torch.cuda.device_count()
        else f"there is no {device}: PyTorch sees {torch.cuda.device_count()} GPU(s)"
    )


class Suite:
    """The report as far as it is known, on the disk after every check."""

    def __init__(self, out: Path, settings: Settings, checks: list[Check], fresh: bool) -> None:
        self.out, self.settings = make_folder(out), settings
        self.path = out / "gpu_suite.json"
        self.report: dict[str, Any] = {
            "format": FORMAT, "cdiff": cdiff.__version__, "settings": dataclasses.asdict(settings), "checks": {},
        }  # fmt: skip
        if self.path.exists() and not fresh:
            self._resume()
        self.report["plan"] = [dataclasses.asdict(check) for check in checks]

    def _resume(self) -> None:
        try:
            older = json.loads(self.path.read_text(encoding="utf-8"))
            mine = self.report["settings"]
            # Where the graphs lie says nothing of what was measured.
            same = older["format"] == FORMAT and older["settings"] | {"work": mine["work"]} == mine
            kept = {name: found for name, found in older["checks"].items() if found["status"] not in (FAILED, SKIPPED)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CdiffError(f"{self.path} cannot be gone on with ({error}); give --fresh to start anew") from None
        if not same:
            raise CdiffError(
                f"{self.path} was measured with other settings; give --fresh to start anew, or another --out"
            )
        self.report["checks"] = kept

    def save(self) -> None:
        """Both files, whole or not at all."""
        self.report["targets"] = targets(self.report["checks"], self.settings.small)
        write_json(self.path, self.report)
        write_bytes(self.out / "gpu_suite.md", markdown(self.report).encode())

    def run(self, checks: list[Check], minutes: float) -> None:
        """Every check that was not done before, while there is time; a line each.

        What was refused before is tried again, since what it lacked may be there by now; but last, so that it takes no time from what
        was never measured, and where no time is left the refusal stays.
        """
        deadline = time.monotonic() + 60 * minutes
        done = self.report["checks"]
        states = {name: found["status"] for name, found in done.items()}
        for check in sorted(checks, key=lambda check: states.get(check.name) == REFUSED):
            left, state = deadline - time.monotonic(), states.get(check.name)
            # A check that is cut short measures nothing, and one of those after it may be shorter.
            late = left < max(min(10, check.seconds), check.expected / 2)
            if state == DONE or (state == REFUSED and late):
                print(f"{check.name}: kept from before", flush=True)
                continue
            found: dict[str, Any] = {
                "status": SKIPPED, "message": "the time was up; run the same command again", "seconds": 0,
            }  # fmt: skip
            if not late:
                outcome = in_a_process(check.name, self.settings, min(check.seconds, left))
                # Cut short by --minutes, and not by its own limit: nothing broke.
                cut = outcome["status"] == FAILED and time.monotonic() >= deadline
                found = found | {"seconds": outcome["seconds"]} if cut else outcome
            done[check.name] = found
            print(f"{check.name}: {found['status']} in {found['seconds']:.0f} s{_tail(found)}", flush=True)
            self.save()
        if any(done[name]["status"] == DONE for name in states if states[name] == REFUSED):
            self._list_packages_again(checks, deadline)
        self.save()

    def _list_packages_again(self, checks: list[Check], deadline: float) -> None:
        """Take `machine` anew, if there is time: a check that was refused was done now, so something has been installed."""
        done = self.report["checks"]
        for check in checks:
            left = deadline - time.monotonic()
            if check.name == "machine" and done["machine"]["status"] == DONE and left >= check.expected:
                outcome = in_a_process(check.name, self.settings, min(check.seconds, left))
                done[check.name] = outcome if outcome["status"] == DONE else done[check.name]


def _tail(found: dict[str, Any]) -> str:
    return f": {found['message']}" if "message" in found else ""


def in_a_process(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
    """One check's outcome, whatever becomes of its process."""
    root = Path(cdiff.__file__).resolve().parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    work = make_folder(Path(settings.work).resolve())
    # What compiles at its first use keeps what it made: below the home folder, or in /tmp, where a GPU machine may let nobody write.
    caches = {"TRITON_CACHE_DIR": str(work / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    environment = {**caches, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        environment.setdefault("TMPDIR", folder)
        out, log = Path(folder) / "check.json", Path(folder) / "log"
        command = [sys.executable, "-m", "cdiff.benchmarks.gpu_checks", name, settings_json(settings), str(out)]
        with log.open("w") as file:
            # A session of its own: compilers that a check started are ended with it.
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        said = log.read_text(encoding="utf-8", errors="replace")[-4000:]
        spent = round(time.monotonic() - start, 2)
        if code is None:
            return {
                "status": FAILED,
                "message": f"took longer than {seconds:.0f} s and was ended",
                "log": said,
                "seconds": spent,
            }
        if out.exists():
            outcome: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return outcome | ({"log": said} if outcome["status"] == FAILED else {})
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        return {"status": FAILED, "message": f"its process ended with {code}: {last[0]}", "log": said, "seconds": spent}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started; the group is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe(checks: list[Check]) -> str:
    """The plan as text."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.name:{width}}  about {check.expected:3d} s  {check.what}" for check in checks]
    total = sum(check.expected for check in checks)
    return "\n".join(
        [*lines, f"{len(checks)} checks, about {total / 60:.1f} minutes on an H200 by guess; --minutes ends it in time"]
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("gpu_suite", __doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder of gpu_suite.json and gpu_suite.md")
    parser.add_argument("--device", default="cuda:0", help="cuda:0; cpu only to try the suite itself, with --small")
    parser.add_argument(
        "--small", action="store_true", help="tiny networks: tries the suite, measures nothing worth keeping"
    )
    parser.add_argument("--checks", help="names or their beginnings, with commas: parity, protocol:graph, machine")
    parser.add_argument("--dry-run", action="store_true", help="list the checks and leave")
    parser.add_argument("--fresh", action="store_true", help="forget an older report in --out")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="begin no check after this long, and cut short the one that runs"
    )
    parser.add_argument(
        "--protocol-seconds", type=float, default=12.0, help="a longer protocol is run in part; 1e9 runs all of it"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for exported graphs and compiled kernels; OUT/work unless given"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0 when every chosen check was done or refused in words, 1 when one broke, 2 for something to mend."""
    begun, options = time.monotonic(), parse(argv)
    try:
        checks = chosen(plan(options.device, options.small), options.checks)
        if options.dry_run:
            print(describe(checks))
            return 0
        if reason := gpu_missing(options.device):
            print(describe(checks))
            print(f"\nnothing was measured: {reason}. To try the suite itself: --device cpu --small")
            return 0
        work = options.work or options.out / "work"
        must_take_files(work)
        settings = Settings(options.device, options.small, str(work), options.protocol_seconds)
        suite = Suite(options.out, settings, checks, options.fresh)
        # Importing PyTorch, which a cold disk takes half a minute for, is a part of the minutes.
        suite.run(checks, options.minutes - (time.monotonic() - begun) / 60)
    except CdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print(suite.out / "gpu_suite.md")
    return int(any(suite.report["checks"][check.name]["status"] == FAILED for check in checks))


if __name__ == "__main__":
    # What ends the suite ends the check that runs: left alone it would keep the GPU, and spoil what is measured next.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
