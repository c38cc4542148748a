"""The pages: links that lead somewhere, settings and commands that exist, tables that are what was measured."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cdiff.runtime.scoring.metrics import bootstrap_over_cases
from cdiff.runtime.scoring.summary import group_names
from tests.conftest import REPOSITORY

PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "cdiff/demo/README.md", *(REPOSITORY / "docs").glob("*.md")])


def prose(page: str) -> str:
    """A page's text on one line: a test that looks for words must not care where lines end."""
    return " ".join((REPOSITORY / page).read_text(encoding="utf-8").split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name}: {target} does not exist"
        if anchor:
            anchors = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings(there)]
            assert anchor in anchors, f"{page.name}: no heading for {target}"


def headings(page: Path) -> list[str]:
    """Of the page's text: a line of a code block may begin with # too."""
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def test_every_setting_that_the_pages_name_exists() -> None:
    from cdiff.train.config import Config

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    settings = re.findall(r"--set ([a-zT]\w*=[\w.]+)", text)
    assert len(settings) > 5
    for setting in settings:
        if not setting.startswith("nonsense="):
            Config().with_settings([setting])


def test_every_setting_stands_in_the_page_of_settings_with_the_values_of_its_presets() -> None:
    from cdiff.train.presets import preset

    page = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    table = [
        [re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:4]]
        for line in page.splitlines()
        if line.startswith("| `")
    ]
    for column, name in enumerate(("small", "paper"), 1):
        config = preset(name)
        stated = [f"{key}={value}" for row in table for key, value in zip(row[0], row[column], strict=True)]
        assert len(stated) == sum(len(section) for section in config.to_json().values())
        assert config.with_settings(stated) == config
        assert len({setting.partition("=")[0] for setting in stated}) == len(stated)


def test_the_command_that_lists_every_setting_does() -> None:
    from cdiff.cli.app import app

    page = prose("docs/own-data.md")
    (command,) = re.findall(r"`cdiff (train [^`]*nonsense=1)` lists every setting", page)
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 2
    assert "the settings are T, accumulate," in done.stderr


def test_every_option_that_the_pages_name_exists() -> None:
    """Each `cdiff COMMAND ... --option` in a page against that command's own --help."""
    from cdiff.cli.app import app

    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    used: dict[str, set[str]] = {}
    for line in lines:
        for name, rest in re.findall(r"\bcdiff ([a-z]+)\b([^`#]*)", line):
            used.setdefault(name, set()).update(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest))
    assert {"segment", "train", "export", "evaluate"} <= set(used)
    commands = ("segment", "evaluate", "train", "import", "export", "benchmark", "info", "doctor", "data")
    for name in commands:
        asked = [*{"data": ["data", "check"]}.get(name, [name]), "--help"]
        helped = CliRunner().invoke(app, asked, env={"COLUMNS": "200", "TERM": "dumb"})
        assert helped.exit_code == 0
        for option in used.get(name, set()):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helped.stdout), f"cdiff {name} has no {option}"


def test_the_commands_page_has_every_option() -> None:
    from cdiff.cli.app import app

    text = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = {
        title.split()[1].strip("`"): body for title, body in re.findall(r"(?ms)^## (`.*?)$(.*?)(?=^## |\Z)", text)
    }
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(sections) == set(commands)
    for name, command in commands.items():
        of = command.commands["check"] if name == "data" else command
        for option in (one for one in of.params if one.param_type_name == "option"):
            if option.name in ("help", "quiet"):  # every command's, told above
                continue
            spelled = [rf"(?<![\w-]){one}(?![\w-])" for one in option.opts + option.secondary_opts]
            assert any(re.search(one, sections[name]) for one in spelled), f"cdiff {name}: {option.opts} is not told"


LIBRARIES_SAY = {  # the GPU page's messages that are the driver's, the loader's
    "cuDNN Frontend error: ... No valid execution plans",
    "libcudart.so.12: cannot open shared object file",
    "libnvinfer.so.10: cannot open shared object file",
    "libcuda.so.1: cannot open shared object file",
    "CUDA driver version is insufficient for CUDA runtime version",
    "no CUDA-capable device is detected",
    "cuDNN is not available",
}

