"""The bundle's README.md: a model card with Hugging Face front matter, filled from the run and from the author's card.json."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.runtime.manifest import ONE_ZOOM, Manifest
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.words import by, several
from cdiff.train.config import Config
from cdiff.train.presets import PRESETS

METHOD = [
    "Amit, Shichrur, Shaharabany, Wolf: Annotator Consensus Prediction for Medical Image Segmentation with Diffusion "
    "Models, 2023, arXiv:2306.09004",
    "Wolleb, Sandkuehler, Bieder, Valmaggia, Cattin: Diffusion Models for Implicit Image Segmentation Ensembles, "
    "MIDL 2022, arXiv:2112.03145",
]
"""The papers of the method, cited by every bundle."""


@dataclass(frozen=True)
class Card:
    """The author's part of the model card: what a run cannot know about its model. Every field is optional.

    name, task: short texts for the manifest. summary, data, intended_use, limits: paragraphs of Markdown. license: an identifier
    of the Hugging Face hub, such as "cc-by-4.0". credit: lines that the data's licence asks for. citation: works to cite besides
    the method's two papers. tags: for the hub. scores: by name, as `cdiff evaluate` writes them. They are measured with the
    exported bundle, so a second export puts them into it; its graphs are the same byte for byte.
    """

    name: str = ""
    task: str = ""
    summary: str = ""
    data: str = ""
    intended_use: str = ""
    limits: str = ""
    license: str = ""
    credit: list[str] = field(default_factory=list)
    citation: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Card:
        """Read a card.json. Raises CdiffError naming the file and the key if it is not an object of the fields above."""
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
            # Python's JSON reader accepts NaN, 1e999 and lone surrogates; a bundle can hold none of them.
            json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
        except (OSError, ValueError, RecursionError) as error:
            raise CdiffError(f"cannot read {path} ({error}); it must be a JSON object in UTF-8") from None
        if not isinstance(values, dict):
            raise CdiffError(f"{path} must hold one JSON object")
        kinds = {f.name: str(f.type).partition("[")[0] for f in dataclasses.fields(cls)}
        words = {"str": "a text", "list": "a list of texts", "dict": "an object"}
        for key, value in values.items():
            if key not in kinds:
                raise CdiffError(f"{path}: key {key!r} is not known; the keys are {', '.join(kinds)}")
            texts = value if isinstance(value, list) else []
            if type(value).__name__ != kinds[key] or not all(isinstance(text, str) for text in texts):
                raise CdiffError(f"{path}: key {key!r} must be {words[kinds[key]]}")
        return cls(**values)


def training_command(config: Config) -> str:
    """The `cdiff train` line that gives this configuration: the nearest preset and what differs from it."""
    changes = {
        name: {key: value for key, value in config.values().items() if preset.values()[key] != value}
        for name, preset in PRESETS.items()
    }
    nearest = min(changes, key=lambda name: len(changes[name]))
    settings = [f" --set {_setting(key, value)}" for key, value in changes[nearest].items()]
    return f"cdiff train --data DIR --preset {nearest} --out RUN" + "".join(settings)


def render(card: Card, manifest: Manifest, config: Config) -> str:
    """The text of README.md. `manifest` must be complete but for its list of files."""
    training = manifest.training
    front = {
        "license": card.license or "other",
        "library_name": "cdiff",
        "pipeline_tag": "image-segmentation",
        "tags": ["medical", "segmentation", "diffusion", "uncertainty", "onnx", *card.tags],
    }
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items()) + "---",
        f"# {manifest.name}",
        card.summary or manifest.draws.summary.format(C=manifest.levels),
        "**Not a medical device.** For research; not for diagnosis, treatment or any other clinical decision.",
        "```\npip install '.[cpu]'  # in a clone of cdiff\ncdiff segment SCAN -o OUT --model THIS_FOLDER\n```",
        "## Model\n\n"
        + _table(
            {
                "task": manifest.task,
                "variant": f"{manifest.variant}: draws {manifest.draws.drawn}",
                "annotators": str(manifest.levels),
                "soft map": manifest.draws.soft,
                "levels": f"{manifest.draws.levels}, c = 1 to {manifest.levels}",
                "uncertainty": manifest.draws.uncertainty,
                "input": f"{by(manifest.image_size)} pixels, {several(manifest.image_channels, 'channel')}, {manifest.framing}",
                **_zooms_row(manifest),
                "normalisation": manifest.normalisation.describe(),
                "network": f"{training.get('parameters', 0) / 1e6:.2f} M parameters, predicts {manifest.target}, "
                f"variance {manifest.variance}",
                "diffusion": _schedule_line(manifest.noise_schedule),
                "graphs": f"ONNX opset {manifest.opset}, {manifest.precision}",
            }
        ),
        "## Data\n\n" + _paragraphs(card.data or _data_line(training), *card.credit),
        f"## Training\n\n{_origin_line(training)}```\n{training_command(config)}{_init_option(training)}\n```\n\n"
        + _table(_training_rows(training)),
        "## Scores\n\n" + (_table(_flat_scores(manifest.scores)) if manifest.scores else "Not scored yet."),
        "## Exported graphs against PyTorch\n\n" + _table(_verification_rows(manifest.verification)),
        "## Intended use\n\n"
        + (
            card.intended_use
            or "Research on agreement between annotators, on images like those that it was trained on."
        ),
        "## Limits\n\n"
        + (
            card.limits
            or "It was tested only on data like those that it was trained on: on another scanner, protocol or population it may fail "
            "without any sign of it."
        ),
        "## Citation\n\n" + "\n".join(f"- {line}" for line in manifest.citation),
    ]
    return "\n\n".join(parts) + "\n"


def _zooms_row(manifest: Manifest) -> dict[str, str]:
    """The sizes at which runs see a slice; empty where that is only its own size."""
    if manifest.zooms == ONE_ZOOM:
        return {}
    sizes = " and ".join(f"{zoom:g}" for zoom in manifest.zooms)
    return {"runs see": f"the slice at {sizes} times its size, in turn"}


def _schedule_line(schedule: NoiseSchedule) -> str:
    if schedule.kind == "cosine":
        return f"T = {schedule.T}, cosine schedule"
    scale = " times 1000/T" if schedule.scaled else ""
    return f"T = {schedule.T}, linear schedule, beta {schedule.beta_start:g} to {schedule.beta_end:g}{scale}"


def _data_line(training: dict[str, Any]) -> str:
    data = training.get("data", {})
    if not {"train", "val"} <= set(data):
        return "The author did not describe the data."
    train, val = data["train"], data["val"]
    return (
        f"Trained on {several(train['slices'], 'slice')} of {several(train['cases'], 'case')}; the checkpoint was chosen on "
        f"{several(val['slices'], 'slice')} of {several(val['cases'], 'case')}. The author did not describe the data further."
    )


def _origin_line(training: dict[str, Any]) -> str:
    """Where the weights came from, to stand before the training command. Empty for a run that began with random ones."""
    if not (came := _came_from(training)):
        return ""
    if "init" in training:
        return f"The weights {came}. They were then trained further by\n\n"
    on = ", then trained further here" if training.get("seconds") else ""
    return f"The weights {came}{on}. This command trains the same network:\n\n"


def _came_from(training: dict[str, Any]) -> str:
    """The weights' history before this training, back through earlier runs; empty for random ones."""
    if init := training.get("init"):
        before = _came_from(init)
        return f"started from the averaged weights of {init['name']}, sha256 {init['sha256']}" + (
            f", which {before}" if before else ""
        )
    if origin := training.get("imported"):
        return (
            f"were trained by https://github.com/{origin['repository']} ({origin['variant']}) and imported from "
            f"{origin['file']}, sha256 {origin['sha256']}"
        )
    return ""


