"""Measures the choices behind the exported graphs: opset, what the denoiser returns, embeddings, float32 islands (docs/export.md).

python -m cdiff.benchmarks.export_choices [--model BUNDLE] [--scan SCAN] [--json OUT]
"""

from __future__ import annotations

import collections
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from cdiff.benchmarks.benchmark import scan_files
from cdiff.benchmarks.script import parser_of, script
from cdiff.export import half
from cdiff.export.graphs import DenoiserGraph, EncoderGraph, export_graph, write_denoiser, write_encoder
from cdiff.export.reference import TorchEngine, load_network
from cdiff.export.verify import SEED
from cdiff.runtime.bundle import open_bundle, shipped_bundle
from cdiff.runtime.engines.base import Float32
from cdiff.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cdiff.runtime.files import write_json
from cdiff.runtime.sampling.batching import segment_windows
from cdiff.runtime.sampling.framing import Framing
from cdiff.runtime.sampling.sampler import sampler_table
from cdiff.runtime.sampling.schedule import NoiseSchedule
from cdiff.runtime.scans.scan import read_scan
from cdiff.train.machine import describe_machine
from cdiff.train.network import ConsensusNet, ResidualBlock

ROWS, ROUNDS = 8, 9


class WholeUpdate(nn.Module):
    """The alternative: one call gives x' = a x + b x0 + c x0_prev + d z, with the sampler's row (a, b, c, d) as an input."""

    def __init__(self, graph: DenoiserGraph) -> None:
        super().__init__()
        self.inner = graph

    def forward(
        self,
        x: Tensor,
        features: Tensor,
        row_slice: Tensor,
        t: Tensor,
        level: Tensor,
        row: Tensor,
        x0_prev: Tensor,
        z: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x0 = self.inner(x, features, row_slice, t, level)
        return row[0] * x + row[1] * x0 + row[2] * x0_prev + row[3] * z, x0


class FoldedBlock(nn.Module):
    """The alternative: a residual block whose embedding projection is a table over all pairs (t, level), of index `z`."""

    def __init__(self, block: ResidualBlock, z: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("table", block.embed(nn.functional.silu(z)))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        block = self.block
        h = block.conv1(nn.functional.silu(block.norm1(x))) + self.table[z][:, :, None, None]  # type: ignore[index]
        out: Tensor = block.skip(x) + block.conv2(nn.functional.silu(block.norm2(h)))
        return out


class Index(nn.Module):
    """Stands in for a look-up table and gives the index times `stride`; two of them, added, give each pair (t, level) its number."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, index: Tensor) -> Tensor:
        return index * self.stride


def folded(network: ConsensusNet) -> ConsensusNet:
    """A copy with every embedding projection folded into a (t, level) table."""
    net = copy.deepcopy(network)
    denoiser = net.denoiser
    pairs = denoiser.time_table.weight[:, None] + denoiser.level_table.weight[None]
    for module in list(denoiser.modules()):
        if isinstance(block := getattr(module, "block", None), ResidualBlock):
            module.block = FoldedBlock(block, pairs.flatten(0, 1))
    denoiser.time_table, denoiser.level_table = Index(net.config.conditions), Index(1)  # type: ignore[assignment]
    return net


class HalfStream(half.HalfConv2d):
    """The alternative: a convolution that hands on float16, so that sums and skips are float16 too."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.half())
        return out


class FloatNorm(nn.Module):
    """GroupNorm in float32 whatever comes in."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.float())
        return out


def half_stream(network: ConsensusNet) -> ConsensusNet:
    """Half precision with the residual stream in float16."""
    net = half.half_network(network)
    _replace(net, half.HalfConv2d, lambda m: HalfStream(m.conv.float()))
    _replace(net, nn.GroupNorm, FloatNorm)
    _replace(net, half.HalfLinear, lambda m: nn.Sequential(m, ToHalf()))
    return net


class ToHalf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.half()


def half_but_ends(network: ConsensusNet) -> ConsensusNet:
    """Half precision with the denoiser's first and last convolution in float32."""
    net = half.half_network(network)
    net.denoiser.first, net.denoiser.last = copy.deepcopy(network.denoiser.first), copy.deepcopy(network.denoiser.last)
    return net


def _replace(module: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, make(child))
        else:
            _replace(child, kind, make)


def speed(network: ConsensusNet, schedule: NoiseSchedule, image: Float32, folder: Path) -> dict[str, Any]:
    """For each alternative, CPU milliseconds per call of ROWS rows on `image` [S,ch,H,W], on one thread and in turns; parity with PyTorch;
    file size and nodes."""
    config = network.config
    rng = np.random.default_rng(0)
    engine = TorchEngine(copy.deepcopy(network), schedule)
    size = config.image_size
    feed: dict[str, Any] = {
        "x": rng.normal(size=(ROWS, 1, size, size)).astype(np.float32),
        "features": engine.encode(image[:1]),
        "row_slice": np.zeros(ROWS, np.int64),
        "t": np.linspace(1, config.T, ROWS).round().astype(np.int64),
        "level": np.arange(ROWS) % config.conditions + 1,
    }
    extra: dict[str, Any] = {
        "row": np.array([0.9, 0.1, -0.01, 0.1], np.float32),
        "x0_prev": np.zeros_like(feed["x"]),
        "z": rng.normal(size=feed["x"].shape).astype(np.float32),
    }
    expected = engine.denoise(**feed)[0]

    sessions: dict[str, tuple[ort.InferenceSession, Path]] = {}
    for opset in (20, 21, 23):
        graph = DenoiserGraph(network.denoiser, config, schedule)
        sessions[f"opset {opset}"] = _open(write_denoiser(graph, config, _new(folder), torch.float32, opset))
    graph = DenoiserGraph(half.half_network(network).denoiser, config, schedule)
    sessions["half precision"] = _open(write_denoiser(graph, config, _new(folder), torch.float16, 21))
    graph = DenoiserGraph(folded(network).denoiser, config, schedule)
    sessions["embeddings folded"] = _open(write_denoiser(graph, config, _new(folder), torch.float32, 21))
    whole = WholeUpdate(DenoiserGraph(network.denoiser, config, schedule))
    tensors = {
        key: torch.from_numpy(value[:3] if len(value) == ROWS else value) for key, value in (feed | extra).items()
    }
    tensors["features"] = tensors["features"].repeat(2, 1, 1, 1)
    axes = dict.fromkeys(tensors, "rows") | {"features": "slices", "row": ""}
    sessions["whole update"] = _open(
        export_graph(whole, tensors, axes, ["x_next", "x0"], _new(folder) / "whole.onnx", 21)
    )

    def numpy_update() -> None:
        a, b, c, d = extra["row"]
        x0 = sessions["opset 21"][0].run(None, feed)[0]
        _ = a * feed["x"] + b * x0 + c * extra["x0_prev"] + d * extra["z"]

    def feed_of(name: str) -> dict[str, Any]:
        if name == "half precision":
            return feed | {"features": feed["features"].astype(np.float16)}
        return feed | extra if name == "whole update" else feed

    def call_of(name: str) -> Callable[[], Any]:
        session, inputs = sessions[name][0], feed_of(name)
        return lambda: session.run(None, inputs)

    calls: dict[str, Callable[[], Any]] = {"pytorch": lambda: engine.denoise(**feed)}
    calls |= {name: call_of(name) for name in sessions} | {"opset 21 + NumPy update": numpy_update}
    times = _alternate(calls)
    rows: dict[str, Any] = {
        name: {"ms_median": round(statistics.median(t), 1), "ms_min": round(min(t), 1)} for name, t in times.items()
    }
    for name, (session, path) in sessions.items():
        found = session.run(["x0"], feed_of(name))[0]
        rows[name] |= {
            "max_error_x0": float(np.abs(found - expected).max()),
            "bytes": path.stat().st_size,
            "nodes": dict(collections.Counter(node.op_type for node in onnx.load(path).graph.node).most_common()),
        }
    rows["opset 20"]["profile"] = profile(sessions["opset 20"][1], feed)
    return rows


def precision(network: ConsensusNet, schedule: NoiseSchedule, image: Float32, folder: Path) -> dict[str, Any]:
    """For float32 and each form of half precision: share of half nodes, error of single calls and of the soft map after whole chains."""
    config = network.config
    reference = TorchEngine(copy.deepcopy(network), schedule)
    rng = np.random.default_rng(1)
    t = np.linspace(1, config.T, ROWS).round().astype(np.int64)
    level, row_slice = np.arange(ROWS) % config.conditions + 1, np.arange(ROWS) % len(image)
    features = reference.encode(image)
    noise = rng.normal(size=(ROWS, 1, *image.shape[2:])).astype(np.float32)
    abar = schedule.abar[t].reshape(-1, 1, 1, 1)
    guess = reference.denoise(noise, features, row_slice, np.full(ROWS, config.T), level)[0]
    x = (np.sqrt(abar) * guess + np.sqrt(1 - abar) * noise).astype(np.float32)
    expected = reference.denoise(x, features, row_slice, t, level)[0]
    windows = Framing("resize", (config.image_size, config.image_size)).frame(image)
    chain = sampler_table("ddim", schedule, min(10, config.T))

    def soft(engine: Any) -> Float32:
        done = segment_windows(engine, windows, chain, levels=config.conditions, runs=2, seed=SEED)
        return np.stack([one.level_means.mean(axis=0) for one in done])

    wanted = soft(reference)
    forms: dict[str, Callable[[ConsensusNet], ConsensusNet]] = {
        "float32": copy.deepcopy,
        "half": half.half_network,
        "half, sums in half": half_stream,
        "half, first and last convolution float32": half_but_ends,
    }
    rows: dict[str, Any] = {}
    for name, make in forms.items():
        net, where = make(network), _new(folder)
        dtype = torch.float32 if name == "float32" else torch.float16
        encoder = write_encoder(EncoderGraph(net.encoder, dtype), config, where)
        denoiser = write_denoiser(DenoiserGraph(net.denoiser, config, schedule), config, where, dtype)
        engine = OnnxRuntimeEngine(encoder, denoiser, threads=1)
        error = np.abs(engine.denoise(x, engine.encode(image), row_slice, t, level)[0] - expected)
        difference = np.abs(soft(engine) - wanted)
        rows[name] = {
            "half_share": half.half_share(denoiser),
            "x0_mean_error": float(error.mean()),
            "x0_max_error": float(error.max()),
            "map_mean_error": float(difference.mean()),
            "map_max_error": float(difference.max()),
            "map_pixels_off_by_0.01": float((difference > 0.01).mean()),
            "bytes": denoiser.stat().st_size,
        }
    return rows


def _alternate(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """CPU time of each call in milliseconds; the calls take turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            if turn:  # the first is a warm-up
                times[name].append(1e3 * (time.thread_time() - begin))
    return times


def profile(path: Path, feed: dict[str, Any]) -> dict[str, float]:
    """The share of each kind of node in the time of ROUNDS calls, the largest first, by ONNX Runtime's own profiler."""
    options = _one_thread()
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = ort.InferenceSession(path, options)
    for _ in range(ROUNDS):
        session.run(None, feed)
    spent = collections.Counter[str]()
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    whole = spent.total()
    return {kind: round(part / whole, 4) for kind, part in spent.most_common()}


def _one_thread() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def _open(path: Path) -> tuple[ort.InferenceSession, Path]:
    return ort.InferenceSession(path, _one_thread()), path


def _new(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


@script
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = parser_of("export_choices", __doc__)
    parser.add_argument("--model", type=Path, help="a bundle (the shipped model)")
    parser.add_argument("--scan", type=Path, help="a scan for it (the demo scan)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args(argv)
    measure(arguments.model, arguments.scan, arguments.json)


def measure(model: Path | None, scan: Path | None, json_file: Path | None) -> None:
    """Print what was measured, and write it to `json_file`. Raises CdiffError for a model or a scan that cannot be read."""
    torch.set_num_threads(1)
    bundle = open_bundle(model or shipped_bundle())
    manifest, network = bundle.manifest, load_network(bundle)
    files = scan_files(scan, manifest)
    slices = read_scan(files, channels=manifest.image_channels, slice_axis=manifest.slice_axis).slices
    middle = len(slices) // 2
    image = np.stack([*manifest.slice_framing.frame(manifest.normalisation.apply(slices)[middle : middle + 2])])
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "model": {"name": manifest.name, "parameters": sum(p.numel() for p in network.parameters())},
            "rows": ROWS,
            "machine": describe_machine(torch.device("cpu")),
            "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": ort.__version__},
            "speed": speed(network, manifest.noise_schedule, image, Path(folder)),
            "precision": precision(network, manifest.noise_schedule, image, Path(folder)),
        }
    if json_file:
        write_json(json_file, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(main())
