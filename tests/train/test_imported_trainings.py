"""Which of the consensus code's trainings a checkpoint is of: one of four, said once."""

from __future__ import annotations

from typing import Any

import pytest

from cdiff.runtime.errors import CdiffError
from cdiff.train.imported.options import Options
from cdiff.train.imported.trainings import FLAGS, with_training

CONSENSUS, NO_ANNOTATOR, SOFT, ANNOTATORS = FLAGS
VARIANTS = {CONSENSUS: "consensus", NO_ANNOTATOR: "no-annotator", SOFT: "soft-label", ANNOTATORS: "annotator"}


def variant(said: dict[str, Any], *settings: str) -> str:
    """The variant that an args.json and the command line's options are taken for."""
    with_one = with_training(said, list(settings), "nothing says it")
    return Options.read("consensus", {"number_of_annotators": 3, **with_one}, list(settings)).variant


@pytest.mark.parametrize("flag", FLAGS)
def test_the_training_is_what_args_json_says(flag: str) -> None:
    alone = {each: each == flag for each in FLAGS}
    assert variant(alone) == variant({flag: "True"}) == variant({}, f"{flag}=yes") == VARIANTS[flag]
    # Two of the scripts write annotators_training beside no_annotator_training, and their code reads neither of them there.
    assert variant(alone | {ANNOTATORS: True}) == VARIANTS[flag]


@pytest.mark.parametrize("said", FLAGS)
@pytest.mark.parametrize("option", FLAGS)
def test_an_option_goes_before_args_json(said: str, option: str) -> None:
    args = {flag: flag == said for flag in FLAGS}
    assert variant(args, f"{option}=True") == VARIANTS[option]
    assert variant(args, f"{option}=True", *(f"{flag}=False" for flag in FLAGS if flag != option)) == VARIANTS[option]


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ({}, ()),
        (dict.fromkeys(FLAGS, False), ()),
        ({}, (f"{ANNOTATORS}=False",)),
        ({}, (f"{CONSENSUS}=False", "num_heads=1")),
        ({CONSENSUS: True, ANNOTATORS: False}, (f"{CONSENSUS}=False",)),
    ],
)
def test_no_training_at_all_is_asked_for(said: dict[str, Any], settings: tuple[str, ...]) -> None:
    """It was taken for annotators_training, whose maps are one annotator's each."""
    with pytest.raises(
        CdiffError, match=r"nothing says it: give the one that its training wrote .*consensus_training=True"
    ):
        variant(said, *settings)


def test_two_trainings_are_not_chosen_between() -> None:
    both = {SOFT: True, CONSENSUS: True}
    says = "say consensus_training=True and soft_label_training=True, .* as with --option soft_label_training=False"
    with pytest.raises(CdiffError, match=says):
        variant(both)
    with pytest.raises(CdiffError, match=says):
        variant({}, f"{SOFT}=True", f"{CONSENSUS}=True")
    assert variant(both, f"{SOFT}=False") == "consensus"
    assert variant(both, f"{NO_ANNOTATOR}=True") == "no-annotator"
    with pytest.raises(CdiffError, match="consensus_training=maybe must be True or False"):
        variant({CONSENSUS: "maybe"})
    with pytest.raises(CdiffError, match="consensus_training=True=False must be True or False"):
        variant({}, f"{CONSENSUS}=True=False")
