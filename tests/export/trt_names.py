"""Which names of TensorRT's API the sources use, read from their syntax trees, and the stub libraries its bindings import against."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# By the name that our code gives an object: its class in the bindings.
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "tensor": "ITensor",
    "parser_error": "ParserError",
}
# By the call that makes it, where no variable holds it.
MADE_BY = {"get_timing_cache": "ITimingCache", "create_engine_inspector": "EngineInspector", "get_input": "ITensor"}
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


@dataclass
class Used:
    """Names below the module such as "BuilderFlag.TF32"; and members of classes, with the numbers of arguments they are called with."""

    names: set[str] = field(default_factory=set)
    members: set[tuple[str, str]] = field(default_factory=set)
    calls: set[tuple[str, str, int]] = field(default_factory=set)


def used_by(path: Path) -> Used:
    """Everything that a source file takes from a module called `trt`, and from objects called as in `CLASSES`.

    A parameter that has another type than Any is not one of TensorRT's, whatever it is called.
    """
    tree, used = ast.parse(path.read_text(encoding="utf-8")), Used()
    if not any(isinstance(node, ast.Name) and node.id == "trt" for node in ast.walk(tree)):
        return used
    for function in tree.body:
        parameters = [node for node in ast.walk(function) if isinstance(node, ast.arg) and node.annotation is not None]
        _collect(function, {p.arg for p in parameters if p.annotation and ast.unparse(p.annotation) != "Any"}, used)
    return used


def _collect(function: ast.stmt, others: set[str], used: Used) -> None:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            dotted = _dotted(node)
            if dotted and dotted[0] == "trt":
                used.names.add(".".join(dotted[1:]))
            elif (owner := _class(node.value, others)) is not None:
                used.members.add((owner, node.attr))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = _class(node.func.value, others)
            if owner and not any(isinstance(argument, ast.Starred) for argument in node.args):
                used.calls.add((owner, node.func.attr, len(node.args) + len(node.keywords)))


def _dotted(node: ast.expr) -> list[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def _class(node: ast.expr, others: set[str]) -> str | None:
    if isinstance(node, ast.Name):
        return None if node.id in others else CLASSES.get(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return MADE_BY.get(node.func.attr)
    return None


def stub_libraries(folder: Path, major: int) -> str | None:
    """Libraries that define just what the bindings look for when imported. Returns why they cannot be made, or None."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return "no C compiler for the stub libraries"
    folder.mkdir()
    source = folder / "stub.c"
    source.write_text("\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in SYMBOLS))
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        file = f"lib{name}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(folder / file), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{compiler}: {done.stderr.strip()}"
    return None


def install_bindings(folder: Path, version: str) -> str | None:
    """TensorRT's bindings of one version into a folder of their own. Returns why pip cannot, or None."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", "--timeout", "20"]
    command = [*pip, "--only-binary", ":all:", "--target", str(folder), f"tensorrt-cu13-bindings=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    except subprocess.TimeoutExpired:
        return "pip did not answer"
    return " ".join(done.stderr.split())[-200:] or "pip failed" if done.returncode else None


# Run in a process of its own: two versions cannot be loaded into one. Prints, of what stdin asks for, what is not there, and the
# members of the enumerations that it names.
CHECK = r"""
import importlib, json, re, sys

trt = importlib.import_module(sys.argv[1])
asked, missing = json.load(sys.stdin), []

def find(path):
    owner = trt
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner

for path in asked["names"]:
    try:
        find(path)
    except AttributeError:
        missing.append(path)
for owner, name, count in asked["calls"]:
    try:
        doc = find(f"{owner}.{name}").__doc__ or ""
    except AttributeError:
        continue
    counts = []
    for arguments in re.findall(rf"^(?:\d+\. )?{name}\((.*)\) ->", doc, re.M):
        if arguments == "*args, **kwargs":
            continue
        parts = [part for part in re.split(r", (?=\w+: )", arguments) if part and not part.startswith("self:")]
        counts.append((sum(" = " not in part for part in parts), len(parts)))
    if counts and not any(least <= count <= most for least, most in counts):
        missing.append(f"{owner}.{name} with {count} arguments, not {counts}")
enums = {name: sorted(find(name).__members__) for name in asked["enums"] if hasattr(trt, name)}
print(json.dumps({"version": trt.__version__, "missing": missing, "enums": enums}))
"""
