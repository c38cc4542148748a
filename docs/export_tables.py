"""The tables of docs/export.md, from what `cdiff.benchmarks.export_choices` and `cdiff.benchmarks.engine_builds` wrote."""

from __future__ import annotations

from pathlib import Path

from table_cells import markdown, not_measured, read

SPEED = {  # as in the results
    "pytorch": "PyTorch, eager",
    "opset 20": "**opset 20**",
    "opset 21": "opset 21",
    "opset 23": "opset 23",
    "half precision": "opset 21, half precision",
    "embeddings folded": "opset 21, embeddings folded in (t, level) tables",
    "whole update": "opset 21, whole update in the graph",
    "opset 21 + NumPy update": "opset 21, then the update in NumPy",
}
NORMS = ("InstanceNormalization", "GroupNormalization", "Attention")
HALF = {
    "float32": "float32 (for comparison)",
    "half": "**products in float16, all sums in float32**",
    "half, sums in half": "residual sums and skips in float16 too",
    "half, first and last convolution float32": "first and last convolution in float32",
}
NETWORKS = {
    "shipped": "the shipped network",
    "paper-reduced": "the paper's at 64 x 64, 32 channels wide, one block a depth",
}
PRECISIONS = {"float32": "float32", "float16": "half precision"}


def graphs_table(results: Path) -> str:
    """The denoiser's forms: processor time of a call, error, size of the file, and how normalisation and attention are written."""
    header = ["denoiser", "ms per call, median", "largest error of x0", "MB", "of its nodes"]
    report = read("export_choices", results)
    if report is None:
        return not_measured(header)
    rows = []
    for name, words in SPEED.items():
        found = report["speed"][name]
        exported = "bytes" in found
        nodes = ", ".join(f"{n} {kind}" for kind in NORMS if (n := found.get("nodes", {}).get(kind)))
        more = [f"{found['max_error_x0']:.1e}", f"{found['bytes'] / 1e6:.1f}", nodes] if exported else ["-", "-", "-"]
        rows.append([words, f"{found['ms_median']:.1f}", *more])
    return markdown(header, rows)


def half_table(results: Path) -> str:
    """The forms of half precision: what single calls and whole soft maps are off by."""
    header = ["half precision, over the float32 graph", "largest error of x0", "mean error of the soft map", "largest"]
    report = read("export_choices", results)
    if report is None:
        return not_measured(header)
    keys = ("x0_max_error", "map_mean_error", "map_max_error")
    rows = [[words, *(f"{report['precision'][name][key]:.1e}" for key in keys)] for name, words in HALF.items()]
    return markdown(header, rows)


def builds_table(results: Path) -> str:
    """TensorRT for RTX: processor seconds of both graphs' engines, and the larger one's size."""
    header = ["both graphs of", "processor seconds", "MB of the denoiser's engine"]
    report = read("engine_builds", results)
    if report is None:
        return not_measured(header)
    rows = []
    for network, words in NETWORKS.items():
        for precision, name in PRECISIONS.items():
            found = report["builds"][network][precision]
            rows.append([f"{words}, {name}", f"{found['cpu_seconds']:.1f}", f"{found['bytes']['denoiser'] / 1e6:.1f}"])
    return markdown(header, rows)