PUT_TOGETHER = {  # those in which the code puts a name or a number
    "does not run on ... here: for cuda": ["does not run on ... here", "for cuda: pip uninstall"],
    "could not start its CUDAExecutionProvider ... and fell back to the CPU": [
        "could not start its {} on {} and fell back to the CPU"
    ],
    "the driver shows no GPU at all": ["the driver shows {}", "no GPU at all"],
    "sees no GPU": ["sees {}", "no GPU"],
    "tensorrt is installed but does not load": ["{} is installed but does not load"],
    "does not build for compute capability 9.0": ["does not build for compute capability {}"],
}


def test_every_message_of_the_gpu_page_is_one_that_the_code_has() -> None:
    """`...` stands for what changes."""
    texts = set()
    for layer in ("runtime", "export", "cli", "train"):
        for path in (REPOSITORY / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values]
                    texts.add("".join(parts))
    _, table = (REPOSITORY / "docs" / "gpu.md").read_text(encoding="utf-8").split("## Troubleshooting by message")
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    for row in rows:
        for message in set(re.findall("`([^`]+)`", row.split(" | ")[0])) - LIBRARIES_SAY:
            for part in PUT_TOGETHER.get(message, [message]):
                wanted = ".*".join(re.escape(piece) for piece in part.split("..."))
                assert any(re.search(wanted, text) for text in texts), message


def test_pages_say_what_was_measured(tables: ModuleType) -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page.name} is out of date: run python docs/make_tables.py"


def test_the_comparison_with_the_unet_claims_what_its_intervals_allow(tables: ModuleType) -> None:
    found = {words: tables.read(name, tables.RESULTS)["all"] for words, name in tables.PAIRED.items()}
    four, vote, anybody, whole = (found[words] for words in tables.PAIRED)

    def differ(score: dict[str, float]) -> bool:
        return score["low"] > 0 or score["high"] < 0

    assert not any(differ(one["soft_dice_5"]) for one in (four, anybody))
    assert [differ(one["dice_level_4"]) for one in (four, anybody, whole)] == [True, False, False]
    assert not any(differ(one[f"dice_level_{c}"]) for one in (four, anybody) for c in (1, 2, 3))
    assert differ(vote["soft_dice_5"])
    assert differ(whole["soft_dice_5"])
    page = prose("docs/choices.md")
    assert f"cdiff is {-whole['soft_dice_5']['mean']:.3f} behind on the middle slices" in page
    assert "better on the level of all four where all four marked" in prose("README.md")


