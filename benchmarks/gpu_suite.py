"""The GPU suite: parity, speed and targets of every engine that this machine has, in one command (docs/gpu.md).

    python -m cdiff.benchmarks.gpu_suite --out gpu_suite

Each check runs in a process of its own with a time limit; gpu_suite.json and gpu_suite.md are written anew after each, and the same
command goes on where it stopped, and tries again what was refused or broke. It needs PyTorch and NumPy; what else is missing is said
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
import traceback
from pathlib import Path
from typing import Any

import cdiff
from cdiff.benchmarks.gpu_checks import DONE, FAILED, REFUSED, RUNNING, Settings, settings_json
from cdiff.benchmarks.gpu_plan import Check, chosen, next_check, plan
from cdiff.benchmarks.gpu_report import markdown
from cdiff.benchmarks.gpu_targets import summary, targets
from cdiff.benchmarks.script import parser_of
from cdiff.runtime.device.gpu import parse_device
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import make_folder, must_take_files, write_bytes, write_json
from cdiff.runtime.gpus import visible_gpus
from cdiff.runtime.words import several

FORMAT = 1
MINUTES = 7.8
SKIPPED = "not measured"
TO_END = 20.0
"""Seconds that a killed process is waited for."""


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
        else f"there is no {device}: PyTorch sees {several(torch.cuda.device_count(), 'GPU')}"
    )


def gpu_name(device: str) -> str | None:
    """The driver's name of the GPU, asked without occupying the GPU; None for the processor, and where the driver does not tell."""
    number, gpus = parse_device(device), visible_gpus()
    return gpus[number].name if number is not None and number < len(gpus) else None


