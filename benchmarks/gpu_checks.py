"""The GPU suite's checks, each run in a process of its own: `python -m cdiff.benchmarks.gpu_checks CHECK SETTINGS OUT`.

A check is `kind:path:model`, such as `protocol:graph-compiled:paper`; with `@25` behind it no batch of more than 25 rows is measured. OUT
gets JSON, {"status", "result", "message", "seconds"}; the message says why there is no result, or only a part of one.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdiff.benchmarks.gpu_machine import Keep, describe_machine
from cdiff.benchmarks.gpu_subjects import PAPER, SEED, SHIPPED, Subject, bundle_of, subject
from cdiff.benchmarks.processes import end_with_parent
from cdiff.runtime.engines.base import ChainBinding, Engine, LimitedRows
from cdiff.runtime.engines.registry import open_engine
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.files import write_json
from cdiff.runtime.words import one_line

DONE, REFUSED, FAILED = "done", "refused", "failed"
RUNNING = "running"
"""The status in OUT until the check ends; the result beside it is what was measured so far, and counts if the check is killed."""

TORCH_PATHS: dict[str, dict[str, Any]] = {
    "eager16": {"channels_last": False, "capture": False},
    "compiled": {"capture": False, "compiled": "reduce-overhead"},
    "graph": {"fused": True},
    "graph-tuned": {"fused": True, "tuned": True},
    "graph-plain": {"fused": False},
    "graph-compiled": {"compiled": "default", "tuned": True},
    "launched": {"fused": True, "capture": False},
    "launched-plain": {"fused": False, "capture": False},
}
"""PyTorch in half precision, rows batched, encoder once: `export.torch_engine.Options`. The first two are baselines; `graph` is the engine
as users get it where Triton works, `graph-plain` where it does not; the last two are for where a step cannot be captured."""

WAYS = ("graph", "graph-plain", "launched", "launched-plain")
"""Ways to run the engine `torch`, the best first. The last two are measured only where those before them have a fault."""

SWEEPS = {SHIPPED: (1, 8, 32, 100), PAPER: (1, 8, 88)}
LARGEST = {SHIPPED: 100, PAPER: 88}
"""Rows of the batches that are measured beside the runtime's own choice, and of the largest: half a slice's rows with the paper's network,
since from 128 rows on a concatenation at full size holds 2^31 numbers."""
LONGER = 3
"""The paper's protocol by one of `WAYS`, on which the targets rest, may take so many times as long as others: at half of an H200's rate,
where it takes 30 s by count, it is then run as a whole."""
ROUNDS, ROUNDS_SECONDS = 3, 20.0
"""Most rounds of `scaling`, and the seconds within which a round must be expected to end if it is to begin."""


@dataclass(frozen=True)
class Settings:
    """What all checks share. `seconds`: how long a protocol may take before a share of its steps stands for the whole."""

    device: str = "cuda:0"
    small: bool = False
    work: str = "gpu_suite_work"
    seconds: float = 12.0

    @property
    def half(self) -> bool:
        return self.device != "cpu"


def open_path(path: str, model: Subject, settings: Settings, **options: Any) -> Engine:
    """The engine called `path`: one of `TORCH_PATHS`, `torch32`, or an engine of the registry. Raises CdiffError when it cannot run."""
    from cdiff.export.reference import TorchEngine
    from cdiff.export.torch_engine import Options, TorchChainEngine

    if path == "torch32":
        return TorchEngine(model.network(), model.schedule, settings.device)
    if path in TORCH_PATHS:
        wanted = {**TORCH_PATHS[path], **options}
        if settings.device == "cpu":  # Triton has no CPU
            wanted["fused"] = False
        elif wanted.get("compiled"):
            triton_compiles(settings.device)
        chosen = Options(half=settings.half, **wanted)
        return TorchChainEngine(model.network(), model.schedule, settings.device, chosen)
    name, device = ("onnxruntime", "cpu") if path == "onnxruntime-cpu" else (path, settings.device)
    bundle = bundle_of(model, device != "cpu", Path(settings.work))
    arguments: dict[str, Any] = {}
    if name.startswith("tensorrt") and "build" in inspect.signature(open_engine).parameters:
        arguments["build"] = importlib.import_module("cdiff.export.tensorrt").build_engines
    engine = open_engine(bundle, name, device, **arguments)
    if isinstance(engine, LimitedRows):
        from cdiff.benchmarks.gpu_measure import usual_batch

        # TensorRT builds an engine for the rows that are asked for first: they must be the runtime's, not those of a comparison's single call.
        engine.bind(usual_batch(engine, model), 1)
    return engine


def triton_compiles(device: str) -> None:
    """Raise CdiffError where Triton cannot compile on this machine: torch.compile, which writes its kernels in Triton, would break too."""
    from cdiff.export.torch_kernels import try_out

    try:
        try_out(device)
    except Exception as error:
        raise CdiffError(
            f"torch.compile needs Triton, which needs a C compiler and Python's headers ({shortened(error)})"
        ) from error


def largest_batch(engine: Engine, model: Subject) -> int:
    """Rows of the largest batch that is measured: with TensorRT no more than the runtime takes, since more would need another engine built."""
    from cdiff.benchmarks.gpu_measure import evened, usual_batch

    largest = min(evened(model, LARGEST[model.name]), model.rows, model.most or model.rows)
    return min(largest, usual_batch(engine, model)) if isinstance(engine, LimitedRows) else largest


def check_noise(path: str, model: Subject, settings: Settings, keep: Keep) -> dict[str, Any]:
    """The noise that the engine's own chain draws, against the NumPy form."""
    from cdiff.benchmarks.gpu_measure import noise_of

    engine = open_path(path, model, settings)
    image = model.images()["random"]
    if not isinstance(engine.bind(4, 1), ChainBinding):
        return {"engine": path, "note": "the loop draws the noise, in NumPy"}
    return {"engine": path, **noise_of(engine, model, image, 4, 2**64 - 5)}