def _init_option(training: dict[str, Any]) -> str:
    return f" --init {shlex.quote(training['init']['name'])}" if "init" in training else ""


def _training_rows(training: dict[str, Any]) -> dict[str, str]:
    machine = training.get("machine", {})
    hardware = machine.get("device", "")
    if hardware == "cpu":
        hardware = f"{several(machine.get('threads'), 'thread')} of {machine.get('cpu')}"
    rows = {
        "steps": training.get("step"),
        "time": _duration(training["seconds"], training.get("clock", "wall")) if training.get("seconds") else None,
        "hardware": hardware,
        "precision": training.get("precision"),
        "PyTorch": machine.get("torch"),
    }
    return {key: str(value) for key, value in rows.items() if value}


def _duration(seconds: float, clock: str) -> str:
    text = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    return f"{text} of processor time" if clock == "cpu" else text


def _verification_rows(verification: dict[str, Any]) -> dict[str, str]:
    largest, bounds = verification.get("largest", {}), verification.get("bounds", {})
    words = {"encoder": "features (relative)", "denoiser": "one denoiser call", "maps": "final soft map, mean"}
    rows = {words[key]: f"{value:.1e} (bound {bounds[key]:.0e})" for key, value in largest.items()}
    for name, share in verification.get("half_share", {}).items():
        rows[f"half precision, {name}"] = f"{share:.1%} of convolutions and products"
    return rows


def _flat_scores(scores: dict[str, Any], above: str = "") -> dict[str, str]:
    """One row per score; {"mean", "low", "high"} becomes "mean (low to high)"."""
    rows: dict[str, str] = {}
    for key, value in scores.items():
        label = f"{above}{key}"
        if isinstance(value, dict) and "mean" in value:
            rows[label] = _number(value["mean"])
            if value.get("low") is not None and value.get("high") is not None:
                rows[label] += f" ({_number(value['low'])} to {_number(value['high'])})"
        elif isinstance(value, dict):
            rows |= _flat_scores(value, f"{label}, ")
        elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
            for item in value:
                rows |= _flat_scores({f"{label} {item.get('level', '')}".strip(): item})
        elif value is not None:
            rows[label] = _number(value)
    return rows


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(rows: dict[str, str]) -> str:
    cells = {key: " ".join(str(value).replace("|", "\\|").split()) for key, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells.items())])


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _setting(key: str, value: Any) -> str:
    """KEY=VALUE, quoted for a shell."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return shlex.quote(f"{key}={text}")