class Suite:
    """The report as far as it is known, written to the disk after every check."""

    def __init__(self, out: Path, settings: Settings, checks: list[Check], fresh: bool) -> None:
        self.out, self.settings = make_folder(out), settings
        self.path = out / "gpu_suite.json"
        self.report: dict[str, Any] = {
            "format": FORMAT, "cdiff": cdiff.__version__, "settings": dataclasses.asdict(settings), "checks": {}, "targets": [],
        }  # fmt: skip
        if self.path.exists() and not fresh:
            self._resume()
        self.report["plan"] = [dataclasses.asdict(check) for check in checks]

    def _resume(self) -> None:
        try:
            older = json.loads(self.path.read_text(encoding="utf-8"))
            mine = self.report["settings"]
            # The folder of the graphs has no bearing on what was measured.
            same = older["format"] == FORMAT and older["settings"] | {"work": mine["work"]} == mine
            kept = {
                name: found
                for name, found in older["checks"].items()
                if found["status"] != SKIPPED or "result" in found
            }
            gpu = kept.get("machine", {}).get("result", {}).get("gpu", {}).get("name")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CdiffError(f"{self.path} cannot be continued ({error}); give --fresh to start anew") from None
        if not same:
            raise CdiffError(
                f"{self.path} was measured with other settings; give --fresh to start anew, or another --out"
            )
        # A report may be carried from machine to machine, and numbers of two GPUs cannot be compared.
        here = gpu_name(self.settings.device)
        if gpu and here and gpu != here:
            raise CdiffError(
                f"{self.path} was measured on {gpu}, but {self.settings.device} is {here}; give --fresh to start anew, or another --out"
            )
        self.report["checks"] = kept

    def save(self) -> None:
        """Write both files, whole or not at all. A result of a form that nobody foresaw costs the targets or its part of the page, and no more."""
        try:
            self.report["targets"] = targets(self.report["checks"], self.settings.small)
        except Exception:
            traceback.print_exc()
        write_json(self.path, self.report)
        write_bytes(self.out / "gpu_suite.md", markdown(self.report).encode())

    def run(self, checks: list[Check], minutes: float) -> None:
        """Run every check that was not done before, while there is time, in the order of `next_check`; print a line for each.

        A check that was refused before, or broke, is tried again; where no time is left, its outcome stays.
        """
        deadline = time.monotonic() + 60 * minutes
        done, before, waiting = self.report["checks"], dict(self.report["checks"]), list(checks)
        while check := next_check(waiting, done, before):
            waiting.remove(check)
            left, older = deadline - time.monotonic(), before.get(check.name, {})
            # Passed over where too little time is left: cut short it would measure nothing, and a later check may be shorter.
            late = left < max(min(10, check.seconds), check.expected / 2)
            if older.get("status") == DONE or (older.get("status") in (REFUSED, FAILED) and late):
                print(f"{check.name}: kept from before", flush=True)
                continue
            found: dict[str, Any] = {
                "status": SKIPPED, "message": "the time was up; run the same command again", "seconds": 0,
            }  # fmt: skip
            if not late:
                outcome = self._outcome(check, deadline)
                broke = outcome["status"] == FAILED
                # Cut short by --minutes, and not by its own limit: nothing broke.
                cut = broke and time.monotonic() >= deadline
                found = outcome | (found | {"seconds": outcome["seconds"]} if cut else {})
                if broke and not cut:
                    found["tries"] = older.get("tries", 0) + 1
            # What an earlier try measured before it broke is kept where a later one gets less far.
            done[check.name] = {key: older[key] for key in ("result",) if key in older} | found
            print(f"{check.name}: {found['status']} in {found['seconds']:.0f} s{_tail(found)}", flush=True)
            self.save()
        if any(done[name]["status"] == DONE for name, found in before.items() if found["status"] == REFUSED):
            self._list_packages_again(checks, deadline)
        self.save()

    def _outcome(self, check: Check, deadline: float) -> dict[str, Any]:
        """One check's outcome. Where a batch was too large, the check is run again with smaller ones in a new process: the first has ended, or
        can run nothing on the GPU any more after an error such as an illegal memory access."""
        outcome = in_a_process(check.name, self.settings, min(check.seconds, deadline - time.monotonic()))
        rows, left = rows_that_ran(outcome), deadline - time.monotonic()
        if outcome["status"] == DONE or rows is None or left < check.expected / 2:
            return outcome
        again = in_a_process(f"{check.name}@{rows}", self.settings, min(check.seconds, left))
        if "seconds" not in again.get("result", {}):  # no whole protocol either
            return outcome
        again["result"]["sweep"] = outcome["result"]["sweep"] | again["result"]["sweep"]
        # Only the first process's log tells where it broke.
        log = {"log": outcome["log"]} if "log" in outcome else {}
        return again | log | {"seconds": round(outcome["seconds"] + again["seconds"], 2)}

    def _list_packages_again(self, checks: list[Check], deadline: float) -> None:
        """Run `machine` again, if there is time: a check that was refused before is done now, so something has been installed."""
        done = self.report["checks"]
        for check in checks:
            left = deadline - time.monotonic()
            if check.name == "machine" and done["machine"]["status"] == DONE and left >= check.expected:
                outcome = in_a_process(check.name, self.settings, min(check.seconds, left))
                done[check.name] = outcome if outcome["status"] == DONE else done[check.name]


def rows_that_ran(outcome: dict[str, Any]) -> int | None:
    """The largest batch of a sweep that could be measured, where none of the larger ones could; else None."""
    sweep = outcome.get("result", {}).get("sweep", {})
    ran = max((int(size) for size, cell in sweep.items() if "error" not in cell), default=None)
    return ran if ran is not None and ran < max(map(int, sweep)) else None


def _tail(found: dict[str, Any]) -> str:
    return f": {found['message']}" if "message" in found else ""