def check_parity(path: str, model: Subject, settings: Settings, keep: Keep) -> dict[str, Any]:
    """One engine against PyTorch float32 without TF32: calls on random and real input, for trained weights whole chains too, and a large batch."""
    from cdiff.benchmarks.gpu_parity import batch_error, call_errors, map_errors
    from cdiff.export.torch_chain import full_precision

    with full_precision():
        reference = open_path("torch32", model, settings)
        engine = open_path(path, model, settings)
        images = model.images()
        found: dict[str, Any] = {"engine": engine.name, "version": engine.version, "device": engine.device}
        found["calls"] = {name: call_errors(engine, reference, image, model) for name, image in images.items()}
        keep(found)
        if model.trained or settings.small:
            found["maps"] = map_errors(engine, reference, images["real"], model)
        else:
            found["maps_note"] = "not compared: with random weights every map is noise about one half"
        keep(found)
        found["batch"] = batch_error(engine, images["real"], model, largest_batch(engine, model))
    return found


def check_published(path: str, model: Subject, settings: Settings, keep: Keep) -> dict[str, Any]:
    """The baseline of the published code: float32 by PyTorch's own settings, which use TF32 in convolutions; and shorter measurements of the
    same row by row, and without TF32."""
    from cdiff.benchmarks.gpu_measure import flops, published
    from cdiff.export.torch_chain import full_precision

    network, image, flop = model.network().to(settings.device), model.images()["real"], flops(model)["protocol"]

    def look(seconds: float = 0.0, by_row: bool = False) -> dict[str, Any]:
        return {**published(model, network, image, settings.device, seconds, by_row=by_row), "flop": flop}

    found = look(settings.seconds / 2)
    keep(found)
    found["by_row"] = look(by_row=True)
    keep(found)
    with full_precision():
        return {**found, "without_tf32": look()}


