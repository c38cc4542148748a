"""Options that several commands share, so that they read and behave alike everywhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from cdiff.cli.console import say
from cdiff.cli.engines import builder
from cdiff.runtime.errors import CdiffError

if TYPE_CHECKING:
    from cdiff.runtime.segmenter import Segmenter


def option(words: str, help: str, *, default: str | None = None, panel: str | None = None, **limits: float) -> Any:
    """An option by what a page calls it: `--out -o BUNDLE` are its names and what stands for its value, which a switch has not.

    default: what --help says of it where the value in the signature does not; limits: min, max.
    """
    *names, value = words.split()
    if value.startswith("-"):
        names, value = [*names, value], ""
    shown = {} if default is None else {"show_default": default}
    more: dict[str, Any] = {**shown, **limits}
    # "" and not None for a switch: Typer would write <bool> there, as if `--page true` were meant.
    return typer.Option(*names, metavar=value, help=help, rich_help_panel=panel, **more)


# By the panel of --help in which an option stands.
data_option = functools.partial(option, panel="Data")
model_option = functools.partial(option, panel="Model")
chain_option = functools.partial(option, panel="Sampling")
output_option = functools.partial(option, panel="Output")

ModelOption = Annotated[
    Path | None,
    model_option("--model BUNDLE", "A folder that `cdiff export` wrote.", default="the model that comes with cdiff"),
]
EngineOption = Annotated[
    str,
    model_option(
        "--engine NAME",
        "auto, or an engine that `cdiff doctor` lists. An engine that is asked for and cannot run is an error.",
    ),
]
DeviceOption = Annotated[str, model_option("--device DEVICE", "cpu, cuda:0, or several GPUs: cuda:0,cuda:1.")]
QuietOption = Annotated[bool, output_option("--quiet -q", "Print results, notes and errors only.")]
TaskOption = Annotated[
    str | None,
    data_option(
        "--task taskNN",
        "Which structure, when the masks carry several; in a benchmark's folder which data set (prostate), or both "
        "(prostate/task01).",
        default="the only one",
    ),
]
LayoutOption = Annotated[
    Literal["auto", "cases", "brats", "table"],
    data_option(
        "--layout NAME",
        "How the data is laid out: cases (folders with image and masks, QUBIQ's too), brats (its slices or volumes) or table (CSV).",
    ),
]
LabelsOption = Annotated[
    str | None,
    data_option(
        "--labels N,N,...",
        "Which values of the masks are inside, such as 1,4 of a label map.",
        default="above half of the largest; brats: the whole tumour",
    ),
]

MasksBy = Literal["array", "header"]
MasksByOption = Annotated[
    MasksBy | None,
    data_option(
        "--masks-by array|header",
        "How masks are laid on their image: voxel by voxel, or each where its header puts it (if it is turned, cropped or has other voxels).",
        default="array",
    ),
]


LARGEST = 2**31 - 1
"""Of the whole numbers of an option such as "1,2,5"."""


def parse_labels(text: str | None) -> tuple[int, ...]:
    """The numbers of --labels, none where it is not given. Raises CdiffError as whole_numbers does."""
    return whole_numbers("--labels", text, "1,4") if text else ()


def whole_numbers(name: str, text: str, example: str) -> tuple[int, ...]:
    """The numbers of an option such as "1,2,5". Raises CdiffError, with the option's name and an example, when they are not whole numbers from 1 to LARGEST."""
    try:
        numbers = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise CdiffError(f"{name} {text} is not a list of whole numbers from 1 on, such as {example}")
    if max(numbers) > LARGEST:
        raise CdiffError(f"{name} {text} has a number above {LARGEST}; give smaller ones, such as {example}")
    return numbers


@dataclass(frozen=True)
class Model:
    """Which model, and what runs it: --model, --engine, --device."""

    model: ModelOption = None
    engine: EngineOption = "auto"
    device: DeviceOption = "cpu"

    def load(self, quiet: bool) -> Segmenter:
        """The model in its engine; says which they are."""
        from cdiff import load

        segmenter = load(self.model, engine=self.engine, device=self.device, build=builder(quiet))
        say(f"model {segmenter.manifest.name}, engine {segmenter.engine.name} on {segmenter.engine.device}", quiet)
        return segmenter