def in_a_process(name: str, settings: Settings, seconds: float) -> dict[str, Any]:
    """One check's outcome, whatever becomes of its process, which is killed after `seconds`."""
    root = Path(cdiff.__file__).resolve().parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    work = make_folder(Path(settings.work).resolve())
    # Compilers cache what they make: by default below the home folder or in /tmp, where a GPU machine may not let us write.
    caches = {"TRITON_CACHE_DIR": str(work / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    environment = {**caches, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start = time.monotonic()
    # The folder stays where it cannot be removed, as on a network disk while a hung process holds its files: that must not stop the suite.
    with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as folder:
        environment.setdefault("TMPDIR", folder)
        environment.setdefault("PYTHONFAULTHANDLER", "1")  # shows in the log where a crash came from
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
                ended = _end(process)
        said = log.read_text(encoding="utf-8", errors="replace")[-4000:]
        try:
            outcome: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it ended before it had written anything
            outcome = {"status": RUNNING}
    if outcome["status"] == RUNNING:
        lines = said.strip().splitlines() or ["it said nothing"]
        last = next((line for line in lines if line.startswith("Fatal Python error")), lines[-1])
        why = (
            f"took longer than {seconds:.0f} s and was ended"
            if code is None
            else f"its process ended with {code}: {last}"
        )
        why += "" if ended else "; its process does not end, and may keep the GPU from what comes next"
        outcome |= {"status": FAILED, "message": why, "seconds": round(time.monotonic() - start, 2)}
    return outcome | ({"log": said} if outcome["status"] == FAILED else {})


def _end(process: subprocess.Popen[bytes]) -> bool:
    """Kill the process and, by its group, what it started. Returns whether it ended: one that waits for a hung driver does not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout=TO_END)
    except subprocess.TimeoutExpired:
        return False
    return True


def describe(checks: list[Check]) -> str:
    """The plan as text."""
    width = max(len(check.name) for check in checks)
    lines = [
        f"{check.name:{width}}  "
        + ("only in need" if check.spare else f"about {check.expected:3d} s ")
        + f"  {check.what}"
        for check in checks
    ]
    planned = [check.expected for check in checks if not check.spare]
    total = (
        f"{len(planned)} checks, about {sum(planned) / 60:.1f} minutes on an H200 by guess; --minutes ends it in time"
    )
    return "\n".join([*lines, total])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("gpu_suite", __doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_suite"), help="folder of gpu_suite.json and gpu_suite.md (gpu_suite)"
    )
    parser.add_argument("--device", default="cuda:0", help="cpu only to try the suite itself, with --small (cuda:0)")
    parser.add_argument(
        "--small", action="store_true", help="tiny networks: tries the suite, measures nothing worth keeping"
    )
    parser.add_argument(
        "--checks", help="names or their beginnings, with commas: parity, protocol:graph, machine; all unless given"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the checks and leave")
    parser.add_argument("--fresh", action="store_true", help="forget an older report in --out")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help=f"begin no check after this long, and cut short the one that runs ({MINUTES:g})",
    )
    parser.add_argument(
        "--protocol-seconds", type=float, default=12.0, help="a longer protocol is run in part; 1e9 runs all of it (12)"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for exported graphs and compiled kernels; OUT/work unless given"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0 when no chosen check broke, 1 when one did, 2 for something to mend, 130 when interrupted."""
    begun, options = time.monotonic(), parse(argv)
    try:
        checks = chosen(plan(options.device, options.small), options.checks)
        if options.dry_run:
            print(describe(checks))
            return 0
        if reason := gpu_missing(options.device):
            print(describe(checks))
            raise CdiffError(f"nothing was measured: {reason}. To try the suite itself: --device cpu --small")
        work = options.work or options.out / "work"
        must_take_files(work)
        settings = Settings(options.device, options.small, str(work), options.protocol_seconds)
        suite = Suite(options.out, settings, checks, options.fresh)
        # --minutes includes the import of PyTorch, which can take half a minute from a cold disk.
        suite.run(checks, options.minutes - (time.monotonic() - begun) / 60)
    except CdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the folder of --work is full, say
        print(f"error: {error}; what was measured is in {options.out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print("\n".join(summary(suite.report["targets"])))
    print(suite.out / "gpu_suite.md")
    return int(any(suite.report["checks"].get(check.name, {}).get("status") == FAILED for check in checks))


if __name__ == "__main__":
    # A signal that ends the suite must end the running check too: left alone it would keep the GPU, and spoil what is measured next.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
