"""The GPU suite's plan: its checks, the order in which they are run, and which way is measured where a better one has a fault."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cdiff.benchmarks.gpu_checks import FAILED, REFUSED, WAYS
from cdiff.benchmarks.gpu_subjects import PAPER, SHIPPED
from cdiff.benchmarks.gpu_targets import DICE, MAPS
from cdiff.runtime.engines.registry import available_engines
from cdiff.runtime.errors import CdiffError

OF_ALL = ("machine", f"published:published:{PAPER}")
"""The checks that the targets of every way need."""

Outcomes = dict[str, dict[str, Any]]
"""What became of each check, by its name."""


@dataclass(frozen=True)
class Check:
    """One check of the plan: `seconds` is its time limit, `expected` what it should take on an H200, guessed and not measured.

    spare: run only where every better way has a fault.
    """

    name: str
    what: str
    seconds: int
    expected: int
    spare: bool = False

    @property
    def way(self) -> str:
        """How the model is run; empty for a check that runs none."""
        return _way(self.name)


def plan(device: str, small: bool) -> list[Check]:
    """Every check for this machine, the most telling first. Engines that cannot run on the device appear only in the check `machine`."""
    kind = device.split(":")[0]
    engines = [state.name for state in available_engines() if kind in state.devices]
    checks = [Check("machine", "versions, the GPU, measured rates, the state of every engine", 120, 12)]

    def add(kind: str, path: str, model: str, what: str, seconds: int, expected: int) -> None:
        checks.append(Check(f"{kind}:{path}:{model}", what, seconds, expected, path in WAYS[2:]))

    calls_and_maps = "against PyTorch float32: calls and final maps"
    parts = "sweep, whole protocol, parts"
    slices = "1, 2 and 4 slices"
    one_by_one = "float32, one run after another, encoder for each row: a share of it"
    add("published", "published", PAPER, f"baseline: {one_by_one}", 90, 25)
    add("protocol", "graph", PAPER, f"our captured half-precision chain: {parts}", 180, 85)
    add("parity", "graph", SHIPPED, calls_and_maps, 90, 20)
    add("scaling", "graph", SHIPPED, slices, 90, 30)
    add("noise", "graph", SHIPPED, "noise drawn on the device against the NumPy form", 90, 15)
    for engine in engines:
        add("parity", engine, SHIPPED, calls_and_maps, 120, 30)
        add("protocol", engine, SHIPPED, parts, 90, 20)
        add("protocol", engine, PAPER, f"{parts}; exports the graphs first", 200, 110)
    add("replay", "graph", SHIPPED, "graph replay against plain launches", 60, 15)
    add("protocol", "graph", SHIPPED, parts, 60, 15)
    add("published", "published", SHIPPED, f"baseline: {one_by_one}", 60, 15)
    add("parity", "graph", PAPER, "calls against PyTorch float32", 60, 15)
    add("kernels", "graph", PAPER, "where a step's time goes, kernel by kernel", 90, 25)
    add("protocol", "eager16", PAPER, f"baseline: float16 eager, encoder once: {parts}", 120, 40)
    add("protocol", "graph-tuned", PAPER, f"our captured chain, cuDNN's algorithms timed: {parts}", 150, 55)
    if kind != "cpu":  # compiling for a CPU takes minutes, and is no baseline for a GPU
        add("protocol", "compiled", PAPER, f"baseline: torch.compile with CUDA graphs, encoder once: {parts}", 220, 100)
    # Where Triton has no C compiler `graph` is refused, and `graph-plain` is the engine that users get.
    for way, what in (
        ("graph-plain", "the captured chain with PyTorch's own GroupNorm"),
        ("launched", "the chain with our kernels, not captured"),
        ("launched-plain", "the chain with PyTorch's own GroupNorm, not captured"),
    ):
        add("protocol", way, PAPER, f"{what}: {parts}", 150, 70)
        add("parity", way, SHIPPED, calls_and_maps, 90, 20)
        add("scaling", way, SHIPPED, slices, 90, 30)
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
            add("scaling", engine, SHIPPED, slices, 90, 30)
            add("parity", engine, PAPER, "calls against PyTorch float32", 120, 30)
        add(
            "parity",
            "onnxruntime-cpu",
            SHIPPED,
            "ONNX Runtime on the host's processor, against PyTorch float32",
            90,
            40,
        )
        add("parity", "graph-tuned", SHIPPED, calls_and_maps, 90, 20)
        add("noise", "graph-plain", SHIPPED, "the noise of PyTorch's own operators against the NumPy form", 60, 12)
    checks.append(Check("tests", "the tests marked gpu", 180, 60))
    if kind != "cpu":  # compiled for three batch sizes: last, for it takes longest
        add("parity", "graph-compiled", SHIPPED, calls_and_maps, 220, 100)
    return [dataclasses.replace(c, expected=2, seconds=600) if small else c for c in checks]


def chosen(checks: list[Check], wanted: str | None) -> list[Check]:
    """The checks that are named in `wanted`, words with commas between, each a whole name or its beginning up to a colon; all for None.

    A spare check is no longer spare where a word names its way as well as its kind. Raises CdiffError for a word that fits no check.
    """
    if wanted is None:
        return checks
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    for word in words:
        if not any(_fits(check.name, word) for check in checks):
            raise CdiffError(f"--checks {word}: no check of that name; --dry-run lists them")
    return [
        dataclasses.replace(check, spare=check.spare and not any(_fits(check.name, w) and ":" in w for w in words))
        for check in checks
        if any(_fits(check.name, word) for word in words)
    ]


def _fits(name: str, word: str) -> bool:
    return name == word or name.startswith(f"{word}:")


def fault_of(way: str, outcomes: Outcomes) -> str | None:
    """Why the targets need another way than this one, as far as is known: a check that they need was refused or broke, or its maps are too
    far off. None where nothing speaks against it."""
    for name in (f"protocol:{way}:{PAPER}", f"parity:{way}:{SHIPPED}"):
        found = outcomes.get(name, {})
        if found.get("status") in (REFUSED, FAILED):
            return f"{name} {found['status']}: {found['message']}"
    maps = outcomes.get(f"parity:{way}:{SHIPPED}", {}).get("result", {}).get("maps")
    if maps and not (maps["mean"] <= MAPS and maps["dice"] >= DICE):
        return f"its maps are too far from PyTorch float32's: {maps['mean']:.2g} on average, Dice {maps['dice']:.4f}"
    return None


def next_check(waiting: list[Check], outcomes: Outcomes, before: Outcomes) -> Check | None:
    """The check to run now; None where nothing is left to do. before: the outcomes that an earlier run left.

    First come the checks that every way needs, and those that stand in for ways with a fault. Last come checks that were refused before,
    which may have what they lacked by now; checks that broke, except the first new try of one that the targets need; and what is left of a
    way with a fault, where every check may use up its time limit.
    """
    able = [check for check in waiting if not check.spare or _stands_in(check, outcomes)]
    return min(able, key=lambda check: _turn(check, outcomes, before), default=None)


def _turn(check: Check, outcomes: Outcomes, before: Outcomes) -> int:
    """0 for what comes first by `next_check`, 2 for what comes last, 1 for the others."""
    if _stands_in(check, outcomes):
        return 0
    state, own, shared = before.get(check.name, {}).get("status"), check.way in WAYS, check.name in OF_ALL
    often = any(
        found.get("tries", 0) > 1
        for name, found in outcomes.items()
        if name == check.name or (own and _way(name) == check.way)
    )
    if often or state == REFUSED or (state == FAILED and not own and not shared):
        return 2
    if own and state != FAILED and fault_of(check.way, outcomes):
        return 2
    return 0 if shared else 1


def _stands_in(check: Check, outcomes: Outcomes) -> bool:
    """Whether the targets need a check because every better way has a fault, and its own has none yet."""
    if check.way not in WAYS[1:] or check.name not in _of_targets(check.way):
        return False
    better = WAYS[: WAYS.index(check.way)]
    return all(fault_of(way, outcomes) for way in better) and fault_of(check.way, outcomes) is None


def _of_targets(way: str) -> tuple[str, ...]:
    return f"protocol:{way}:{PAPER}", f"parity:{way}:{SHIPPED}", f"scaling:{way}:{SHIPPED}"


def _way(name: str) -> str:
    return name.split(":")[1] if ":" in name else ""
