"""The tables of the rivals that were trained with equal data and time, from what `cdiff.benchmarks.peers` wrote."""

from __future__ import annotations

from pathlib import Path

from table_cells import GED, Scores, distance, interval, markdown, mean, not_measured, read, read_peer, unmeasured

PEERS = {  # as in `cdiff.benchmarks.peers`
    "consensus": "consensus diffusion (Amit et al.)",
    "annotator": "diffusion, one map per annotator",
    "no-annotator": "diffusion, a random annotator",
    "soft-label": "diffusion, soft label",
    "implicit-ensemble": "implicit ensemble (Wolleb et al.)",
    "unet-majority": "U-Net, majority vote",
    "unet-soft": "U-Net, soft label",
    "unet-random-dice": "U-Net, a random annotator",
    "unet-heads-dice": "U-Net, one head per annotator",
    "unet-dropout-dice": "U-Net, MC dropout",
    "unet-probabilistic-dice": "probabilistic U-Net (Kohl et al.)",
    "unet-random": "U-Net, a random annotator, cross-entropy alone",
    "unet-heads": "U-Net, one head per annotator, cross-entropy alone",
    "unet-dropout": "U-Net, MC dropout, cross-entropy alone",
    "unet-probabilistic": "probabilistic U-Net (Kohl et al.), cross-entropy alone",
}
FOUR, ANY, SECOND = "peers_testing_all_raters", "peers_testing_marked", "peers_testing_all_raters_seed_1"
LATER = "_dice"
"""What the names of the results end in that were measured after the others: the peers that were given a Dice term."""


def best_first(result: str, results: Path) -> list[tuple[str, Scores | None]]:
    """Every peer's name and scores, the best soft Dice first; those that were not measured last."""
    found = [(name, read_peer(result, name, results) or read_peer(result + LATER, name, results)) for name in PEERS]
    return sorted(found, key=lambda row: -row[1]["soft_dice_5"]["mean"] if row[1] else 0.0)


def seconds_a_slice(name: str, peer: Scores, result: str, results: Path) -> str:
    """CPU seconds per slice. With a Dice term a peer is the same network and draws alike: those without it, which a quieter machine measured."""
    twin = read_peer(result, name.removesuffix("-dice"), results) if name.endswith("-dice") else None
    return f"{(twin or peer)['cpu_seconds_a_slice']:.2f}"


def peer_words(name: str, peer: Scores) -> str:
    """A peer's words, with a diffusion peer's number of steps, and how far it came where it was scored before its end."""
    words, share, steps = PEERS[name], peer["share_of_budget"], peer["protocol"].get("steps")
    if steps:
        words += f", {steps} step{'s' * (steps > 1)}"
    return words if share >= 1 else f"{words} ({share:.0%} of its budget)"


def scale_cells(peer: Scores) -> list[str]:
    """What all tables of the peers show: soft Dice, energy distance with the number of samples, calibration."""
    dice = [interval(peer["soft_dice_5"]), interval(peer["soft_dice_9"])]
    return [*dice, distance(peer), mean(peer["ece_near"]), mean(peer["brier_near"])]


SCALE = ["soft Dice, 5", "soft Dice, 9", GED, "ECE near", "Brier near"]


def peers_table(results: Path) -> str:
    """The peers in short: scores on the slices that all four readers marked, and the reader's own as a reference.

    A peer that was trained with a Dice term and without it is there with it, as all others have it.
    """
    header = ["trained with equal data and time", *SCALE, "CPU s per slice"]
    found = best_first(FOUR, results)
    measured = {name for name, peer in found if peer}
    pairs = [(f"{name}-dice", name) for name in PEERS if f"{name}-dice" in PEERS]
    left_out = {without if with_dice in measured else with_dice for with_dice, without in pairs}
    rows = []
    for name, peer in found:
        if name in left_out:
            continue
        cells = [*scale_cells(peer), seconds_a_slice(name, peer, FOUR, results)] if peer else unmeasured(header)
        rows.append([peer_words(name, peer) if peer else PEERS[name], *cells])
    return markdown(header, [*rows, *reader_row(FOUR, results, len(header))])


def peers_full_table(result: str, results: Path) -> str:
    """The peers with everything: size, training, scores, each level."""
    training = ["M parameters", "training steps", "CPU min"]
    header = ["peer", *SCALE, *[f"level {c}" for c in range(1, 5)], *training, "CPU s per slice"]
    rows = []
    for name, peer in best_first(result, results):
        if peer is None:
            rows.append([PEERS[name], *unmeasured(header)])
            continue
        run = peer["training"]
        cpu = run.get("cpu_seconds")
        levels = [mean(level) for level in peer["dice_per_level"]]
        steps, minutes = str(run.get("steps", "-")), "-" if cpu is None else f"{cpu / 60:.0f}"
        spent = [f"{run['parameters'] / 1e6:.2f}", steps, minutes, seconds_a_slice(name, peer, result, results)]
        rows.append([peer_words(name, peer), *scale_cells(peer), *levels, *spent])
    return markdown(header, [*rows, *reader_row(result, results, len(header))])


SEEDED = {"soft_dice_5": "soft Dice, 5", "ged": "GED", "ece_near": "ECE near"}


def seeds_table(results: Path) -> str:
    """The peers that were trained a second time, with another seed: each score of both trainings, and how far apart these are."""
    scores = [f"{words}, {which}" for words in SEEDED.values() for which in ("first", "second", "apart")]
    header = ["peer", "training steps", *scores]
    rows = []
    for name, first in best_first(FOUR, results):
        second = read_peer(SECOND, name, results)
        if first is None or second is None:
            continue
        pairs = [(first[key]["mean"], second[key]["mean"]) for key in SEEDED]
        steps = f"{first['training']['steps']}, {second['training']['steps']}"
        cells = [cell for a, b in pairs for cell in (f"{a:.3f}", f"{b:.3f}", f"{abs(a - b):.3f}")]
        rows.append([PEERS[name], steps, *cells])
    return markdown(header, rows) if rows else not_measured(header)


def reader_row(result: str, results: Path, columns: int) -> list[list[str]]:
    """A reader against the other three, from any peer's scores: the same for all."""
    report = read(result, results)
    if report is None or not report["peers"]:
        return []
    scores = next(iter(report["peers"].values()))
    cells = [interval(scores[f"soft_dice_{n}_annotators"]) for n in (5, 9)]
    return [["a radiologist against the other three", *cells, *["-"] * (columns - 3)]]
