"""The model repository for Triton: its configuration as Triton's schema reads it, and its model end to end with a stand-in server."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format
from typer.testing import CliRunner

import cdiff
from cdiff.cli.app import app
from cdiff.export.triton import write_repository
from cdiff.runtime.bundle import open_bundle
from cdiff.runtime.errors import CdiffError
from cdiff.runtime.results import entropy

STRING, INT32, INT64, BOOL, MESSAGE, ENUM = 9, 5, 3, 8, 11, 14


def model_config() -> Any:
    """The part of Triton's ModelConfig (its model_config.proto) that a Python backend's model uses; what is not in it is refused."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, bool] | tuple[str, int, int, bool, str]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind, many, *type_name in fields:
            of = {"type_name": f".inference.{type_name[0]}"} if type_name else {}
            made.field.add(name=field, number=number, type=kind, label=3 if many else 1, **of)  # type: ignore[arg-type]

    kinds = file.enum_type.add(name="DataType")
    integers = [f"{sign}INT{bits}" for sign in ("U", "") for bits in (8, 16, 32, 64)]
    names = ["INVALID", "BOOL", *integers, "FP16", "FP32", "FP64", "STRING"]
    for number, name in enumerate(names):
        kinds.value.add(name=f"TYPE_{name}", number=number)
    where = file.enum_type.add(name="Kind")
    for number, name in enumerate(("AUTO", "GPU", "CPU", "MODEL")):
        where.value.add(name=f"KIND_{name}", number=number)
    tensor = (("name", 1, STRING, False), ("data_type", 2, ENUM, False, "DataType"))
    message("ModelInput", *tensor, ("dims", 4, INT64, True), ("optional", 8, BOOL, False))
    message("ModelOutput", *tensor, ("dims", 3, INT64, True))
    message(
        "ModelInstanceGroup",
        ("name", 1, STRING, False),
        ("count", 2, INT32, False),
        ("gpus", 3, INT32, True),
        ("kind", 4, ENUM, False, "Kind"),
    )
    message("ModelParameter", ("string_value", 1, STRING, False))
    message(
        "ModelConfig", ("name", 1, STRING, False), ("max_batch_size", 4, INT32, False), ("input", 5, MESSAGE, True, "ModelInput"),
        ("output", 6, MESSAGE, True, "ModelOutput"), ("instance_group", 7, MESSAGE, True, "ModelInstanceGroup"),
        ("parameters", 14, MESSAGE, True, "ModelConfig.ParametersEntry"), ("backend", 17, STRING, False),
    )  # fmt: skip
    entry = file.message_type[-1].nested_type.add(name="ParametersEntry")
    entry.field.add(name="key", number=1, type=STRING, label=1)
    entry.field.add(name="value", number=2, type=MESSAGE, label=1, type_name=".inference.ModelParameter")
    entry.options.map_entry = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    return write_repository(open_bundle(tiny_bundle), folder, name="tiny", device="cpu")


def read_config(repository: Path) -> Any:
    return text_format.Parse((repository / "config.pbtxt").read_text(), model_config())


def test_the_configuration_is_tritons(repository: Path) -> None:
    found = read_config(repository)
    assert (found.name, found.backend, found.max_batch_size) == ("tiny", "python", 0)
    inputs = {item.name: (item.data_type, list(item.dims), item.optional) for item in found.input}
    assert inputs == {
        "image": (11, [1, -1, -1], False), "seed": (5, [1], True), "runs": (8, [1], True), "steps": (8, [1], True)
    }  # fmt: skip
    outputs = {item.name: (item.data_type, list(item.dims)) for item in found.output}
    assert outputs == {"soft": (11, [-1, -1]), "levels": (11, [3, -1, -1]), "uncertainty": (11, [2, -1, -1])}
    assert [(group.kind, group.count) for group in found.instance_group] == [(2, 1)]
    assert {"engine", "sampler", "fast", "batch"} == set(found.parameters)


def test_the_check_itself_refuses_what_triton_would(repository: Path) -> None:
    text = (repository / "config.pbtxt").read_text()
    for wrong in (text + 'shape: "none"\n', text.replace("TYPE_FP32", "FP32"), text.replace("dims:", "dim:")):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(wrong, model_config())