def test_the_energy_distances_that_are_compared_are_of_equally_many_masks_or_it_is_said(tables: ModuleType) -> None:
    page = prose("docs/choices.md")
    found = tables.read("ged_by_masks", tables.RESULTS)["ged"]
    one, levels, runs, readers = (found[name] for name in ("one_mask", "levels_of_the_map", "levels_of_every_run", "annotators_majority"))  # fmt: skip
    unet = tables.read_peer("unet_testing_all_raters", "unet-soft", tables.RESULTS)["ged"]["mean"]
    assert one["low"] < unet < one["high"], "as far as the U-Net's"
    assert (
        f"is at {one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f}), as far as the U-Net's ({unet:.3f})" in page
    )
    assert f"its four levels at {levels['mean']:.3f}, next to the {runs['mean']:.3f} of every run's levels" in page
    assert f"the readers' majority, is {readers['mean']:.3f}." in page
    again = tables.read("ged_by_masks_unet", tables.RESULTS)["ged"]
    first, four = again["one_mask"], again["levels_of_the_map"]
    other = tables.read_peer("peers_testing_all_raters", "consensus", tables.RESULTS)["ged"]["mean"]
    assert f"goes from {first['mean']:.3f} as one mask to {four['mean']:.3f} as its four levels" in page
    assert f"([{other:.3f}](benchmarks.md#peers))" in page
    assert four["low"] < other < four["high"], "next to"
    peers = prose("docs/benchmarks.md")
    spans = [f"{one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for one in (first, four)]
    assert f"has {spans[0]} as one mask and {spans[1]} as its four levels" in peers
    same = tables.read("lidc_testing_all_raters_fast", tables.RESULTS)["ged"]["mean"]
    assert runs["mean"] == pytest.approx(same, abs=1e-6)
    for name in tables.ZOOMS.values():
        between = tables.read(name, tables.RESULTS)["all"]
        assert between["ged_no_diagonal"]["low"] < 0 < between["ged_no_diagonal"]["high"]
        assert between["ged"]["high"] < 0
    assert "without the diagonal the difference is within chance everywhere" in page


def test_how_much_of_the_largest_nodules_is_missed_is_what_was_measured(tables: ModuleType) -> None:
    cases = tables.read("lidc_testing_all_raters_fast", tables.RESULTS)["cases"]
    size = [sum(case["volumes"]["true_voxels"]) / len(case["slices"]) for case in cases]
    largest = [cases[i]["volumes"] for i in np.array_split(np.argsort(size, kind="stable"), 3)[-1]]
    drawn, true = (np.array([one[f"{whose}_voxels"][0] for one in largest]) for whose in ("predicted", "true"))
    share = bootstrap_over_cases([[missed] for missed in (true - drawn) / true])
    assert share.mean is not None
    assert share.low is not None
    assert share.high is not None
    page = prose("docs/choices.md")
    told = f"by {100 * share.mean:.0f} % of its volume on average ({100 * share.low:.0f} to {100 * share.high:.0f} %; all together by"
    assert f"{told} {100 * (1 - drawn.sum() / true.sum()):.0f} %" in page


def test_what_training_slices_score_is_told_with_the_chance_in_it(tables: ModuleType) -> None:
    """Of other cases than Validation's: each side drawn by itself."""
    rng = np.random.default_rng(0)
    draws, means, counts = [], [], []
    for name in ("lidc_training_25_fast", "lidc_validation_all_raters_fast"):
        cases = tables.read(name, tables.RESULTS)["cases"][:25]
        scores = [[row["soft_dice_5"] for row in case["slices"]] for case in cases]
        sums, sizes = (np.array([fold(values) for values in scores]) for fold in (sum, len))
        drawn = rng.integers(0, 25, (100_000, 25))
        draws.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
        means.append(sums.sum() / sizes.sum())
        counts.append(sizes.sum())
    page = prose("docs/choices.md")
    assert f"soft Dice {means[0]:.3f}" in page
    assert f"against {means[1]:.3f} " in page
    assert f"on the {counts[0]} that" in page
    assert f"on the {counts[1]} of Validation's first 25" in page
    low, high = np.quantile(draws[0] - draws[1], [0.025, 0.975])
    told = re.findall(r"first 25, \+(0\.\d+) \((-0\.\d+) to \+(0\.\d+);", page)
    assert [float(number) for number in told[0]] == pytest.approx([means[0] - means[1], low, high], abs=0.0015)


def test_what_a_second_training_of_the_peers_tells_is_what_was_measured(
    tables: ModuleType, peer_tables: ModuleType
) -> None:
    first, second = (tables.read(name, tables.RESULTS)["peers"] for name in (peer_tables.FOUR, peer_tables.SECOND))
    top = sorted(first, key=lambda name: -first[name]["soft_dice_5"]["mean"])[:7]
    assert set(second) == set(top), "the first seven of the first round"

    def apart(key: str) -> list[float]:
        return sorted(abs(first[name][key]["mean"] - second[name][key]["mean"]) for name in top)

    page = prose("docs/benchmarks.md")
    dice, distance = apart("soft_dice_5"), apart("ged")
    assert f"moves a peer by {dice[0]:.3f} to {dice[-1]:.3f}" in page
    assert f"energy distance moves by {distance[-1]:.3f} at most" in page
    means = [first[name]["soft_dice_5"]["mean"] for name in top]
    assert dice[-1] > max(means) - min(means)
    more = [second[name]["training"]["steps"] / first[name]["training"]["steps"] - 1 for name in top]
    assert f"{100 * min(more):.0f} to {100 * max(more):.0f} % more steps" in page
    for found in (first, second):
        unets, others = ([found[n]["ged"]["mean"] for n in found if n.startswith("unet") is unet] for unet in (True, False))  # fmt: skip
        assert max(others) < min(unets)


def test_the_hours_of_the_whole_protocol_are_those_of_its_sample(tables: ModuleType) -> None:
    page = prose("docs/model.md")
    sample, every = (
        tables.read(name, tables.RESULTS) for name in ("lidc_testing_middle", "lidc_testing_all_raters_fast")
    )
    hours = sum(case["seconds"] for case in sample["cases"]) / 3600
    words = {2: "two", 11: "eleven"}
    assert f"about {words[round(hours)]} hours on two cores, beside other work" in page
    assert f"two cores, beside other work, {words[round(hours * every['n_slices'] / sample['n_slices'])]} hours" in page


def test_what_five_steps_scored_on_testing_is_what_was_measured(tables: ModuleType) -> None:
    choices, model = (prose(f"docs/{page}.md") for page in ("choices", "model"))
    mean, vote, anybody = (
        tables.read(f"paired_steps_testing{which}", tables.RESULTS)["all"] for which in ("", "_vote", "_marked")
    )
    assert f"soft Dice {mean['soft_dice_5']['a']:.3f} as `mean`, {vote['soft_dice_5']['a']:.3f} as `vote`" in model
    rose = [f"{one['ged']['a']:.3f} to {one['ged']['b']:.3f}" for one in (mean, anybody)]
    assert f"rose from {rose[0]} (any marked: {rose[1]};" in choices
    same = tables.read("lidc_testing_all_raters_fast", tables.RESULTS)["soft_dice_5"]["mean"]
    assert mean["soft_dice_5"]["b"] == pytest.approx(same, abs=1e-9)


def test_how_far_the_conventions_of_the_energy_distance_lie_apart_is_what_was_measured(tables: ModuleType) -> None:
    found = tables.read("lidc_testing_all_raters_zooms", tables.RESULTS)
    told = f"({found['ged']['mean']:.3f} and {found['ged_no_diagonal']['mean']:.3f} for the shipped model's {found['ged_samples']['model']} masks,"
    assert told in prose("docs/metrics.md")


def test_the_joins_are_those_of_the_shipped_graph() -> None:
    import onnx

    graph = onnx.load(REPOSITORY / "cdiff/models/lidc/denoiser.onnx").graph
    joins = [
        node for node in graph.node if node.op_type == "Concat" and node.attribute[0].i == 1
    ]  # the others join sizes
    assert f"The {len(joins)} joins" in prose("docs/export.md")


def test_what_mirroring_does_is_what_was_measured(tables: ModuleType) -> None:
    found = tables.read("paired_mirror", tables.RESULTS)["all"]  # a: without, b: with it
    dice, distance = found["soft_dice_5"], found["ged"]
    page = prose("docs/commands.md")
    assert f"{found['n_slices']} Validation slices: {dice['b']:.3f} with it, {dice['a']:.3f} without" in page
    assert f"a little less ({distance['b']:.3f}, {distance['a']:.3f};" in page
    assert dice["low"] < 0 < dice["high"]
    assert distance["high"] < 0


def test_the_page_says_what_intervals_over_patients_would_be(tables: ModuleType) -> None:
    page = prose("docs/model.md")
    pattern = re.findall(r"Drawn by patient \(`--group \"(.+?)\"`", page)[0]
    wider: dict[str, list[float]] = {"": [], "_annotators": []}
    protocols = [f"all_raters_{sizes}{rounded}" for sizes in ("fast", "zooms") for rounded in ("", "_vote")]
    for name, count in (*((name, 44) for name in protocols), ("validation", 53)):
        validation = name == "validation"
        cases = tables.read(
            "lidc_validation_all_raters_fast" if validation else f"lidc_testing_{name}", tables.RESULTS
        )["cases"]
        groups = group_names([case["case"] for case in cases], pattern)
        assert groups is not None
        assert len(set(groups)) == count
        for ending, score in ((e, f"soft_dice_{n}{e}") for e in wider for n in (5, 9) if not validation):
            values = [[row[score] for row in case["slices"]] for case in cases]
            over_cases, over_patients = bootstrap_over_cases(values), bootstrap_over_cases(values, groups=groups)
            assert None not in (over_cases.low, over_patients.low)
            wider[ending].append((over_patients.high - over_patients.low) / (over_cases.high - over_cases.low) - 1)  # type: ignore[operator]
    model, readers = ([f"{100 * edge:.0f}" for edge in (min(found), max(found))] for found in wider.values())
    assert "Testing's 67 are of 44 patients, Validation's 77 of 53" in page
    assert f"are {model[0]} to {model[1]} % wider, the readers' {readers[0]} to {readers[1]} %" in page


def test_the_first_page_says_of_the_full_protocol_what_was_measured(tables: ModuleType) -> None:
    page = prose("README.md")
    full, fast = (tables.read(f"lidc_testing_middle{name}", tables.RESULTS) for name in ("", "_fast"))
    means = [one["soft_dice_5"]["mean"] for one in (full, fast)]
    assert f"25 runs of 100 steps score {means[0]:.3f} and 4 runs of one step {means[1]:.3f}, both at one size" in page
    assert means[0] <= means[1], "or the full protocol is better"
    best = tables.read("lidc_testing_all_raters_zooms_vote", tables.RESULTS)["soft_dice_5"]["mean"]
    assert ("missed it" in page) == (best <= 0.88)
