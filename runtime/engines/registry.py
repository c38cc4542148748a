"""Which engines exist, which can run here and why not, and opening the one that was asked for (design, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdiff.runtime.engines.base import Engine

if TYPE_CHECKING:
    from cdiff.runtime.bundle import Bundle

NAMES = ("onnxruntime", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class EngineStatus:
    """One engine on this machine: the devices it can use here and, when there are none, what is missing."""

    name: str
    version: str | None
    devices: tuple[str, ...]
    missing: str

    @property
    def available(self) -> bool:
        """Whether it can run at all here."""
        return bool(self.devices)


def available_engines() -> list[EngineStatus]:
    """The state of every engine in `NAMES`, in that order; imports no torch and raises nothing."""
    raise NotImplementedError


def open_engine(bundle: Bundle, name: str = "auto", device: str = "cpu", *, threads: int | None = None) -> Engine:
    """Open the bundle's graphs with the engine called `name` on `device` (`cpu`, `cuda` or `cuda:N`).

    `auto` picks the best engine that can run on that device; the caller shows `engine.name` and `engine.device`.
    Raises CdiffError when the engine or device is unknown or cannot run here: never another one in silence.
    """
    raise NotImplementedError
