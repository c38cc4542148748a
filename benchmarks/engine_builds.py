"""What TensorRT for RTX's builds take, which need no GPU: `python -m cdiff.benchmarks.engine_builds [--json OUT]`.

The shipped network, and the paper's reduced to what a processor exports in seconds: 64 x 64 pixels, 32 channels wide, one block a depth.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdiff.benchmarks.gpu_subjects import PAPER, SHIPPED, Subject, subject, write_random_bundle
from cdiff.benchmarks.script import parser_of, script
from cdiff.export.tensorrt import build_engines
from cdiff.runtime.engines.trt import RTX_CAPABILITIES, load_trt, profile_for
from cdiff.runtime.files import write_json
from cdiff.train.presets import preset

PRECISIONS = ("float32", "float16")


def subjects() -> list[Subject]:
    """The networks that are built."""
    reduced = replace(preset("paper").network, image_size=64, base_channels=32, residual_blocks=1, levels=4)
    paper = Subject(f"{PAPER}-reduced", replace(preset("paper"), network=reduced), False, 25)
    return [subject(SHIPPED, small=False), paper]


def build(model: Subject, precision: str, work: Path) -> dict[str, Any]:
    """One build of both graphs for all of the flavour's compute capabilities: processor seconds, and the engines' sizes in bytes."""
    bundle = write_random_bundle(work / f"{model.name}-{precision}", model, precision == "float16")
    begin = time.process_time()
    paths = build_engines(bundle, "tensorrt-rtx", RTX_CAPABILITIES[precision], profile_for(bundle.manifest, model.runs))
    seconds = time.process_time() - begin
    return {"cpu_seconds": round(seconds, 2), "bytes": {path.stem: path.stat().st_size for path in paths}}


@script
def main(argv: list[str] | None = None) -> None:
    """The command line: print every build, and write them to --json."""
    parser = parser_of("engine_builds", __doc__)
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        builds = {
            model.name: {"rows": model.rows, **{p: build(model, p, Path(folder)) for p in PRECISIONS}}
            for model in subjects()
        }
    version = str(load_trt("tensorrt-rtx").__version__)
    result = {"tensorrt_rtx": version, "capabilities": RTX_CAPABILITIES, "builds": builds}
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(main())
