"""The public Python face: `cdiff.load(bundle).segment(scan)`."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdiff.runtime.bundle import Bundle
    from cdiff.runtime.engines.trt import BuildEngines, Flavour, Gpu, Profile
    from cdiff.runtime.segmenter import Segmenter

# Nothing of a user's scans or machine goes anywhere: ONNX Runtime, from 1.29 on, reports its use to its makers unless this is set before it
# starts. Importing any part of cdiff comes here first. Who wants the reports sets it to 0.
TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"
os.environ.setdefault(TELEMETRY_OFF, "1")

# Python started in a clone finds this folder before an installed cdiff, and here the subpackages lie beside it, not in it.
if not (Path(__file__).parent / "runtime").exists():
    __path__.append(str(Path(__file__).resolve().parents[1]))

try:
    __version__ = version("cdiff")
except PackageNotFoundError:  # run from a clone, on a machine where nothing can be installed
    __version__ = "0+clone"
__all__ = ["__version__", "load"]


def __dir__() -> list[str]:
    """What completion offers: not what is imported here."""
    return __all__


def load(
    bundle: str | PathLike[str] | None = None,
    *,
    engine: str = "auto",
    device: str = "cpu",
    build: BuildEngines | None = None,
) -> Segmenter:
    """Open a bundle once; segment as many scans with it as you like.

    bundle: the folder that `cdiff export` wrote; the model that comes with cdiff when left out.
    engine, device: as for `cdiff segment`; what was picked is in the result's report. engine="torch" is PyTorch, which needs the
    extra `train`: for a GPU without TensorRT.
    build: what makes the TensorRT engines of a GPU that the bundle has none for yet, which takes minutes and happens once;
    `cdiff.export.tensorrt.build_engines` unless given.
    Raises cdiff.runtime.errors.CdiffError when the bundle is not whole or the engine cannot run here.
    """
    from cdiff.runtime.bundle import shipped_bundle
    from cdiff.runtime.segmenter import Segmenter

    folder = shipped_bundle() if bundle is None else Path(bundle)
    if engine == "torch":
        from cdiff.export.torch_engine import open_torch
        from cdiff.runtime.bundle import open_bundle
        from cdiff.runtime.errors import CdiffError

        if "," in device:
            raise CdiffError(f"the engine torch runs on one device, but {device} names several; name one")
        opened = open_bundle(folder)
        return Segmenter(opened, open_torch(opened, device))
    return Segmenter.open(folder, engine=engine, device=device, build=build or _build)


def _build(bundle: Bundle, flavour: Flavour, gpu: Gpu, profile: Profile) -> tuple[Path, Path]:
    """The exporter's builder, imported only when there is something to build: segmenting needs nothing of it."""
    from cdiff.export.tensorrt import build_engines

    return build_engines(bundle, flavour, gpu, profile)