@dataclass(frozen=True)
class Chain:
    """How maps are drawn: --runs, --steps, --sampler, --fast, --levels, --mirror, --zooms, --seed."""

    runs: Annotated[
        int | None,
        chain_option(
            "--runs R",
            "How many chains to average for each slice and level.",
            default="25; with --fast the bundle's",
            min=1,
        ),
    ] = None
    steps: Annotated[
        int | None, chain_option("--steps N", "Steps per chain.", default="all T; with --fast the bundle's", min=1)
    ] = None
    sampler: Annotated[
        Literal["ddpm", "ddim", "dpm++2m"] | None,
        chain_option(
            "--sampler NAME",
            "ddpm (the papers'), ddim or dpm++2m (both good in few steps).",
            default="ddpm; with --fast the bundle's",
        ),
    ] = None
    fast: Annotated[
        bool,
        chain_option(
            "--fast",
            "Few steps and runs, as the bundle states them: many times faster. "
            "--runs, --steps and --sampler still apply when given.",
        ),
    ] = False
    levels: Annotated[
        Literal["mean", "vote"],
        chain_option(
            "--levels vote|mean",
            "How runs become a level's map: their mean, or (vote) that mean rounded at one half, as the published code does.",
        ),
    ] = "mean"
    mirror: Annotated[
        bool | None,
        chain_option(
            "--mirror/--no-mirror",
            "Let the runs see the slice as it is and mirrored, in turn.",
            default="yes where the model was trained on mirrored images",
        ),
    ] = None
    zooms: Annotated[
        str | None,
        chain_option(
            "--zooms Z,Z",
            "Let the runs see the slice at these multiples of its size, in turn, such as 1,1.25; for models of the framing "
            "centre.",
            default="what the bundle states",
        ),
    ] = None
    seed: Annotated[int, chain_option("--seed K", "The same seed gives the same maps.", min=0)] = 0

    def arguments(self) -> dict[str, Any]:
        """The same as keyword arguments of `Segmenter.segment`."""
        from cdiff.runtime.sampling.zoom import parse_zooms  # with NumPy, which --help can do without

        return {
            "runs": self.runs,
            "steps": self.steps,
            "sampler": self.sampler,
            "fast": self.fast,
            "combine": self.levels,
            "mirror": self.mirror,
            "zooms": None if self.zooms is None else parse_zooms(self.zooms),
            "seed": self.seed,
        }

    def hint(self, segmenter: Segmenter) -> str:
        """A line for whoever waits for all runs and steps without having asked for them, where the bundle has a `--fast`; else empty."""
        fast = segmenter.manifest.fast
        if self.fast or not fast.keys() >= {"runs", "steps"} or (self.runs, self.steps, self.sampler) != (None,) * 3:
            return ""
        asked = f"{segmenter.runs()} runs of {segmenter.manifest.T} steps for each slice and level"
        return f"{asked}; --fast takes {fast['runs']} of {fast['steps']}"


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer should see it: a parameter that is a block of options (Model, Chain) is replaced by them.

    The block's options stand where the block stood, so the order in --help is that of the definition.
    """
    hints = get_type_hints(command, include_extras=True)
    blocks = {name: hint for name, hint in hints.items() if inspect.isclass(hint) and is_dataclass(hint)}

    def parameters() -> Iterator[inspect.Parameter]:
        for name, parameter in inspect.signature(command).parameters.items():
            if block := blocks.get(name):
                types = get_type_hints(block, include_extras=True)
                for field in fields(block):
                    yield inspect.Parameter(
                        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
                    )
            else:
                yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, block in blocks.items():
            given[name] = block(**{field.name: given.pop(field.name) for field in fields(block)})
        command(**given)

    spread_out = inspect.Signature(list(parameters()))
    run.__signature__ = spread_out  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in spread_out.parameters.items()}
    return run