def test_a_repository_for_gpus(tiny_bundle: Path, tmp_path: Path) -> None:
    model = write_repository(open_bundle(tiny_bundle), tmp_path, name="a", engine="tensorrt", instances=2)
    found = read_config(model)
    assert [(group.kind, group.count) for group in found.instance_group] == [(1, 2)]
    assert found.parameters["engine"].string_value == "tensorrt"
    assert open_bundle(model / "1" / "bundle").manifest == open_bundle(tiny_bundle).manifest


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "a/b"}, "must be letters"),
        ({"engine": "fast"}, "not known"),
        ({"device": "tpu"}, "cuda or cpu"),
        ({"instances": 0}, "at least one"),
    ],
    ids=["name", "engine", "device", "instances"],
)
def test_bad_arguments_leave_nothing(tiny_bundle: Path, tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(CdiffError, match=said):
        write_repository(open_bundle(tiny_bundle), tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_an_older_model_stays_unless_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    write_repository(bundle, tmp_path, name="a")
    with pytest.raises(CdiffError, match="already exists"):
        write_repository(bundle, tmp_path, name="a", instances=2)
    write_repository(bundle, tmp_path, name="a", instances=2, replace=True)
    assert read_config(tmp_path / "a").instance_group[0].count == 2


class Tensor:
    """What triton_python_backend_utils.Tensor does for a model."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values

    @classmethod
    def from_dlpack(cls, name: str, tensor: Tensor) -> Tensor:
        return cls(name, tensor.as_numpy())


class MisreadTensor(Tensor):
    """What a backend built with pybind11 before 2.12 makes of NumPy 2's arrays: every item at the first one's place."""

    @classmethod
    def from_dlpack(cls, name: str, tensor: Tensor) -> Tensor:
        return cls(name, np.zeros_like(tensor.as_numpy()))


class TritonError:
    INVALID_ARG = 3

    def __init__(self, message: str, code: int) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


def stand_in() -> ModuleType:
    """A triton_python_backend_utils with the functions and classes that its documentation has and a model here uses."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor = Tensor
    module.TritonError = TritonError

    def response(output_tensors: list[Tensor], error: Any = None) -> Any:
        return SimpleNamespace(output_tensors=lambda: output_tensors, error=error)

    def find(request: dict[str, np.ndarray], name: str) -> Tensor | None:
        return Tensor(name, request[name]) if name in request else None

    module.InferenceResponse, module.get_input_tensor_by_name = response, find
    return module


@pytest.fixture
def served(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The repository's own model.py, loaded and initialised as the server does."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in())
    spec = importlib.util.spec_from_file_location("model", repository / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({
        "model_config": json_format.MessageToJson(read_config(repository), preserving_proto_field_name=True),
        "model_instance_kind": "CPU", "model_instance_device_id": "0", "model_repository": str(repository),
        "model_version": "1", "model_name": "tiny", "model_instance_name": "tiny_0",
    })  # fmt: skip
    return model


def test_a_request_is_a_slice(served: Any, tiny_bundle: Path) -> None:
    image = np.random.default_rng(3).uniform(0, 200, (1, 40, 30)).astype(np.float32)
    request = {
        "image": image,
        "seed": np.array([2**64 - 1], np.uint64),
        "runs": np.array([2], np.int32),
        "steps": np.array([5], np.int32),
    }
    (response,) = served.execute([request])
    assert response.error is None
    found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    expected = cdiff.load(tiny_bundle).segment(image[0], runs=2, steps=5, seed=2**64 - 1)
    np.testing.assert_array_equal(found["soft"], expected.soft)
    np.testing.assert_array_equal(found["levels"], np.moveaxis(expected.levels, -1, 0))
    np.testing.assert_array_equal(found["uncertainty"][0], entropy(expected.soft))
    assert all(values.dtype == np.float32 for values in found.values())


def test_one_bad_request_costs_no_other(served: Any) -> None:
    good = {
        "image": np.zeros((1, 32, 32), np.float32),
        "runs": np.array([1], np.int32),
        "steps": np.array([1], np.int32),
    }
    bad = [
        {},
        {"image": np.zeros((3, 32, 32), np.float32)},
        {**good, "image": np.full((1, 32, 32), np.nan, np.float32)},
        {**good, "runs": np.array([0], np.int32)},
        {**good, "seed": np.array([1, 2], np.uint64)},
    ]
    responses = served.execute([*bad, good])
    said = [response.error.message() for response in responses[:-1]]
    for message, words in zip(
        said, ("no input 'image'", r"takes \[1, H, W\]", "NaN", "runs 0", "2 values"), strict=True
    ):
        assert re.search(words, message), message
    assert {response.error.code() for response in responses[:-1]} == {TritonError.INVALID_ARG}, "the client's fault"
    assert responses[-1].error is None
    served.finalize()
    assert not hasattr(served, "segmenter")


def test_a_server_that_misreads_arrays_loads_no_model(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["triton_python_backend_utils"], "Tensor", MisreadTensor)
    with pytest.raises(CdiffError, match=r"built for NumPy 1 .* use Triton Inference Server 24.11 or newer"):
        served.initialize({})


def test_a_gpu_instance_asks_for_its_own_gpu(served: Any, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("cdiff.runtime.serving.Segmenter.open", lambda *arguments: asked.append(arguments))
    served.initialize({
        "model_config": json.dumps({"parameters": {"engine": {"string_value": "tensorrt"}}}), "model_instance_kind": "GPU",
        "model_instance_device_id": "3", "model_repository": str(repository), "model_version": "1",
    })  # fmt: skip
    assert asked == [(repository / "1" / "bundle", "tensorrt", "cuda:3")]


def test_export_writes_it_beside_the_bundle(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdiff.export.exporter.export_run", lambda *_, **__: open_bundle(tiny_bundle))
    command = ["export", str(tiny_run), "--out", str(tmp_path / "bundle"), "--triton", str(tmp_path / "models"), "-q"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (model,) = (tmp_path / "models").iterdir()
    assert read_config(model).name == model.name
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2, "an older model is not overwritten in silence"
