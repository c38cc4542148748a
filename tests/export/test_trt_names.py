"""Every TensorRT name, enumeration member and number of arguments that the code uses, against the real bindings."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cdiff.export.tensorrt import HARDWARE, BuildOptions
from tests.conftest import REPOSITORY
from tests.export.trt_double import ENUMS, SAME_IN_ALL
from tests.export.trt_names import CHECK, Used, install_bindings, stub_libraries, used_by

SOURCES = [*sorted((REPOSITORY / "export").glob("*.py")), *sorted((REPOSITORY / "runtime/engines").glob("*.py"))]
RTX_ONLY = {
    ("IBuilderConfig", "set_compute_capability"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("names", "ComputeCapability"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeCache", "deserialize"),
    ("IRuntimeCache", "serialize"),
}
FLAGS = BuildOptions(refit=True, version_compatible=True).flags


def asked(rtx: bool) -> dict[str, Any]:
    """What the sources use of one flavour, and what they reach by a name in a string."""
    used = Used()
    for path in SOURCES:
        found = used_by(path)
        used.names |= found.names
        used.members |= found.members
        used.calls |= found.calls
    names = {name.removesuffix(".__members__") for name in used.names}
    names |= {f"{owner}.{name}" for owner, name in used.members if rtx or (owner, name) not in RTX_ONLY}
    names |= {f"BuilderFlag.{name}" for name in ("STRICT_NANS", *FLAGS)}
    names |= {f"HardwareCompatibilityLevel.{name}" for name in HARDWARE.values()}
    names |= {f"LayerType.{name}" for name in ("CONVOLUTION", "MATRIX_MULTIPLY", "EINSUM")}
    if not rtx:
        names -= {name for owner, name in RTX_ONLY if owner == "names"}
    calls = [call for call in used.calls if rtx or call[:2] not in RTX_ONLY]
    return {
        "names": sorted(names),
        "calls": sorted(calls),
        "enums": [*SAME_IN_ALL, "ComputeCapability", *ENUMS["1.7.1.116"]],
    }


def check(module: str, question: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, module],
        input=json.dumps(question),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def agrees_with_its_double(answer: dict[str, Any], version: str) -> bool:
    assert answer["version"] == version
    expected = {name: sorted(members.split()) for name, members in {**SAME_IN_ALL, **ENUMS[version]}.items()}
    assert answer["enums"] == expected
    return True


@pytest.mark.slow
@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_names_of_tensorrt(version: str, tmp_path: Path) -> None:
    bindings, libraries = tmp_path / "bindings", tmp_path / "libraries"
    if reason := stub_libraries(libraries, int(version.split(".")[0])):
        pytest.skip(reason)
    if reason := install_bindings(bindings, version):
        pytest.skip(f"TensorRT {version}'s bindings cannot be installed here: {reason}")
    environment = {"PYTHONPATH": str(bindings), "LD_LIBRARY_PATH": str(libraries)}
    answer = check("tensorrt_bindings", asked(rtx=False), environment)
    assert answer["missing"] == []
    assert agrees_with_its_double(answer, version)

    # What a version does not have is found out: the names of weak typing in 11, of TensorRT for RTX in both.
    probe = {
        "names": ["BuilderFlag.FP16", "ComputeCapability.SM89"],
        "calls": [["Builder", "create_network", 2]],
        "enums": [],
    }
    lacking = check("tensorrt_bindings", probe, environment)["missing"]
    assert ("BuilderFlag.FP16" in lacking) == version.startswith("11.")
    assert "ComputeCapability.SM89" in lacking
    assert any(item.startswith("Builder.create_network with 2 arguments") for item in lacking)


def test_names_of_tensorrt_for_rtx() -> None:
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install '.[rtx]' in cdiff's clone")
    answer = check("tensorrt_rtx_bindings", asked(rtx=True), {})
    assert answer["missing"] == []
    if answer["version"] in ENUMS:
        assert agrees_with_its_double(answer, answer["version"])


def test_the_check_sees_what_the_code_uses() -> None:
    question = asked(rtx=True)
    for name in (
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "IBuilderConfig.progress_monitor",
        "OnnxParser.num_errors",
    ):
        assert name in question["names"]
    assert ("IBuilderConfig", "set_timing_cache", 2) in question["calls"]
    assert ("IRuntimeCache", "deserialize", 1) in question["calls"]
    assert "Runtime.engine_host_code_allowed" in question["names"]
