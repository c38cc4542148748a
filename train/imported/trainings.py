"""Which of the consensus code's four trainings made a checkpoint, by the flags in its args.json or on the command line."""

from __future__ import annotations

from typing import Any

from cdiff.runtime.errors import CdiffError
from cdiff.train.imported.values import typed

OTHERS = ("consensus_training", "no_annotator_training", "soft_label_training")
"""Their data set asserts that at most one of these is on; with none on, the training was `ANNOTATORS`."""
ANNOTATORS = "annotators_training"
"""A flag that their code never reads. Some of its scripts write it beside no_annotator_training, all of them where none of `OTHERS` is on."""
FLAGS = (*OTHERS, ANNOTATORS)


def with_training(said: dict[str, Any], settings: list[str], lacking: str) -> dict[str, Any]:
    """`said`, an args.json, with the flag of one training on and those of the others off.

    A training that `settings` ("name=value" each) turn on is taken whatever `said` says. Raises CdiffError where two trainings are
    on, or none; for none the message begins with `lacking`.
    """
    given = dict(setting.split("=", 1) for setting in settings if "=" in setting)
    chosen = _one(given) or _one(said | given)
    if chosen is None:
        raise CdiffError(
            f"{lacking}: give the one that its training wrote with --args, or say which training it was: "
            "--option consensus_training=True, or annotators_training, no_annotator_training or soft_label_training"
        )
    return said | {flag: flag == chosen for flag in FLAGS}


def _one(flags: dict[str, Any]) -> str | None:
    on = [flag for flag in FLAGS if flag in flags and typed(flag, flags[flag], False)]
    if len(others := [flag for flag in on if flag in OTHERS]) > 1:
        raise CdiffError(
            f"the options say {' and '.join(f'{flag}=True' for flag in others)}, but the published code trains only one of them; turn the others "
            f"off, as with --option {others[1]}=False"
        )
    return next(iter(others or on), None)
