"""The pages against the code that they describe: what their Python calls, the scores that they define."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from dataclasses import fields

import cdiff
from cdiff.runtime.results import Result
from cdiff.runtime.scoring import scores
from cdiff.runtime.segmenter import Segmenter
from tests.conftest import REPOSITORY
from tests.test_docs import PAGES


def test_the_pages_python_calls_what_there_is() -> None:
    """Names and arguments alone: the blocks themselves need files of a user's."""
    segment, many = (inspect.signature(one).parameters for one in (Segmenter.segment, Segmenter.segment_many))
    takes = {"load": inspect.signature(cdiff.load).parameters, "segment": segment, "segment_many": {**many, **segment}}
    takes["save"] = inspect.signature(Result.save).parameters
    blocks = [
        block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    ]
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    called = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert {"load", "segment", "segment_many", "save"} <= {node.func.attr for node in called}  # type: ignore[attr-defined]
    for node in called:
        name = node.func.attr  # type: ignore[attr-defined]
        assert all(keyword.arg in takes[name] for keyword in node.keywords), ast.unparse(node)
    has = {"result": {*dir(Result), *(part.name for part in fields(Result))}, "one": {"item", "error", "value"}}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in has:
            assert node.attr in has[node.value.id], ast.unparse(node)


def test_every_name_of_the_code_that_the_pages_give_is_there() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    found = re.findall(r"`(cdiff(?:\.\w+)+)(?:\((.*?)\))?`", text)
    assert len(found) > 2
    for name, arguments in found:
        takes = inspect.signature(pkgutil.resolve_name(name)).parameters
        assert set(re.findall(r"(\w+)=", arguments)) <= set(takes), f"{name}({arguments})"
    for path in re.findall(r"`((?:runtime|export|train|cli|benchmarks|tests|docs|cdiff)/[\w./]+)`", text):
        assert (REPOSITORY / path).exists(), path


def test_every_score_is_defined() -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    keys = [*scores.PER_SLICE, *scores.PER_LEVEL, scores.PER_THRESHOLD]
    keys += [*scores.PER_CASE, *scores.PER_CASE_LEVEL, scores.PER_CASE_THRESHOLD]
    assert [key for key in keys if f"`{key}`" not in page] == []