def check_protocol(path: str, model: Subject, settings: Settings, keep: Keep) -> dict[str, Any]:
    """A batch-size sweep, the whole protocol at the best batch, and where its time goes.

    Until a whole protocol is measured, the time of a step at the best batch, multiplied by the steps, stands for it (`share` 0).
    """
    from cdiff.benchmarks.gpu_measure import flops, step_seconds, usual_batch, whole_protocol

    engine = open_path(path, model, settings)
    largest, own, flop = largest_batch(engine, model), usual_batch(engine, model), flops(model)["protocol"]
    image = model.images()["real"]
    options = TORCH_PATHS.get(path, {})
    once = options.get("compiled") or options.get("tuned") or path == "onnxruntime-tensorrt"
    # Where PyTorch or ONNX Runtime's TensorRT provider compiles, or cuDNN times its algorithms, each size costs a minute of the budget.
    sizes = [largest] if once else sorted({min(size, largest) for size in (*SWEEPS[model.name], own, largest)})
    sweep: dict[str, Any] = {}
    found: dict[str, Any] = {
        "engine": engine.name, "version": engine.version, "device": engine.device, "sweep": sweep, "runtime_batch": own,
        "flop": flop,
    }  # fmt: skip

    def steps_of(size: int) -> float:
        """Seconds of all steps of a slice."""
        return float(-(-model.rows // size) * model.config.network.T * sweep[str(size)]["ms_a_step"] / 1e3)

    for size in sizes:
        sweep[str(size)] = {"error": "the check's process ended while it was measured"}
        if "batch" in found:
            keep(found)
        try:
            spent = step_seconds(engine, model, image, size)
        except Exception as error:  # out of memory, or of cuDNN or Triton: the other sizes still count
            sweep[str(size)] = {"error": shortened(error)}
            continue
        sweep[str(size)] = {"ms_a_step": 1e3 * spent, "ms_a_row": 1e3 * spent / size}
        best = min((size for size in sizes if "ms_a_row" in sweep.get(str(size), {})), key=steps_of)
        found |= {"seconds_a_slice": steps_of(best), "share": 0.0, "batch": best, "flop_per_s": flop / steps_of(best)}
        keep(found)
    if "batch" not in found:
        raise CdiffError(f"no batch size could be run: {sweep[str(sizes[0])]['error']}")
    seconds = settings.seconds * (LONGER if path in WAYS and model.name == PAPER else 1)
    found |= whole_protocol(engine, model, image, found["batch"], seconds)
    found["flop_per_s"] = flop / found["seconds"]
    keep(found)
    try:
        return found | step_parts(engine, model, found["batch"])
    except (CdiffError, RuntimeError) as error:  # a step launched plainly needs its memory beside the captured one's
        return found | {"parts_error": shortened(error)}


def step_parts(engine: Engine, model: Subject, batch: int) -> dict[str, Any]:
    """Seconds of an encoding and, where the binding can tell, of a step's noise, denoiser and update; and of bringing x back."""
    from cdiff.benchmarks.gpu_measure import least, some_rows, table_of
    from cdiff.export.torch_chain import wait

    image, binding = model.images()["real"], engine.bind(batch, 1)

    def encode() -> None:
        binding.encode(0, image[0])
        wait(engine.device)

    found: dict[str, Any] = {"encoder_seconds": least(encode)}
    if hasattr(binding, "parts"):
        found["step_seconds"] = binding.parts(some_rows(model, batch), table_of(model, 2), 0)
        import torch

        x = np.zeros((batch, 1, *image.shape[2:]), np.float32)
        found["transfer_seconds"] = least(lambda: torch.from_numpy(x).to(engine.device).cpu())
    return found


def check_replay(path: str, model: Subject, settings: Settings, keep: Keep) -> dict[str, Any]:
    """A step replayed as a CUDA graph against the same step launched kernel by kernel, at small batches, where launches show most."""
    from cdiff.benchmarks.gpu_measure import step_seconds

    image, found = model.images()["random"], {}
    for batch in (1, 8):
        for capture in (True, False):
            engine = open_path(path, model, settings, **({"capture": capture} if path in TORCH_PATHS else {}))
            if path not in TORCH_PATHS:
                if not hasattr(engine, "capture"):
                    return {"note": "this engine captures nothing"}
                engine.capture = capture
            found[f"{'replay' if capture else 'launches'}_{batch}"] = 1e3 * step_seconds(engine, model, image, batch)
    return {
        "ms_a_step": found,
        "ratio_1": found["launches_1"] / found["replay_1"],
        "ratio_8": found["launches_8"] / found["replay_8"],
    }


def check_scaling(path: str, model: Subject, settings: Settings, keep: Keep) -> dict[str, Any]:
    """The same protocol over 1, 2 and 4 slices: seconds per slice, medians of three rounds where there is time for them.

    The target is 5 %, and one run of a small model may be off by that alone.
    """
    from cdiff.benchmarks.gpu_measure import whole_protocol

    engine, image = open_path(path, model, settings), model.images()["real"]
    batch = largest_batch(engine, model)
    rounds: list[dict[int, dict[str, Any]]] = []
    took, found = 0.0, {}
    while len(rounds) < ROUNDS and took * (1 + 1 / max(1, len(rounds))) < ROUNDS_SECONDS:
        start = time.perf_counter()
        rounds.append({n: whole_protocol(engine, model, image, batch, settings.seconds * n / 2, n) for n in (1, 2, 4)})
        took += time.perf_counter() - start
        found = {
            "seconds_a_slice": {
                str(n): statistics.median(each[n]["seconds_a_slice"] for each in rounds) for n in rounds[0]
            },
            "share": min(run["share"] for each in rounds for run in each.values()),
            "rounds": len(rounds),
        }
        keep(found)
    return found


def check_kernels(path: str, model: Subject, settings: Settings, keep: Keep) -> dict[str, Any]:
    """Where a step's time goes, kernel by kernel; launched plainly, so that the profiler sees each by itself."""
    from cdiff.benchmarks.gpu_measure import kernel_times

    engine = open_path(path, model, settings, capture=False)
    return kernel_times(engine, model, model.images()["real"], largest_batch(engine, model))


KINDS: dict[str, Callable[[str, Subject, Settings, Keep], dict[str, Any]]] = {
    "noise": check_noise, "parity": check_parity, "published": check_published, "protocol": check_protocol,
    "replay": check_replay, "scaling": check_scaling, "kernels": check_kernels,
}  # fmt: skip


def run_check(name: str, settings: Settings, keep: Keep = lambda found: None) -> dict[str, Any]:
    """One check's outcome. A refusal or an error is an outcome too, with what was measured before it; only Ctrl-C and the like are raised.

    keep: is given what is known before the check has ended.
    """
    import torch

    torch.manual_seed(SEED)
    if settings.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    start = time.perf_counter()
    known: dict[str, Any] = {}

    def kept(found: dict[str, Any]) -> None:
        known["result"] = dict(found)
        keep(found)

    try:
        known = {"status": DONE, "result": _result(name, settings, kept)}
    except CdiffError as error:
        known |= {"status": REFUSED, "message": shortened(error)}
    except ModuleNotFoundError as error:
        known |= {"status": REFUSED, "message": f"needs {error.name}, which is not installed here"}
    except Exception as error:  # whatever breaks one engine must not cost the others
        traceback.print_exc()
        known |= {"status": FAILED, "message": shortened(error)}
    return {**known, "seconds": round(time.perf_counter() - start, 2)}


def _result(name: str, settings: Settings, keep: Keep) -> dict[str, Any]:
    if name == "machine":
        return describe_machine(settings.device, keep)
    if name == "tests":
        from cdiff.benchmarks.gpu_tests import run_marked_tests

        return run_marked_tests()
    kind, path, rest = name.split(":")
    model, _, most = rest.partition("@")
    measured = dataclasses.replace(subject(model, settings.small), most=int(most) if most else None)
    return KINDS[kind](path, measured, settings, keep)


def shortened(error: BaseException) -> str:
    """What an error says, on one line that a table can hold."""
    text = one_line(error)
    return text if len(text) <= 400 else text[:400] + " ..."


def main() -> None:
    """See the module's text."""
    if len(sys.argv) != 4:
        sys.exit("error: the suite starts these: python -m cdiff.benchmarks.gpu_suite --out OUT --checks CHECK")
    end_with_parent()
    name, settings, out = sys.argv[1:]

    def keep(found: dict[str, Any]) -> None:
        write_json(Path(out), {"status": RUNNING, "result": found})

    write_json(Path(out), run_check(name, Settings(**json.loads(settings)), keep))
    # Everything is written, and libraries can hang when they shut down: PyTorch waits minutes for its compilers.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def settings_json(settings: Settings) -> str:
    return json.dumps(dataclasses.asdict(settings))


if __name__ == "__main__":
    main()
